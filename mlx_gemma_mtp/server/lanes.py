"""Threads for the tokenizer: a long text is encoded beside short ones, not before them.

Knows nothing of tokenizers. Those of Hugging Face may be asked by several threads as
long as nobody changes their settings, and let others run while they encode.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
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

    def drop(self, is_gone: Callable[[T], bool]) -> None:
        """Forget what nobody wants any more."""
        self._items = [entry for entry in self._items if not is_gone(entry[1])]


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
        future.add_done_callback(self._forget_cancelled)
        self._calls.put(True)
        return future

    def close(self) -> None:
        """Call nothing more."""
        with self._lock:
            left = [self._waiting.take()[0] for _ in range(len(self._waiting))]
        for future in left:
            future.cancel()
        self._calls.put(False)

    def _forget_cancelled(self, ended: Future[Any]) -> None:
        """Let go of a text that nobody waits for; it may have megabytes."""
        if ended.cancelled():
            with self._lock:
                self._waiting.drop(lambda call: call[0] is ended)

    def _run(self) -> None:
        while self._calls.get():
            self._call_next()

    def _call_next(self) -> None:
        with self._lock:
            if not len(self._waiting):  # it was cancelled in between
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
        self._loop: asyncio.AbstractEventLoop | None = None
        self._open: set[asyncio.Future[Any]] = set()
        self._failure: Exception | None = None

    async def run(self, size: int, function: Callable[[], T]) -> T:
        """Call something that takes as long as its size says.

        Args:
            size: In characters to encode.
            function: What to call. It is not called where nobody waits any more when
                its turn comes.

        Raises:
            Exception: What ``close`` was given, where that came first.
        """
        if self._failure is not None:
            raise self._failure
        self._loop = asyncio.get_running_loop()
        lane = self._short if size <= MOST_SHORT else self._long
        call = asyncio.wrap_future(lane.submit(size, function))
        self._open.add(call)
        try:
            return await call
        except asyncio.CancelledError:
            if self._failure is not None:
                raise self._failure from None
            raise
        finally:
            self._open.discard(call)

    def close(self, failure: Exception) -> None:
        """Call nothing more; may be called from any thread, and again.

        Args:
            failure: What everybody is told who waits, also for what is being called.
        """
        self._failure = failure
        self._short.close()
        self._long.close()
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._let_go)

    def _let_go(self) -> None:
        for call in self._open:
            call.cancel()
