"""How many drafts the next round has: a fixed number, or a controller's choice.

Numbers in, numbers out; the controller itself is in control.py.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from statistics import median
from typing import Protocol

from .controller import DraftLengthController

# Seconds to trace a round, until some were traced: a guess that keeps short texts from
# paying for many numbers of drafts.
_SETUP_S = 0.2


class DraftLength(Protocol):
    """What a decoder asks for each round."""

    @property
    def num_shadow_drafts(self) -> int:
        """Drafts to make beside the round last chosen, a plain one; mostly 0."""

    def choose(
        self,
        allowed: Collection[int],
        *,
        not_ready: Collection[int],
        tokens_left: int | None,
        can_shadow: bool = False,
    ) -> int:
        """The number of drafts of the next round.

        Args:
            allowed: The numbers to choose from, 0 among them.
            not_ready: Those of which no round was traced before.
            tokens_left: Most tokens that any row still wants; None for no limit.
            can_shadow: Whether drafts may be made beside the round to learn from.
        """

    def observe(
        self,
        num_draft_tokens: int,
        accepted: Sequence[int],
        seconds: float | None,
        *,
        num_shadow_drafts: int = 0,
    ) -> None:
        """Learn from a round.

        Args:
            num_draft_tokens: Its drafts.
            accepted: How many of them each live row accepted.
            seconds: Its time; None where it says nothing.
            num_shadow_drafts: Drafts that were made beside it.
        """

    def observe_shadow(self, num_draft_tokens: int, accepted: Sequence[int]) -> None:
        """Learn from drafts that were made beside a round.

        Args:
            num_draft_tokens: How many.
            accepted: How many of them are the tokens that came, of each row.
        """

    def observe_setup(self, seconds: float) -> None:
        """Learn what it took to trace a round."""


class DraftLengths(Protocol):
    """Who chooses, as rows come and go."""

    def seat(self, num_seats: int, *, rule: str, context: int) -> DraftLength:
        """Who chooses for the rows from now on.

        Args:
            num_seats: Rows that a round computes.
            rule: The rules that judge their drafts, in words.
            context: Tokens of the longest row.
        """

    def finish(self) -> None:
        """The requests have ended: what was learnt may be kept."""


class FixedDraftLength:
    """The same number for every round, or the next smaller that is allowed.

    Args:
        num_draft_tokens: K.
    """

    num_shadow_drafts = 0

    def __init__(self, num_draft_tokens: int) -> None:
        self._num_draft_tokens = num_draft_tokens

    def choose(
        self,
        allowed: Collection[int],
        *,
        not_ready: Collection[int],
        tokens_left: int | None,
        can_shadow: bool = False,
    ) -> int:
        """See ``DraftLength``."""
        return max(k for k in allowed if k <= self._num_draft_tokens)

    def observe(
        self,
        num_draft_tokens: int,
        accepted: Sequence[int],
        seconds: float | None,
        *,
        num_shadow_drafts: int = 0,
    ) -> None:
        """There is nobody to learn."""

    def observe_shadow(self, num_draft_tokens: int, accepted: Sequence[int]) -> None:
        """There is nobody to learn."""

    def observe_setup(self, seconds: float) -> None:
        """There is nobody to learn."""

    def seat(self, num_seats: int, *, rule: str, context: int) -> FixedDraftLength:
        """The same for all rows."""
        return self

    def finish(self) -> None:
        """There is nothing to keep."""


class AdaptiveDraftLength:
    """What a controller expects to be fastest; or a fixed number, for it to learn.

    Args:
        controller: It has learnt from the rounds before.
        num_draft_tokens: The number for every round, or the next smaller that is
            allowed; None for the controller's choice.
        setups: What it took to trace the last rounds, seconds; appended to.
        lock: Held while the controller is asked or told something.
        keep: Keeps what it has learnt, called at the end.
    """

    def __init__(
        self,
        controller: DraftLengthController,
        *,
        num_draft_tokens: int | None = None,
        setups: deque[float],
        lock: AbstractContextManager[object],
        keep: Callable[[], None],
    ) -> None:
        self.num_shadow_drafts = 0
        self._controller = controller
        self._fixed = (
            None if num_draft_tokens is None else FixedDraftLength(num_draft_tokens)
        )
        self._lock = lock
        self._setups = setups
        self._keep = keep
        with lock:
            controller.start()

    def choose(
        self,
        allowed: Collection[int],
        *,
        not_ready: Collection[int],
        tokens_left: int | None,
        can_shadow: bool = False,
    ) -> int:
        """See ``DraftLength``."""
        if self._fixed is not None:
            return self._fixed.choose(
                allowed, not_ready=not_ready, tokens_left=tokens_left
            )
        with self._lock:
            setup_s = dict.fromkeys(not_ready, self._setup_s) if not_ready else {}
            count = self._controller.choose(
                allowed=allowed,
                setup_s=setup_s,
                tokens_left=tokens_left,
                can_shadow=can_shadow,
            )
            self.num_shadow_drafts = self._controller.num_shadow_drafts
        return count

    def observe(
        self,
        num_draft_tokens: int,
        accepted: Sequence[int],
        seconds: float | None,
        *,
        num_shadow_drafts: int = 0,
    ) -> None:
        """See ``DraftLength``."""
        with self._lock:
            self._controller.observe(
                num_draft_tokens,
                accepted,
                seconds,
                num_shadow_drafts=num_shadow_drafts,
            )

    def observe_shadow(self, num_draft_tokens: int, accepted: Sequence[int]) -> None:
        """See ``DraftLength``."""
        with self._lock:
            self._controller.observe_shadow(num_draft_tokens, accepted)

    def observe_setup(self, seconds: float) -> None:
        """See ``DraftLength``."""
        with self._lock:
            self._setups.append(seconds)

    def seat(self, num_seats: int, *, rule: str, context: int) -> AdaptiveDraftLength:
        """The same: the controller was chosen for rows that stay."""
        return self

    def finish(self) -> None:
        """See ``DraftLength``."""
        self._keep()

    @property
    def _setup_s(self) -> float:
        """What tracing a round is expected to take, seconds."""
        # The first round of a process also builds what all rounds need.
        return median(self._setups) if len(self._setups) > 1 else _SETUP_S


class BatchDraftLengths:
    """A controller's choice for each kind of batch.

    Args:
        adaptive: Makes the choice for so many seats, a rule and a context.
        keep: Keeps what was learnt, called at the end.
    """

    def __init__(
        self,
        adaptive: Callable[[int, str, int], AdaptiveDraftLength],
        *,
        keep: Callable[[], None],
    ) -> None:
        self._adaptive = adaptive
        self._keep = keep
        self._known: dict[tuple[int, str], AdaptiveDraftLength] = {}

    def seat(self, num_seats: int, *, rule: str, context: int) -> AdaptiveDraftLength:
        """See ``DraftLengths``."""
        key = (num_seats, rule)
        if key not in self._known:
            self._known[key] = self._adaptive(num_seats, rule, context)
        return self._known[key]

    def finish(self) -> None:
        """See ``DraftLengths``."""
        self._keep()
