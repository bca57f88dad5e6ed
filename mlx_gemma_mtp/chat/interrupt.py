"""Control-C while an answer is said: it stops the answer, not the program."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType


class Interrupts:
    """Takes the first Control-C as a wish to stop; a second one raises.

    A context manager, in the main thread. Before ``may_wait`` is set the first one
    raises too: there is no token after which to stop.

    Attributes:
        may_wait: Whether someone looks at ``asked`` before long.
        asked: Whether Control-C was pressed.
    """

    def __init__(self) -> None:
        self.may_wait = False
        self.asked = False

    def __enter__(self) -> Interrupts:
        self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked or not self.may_wait:
            raise KeyboardInterrupt
        self.asked = True
