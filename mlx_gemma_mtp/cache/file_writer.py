"""Writes files in a thread of its own, one after the other.

Knows nothing of what is in them.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .place_file import Place

logger = logging.getLogger("mlx_gemma_mtp")


@dataclass(frozen=True)
class Job:
    """A file to write.

    Attributes:
        name: Its name.
        place: What it is of.
        data: What is in it.
        needs: Names of files that it is of no use without.
    """

    name: str
    place: Place
    data: Sequence[memoryview]
    needs: Sequence[str]

    @property
    def num_bytes(self) -> int:
        """Memory that waits for it."""
        return sum(part.nbytes for part in self.data)


class FileWriter:
    """Files that wait to be written.

    Args:
        write: Writes one.
        max_bytes: Most memory that waits; but one file may wait whatever it takes.
    """

    def __init__(self, write: Callable[[Job], None], *, max_bytes: int) -> None:
        self._write = write
        self._max_bytes = max_bytes
        self._jobs: deque[Job] = deque()  # the first one is being written
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._is_closed = False

    @property
    def pending(self) -> list[str]:
        """Names of the files that are not there yet."""
        with self._changed:
            return [job.name for job in self._jobs]

    def put(self, job: Job) -> bool:
        """Let a file wait for its turn; whether it may."""
        with self._changed:
            waiting = sum(each.num_bytes for each in self._jobs)
            is_full = self._jobs and waiting + job.num_bytes > self._max_bytes
            if self._is_closed or is_full:
                return False
            self._jobs.append(job)
            self._changed.notify_all()
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name="prompt files", daemon=True
                )
                self._thread.start()
        return True

    def close(self, timeout_s: float) -> None:
        """Take no more; return when all were written, or after this time."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(timeout_s)

    def _run(self) -> None:
        while (job := self._next()) is not None:
            try:
                self._write(job)
            except Exception:
                logger.exception("a prompt could not be written")
            with self._changed:
                self._jobs.popleft()

    def _next(self) -> Job | None:
        """The next job, waited for; None where none will come."""
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._is_closed)
            return self._jobs[0] if self._jobs else None
