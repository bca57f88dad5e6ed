"""The routes of OpenAI's Responses."""

from __future__ import annotations

import time

from fastapi import FastAPI, Request
from fastapi.responses import Response

from ..conversation import conversation_of
from ..desk import Desk
from ..errors import AnswerError, renamed
from .answer import ResponseWriter
from .schema import REFUSED, WITHOUT_EFFECT, ResponsesBody
from .tools import ToolNames
from .translation import NAMES, chat_body

PATH = "/v1/responses"


def add_routes(app: FastAPI, desk: Desk) -> None:
    """Let an application answer them."""

    @app.post(PATH, summary="Answer a message, in OpenAI's later form")
    async def respond(request: Request, body: ResponsesBody) -> Response:
        arrived = time.perf_counter()
        fields = desk.body_parser.fields
        fields.check(body.model_extra or {}, REFUSED, WITHOUT_EFFECT)
        tools = ToolNames(body.tools or ())
        for kind in tools.left_out:
            fields.tell(f"tools.{kind}")
        with renamed(NAMES):
            asked = await conversation_of(request, desk, chat_body(body, tools))
            choices = asked.choices(desk)
        (reader,) = asked.readers(desk)
        model = body.model or desk.settings.names[0]
        writer = ResponseWriter(body, reader, tools, model=model)
        return await desk.answered(
            request, choices, writer, arrived, is_stream=bool(body.stream)
        )

    @app.get(f"{PATH}/{{name:path}}", include_in_schema=False)
    async def stored(name: str) -> Response:
        raise AnswerError(
            404,
            f"a response must be kept by its client: got {name[:100]!r}. Nothing is "
            "stored here.",
        )
