"""How long a generation's phases and rounds take, as the host sees them.

A round's time is the interval between two reads of reports, without what the caller did
while the device had nothing to do. Where the host had to wait for the device, it is the
time of the round just read. Where it had not, it is that of the round queued in it:
queueing took long (on the CPU backend it waits until the round has nearly run), or the
host is the slower of both. An interval in which a round was traced, slabs grew, or the
caller stalled the rounds says nothing of them; it has no time. Knows nothing of arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass

from ..cpu_kernels import clock
from .stats import Phases

# The host waited at least this share of an interval for the device: then the device
# was busy all along, and the interval is the round's time.
_BUSY_SHARE = 0.02
# Queueing took at least this share of what was not the caller's: it waited for rounds.
_BLOCKED_SHARE = 0.5
# A caller that took more of an interval than this has stalled the rounds.
_STALL_SHARE = 0.5


@dataclass(frozen=True)
class Interval:
    """What passed between two reads.

    Attributes:
        seconds: The time of one round.
        is_queued: Whether it is the round last queued, where one is in flight, and not
            the one just read.
    """

    seconds: float
    is_queued: bool


class RoundTimer:
    """Times one decoder.

    Args:
        clock: Seconds that only ever grow.

    Attributes:
        phases: Seconds so far, up to the last mark.
    """

    def __init__(self, clock: Callable[[], float] = clock) -> None:
        self.phases = Phases()
        self._clock = clock
        self._mark = clock()
        self._waited = 0.0
        self._begin_interval()

    @contextmanager
    def prefill(self) -> Generator[None, None, None]:
        """Around the reading of the prompt."""
        self._to_host()
        yield
        self.phases.prefill_s += self._lap()

    @contextmanager
    def wait(self) -> Generator[None, None, None]:
        """Around the read of a report."""
        self._to_host()
        yield
        self._waited = self._lap()
        self.phases.rounds_s += self._waited

    @contextmanager
    def queue(self) -> Generator[None, None, None]:
        """Around the handing of a round to the device."""
        self._to_host()
        yield
        lap = self._lap()
        self._queued += lap
        self.phases.rounds_s += lap

    @contextmanager
    def caller(self, *, is_idle: bool) -> Generator[None, None, None]:
        """Around what the caller does between two rounds.

        Args:
            is_idle: Whether no round is in flight meanwhile.
        """
        self.mark()
        yield
        self.add_caller(is_idle=is_idle)

    def mark(self) -> None:
        """What comes now is the caller's time, until ``add_caller``."""
        self._to_host()

    def add_caller(self, *, is_idle: bool) -> None:
        """The caller's time, since the last mark, is over; see ``caller``."""
        lap = self._lap()
        self._caller += lap
        self._idle += lap if is_idle else 0.0
        self.phases.host_s += lap

    def disturb(self) -> None:
        """Something that is no part of a round falls into this interval."""
        self._is_disturbed = True

    def interval(self) -> Interval | None:
        """What passed since the read before; None where it says nothing of a round."""
        passed = self._mark - self._last_read - self._idle
        caller, queued = self._caller - self._idle, self._queued
        is_disturbed = self._is_disturbed
        self._begin_interval()
        if is_disturbed or passed <= 0:
            return None
        if self._waited >= _BUSY_SHARE * passed:
            return Interval(passed, is_queued=False)
        if not queued or caller > _STALL_SHARE * passed:
            return None
        if queued > _BLOCKED_SHARE * (passed - caller):
            passed -= caller  # the round had run by the time the caller had its turn
        return Interval(passed, is_queued=True)

    def _begin_interval(self) -> None:
        """Start to count anew."""
        self._last_read = self._mark
        self._caller = self._idle = self._queued = 0.0
        self._is_disturbed = False

    @property
    def waited_s(self) -> float:
        """How long the last report was waited for."""
        return self._waited

    def stop(self) -> None:
        """Count what is left since the last mark."""
        self._to_host()

    def _to_host(self) -> None:
        self.phases.host_s += self._lap()

    def _lap(self) -> float:
        now = self._clock()
        lap, self._mark = now - self._mark, now
        return lap
