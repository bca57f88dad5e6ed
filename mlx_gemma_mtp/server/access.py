"""Who may send a request, and how large it may be: before anything looks at it."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import AnswerError
from .failures import failure_response
from .json_body import UNREADABLE

# The page is the same for everybody, asks for the key and shows nothing without it.
OPEN_PATHS = frozenset({"/", "/health"})
_BODY_TIMEOUT_S = 30.0  # for a body that is sent slowly


class Gate:
    """Lets requests through to the application.

    Args:
        app: The application.
        api_key: What requests must bring; None for nothing.
        allowed_hosts: Names by which a request without a key may call this machine.
        posted: Paths that take a body; no other's is looked at.
        max_bytes: Largest body.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        api_key: str | None,
        allowed_hosts: tuple[str, ...],
        posted: frozenset[str],
        max_bytes: int,
    ) -> None:
        self._app = app
        self._key = None if api_key is None else api_key.encode()
        self._allowed_hosts = allowed_hosts
        self._posted = posted
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check a request and hand it on, its body read."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._check(scope["path"], Headers(scope=scope))
            if scope["method"] == "POST" and scope["path"] in self._posted:
                receive = await self._with_body(Headers(scope=scope), receive)
            if scope["method"] == "HEAD":  # uvicorn sends no body for it
                scope = {**scope, "method": "GET"}
        except AnswerError as failure:
            response = failure_response(failure, scope["path"])
            if failure.status == 401:
                response.headers["www-authenticate"] = "Bearer"
            await response(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _check(self, path: str, headers: Headers) -> None:
        """Check who asks.

        Raises:
            AnswerError: Somebody who may not.
        """
        if path in OPEN_PATHS:
            return
        if self._key is None:
            self._check_host(headers.get("host", ""))
        elif not any(hmac.compare_digest(k, self._key) for k in _given_keys(headers)):
            raise AnswerError(
                401,
                "the API key must be sent as Authorization: Bearer KEY: got none or "
                "another one.",
                code="invalid_api_key",
            )

    def _check_host(self, host: str) -> None:
        """Refuse names that a foreign web page may have given this machine.

        A page can let its own name point here and then talk to this server as if it
        were its own; an address or localhost cannot be a page's name.
        """
        name = _host_name(host)
        if name not in self._allowed_hosts and not _is_own(name):
            raise AnswerError(
                403,
                f"the host must be an address or localhost: got {name[:100]!r}. Start "
                "the server with --allowed-hosts NAME, or with --api-key.",
            )

    async def _with_body(self, headers: Headers, receive: Receive) -> Receive:
        """Read a body and give it on in one piece.

        Raises:
            AnswerError: It is too large, too slow, or no JSON.
        """
        kind = headers.get("content-type", "").split(";")[0].strip().lower()
        if kind != "application/json":
            # Which also keeps out web pages: they may send other types unasked.
            raise AnswerError(
                415,
                f"content-type must be application/json: got {kind[:100]!r}.",
            )
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length[:19]) > self._max_bytes:
            raise self._too_large()
        try:
            body = await asyncio.wait_for(self._read(receive), _BODY_TIMEOUT_S)
        except TimeoutError:
            raise AnswerError(
                408, f"the body must arrive within {_BODY_TIMEOUT_S:.0f} s."
            ) from None
        if not body:
            raise AnswerError(400, UNREADABLE)
        message: Message = {"type": "http.request", "body": body, "more_body": False}
        messages = iter([message])

        async def receive_again() -> Message:
            return next(messages, None) or await receive()

        return receive_again

    async def _read(self, receive: Receive) -> bytes:
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise AnswerError(
                    400, "the body must be complete: the connection ended."
                )
            body += message.get("body", b"")
            if len(body) > self._max_bytes:
                raise self._too_large()
            if not message.get("more_body", False):
                return bytes(body)

    def _too_large(self) -> AnswerError:
        return AnswerError(
            413, f"the body must be at most {self._max_bytes} bytes: got more."
        )


def _given_keys(headers: Headers) -> list[bytes]:
    """The keys that a request brings, in OpenAI's way and in Anthropic's."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    found = [key] if scheme.lower() == "bearer" else []
    found += [headers["x-api-key"]] if "x-api-key" in headers else []
    return [each.strip().encode("latin-1") for each in found]


def _host_name(host: str) -> str:
    """The name in a Host header, without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].rstrip(".").lower()


def _is_own(name: str) -> bool:
    """Whether a name is an address, or always this machine's."""
    if not name or name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
