"""Gives memory back to the system that requests took.

glibc keeps what was freed for later: a hundred megabytes and more behind a few large
bodies, some tens behind many small ones. It is asked to let go of that. Other
allocators are not asked: macOS's gives large blocks back by itself.
"""

from __future__ import annotations

import asyncio
import ctypes
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

_LARGE = 10**6  # bytes of a body
REST_S = 1.0  # without a request, after which is tidied up behind them all


def memory_returner() -> Callable[[], None]:
    """What gives freed memory back; it does nothing where there is no glibc."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return lambda: None
    return lambda: trim(0)


class Tidied:
    """Tidies up behind large bodies, and where there is nothing to do.

    Args:
        app: The application.
        give_back: Called once a request with a large body is over, and some time after
            the last one of all.
    """

    def __init__(self, app: ASGIApp, give_back: Callable[[], None]) -> None:
        self._app = app
        self._give_back = give_back
        self._num_open = 0
        self._rest: asyncio.TimerHandle | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, then tidy up."""
        num_bytes = 0

        async def counting() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            return message

        self._num_open += 1
        if self._rest is not None:
            self._rest.cancel()
        try:
            await self._app(scope, counting, send)
        finally:
            self._num_open -= 1
            if num_bytes > _LARGE:
                self._give_back()
            if not self._num_open:
                loop = asyncio.get_running_loop()
                self._rest = loop.call_later(REST_S, self._give_back)
