"""Gives memory back to the system that large bodies took.

glibc keeps what was freed for later, a hundred megabytes and more behind a few large
bodies. It is asked to let go of that. Other allocators are not asked: macOS's gives
large blocks back by itself.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

_LARGE = 10**6  # bytes of a body


def memory_returner() -> Callable[[], None]:
    """What gives freed memory back; it does nothing where there is no glibc."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return lambda: None
    return lambda: trim(0)


class Tidied:
    """Tidies up behind large bodies.

    Args:
        app: The application.
        give_back: Called once a request with a large body is over.
    """

    def __init__(self, app: ASGIApp, give_back: Callable[[], None]) -> None:
        self._app = app
        self._give_back = give_back

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, then tidy up."""
        num_bytes = 0

        async def counting() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            return message

        try:
            await self._app(scope, counting, send)
        finally:
            if num_bytes > _LARGE:
                self._give_back()
