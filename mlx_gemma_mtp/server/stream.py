"""Sending what comes bit by bit, and noticing that nobody reads it any more."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

T = TypeVar("T")

_HEADERS = {
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # nginx would wait for more
}


async def until_gone(receive: Receive) -> None:
    """Wait until the client has gone away."""
    message: Message = {"type": ""}
    while message["type"] != "http.disconnect":
        message = await receive()


async def unless_gone(work: Awaitable[T], receive: Receive) -> T | None:
    """Work for a client as long as it is there.

    Args:
        work: What it waits for; cancelled when it goes away.
        receive: Its messages.

    Returns:
        What came out, or None for nobody.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(until_gone(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for each in (task, watch):
            each.cancel()


class EventStream(Response):
    """A stream of server-sent events.

    Args:
        chunks: The events.
        on_end: Called when the stream has ended, for whatever reason.
    """

    media_type = "text/event-stream"

    def __init__(
        self, chunks: AsyncIterator[bytes], on_end: Callable[[], None]
    ) -> None:
        self.status_code = 200
        self.background = None
        self._chunks = chunks
        self._on_end = on_end
        self.init_headers(_HEADERS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything, or as much as somebody reads."""
        try:
            await unless_gone(self._send(send), receive)
        finally:
            self._on_end()

    async def _send(self, send: Send) -> None:
        start: dict[str, Any] = {
            "type": "http.response.start",
            "status": self.status_code,
            "headers": self.raw_headers,
        }
        await send(start)
        async for chunk in self._chunks:
            await send(_body(chunk, more_body=True))
        await send(_body(b"", more_body=False))


def _body(chunk: bytes, *, more_body: bool) -> dict[str, Any]:
    return {"type": "http.response.body", "body": chunk, "more_body": more_body}
