"""Reading a body as JSON: in one way, with one answer for every body that is none."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn

from fastapi import Request
from fastapi.responses import Response
from fastapi.routing import APIRoute

UNREADABLE = "the body must be JSON in UTF-8, without half surrogate pairs: it is not."


class JSONRoute(APIRoute):
    """A route whose bodies are read by ``read``."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """See FastAPI, which reads UTF-16 too and fails on what is no text."""
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            return await handler(_Request(request.scope, request.receive))

        return handle


class _Request(Request):
    async def json(self) -> Any:
        return read(await self.body())


def read(raw: bytes) -> Any:
    """What a body says.

    Half characters, which JSON can write, are refused: no tokenizer can read them.

    Raises:
        json.JSONDecodeError: It cannot be read, for whatever reason.
    """
    try:
        found = json.loads(raw.decode("utf-8-sig"), parse_constant=refuse_constant)
        if b"\\ud" in raw or b"\\uD" in raw:  # how a surrogate is written
            json.dumps(found, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        # The only error that FastAPI knows to be the body's.
        raise json.JSONDecodeError(UNREADABLE, "", 0) from None
    return found


def refuse_constant(name: str) -> NoReturn:
    """Refuse NaN and its like, which Python takes for JSON.

    Raises:
        ValueError: Always.
    """
    raise ValueError(name)
