"""Beats of ranks at rest: all sleep between them, and miss one that does not come.

A rank that waits in a collective spins. So at rest a thread of each rank meets the
others in a small exchange now and then, and sleeps in between, whatever the program
does meanwhile. As every beat ends on all ranks at once, the next one finds them awake
together.

Pauses are short at first, so that work that comes soon begins soon. Knows nothing of
what a beat says.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

from ..errors import RanksError, described

_FIRST_S = 0.002
LONGEST_S = 0.045


def pauses() -> Iterator[float]:
    """Seconds of sleep before each beat, the same on all ranks."""
    pause_s = _FIRST_S
    while True:
        yield pause_s
        pause_s = min(2 * pause_s, LONGEST_S)


class Beats:
    """A thread that beats from ``start`` until a beat ends the rest; one for all rests.

    MLX keeps a thread of its own for each Python thread that has evaluated something.

    Args:
        beat: Meets the other ranks; whether the rest is over with it.
        fail: Is told what went wrong where nobody waits for the rest's end; may take
            its time.
    """

    def __init__(self, beat: Callable[[], bool], fail: Callable[[str], None]) -> None:
        self._beat = beat
        self._fail = fail
        self._changed = threading.Condition()
        self._is_resting = False
        self._is_beating = False
        self._is_awaited = False
        self._is_urgent = False
        self._error: RanksError | None = None
        self._thread: threading.Thread | None = None

    @property
    def is_resting(self) -> bool:
        """Whether it was started, and nothing has ended it."""
        return self._is_resting

    def start(self) -> None:
        """Beat from now on."""
        with self._changed:
            self._is_resting = True
            self._changed.notify_all()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="beats", daemon=True)
            self._thread.start()

    def wait(self) -> None:
        """Wait until a beat ends the rest; the next one comes at once.

        Raises:
            RanksError: One has failed.
        """
        with self._changed:
            self._is_awaited = self._is_urgent = True
            self._changed.notify_all()
            try:
                self._changed.wait_for(
                    lambda: not (self._is_resting or self._is_beating)
                )
            finally:
                self._is_awaited = self._is_urgent = False
            error, self._error = self._error, None
        if error is not None:
            raise error

    def stop(self) -> None:
        """Beat no more; a beat that has begun ends first."""
        with self._changed:
            self._is_resting = False
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._is_beating)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_resting)
            for pause_s in pauses():
                if not self._begins_after(pause_s):
                    break
                is_over, error = True, None
                try:
                    is_over = self._beat()
                except RanksError as found:
                    error = found
                except Exception as found:  # noqa: BLE001 (whoever waits must hear of it)
                    error = RanksError(f"Beats must go on: got {described(found)}.")
                self._end_beat(error, is_over=is_over)

    def _begins_after(self, pause_s: float) -> bool:
        with self._changed:
            self._changed.wait_for(
                lambda: self._is_urgent or not self._is_resting, pause_s
            )
            self._is_urgent = False
            self._is_beating = self._is_resting
            return self._is_beating

    def _end_beat(self, error: RanksError | None, *, is_over: bool) -> None:
        with self._changed:
            is_awaited = self._is_awaited
            self._error = error
            self._is_beating = False
            self._is_resting &= not is_over
            self._changed.notify_all()
        if error is not None and not is_awaited:
            self._fail(str(error))
