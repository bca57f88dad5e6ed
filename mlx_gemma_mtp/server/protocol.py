"""uvicorn's HTTP protocol, with limits on what a connection may cost.

uvicorn itself waits for ever for a request that never comes and for a reader that
never reads, takes heads of any size that arrive in one piece, and says what is wrong in
plain text and, for every request again, in the log.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any, ClassVar

import h11
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from . import openai_format as formats
from .errors import AnswerError
from .request_log import ID_HEADER, Sparing, about, fresh_id

logger = logging.getLogger("mlx_gemma_mtp.server.connections")
logger.addFilter(Sparing())

# Bytes of a request's line and headers together.
MAX_HEAD_BYTES = 16384

# Seconds for a request's head to arrive, from the first of its bytes or from the
# connection's beginning.
HEAD_TIMEOUT_S = 20.0
# Seconds in which a reader must take something of what waits for it.
STALL_TIMEOUT_S = 60.0


class Reader(h11.Connection):
    """Reads requests, of which none may be one for us and another for a proxy."""

    def __init__(self) -> None:
        super().__init__(h11.SERVER, max_incomplete_event_size=MAX_HEAD_BYTES)

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        """The next part of a request.

        Raises:
            AnswerError: It is none; the connection must end.
        """
        num_before = self._num_waiting if self.their_state is h11.IDLE else 0
        try:
            event = super().next_event()
        except h11.RemoteProtocolError as error:
            raise _failure_of(error) from None
        if isinstance(event, h11.Request):
            _check_head(event, num_before - self._num_waiting)
        return event

    @property
    def _num_waiting(self) -> int:
        """Bytes that were received and not read yet."""
        return len(self.trailing_data[0])


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
        self.conn = Reader()
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

    def handle_events(self) -> None:
        """Go on with what was received, or say why that is no request."""
        try:
            super().handle_events()
        except AnswerError as failure:
            self._refuse(failure)

    def shutdown(self) -> None:
        """End, unless that is under way."""
        if not self.transport.is_closing():
            super().shutdown()

    def _unsupported_upgrade_warning(self) -> None:
        """Say without uvicorn's advice, which is no user's, what was asked for."""
        with about(self.client, "-"):
            logger.warning("an upgrade was asked for, such as to a WebSocket: not done")

    def _expect_head(self) -> None:
        if self._head_alarm is None and not self.transport.is_closing():
            self._head_alarm = self.loop.call_later(
                HEAD_TIMEOUT_S, self.transport.abort
            )

    def _refuse(self, failure: AnswerError) -> None:
        """Answer what is no request, and close."""
        request_id = fresh_id()
        with about(self.client, request_id):
            logger.warning(
                f"%d: {failure.message}", failure.status
            )  # each its own kind
        if self._is_answering:
            self.transport.close()
            return
        body = formats.dumps(failure.body())
        lines = [
            f"HTTP/1.1 {failure.status} {STATUS_PHRASES[failure.status].decode()}",
            "content-type: application/json",
            f"content-length: {len(body)}",
            "connection: close",
            f"{ID_HEADER}: {request_id}",
            *(f"{name}: {value}" for name, value in failure.headers().items()),
        ]
        head = "\r\n".join(lines).encode() + b"\r\n\r\n"
        self.transport.write(head + body)
        self.transport.close()

    @property
    def _is_answering(self) -> bool:
        """Whether an answer has begun, in which no other one may begin."""
        cycle = self.cycle
        has_begun = cycle is not None and cycle.response_started
        return has_begun and not cycle.response_complete


def _check_head(request: h11.Request, num_bytes: int) -> None:
    """Refuse a head that is too long, or that does not say where its body ends.

    Raises:
        AnswerError: It is one of these.
    """
    if num_bytes > MAX_HEAD_BYTES:
        raise _head_too_long()
    names = {name for name, _ in request.headers}
    if b"transfer-encoding" in names:
        if b"content-length" in names:
            raise AnswerError(
                400,
                "a body must have content-length or transfer-encoding: got both.",
            )
        if request.http_version < b"1.1":
            raise AnswerError(400, "transfer-encoding must have HTTP/1.1: got 1.0.")


def _head_too_long() -> AnswerError:
    return AnswerError(
        431,
        f"a request's line and headers must have at most {MAX_HEAD_BYTES} bytes "
        "together: got more.",
    )


def _failure_of(error: h11.RemoteProtocolError) -> AnswerError:
    """What to say of h11's error, whose text may hold anything that was sent."""
    if error.error_status_hint == 431:
        return _head_too_long()
    return AnswerError(error.error_status_hint, "a request must be HTTP: it is not.")


def limited_protocol(max_connections: int) -> type[LimitedProtocol]:
    """The protocol with its limit, which uvicorn has no way to hand on."""
    return type("Limited", (LimitedProtocol,), {"max_connections": max_connections})


def _stopped(alarm: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    """No alarm any more, whether there was one or not."""
    if alarm is not None:
        alarm.cancel()
    return None
