"""The watchdog of a rank: ends the process when the others are silent for too long.

A rank whose neighbour is stopped, or hangs, waits inside MLX for ever, and no exception
comes; with JACCL neither when the neighbour is dead. MLX lets other Python threads run
meanwhile, so one of them watches. Knows nothing of what is exchanged.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

LIMIT_S = 8.0  # of silence; with what comes on top, all ranks end within 10 s
_LOOK_S = 0.25
# What one look adds at most: a process that was stopped, or a machine that slept, has
# not waited in that time.
_MOST_S = 1.0
_GOODBYE_S = 1.0  # for the last line, where nobody reads it


@dataclass(eq=False)
class _Wait:
    """What a thread waits for now, and for how long."""

    what: str
    limit_s: float
    waited_s: float = 0.0


class Watchdog:
    """Watches how long this rank's threads wait for other ranks.

    Args:
        rank: This rank.
        size: How many there are.
        clock: Seconds.
        end: Ends the process with a last line, from any thread.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        *,
        clock: Callable[[], float] = time.monotonic,
        end: Callable[[str], None] | None = None,
    ) -> None:
        self._rank = rank
        self._size = size
        self._clock = clock
        self.end = end or end_process
        self._lock = threading.Lock()
        self._waits: dict[int, list[_Wait]] = {}  # by thread; the innermost is last
        self._looked_at = clock()

    def start(self) -> None:
        """Look four times a second, in a thread that ends with the process."""
        threading.Thread(target=self._run, name="watchdog", daemon=True).start()

    @contextmanager
    def waiting(self, what: str, limit_s: float = LIMIT_S) -> Iterator[None]:
        """What is done inside needs the others: the process ends if they are silent.

        Args:
            what: What the rank waits for, for the last line.
            limit_s: Seconds of silence.
        """
        wait, thread = _Wait(what, limit_s), threading.get_ident()
        with self._lock:
            self._waits.setdefault(thread, []).append(wait)
        try:
            yield
        finally:
            with self._lock:
                waits = self._waits[thread]
                waits.pop()
                if waits:
                    waits[-1].waited_s = 0.0
                else:
                    del self._waits[thread]

    def beat(self) -> None:
        """Something was heard of the others."""
        with self._lock:
            for waits in self._waits.values():
                for wait in waits:
                    wait.waited_s = 0.0

    def look(self) -> None:
        """End the process if a thread has waited too long."""
        now = self._clock()
        passed_s = min(now - self._looked_at, _MOST_S)
        self._looked_at = now
        late = None
        with self._lock:
            for waits in self._waits.values():
                wait = waits[-1]
                wait.waited_s += passed_s
                if wait.waited_s > wait.limit_s:
                    late = self._line(wait.what, wait.limit_s)
        if late is not None:
            self.end(late)

    def _line(self, what: str, limit_s: float) -> str:
        return (
            f"Rank {self._rank} of {self._size} must hear of the others within"
            f" {limit_s:g} s: got nothing in {what}. See what the other ranks wrote,"
            " then start all again."
        )

    def _run(self) -> None:
        while True:
            time.sleep(_LOOK_S)
            self.look()


def end_process(line: str) -> None:
    """Write a line to stderr and end with status 1, whatever other threads do.

    Python's own end would wait for the thread inside MLX. What is written may have no
    reader, or its lock another owner: a thread of its own writes.
    """
    writer = threading.Thread(target=_say_goodbye, args=[line], daemon=True)
    try:
        writer.start()
        writer.join(_GOODBYE_S)
    except RuntimeError:  # at exit Python starts no thread
        _say_goodbye(line)
    os._exit(1)


def _say_goodbye(line: str) -> None:
    # Not what a program has put in its place: this must be seen.
    place = sys.__stderr__ or sys.stderr
    place.write(f"{line}\n")
    place.flush()
    sys.stdout.flush()
