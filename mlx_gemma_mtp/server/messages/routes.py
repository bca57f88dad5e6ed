"""The routes of Anthropic's Messages."""

from __future__ import annotations

import time

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from ..conversation import Conversation, conversation_of
from ..desk import Desk
from ..errors import renamed
from .answer import MessageWriter
from .errors import PATH
from .schema import REFUSED, WITHOUT_EFFECT, CountBody, MessagesBody
from .translation import chat_body, names

COUNT_PATH = f"{PATH}/count_tokens"


def add_routes(app: FastAPI, desk: Desk) -> None:
    """Let an application answer them."""

    @app.post(PATH, summary="Answer a message, in Anthropic's form")
    async def messages(request: Request, body: MessagesBody) -> Response:
        arrived = time.perf_counter()
        with renamed(names(body)):
            asked = await _asked(request, desk, body)
            choices = asked.choices(desk)
        (reader,) = asked.readers(desk)
        writer = MessageWriter(
            reader,
            model=body.model or desk.settings.names[0],
            num_prompt_tokens=len(asked.prompt.tokens),
        )
        return await desk.answered(
            request, choices, writer, arrived, is_stream=bool(body.stream)
        )

    @app.post(COUNT_PATH, summary="Count a message's tokens")
    async def count(request: Request, body: CountBody) -> Response:
        with renamed(names(body)):
            asked = await _asked(request, desk, body)
        return JSONResponse({"input_tokens": len(asked.prompt.tokens)})


async def _asked(request: Request, desk: Desk, body: CountBody) -> Conversation:
    """The conversation that a body holds.

    Raises:
        AnswerError: See ``conversation_of``.
    """
    desk.body_parser.fields.check(body.model_extra or {}, REFUSED, WITHOUT_EFFECT)
    return await conversation_of(request, desk, chat_body(body))
