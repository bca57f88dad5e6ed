"""Things timed in turn, in windows, within a budget.

The machine is warmed up by the clock. Candidates take turns, A B B A and so on, so that
a clock that falls slows all alike; the median of five windows counts. Where windows of
one candidate lie further apart than the margin, all is timed once more.

This file knows no clock and nothing of what is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .judgement import MARGIN, Timing

WINDOW_S = 0.4
NUM_WINDOWS = 5
WARM_UP_S = 1.0

# Works for about so many seconds; what one thing takes, seconds.
Window = Callable[[float], float]


class NoTimeError(Exception):
    """What comes next does not fit into the budget."""


class Windows:
    """Times things on one clock.

    Args:
        clock: Seconds since some moment.
        budget_s: Longest time from now on, seconds.

    Attributes:
        reserved_s: How much of it is left for later, seconds.
    """

    def __init__(self, clock: Callable[[], float], budget_s: float) -> None:
        self.reserved_s = 0.0
        self._clock = clock
        self._end = clock() + budget_s

    def need(self, seconds: float) -> None:
        """Stop where so much more time is not there.

        Raises:
            NoTimeError: It is not.
        """
        if self._clock() + seconds > self._end - self.reserved_s:
            raise NoTimeError

    def warm_up(self, window: Window) -> None:
        """Work until the clocks are up, or until it fails."""
        end = self._clock() + WARM_UP_S
        while self._clock() < end and window(WINDOW_S) < float("inf"):
            pass

    def compared(self, windows: Sequence[Window], share: float = 1.0) -> list[Timing]:
        """Time things in turn.

        Args:
            windows: The things.
            share: Of the usual length of a window.

        Raises:
            NoTimeError: The budget is over.
        """
        for is_last in (False, True):
            start = self._clock()
            taken: list[list[float]] = [[] for _ in windows]
            for turn in range(NUM_WINDOWS):
                for i in range(len(windows))[:: -1 if turn % 2 else 1]:
                    self.need(0.0)
                    taken[i].append(windows[i](share * WINDOW_S))
            timings = [Timing.of(each) for each in taken]
            if is_last or all(timing.spread <= MARGIN for timing in timings):
                break
            self.need(self._clock() - start)
        return timings
