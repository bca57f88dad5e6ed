"""uvicorn's HTTP protocol, with limits on what a connection may cost.

uvicorn itself waits for ever for a request that never comes and for a reader that
never reads, and says what is wrong in plain text.
"""

from __future__ import annotations

import asyncio
from typing import Any, ClassVar

from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from . import formats
from .failures import AnswerError

# Seconds for a request's head to arrive, from the first of its bytes or from the
# connection's beginning.
HEAD_TIMEOUT_S = 20.0
# Seconds in which a reader must take something of what waits for it.
STALL_TIMEOUT_S = 60.0


class LimitedProtocol(H11Protocol):
    """One connection.

    Args:
        settings: uvicorn's.

    Attributes:
        max_connections: Most open connections; one more is told so and closed.
    """

    max_connections: ClassVar[int]

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._head_alarm: asyncio.TimerHandle | None = None
        self._stall_alarm: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection, or refuse it."""
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            text = f"at most {self.max_connections} connections are taken."
            self._refuse(AnswerError(503, f"{text} Try again later.", retry_after=1))
        else:
            self._expect_head()

    def data_received(self, data: bytes) -> None:
        """Take some bytes of a request."""
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._expect_head()  # or the rest of a body that was refused
        else:
            self._head_alarm = _stopped(self._head_alarm)

    def on_response_complete(self) -> None:
        """Go on to the next request, for which uvicorn waits its own time."""
        self._head_alarm = _stopped(self._head_alarm)
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._head_alarm = _stopped(self._head_alarm)
        self._stall_alarm = _stopped(self._stall_alarm)
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Note that the reader is behind."""
        super().pause_writing()
        if self._stall_alarm is None:
            self._stall_alarm = self.loop.call_later(
                STALL_TIMEOUT_S, self.transport.abort
            )

    def resume_writing(self) -> None:
        """Note that the reader has read."""
        self._stall_alarm = _stopped(self._stall_alarm)
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Say that something is no HTTP request."""
        self._refuse(AnswerError(400, msg))

    def _expect_head(self) -> None:
        if self._head_alarm is None and not self.transport.is_closing():
            self._head_alarm = self.loop.call_later(
                HEAD_TIMEOUT_S, self.transport.abort
            )

    def _refuse(self, failure: AnswerError) -> None:
        """Answer without a request, and close."""
        body = formats.dumps(failure.body())
        lines = [
            f"HTTP/1.1 {failure.status} {STATUS_PHRASES[failure.status].decode()}",
            "content-type: application/json",
            f"content-length: {len(body)}",
            "connection: close",
            *(f"{name}: {value}" for name, value in failure.headers().items()),
        ]
        head = "\r\n".join(lines).encode() + b"\r\n\r\n"
        self.transport.write(head + body)
        self.transport.close()


def limited_protocol(max_connections: int) -> type[LimitedProtocol]:
    """The protocol with its limit, which uvicorn has no way to hand on."""
    return type("Limited", (LimitedProtocol,), {"max_connections": max_connections})


def _stopped(alarm: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    """No alarm any more, whether there was one or not."""
    if alarm is not None:
        alarm.cancel()
    return None
