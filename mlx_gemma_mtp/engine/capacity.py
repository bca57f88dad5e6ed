"""How many slots the full layers' slabs have, and when they grow.

Where the capacity changes a kernel's bytes, growth must come at positions that do not
depend on the number of drafts: a token's logits are then computed over the same slots
with drafting and without. Knows nothing of arrays.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from ..cache.slabs import SlabLayout, next_capacity, stepped_capacity
from ..constants import MAX_DRAFT_TOKENS
from .sequence import Row

# Slabs for a request are reserved up to this many tokens ahead, so that an ordinary
# one never grows; a longer one grows as it goes.
RESERVED_TOKENS = 1024

_BLOCK = MAX_DRAFT_TOKENS + 1
_LONGEST = 2**31  # positions are int32


class Room:
    """The room of a batch's rows.

    Args:
        rows: The rows; their offsets are read, as of the last report.
        is_fixed: Whether growth comes at positions that do not depend on the number
            of drafts.
        is_open: Whether rows come and go; there are fewer capacities then.

    Attributes:
        rows: The rows; whoever lets rows join and leave exchanges them.
    """

    def __init__(
        self, rows: Sequence[Row], *, is_fixed: bool, is_open: bool = False
    ) -> None:
        self.rows = rows
        self._is_open = is_open
        # Rows of a batch share the capacity, and one row's growth must not depend on
        # how far another one has come: there everything is reserved.
        self._is_all_reserved = is_fixed and len(rows) > 1
        self._is_fixed = is_fixed and len(rows) == 1

    def initial_capacity(self) -> int:
        """Slots for the longest row: its tokens, those to come, rounds in flight."""
        # The same for every K: unfused attention may round by the capacity.
        needed = 0
        for row in self.rows:
            left, ahead = row.num_left, RESERVED_TOKENS
            if left is not None:
                ahead = left if self._is_all_reserved else min(left, ahead)
            needed = max(needed, row.offset + ahead + 2 * _BLOCK)
        return stepped_capacity(needed) if self._is_open else next_capacity(needed)

    def grown(self, capacity: int) -> int:
        """The next capacity."""
        if self._is_open:
            return stepped_capacity(capacity + 1)
        return next_capacity(capacity + 1, capacity)

    def is_known(self, capacity: int, in_flight: Collection[int]) -> bool:
        """Whether the next round's room does not hang on reports still in flight.

        Args:
            capacity: Slots now.
            in_flight: Drafts of each round in flight.
        """
        is_near = self._latest(in_flight) + _BLOCK > self._limit(capacity)
        return not (self._is_fixed and in_flight and is_near)

    def must_grow(self, capacity: int, in_flight: Collection[int]) -> bool:
        """Whether the slabs must grow before the next round.

        Args:
            capacity: Slots now.
            in_flight: Drafts of each round in flight.
        """
        latest = self._latest(in_flight)
        if self._is_fixed:
            return latest >= self._limit(capacity)
        return latest + _BLOCK > capacity

    def allowed(self, drafts: Collection[int], capacity: int) -> Collection[int]:
        """The numbers of drafts that do not reach over the place of a growth.

        Args:
            drafts: The numbers to choose from, 0 among them.
            capacity: Slots now, grown where they had to.
        """
        room = self._limit(capacity) - self._latest(())
        if not self._is_fixed or room >= _BLOCK:
            return drafts
        return tuple(k for k in drafts if k < max(room, 1))

    def _latest(self, in_flight: Collection[int]) -> int:
        """The furthest that the next round may start."""
        # A row that has ended goes on beyond its end; what it writes is never seen.
        offsets = [row.offset for row in self.rows if row.is_live]
        return max(offsets, default=0) + sum(k + 1 for k in in_flight)

    def _limit(self, capacity: int) -> int:
        """The first position whose query sees the next capacity."""
        return capacity - _BLOCK


def most_slots(rows: Sequence[Row]) -> int | None:
    """Most slots that rows that come and go can need; None where one has no limit."""
    ends = [row.last_position for row in rows]
    limits = [end for end in ends if end is not None]
    if len(limits) < len(ends):
        return None
    return slots_for(max(limits, default=0))


def slots_for(num_tokens: int) -> int:
    """Slots that a row of so many tokens can need where rows come and go."""
    return stepped_capacity(num_tokens + 2 * _BLOCK)


def longest_text(layout: SlabLayout, max_kv_bytes: int) -> int:
    """Most tokens that one row may have where slabs may take so much memory."""
    capacity, larger = 0, stepped_capacity(1)
    while layout.num_bytes(1, larger) <= max_kv_bytes and larger < _LONGEST:
        capacity, larger = larger, stepped_capacity(larger + 1)
    return max(capacity - 2 * _BLOCK, 0)
