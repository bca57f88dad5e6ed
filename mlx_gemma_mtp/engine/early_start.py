"""Whether the next round is started before the last one's report is read.

Its graph is built before in either case. Started early, the device never waits for the
host. But a device takes only so many commands ahead (Metal: 10 command buffers in
flight, of MLX's default size less than a round of a large model); starting then blocks
until most of the round before has run, and what that one's report says reaches the
caller late. Which is better depends on the machine and the model, so it is measured:
early only where that makes rounds shorter. Knows nothing of arrays.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable
from statistics import median

_BLOCK = 8  # rounds of one kind in a row, while both are measured
_SAMPLES = 16  # of either kind, of one way to draft, that decide
_LEAST_GAIN = 1.02  # times shorter: less is not worth text that comes late


class EarlyStart:
    """Learns from the first rounds of a process, and then decides.

    Attributes:
        is_early: Whether the next round is to be started early.
    """

    def __init__(self) -> None:
        self.is_early = True
        self._num_left = _BLOCK
        self._seconds = defaultdict[tuple[Hashable, bool], list[float]](list)
        self._has_decided = False

    def observe(self, way: Hashable, seconds: float, *, is_early: bool) -> None:
        """Learn from a round.

        Args:
            way: How it drafted: rounds of one way are compared.
            seconds: What it took.
            is_early: Whether it was started early.
        """
        if self._has_decided:
            return
        self._seconds[way, is_early].append(seconds)
        self._num_left -= 1
        if not self._num_left:
            self.is_early, self._num_left = not self.is_early, _BLOCK
        early = self._seconds[way, True]
        late = self._seconds[way, False]
        if min(len(early), len(late)) >= _SAMPLES:
            self.is_early = median(late) > _LEAST_GAIN * median(early)
            self._has_decided = True
            self._seconds.clear()
