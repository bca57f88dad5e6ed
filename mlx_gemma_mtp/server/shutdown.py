"""SIGTERM and Control-C: obeyed at once, whatever the main thread does.

Python runs a signal's handler in the main thread, between two instructions: not while
MLX compiles or computes there. What Python does at once is to write the signal's number
to a file, and a thread of its own waits for that here.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

logger = logging.getLogger("mlx_gemma_mtp.server")

_GRACE_S = 1.0  # for the engine to end by itself once its time is over
_LONGEST_S = 10.0**6  # that a socket waits; no engine takes as long


class Shutdown:
    """What signals do. Before ``start`` was called they end the process.

    Args:
        timeout_s: Seconds that the engine has to finish.

    Attributes:
        is_asked_for: Whether a signal came.
        is_over: Set once the engine has ended: the process ends by itself.
    """

    def __init__(self, timeout_s: float) -> None:
        self.is_asked_for = False
        self.is_over = False
        self._timeout_s = timeout_s
        self._begin: Callable[[], None] | None = None
        self._give_up: Callable[[], None] | None = None

    @contextmanager
    def obeying(self) -> Iterator[None]:
        """Listen to SIGTERM and Control-C meanwhile; called in the main thread."""
        numbers, written = socket.socketpair()
        written.setblocking(False)
        fd = signal.set_wakeup_fd(written.fileno(), warn_on_full_buffer=False)
        before = {
            number: signal.signal(number, lambda *_: None)  # else nothing is written
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        listen = threading.Thread(
            target=self._listen, args=[numbers], name="signals", daemon=True
        )
        listen.start()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(fd)
            written.close()
            listen.join()

    def start(self, *, begin: Callable[[], None], give_up: Callable[[], None]) -> None:
        """Let signals end what is served from here on.

        Args:
            begin: Takes nothing new and lets the engine finish.
            give_up: Tells everybody that there is no more to come; called where the
                engine has not ended in time. The process ends behind it.
        """
        self._give_up = give_up
        self._begin = begin

    def _listen(self, numbers: socket.socket) -> None:
        with numbers:
            number = _next(numbers, None)
            if number is None:
                return
            if self._begin is None or self._give_up is None:
                os._exit(128 + number)
            self.is_asked_for = True
            self._begin()
            self._end_in_time(numbers, self._give_up)

    def _end_in_time(self, numbers: socket.socket, give_up: Callable[[], None]) -> None:
        """End the process where another signal comes, or the engine goes on."""
        try:
            number = _next(numbers, min(self._timeout_s + _GRACE_S, _LONGEST_S))
        except TimeoutError:
            if not self.is_over:
                ends = threading.Thread(target=_end, args=[give_up], daemon=True)
                ends.start()  # clients may take seconds to be told: listen meanwhile
            number = _next(numbers, None)
        if number is not None:
            os._exit(128 + number)


def _end(give_up: Callable[[], None]) -> None:
    """End the process without the engine."""
    logger.warning("the engine is still busy; the process ends without it")
    try:
        give_up()
    except Exception:
        logger.exception("clients were not told")
    finally:
        os._exit(0)


def _next(numbers: socket.socket, timeout_s: float | None) -> int | None:
    """Wait for a signal; None where nobody listens any more.

    Raises:
        TimeoutError: None came in time.
    """
    numbers.settimeout(timeout_s)
    return next(iter(numbers.recv(1)), None)
