"""Threads for the tokenizer: a long text is encoded beside short ones, not before them.

Knows nothing of tokenizers. Those of Hugging Face may be asked by several threads as
long as nobody changes their settings, and let others run while they encode.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

T = TypeVar("T")

# Size of a short text: a tokenizer takes some tenths of a second for that many.
MOST_SHORT = 2**15


class BySize(Generic[T]):
    """What waits: the smallest and the oldest are next in turn, so nothing starves."""

    def __init__(self) -> None:
        self._items: list[tuple[int, T]] = []
        self._is_oldest_next = False

    def __len__(self) -> int:
        return len(self._items)

    def append(self, size: int, item: T) -> None:
        """Let something wait."""
        self._items.append((size, item))

    def take(self) -> T:
        """The next one; there must be one."""
        sizes = [size for size, _ in self._items]
        index = 0 if self._is_oldest_next else sizes.index(min(sizes))
        self._is_oldest_next = not self._is_oldest_next
        return self._items.pop(index)[1]


class _Lane:
    """One thread and what waits for it."""

    def __init__(self, name: str) -> None:
        self._waiting: BySize[tuple[Future[Any], Callable[[], Any]]] = BySize()
        self._lock = threading.Lock()
        self._calls: SimpleQueue[bool] = SimpleQueue()  # whether to go on, each time
        # A daemon: the process may end before a text was encoded.
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def submit(self, size: int, function: Callable[[], T]) -> Future[T]:
        """Let something be called."""
        future: Future[T] = Future()
        with self._lock:
            self._waiting.append(size, (future, function))
        self._calls.put(True)
        return future

    def close(self) -> None:
        """Call nothing more."""
        with self._lock:
            while len(self._waiting):
                self._waiting.take()[0].cancel()
        self._calls.put(False)

    def _run(self) -> None:
        while self._calls.get():
            self._call_next()

    def _call_next(self) -> None:
        with self._lock:
            if not len(self._waiting):  # it was closed in between
                return
            future, function = self._waiting.take()
        if not future.set_running_or_notify_cancel():
            return
        try:
            result = function()
        except BaseException as error:  # noqa: BLE001 - it is the caller's
            future.set_exception(error)
        else:
            future.set_result(result)


class Lanes:
    """A thread for short texts, and one for long ones."""

    def __init__(self) -> None:
        self._short, self._long = _Lane("short-texts"), _Lane("long-texts")

    async def run(self, size: int, function: Callable[[], T]) -> T:
        """Call something that takes as long as its size says.

        Args:
            size: In characters to encode.
            function: What to call. It is not called where nobody waits any more when
                its turn comes.
        """
        lane = self._short if size <= MOST_SHORT else self._long
        return await asyncio.wrap_future(lane.submit(size, function))

    def close(self) -> None:
        """Call nothing more; whoever waits is cancelled."""
        self._short.close()
        self._long.close()
