"""How many seats and slots a batch has, and when its slabs grow.

What differs between a batch that is there from the start and one that sequences join
and leave is a policy. Where the capacity changes a kernel's bytes, growth must come at
positions that do not depend on the number of drafts: a token's logits are then computed
over the same slots with drafting and without. Knows nothing of arrays.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from ..cache.slabs import SlabLayout, next_capacity, slots_ahead, stepped_capacity
from ..constants import MAX_DRAFT_TOKENS
from .sequence import TokenSequence

DEFAULT_MAX_ROWS = 32

_BLOCK = MAX_DRAFT_TOKENS + 1
_LONGEST = 2**31  # positions are int32
# Few numbers of seats, so that few rounds are traced; beyond them multiples of 8.
_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)


@dataclass(frozen=True)
class OpenBatch:
    """Sequences join and leave; seats and slots follow them, in few steps.

    Attributes:
        max_sequences: Most sequences that are decoded together; others wait.
        max_kv_bytes: Most memory of the slabs; None for no limit. A sequence is let in
            only where all fit at their longest, so none is ever sent away.
    """

    max_sequences: int | None = DEFAULT_MAX_ROWS
    max_kv_bytes: int | None = None
    # Seats are given up and taken again: whoever has ended may lose its caches.
    may_shrink = True
    grows_at_fixed_places = False
    reserves_all = False

    def seats(self, num_sequences: int) -> int:
        """The number of seats for so many sequences."""
        return seats_for(num_sequences)

    def capacity(self, needed: int, capacity: int = 0) -> int:
        """A number of slots that is enough, of the few that are used.

        Args:
            needed: Slots that are needed.
            capacity: Slots so far; 0 for none.
        """
        return stepped_capacity(needed)


@dataclass(frozen=True)
class ClosedBatch:
    """All sequences are there from the start; each has a seat of its own to the end.

    One sequence grows at fixed places. Several share the capacity, and the growth of
    one must not depend on how far another has come: there everything is reserved.

    Attributes:
        num_sequences: How many.
    """

    num_sequences: int
    max_sequences = None
    max_kv_bytes = None
    # Whoever has ended keeps its seat, and so its caches.
    may_shrink = False

    @property
    def grows_at_fixed_places(self) -> bool:
        """Whether growth comes at positions that do not depend on drafts."""
        return self.num_sequences == 1

    @property
    def reserves_all(self) -> bool:
        """Whether all tokens that may come have slots from the start."""
        return self.num_sequences > 1

    def seats(self, num_sequences: int) -> int:
        """The number of seats: it never changes."""
        return self.num_sequences

    def capacity(self, needed: int, capacity: int = 0) -> int:
        """A number of slots that is enough; see ``OpenBatch``."""
        return next_capacity(needed, capacity)


BatchPolicy = OpenBatch | ClosedBatch


def seats_for(num_rows: int) -> int:
    """The number of seats for so many sequences that join and leave."""
    return next((s for s in _SIZES if s >= num_rows), -(-num_rows // 8) * 8)


class Capacity:
    """How many slots the full layers' slabs of a batch must have.

    Args:
        policy: What grows, and how.
        sequences: The sequences; their offsets are read, as of the last report.

    Attributes:
        sequences: The sequences; whoever lets some join and leave exchanges them.
    """

    def __init__(
        self, policy: BatchPolicy, sequences: Sequence[TokenSequence] = ()
    ) -> None:
        self.sequences = sequences
        self._policy = policy

    def initial(self) -> int:
        """Slots for the longest: its tokens, those to come, rounds in flight."""
        # The same for every K: unfused attention may round by the capacity.
        needed = 0
        for sequence in self.sequences:
            left, ahead = sequence.num_left, slots_ahead()
            if left is not None:
                ahead = left if self._policy.reserves_all else min(left, ahead)
            needed = max(needed, sequence.offset + ahead + 2 * _BLOCK)
        return self._policy.capacity(needed)

    def grown(self, num_slots: int) -> int:
        """The next number of slots."""
        return self._policy.capacity(num_slots + 1, num_slots)

    def is_known(self, num_slots: int, in_flight: Collection[int]) -> bool:
        """Whether what the next round needs does not hang on reports still in flight.

        Args:
            num_slots: Slots now.
            in_flight: Drafts of each round in flight.
        """
        is_near = self._latest(in_flight) + _BLOCK > self._limit(num_slots)
        return not (self._policy.grows_at_fixed_places and in_flight and is_near)

    def must_grow(self, num_slots: int, in_flight: Collection[int]) -> bool:
        """Whether the slabs must grow before the next round.

        Args:
            num_slots: Slots now.
            in_flight: Drafts of each round in flight.
        """
        latest = self._latest(in_flight)
        if self._policy.grows_at_fixed_places:
            return latest >= self._limit(num_slots)
        return latest + _BLOCK > num_slots

    def allowed(self, drafts: Collection[int], num_slots: int) -> Collection[int]:
        """The numbers of drafts that do not reach over the place of a growth.

        Args:
            drafts: The numbers to choose from, 0 among them.
            num_slots: Slots now, grown where they had to.
        """
        left = self.room(num_slots)
        if not self._policy.grows_at_fixed_places or left >= _BLOCK:
            return drafts
        return tuple(k for k in drafts if k < max(left, 1))

    def room(self, num_slots: int) -> int:
        """Tokens until the slabs grow; below 1 where they are about to."""
        return self._limit(num_slots) - self._latest(())

    def _latest(self, in_flight: Collection[int]) -> int:
        """The furthest that the next round may start."""
        # One that has ended goes on beyond its end; what it writes is never seen.
        offsets = [s.offset for s in self.sequences if s.is_live]
        return max(offsets, default=0) + sum(k + 1 for k in in_flight)

    def _limit(self, num_slots: int) -> int:
        """The first position whose query sees the next number of slots."""
        return num_slots - _BLOCK


def most_slots(sequences: Sequence[TokenSequence]) -> int | None:
    """Most slots that joining sequences can need; None where one has no limit."""
    ends = [sequence.last_position for sequence in sequences]
    limits = [end for end in ends if end is not None]
    if len(limits) < len(ends):
        return None
    return slots_for(max(limits, default=0))


def slots_for(num_tokens: int) -> int:
    """Slots that a sequence of so many tokens can need where others join and leave."""
    return stepped_capacity(num_tokens + 2 * _BLOCK)


def longest_text(layout: SlabLayout, max_kv_bytes: int) -> int:
    """Most tokens that one sequence may have where slabs may take so much memory."""
    capacity, larger = 0, stepped_capacity(1)
    while layout.num_bytes(1, larger) <= max_kv_bytes and larger < _LONGEST:
        capacity, larger = larger, stepped_capacity(larger + 1)
    return max(capacity - 2 * _BLOCK, 0)
