"""What is said and counted of requests: each has a name, and its lines have it too."""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger("mlx_gemma_mtp.server")

ID_HEADER = "x-request-id"
_ID_NAMES = (ID_HEADER.encode(), b"request-id")  # OpenAI's and Anthropic's
FORMAT = "%(asctime)s %(levelname)s %(request)s%(message)s"
# What ids of clients are taken: nothing that a log or a header could mistake.
_HARMLESS = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
_QUIET_S = 60.0  # between two warnings of the same kind
_request: ContextVar[str] = ContextVar("request", default="")
_id: ContextVar[str] = ContextVar("id", default="")


def fresh_id() -> str:
    """A name for a request that brings none."""
    return secrets.token_hex(12)


def current_id() -> str:
    """The name of the request that is being answered; empty outside of one."""
    return _id.get()


@contextmanager
def about(client: tuple[str, int] | None, request_id: str) -> Iterator[None]:
    """Let the lines that are logged within say whose request they are about.

    Args:
        client: Address and port; None where they are not known.
        request_id: The request's name.
    """
    token = _request.set(_whose(client, request_id))
    try:
        yield
    finally:
        _request.reset(token)


def _whose(client: tuple[str, int] | None, request_id: str) -> str:
    host, port = client or ("?", 0)
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return f"{address} {request_id} "


class WithRequest(logging.Filter):
    """Gives every record the field that ``FORMAT`` names."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Let it pass."""
        record.request = _request.get()
        return True


class Sparing(logging.Filter):
    """Lets a line of each kind pass once a minute, with the number of those before."""

    def __init__(self) -> None:
        super().__init__()
        self._quiet_until: dict[str, float] = {}
        self._num_held: dict[str, int] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record is to be logged; its kind is its text."""
        kind, now = record.getMessage(), time.monotonic()
        if now < self._quiet_until.get(kind, now):
            self._num_held[kind] = self._num_held.get(kind, 0) + 1
            return False
        self._quiet_until[kind] = now + _QUIET_S
        num_held = self._num_held.pop(kind, 0)
        if num_held:
            record.msg, record.args = "%s (%d more before)", (kind, num_held)
        return True


class Counted:
    """Names the requests of an application and counts its answers.

    Args:
        app: The application.
        observe: Told of every answer: endpoint, status, seconds.
        endpoints: The paths that are told apart.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        observe: Callable[[str, int, float], None],
        endpoints: frozenset[str],
    ) -> None:
        self._app = app
        self._observe = observe
        self._endpoints = endpoints

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request and count it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(ID_HEADER, "")
        request_id = given if _HARMLESS.fullmatch(given) else fresh_id()
        # Not taken back: the task is this request's, and uvicorn may log its end.
        _request.set(_whose(scope["client"], request_id))
        _id.set(request_id)
        await self._counted(scope, receive, send, request_id)

    async def _counted(
        self, scope: Scope, receive: Receive, send: Send, request_id: str
    ) -> None:
        start = time.perf_counter()
        status = 499  # nobody waited for an answer

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                named = [(name, request_id.encode()) for name in _ID_NAMES]
                message = {**message, "headers": [*message["headers"], *named]}
            await send(message)

        try:
            await self._app(scope, receive, noting)
        finally:
            path = scope["path"] if scope["path"] in self._endpoints else "other"
            seconds = time.perf_counter() - start
            self._observe(path, status, seconds)
            # Others are asked for every second, by whatever watches the server.
            level = logging.INFO if scope["method"] == "POST" else logging.DEBUG
            logger.log(level, "%s %d in %.3f s", path, status, seconds)
