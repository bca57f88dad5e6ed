"""How many drafts the next round has: a fixed number, or a controller's choice.

Numbers in, numbers out; the controller itself is in controller.py.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

from ..constants import DRAFTER, LOOKUP
from .controller import DraftLengthController

# Seconds to trace a round, until some were traced: a guess that keeps short texts from
# paying for many numbers of drafts.
_SETUP_S = 0.2


class Way(NamedTuple):
    """How a round drafts.

    Attributes:
        num_draft_tokens: K.
        source: Where drafts come from, ``"drafter"`` or ``"lookup"``; a round without
            drafts is one of the drafter's.
    """

    num_draft_tokens: int
    source: str = DRAFTER


def ways(numbers: Iterable[int], sources: Collection[str]) -> list[Way]:
    """The ways of numbers of drafts and of sources; plain rounds are always there."""
    counts = list(numbers)
    plain = [Way(0)] if 0 in counts else []
    return [*plain, *(Way(k, source) for source in sources for k in counts if k)]


@dataclass(frozen=True)
class Learning:
    """What all policies of a pair learn together.

    Attributes:
        controller: The controller for so many sequences, a rule that judges their
            drafts, in words, and so many tokens of the longest one.
        setups: What it took to trace the last rounds, seconds; appended to.
        lock: Held while a controller is asked or told something.
        keep: Keeps what was learnt, called at the end.
    """

    controller: Callable[[int, str, int], DraftLengthController]
    setups: deque[float]
    lock: AbstractContextManager[object]
    keep: Callable[[], None]


class DraftPolicy:
    """Chooses the number of drafts of every round.

    Args:
        num_draft_tokens: The number for every round, or the next smaller that is
            allowed; None for a controller's choice.
        learning: Learns from the rounds, also where their number is fixed; None for
            nobody who learns.

    Attributes:
        num_shadow_drafts: Drafts to make beside the round last chosen, a plain one;
            mostly 0.
    """

    def __init__(
        self, num_draft_tokens: int | None, *, learning: Learning | None = None
    ) -> None:
        assert num_draft_tokens is not None or learning is not None
        self.num_shadow_drafts = 0
        self._fixed = num_draft_tokens
        self._learning = learning
        self._controller: DraftLengthController | None = None
        self._kinds: dict[tuple[int, str], DraftPolicy] = {}

    def for_batch(self, num_seats: int, *, rule: str, context: int) -> DraftPolicy:
        """Who chooses for a batch of a kind: always the same for the same kind.

        Args:
            num_seats: Sequences that a round computes.
            rule: The rules that judge their drafts, in words.
            context: Tokens of the longest sequence, for what to expect at first.
        """
        if self._learning is None:
            return self
        kind = (num_seats, rule)
        if kind not in self._kinds:
            policy = DraftPolicy(self._fixed, learning=self._learning)
            policy._controller = self._learning.controller(num_seats, rule, context)
            with self._learning.lock:
                policy._controller.start()
            self._kinds[kind] = policy
        return self._kinds[kind]

    def choose(
        self,
        allowed: Collection[int],
        *,
        not_ready: Collection[Way],
        tokens_left: int | None,
        sources: Sequence[str] = (DRAFTER,),
        matches: Sequence[int] = (),
        tokens_to_growth: int | None = None,
        can_shadow: bool = False,
        context: int = 0,
    ) -> Way:
        """How the next round drafts.

        Args:
            allowed: The numbers of drafts to choose from, 0 among them.
            not_ready: The ways of which no round was traced before.
            tokens_left: Most tokens that any sequence still wants; None for no limit.
            sources: Where drafts may come from; ``()`` for plain rounds alone.
            matches: Of each live sequence, see ``LookupModel.expected_tokens``; where
                drafts may come from the text.
            tokens_to_growth: Tokens until rounds of another size are needed; None for
                never.
            can_shadow: Whether drafts may be made beside the round to learn from.
            context: Tokens of the longest sequence.
        """
        if not sources:
            allowed = (0,)
        if self._fixed is not None:
            allowed = [max(k for k in allowed if k <= self._fixed)]
            if len(sources) < 2 or self._controller is None:
                (count,) = allowed
                return Way(count, sources[0]) if count else Way(0)
        assert self._learning is not None
        assert self._controller is not None  # see for_batch
        with self._learning.lock:
            setup_s = self._setups(not_ready, DRAFTER)
            drafted = allowed if DRAFTER in sources else [k for k in allowed if not k]
            if LOOKUP in sources:
                count = self._controller.choose_lookup(
                    matches,
                    allowed=allowed,
                    drafter_allowed=drafted,
                    setup_s=self._setups(not_ready, LOOKUP),
                    drafter_setup_s=setup_s,
                    tokens_left=tokens_left,
                    tokens_to_growth=tokens_to_growth,
                    context=context,
                )
                if count:
                    self.num_shadow_drafts = 0
                    return Way(count, LOOKUP)
            if self._fixed is not None:
                return Way(max(allowed))
            count = self._controller.choose(
                allowed=drafted,
                setup_s=setup_s,
                tokens_left=tokens_left,
                can_shadow=can_shadow,
                context=context,
            )
            self.num_shadow_drafts = self._controller.num_shadow_drafts
        return Way(count)

    def observe(
        self,
        way: Way,
        accepted: Sequence[int],
        seconds: float | None,
        *,
        matches: Sequence[int] = (),
        num_shadow_drafts: int = 0,
        context: int = 0,
    ) -> None:
        """Learn from a round.

        Args:
            way: How it drafted.
            accepted: How many drafts each live sequence accepted.
            seconds: Its time; None where it says nothing.
            matches: Of each of these sequences, see ``choose``.
            num_shadow_drafts: Drafts that were made beside it.
            context: Tokens of the longest sequence, when it was chosen.
        """
        if self._learning is None or self._controller is None:
            return
        with self._learning.lock:
            if way.source == LOOKUP:
                self._controller.observe_lookup(
                    way.num_draft_tokens, seconds, context=context
                )
                return
            self._controller.observe(
                way.num_draft_tokens,
                accepted,
                seconds,
                matches=matches,
                num_shadow_drafts=num_shadow_drafts,
                context=context,
            )

    def observe_shadow(self, num_draft_tokens: int, accepted: Sequence[int]) -> None:
        """Learn from drafts that were made beside a round.

        Args:
            num_draft_tokens: How many.
            accepted: How many of them are the tokens that came, of each sequence.
        """
        if self._learning is None or self._controller is None:
            return
        with self._learning.lock:
            self._controller.observe_shadow(num_draft_tokens, accepted)

    def observe_match(self, length: int, num_same: int) -> None:
        """Learn from what was looked up; see ``LookupModel.observe``."""
        if self._learning is None or self._controller is None:
            return
        with self._learning.lock:
            self._controller.lookup.observe(length, num_same)

    def observe_setup(self, seconds: float) -> None:
        """Learn what it took to trace a round."""
        if self._learning is not None:
            with self._learning.lock:
                self._learning.setups.append(seconds)

    def finish(self) -> None:
        """The requests have ended: what was learnt may be kept."""
        if self._learning is not None:
            self._learning.keep()

    def _setups(self, not_ready: Collection[Way], source: str) -> dict[int, float]:
        """What tracing rounds of a source is expected to take, by K."""
        counts = [way.num_draft_tokens for way in not_ready if way.source == source]
        return dict.fromkeys(counts, self._setup_s) if counts else {}

    @property
    def _setup_s(self) -> float:
        """What tracing a round is expected to take, seconds."""
        assert self._learning is not None
        # The first round of a process also builds what all rounds need.
        setups = self._learning.setups
        return median(setups) if len(setups) > 1 else _SETUP_S
