"""What the ranks of a target on several machines agree on, round by round.

Every rank builds the same rounds from the same tokens. What else a round hangs on, such
as clocks and what was learnt, is rank 0's: its number of drafts, its drafts, what was
decided, and when it leaves. Sums carry no names: ranks whose rounds differ would add up
garbage, and nobody would say so. So what one rank alone knows reaches the others before
it counts: a word rides on every round and is read with its report, and what it says
holds for the next round but one, as one round is queued ahead.

With it every rank sends a digest of its round and of all tokens before. They differ
where ranks are out of step.

Knows nothing of models.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Collection, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import cast

import mlx.core as mx

from ..constants import DRAFTER, LOOKUP
from ..distributed.patience import FIRST_S
from ..distributed.ranks import Ranks
from ..distributed.watchdog import LIMIT_S
from ..drafting.policy import Way
from ..errors import RanksError
from ..sampling.acceptance import Accepted

_SOURCES = (DRAFTER, LOOKUP)
_LENGTH = 5  # of the word, without digests
_AHEAD = 2  # rounds until a word holds


@dataclass(frozen=True)
class Agreement:
    """The device's side: sums of what only rank 0 does not leave zero.

    Attributes:
        group: Adds up; ``mx.distributed``'s.
        word: Of this rank, int32 [5 + ranks]. The first number is 1 on rank 0, 0 on the
            others.
    """

    group: mx.distributed.Group
    word: mx.array

    def first(self, x: mx.array) -> mx.array:
        """Rank 0's x, of its shape: int32."""
        own = x.astype(mx.int32) * self.word[0]
        return mx.distributed.all_sum(own, group=self.group)

    def decided(self, accepted: Accepted) -> tuple[Accepted, mx.array]:
        """What rank 0 has decided, and the word of all ranks, in one sum."""
        num_rows = accepted.num_accepted.shape[0]
        own = mx.concatenate([accepted.num_accepted, accepted.next_token[:, 0]])
        own = mx.concatenate([own.astype(mx.int32) * self.word[0], self.word])
        found = mx.distributed.all_sum(own, group=self.group)
        counts, tokens = found[:num_rows], found[num_rows : 2 * num_rows]
        agreed = replace(accepted, num_accepted=counts, next_token=tokens[:, None])
        return agreed, found[2 * num_rows :]


class Control:
    """The host's side, of one decoder; by itself that of a machine that is alone.

    Attributes:
        is_leaving: Whether this rank asks all to build no more rounds than they must;
            only rank 0's word counts.
        is_alone: Whether nobody must agree: what is built need not be run.
    """

    is_leaving = False
    is_alone = True

    @property
    def may_build(self) -> bool:
        """Whether there is another round."""
        return True

    @property
    def is_over(self) -> bool:
        """Whether rank 0 has left and all rounds were read."""
        return False

    @property
    def is_lost(self) -> bool:
        """Whether the ranks have lost each other."""
        return False

    def agreed(self, way: Way, allowed: Collection[int]) -> Way:
        """How the next round drafts.

        Args:
            way: What the first two rounds shall do; rank 0's counts.
            allowed: The numbers of drafts that it may have, 0 among them.
        """
        return way

    def word(self, way: Way, *shape: int) -> mx.array | None:
        """This rank's word for the round that is built; rounds are counted by it.

        Args:
            way: How the round behind the next one shall draft.
            shape: What all ranks' rounds must have in common.
        """
        return None

    def are_traced(self, shape: Hashable, *, is_traced: bool) -> bool:
        """Whether rounds like the one of the last word have run before, on all ranks.

        Args:
            shape: Of this one.
            is_traced: Whether they have on this one.
        """
        return is_traced

    def meet(self) -> None:
        """Wait for all ranks before the first round of a shape that some have traced.

        Each of them traces it in its own time; a GPU must not wait for that inside a
        round.
        """

    def waiting(self) -> AbstractContextManager[None]:
        """What is done inside needs the other ranks: it waits for rounds in flight.

        Raises:
            RanksError: They were lost.
        """
        return nullcontext()

    def reading(self) -> AbstractContextManager[None]:
        """The same where it waits for the oldest round in flight alone.

        Raises:
            RanksError: They were lost.
        """
        return nullcontext()

    def read(self, word: mx.array | None, tokens: Sequence[Sequence[int]]) -> None:
        """Follow what a round brought.

        Args:
            word: Of all ranks; None of one.
            tokens: The round's, of each seat.

        Raises:
            RanksError: The ranks are out of step.
        """


class RanksControl(Control):
    """The host's side of one decoder among several.

    Args:
        ranks: All machines.
    """

    is_alone = False

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._ways: deque[Way] = deque()
        self._num_built = 0
        self._num_read = 0
        self._last: int | None = None
        self._digest = 0
        self._met: set[Hashable] = set()
        self._traced: set[int] = set()  # rounds in flight that some had to trace

    @property
    def may_build(self) -> bool:
        """See ``Control``."""
        return self._last is None or self._num_built <= self._last

    @property
    def is_over(self) -> bool:
        """See ``Control``."""
        return not self.may_build and self._num_read == self._num_built

    @property
    def is_lost(self) -> bool:
        """See ``Control``."""
        return self._ranks.is_lost

    def agreed(self, way: Way, allowed: Collection[int]) -> Way:
        """See ``Control``."""
        if not self._num_built:
            count, source = self._ranks.share(list(way))
            self._ways.extend([Way(count, source)] * _AHEAD)
        due = self._ways.popleft()
        count = max(k for k in allowed if k <= due.num_draft_tokens)
        return Way(count, due.source) if count else Way(0)

    def word(self, way: Way, *shape: int) -> mx.array:
        """See ``Control``."""
        number, self._num_built = self._num_built, self._num_built + 1
        self._digest = zlib.crc32(repr((number, shape)).encode(), self._digest)
        word = [0] * (_LENGTH + self._ranks.size)
        if self._ranks.is_first:
            source = _SOURCES.index(way.source)
            leaves = int(self.is_leaving)
            word[:_LENGTH] = [1, number, way.num_draft_tokens, source, leaves]
            if self.is_leaving and self._last is None:
                self._last = number + _AHEAD - 1
        word[_LENGTH + self._ranks.rank] = self._digest & 0x7FFFFFFF
        return mx.array(word, dtype=mx.int32)

    def are_traced(self, shape: Hashable, *, is_traced: bool) -> bool:
        """See ``Control``.

        Ranks ask each other once in a text: each forgets what it has traced by itself.
        """
        are_traced = shape in self._met or self._ranks.all_say(is_traced, self._limit_s)
        self._met.add(shape)
        if not are_traced:
            self._traced.add(self._num_built - 1)
        return are_traced

    def meet(self) -> None:
        """See ``Control``."""
        self._ranks.barrier(FIRST_S)

    def waiting(self) -> AbstractContextManager[None]:
        """See ``Control``."""
        return self._exchange(self._limit_s)

    def reading(self) -> AbstractContextManager[None]:
        """See ``Control``.

        The sums of a round are under way before the next one is traced or compiled.
        """
        return self._exchange(FIRST_S if self._num_read in self._traced else LIMIT_S)

    def _exchange(self, limit_s: float) -> AbstractContextManager[None]:
        self._ranks.check()  # what is in flight of lost ones never ends
        return self._ranks.exchange(f"round {self._num_read}", limit_s)

    @property
    def _limit_s(self) -> float:
        """Seconds that a rank may be silent now: it may compile what is in flight."""
        return FIRST_S if self._traced else LIMIT_S

    def read(self, word: mx.array | None, tokens: Sequence[Sequence[int]]) -> None:
        """See ``Control``."""
        assert word is not None
        number, self._num_read = self._num_read, self._num_read + 1
        self._traced.discard(number)
        found = cast(list[int], word.tolist())
        first, counted, count, source, leaves = found[:_LENGTH]
        if first != 1 or counted != number or len(set(found[_LENGTH:])) > 1:
            self._ranks.is_lost = True
            raise RanksError(
                f"all ranks must run the same rounds: got another round {number} on "
                f"rank {self._ranks.rank}. Run one script, of one version, on all."
            )
        self._digest = zlib.crc32(repr(tokens).encode(), self._digest)
        self._ways.append(Way(count, _SOURCES[source]))
        if leaves and self._last is None:
            self._last = number + _AHEAD - 1
