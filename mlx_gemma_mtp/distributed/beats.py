"""Rank 0's beats while it has no work: the others sleep between them.

A rank that waits in a collective spins. So while rank 0 waits for its user, a thread of
its own meets the others in a small exchange now and then, and all sleep in between. As
every beat ends on all ranks at once, the next one finds them awake together.

Pauses are short at first, so that work that comes soon begins soon. Knows nothing of
what a beat says.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

from ..errors import RanksError

_FIRST_S = 0.002
LONGEST_S = 0.045


def pauses() -> Iterator[float]:
    """Seconds of sleep before each beat, the same on all ranks."""
    pause_s = _FIRST_S
    while True:
        yield pause_s
        pause_s = min(2 * pause_s, LONGEST_S)


class Beats:
    """A thread that beats from ``start`` to ``stop``; one for all rests.

    MLX keeps a thread of its own for each Python thread that has evaluated something.

    Args:
        beat: Meets the other ranks.
        fail: Is told what went wrong; the thread's owner waits for its user.
    """

    def __init__(self, beat: Callable[[], None], fail: Callable[[str], None]) -> None:
        self._beat = beat
        self._fail = fail
        self._changed = threading.Condition()
        self._is_resting = False
        self._is_beating = False
        self._thread: threading.Thread | None = None

    @property
    def is_resting(self) -> bool:
        """Whether it was started."""
        return self._is_resting

    def start(self) -> None:
        """Beat from now on."""
        with self._changed:
            self._is_resting = True
            self._changed.notify_all()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="beats", daemon=True)
            self._thread.start()

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
                try:
                    self._beat()
                except RanksError as error:
                    self._fail(str(error))
                finally:
                    self._end_beat()

    def _begins_after(self, pause_s: float) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: not self._is_resting, pause_s)
            self._is_beating = self._is_resting
            return self._is_beating

    def _end_beat(self) -> None:
        with self._changed:
            self._is_beating = False
            self._changed.notify_all()
