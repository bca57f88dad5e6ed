"""Threads beside the event loop: a long text is encoded beside short ones, not before
them, and what answers must be is compiled beside both.

Knows nothing of tokenizers. Those of Hugging Face may be asked by several threads as
long as nobody changes their settings, and let others run while they encode. Chat
templates are Python that may take hours for thousands of messages, so what runs can be
stopped: an exception is raised in its thread (``PyThreadState_SetAsyncExc``).
"""

from __future__ import annotations

import asyncio
import ctypes
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

T = TypeVar("T")

LIMIT_S = 30.0  # for one call; a context full of text is encoded in less

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


class _Stopped(BaseException):
    """Nobody waits any more for what runs."""


class _Call(Generic[T]):
    """Something to be called in a lane.

    Args:
        function: What to call.

    Attributes:
        started: Done once it is called.
        result: What comes out.
    """

    def __init__(self, function: Callable[[], T]) -> None:
        self.started: Future[None] = Future()
        self.result: Future[T] = Future()
        self._function = function
        self._lock = threading.Lock()
        self._thread: int | None = None  # where it runs
        self._is_stopped = False

    def run(self) -> None:
        """Call it, unless it was stopped before."""
        if not self.result.set_running_or_notify_cancel():
            self.started.cancel()
            return
        if self.started.set_running_or_notify_cancel():
            self.started.set_result(None)
        try:
            try:
                self._begin()
                found = self._function()
            finally:
                self._end()
        except BaseException as error:  # noqa: BLE001 - it is the caller's
            self.result.set_exception(error)
        else:
            self.result.set_result(found)

    def stop(self) -> None:
        """Let it not be called, or end; nothing where it has ended."""
        self.started.cancel()
        if self.result.cancel():
            return
        with self._lock:
            if self._thread is not None and not self._is_stopped:
                _raise_in(self._thread, _Stopped)
            self._is_stopped = True

    def _begin(self) -> None:
        with self._lock:
            self._thread = threading.get_ident()
            if self._is_stopped:
                raise _Stopped

    def _end(self) -> None:
        """From here on nothing is raised in this thread."""
        with self._lock:
            if self._thread is not None and self._is_stopped:
                _raise_what_is_due()
            self._thread = None


def _raise_in(thread: int, kind: type[BaseException]) -> None:
    """Let a thread raise an exception soon."""
    what = ctypes.py_object(kind)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), what)


def _raise_what_is_due() -> None:
    """Let what this thread should raise soon be raised here, and nothing later.

    Taking it back (with NULL) would leave the interpreter's flag set for ever up to
    Python 3.12: all code would look for it at every turn, and traced code would hang.
    """
    with suppress(_Stopped):
        _raise_in(threading.get_ident(), _Stopped)
        while True:
            pass


class _Lane:
    """One thread and what waits for it."""

    def __init__(self, name: str) -> None:
        self._waiting: BySize[_Call[Any]] = BySize()
        self._lock = threading.Lock()
        self._calls: SimpleQueue[bool] = SimpleQueue()  # whether to go on, each time
        # A daemon: the process may end before a text was encoded.
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def submit(self, size: int, call: _Call[Any]) -> None:
        """Let something be called."""
        with self._lock:
            self._waiting.append(size, call)
        self._calls.put(True)

    def stop(self, call: _Call[Any]) -> None:
        """Let go of what nobody waits for; its text may have megabytes."""
        call.stop()
        with self._lock:
            self._waiting.drop(lambda other: other is call)

    def close(self) -> None:
        """Call nothing more."""
        with self._lock:
            left = [self._waiting.take() for _ in range(len(self._waiting))]
        for call in left:
            call.stop()
        self._calls.put(False)

    def _run(self) -> None:
        while self._calls.get():
            with self._lock:
                call = self._waiting.take() if len(self._waiting) else None
            if call is not None:  # it was not stopped in between
                call.run()
            del call  # and what it has found


class Lanes:
    """A thread for short texts, one for long ones, and one that compiles."""

    def __init__(self) -> None:
        self._short, self._long = _Lane("short-texts"), _Lane("long-texts")
        self._compiling = _Lane("compiling")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._open: set[asyncio.Future[Any]] = set()
        self._failure: Exception | None = None

    async def run(self, size: int, function: Callable[[], T]) -> T:
        """Call something that takes as long as its size says.

        Args:
            size: In characters to encode.
            function: What to call. It is stopped where nobody waits any more.

        Raises:
            asyncio.TimeoutError: It has run for longer than ``LIMIT_S``.
            Exception: What ``close`` was given, where that came first.
        """
        lane = self._short if size <= MOST_SHORT else self._long
        return await self._run(lane, size, function)

    async def compile(self, size: int, function: Callable[[], T]) -> T:
        """Call something that compiles what an answer must be; as ``run`` does."""
        return await self._run(self._compiling, size, function)

    async def _run(self, lane: _Lane, size: int, function: Callable[[], T]) -> T:
        """Call something in a lane."""
        if self._failure is not None:
            raise self._failure
        self._loop = asyncio.get_running_loop()
        call = _Call(function)
        lane.submit(size, call)
        found = asyncio.wrap_future(call.result)
        self._open.add(found)
        try:
            await asyncio.wrap_future(call.started)
            return await asyncio.wait_for(found, LIMIT_S)
        except asyncio.CancelledError:
            if self._failure is not None:
                raise self._failure from None
            raise
        finally:
            self._open.discard(found)
            lane.stop(call)

    def close(self, failure: Exception) -> None:
        """Call nothing more; may be called from any thread, and again.

        Args:
            failure: What everybody is told who waits, also for what is being called.
        """
        self._failure = failure
        self._short.close()
        self._long.close()
        self._compiling.close()
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._let_go)

    def _let_go(self) -> None:
        for found in self._open:
            found.cancel()
