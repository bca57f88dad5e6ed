"""The routes: which request is answered how."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from .._version import __version__
from ..structure.masks import BoundConstraint
from . import metrics as metrics_module
from .access import Gate, failure_response
from .answer_parser import Dialogue
from .body_parser import BodyParser
from .bridge import Bridge
from .choice import Choice
from .errors import AnswerError, bad_request
from .forced_calls import ForcedCalls
from .forms import Form, Forms, form_of
from .json_body import UNREADABLE, JSONRoute
from .lanes import LIMIT_S, Lanes
from .openai_format import Envelope, dumps
from .openapi import DescribedApp, Offer
from .prompts import Prompt, Prompts
from .reply import Reply
from .request_log import ID_HEADER, Counted
from .responses import Answer, ChatStyle, CompletionStyle, Style
from .schema import ChatBody, CompletionBody
from .settings import Settings
from .stream import EventStream, unless_gone
from .tidy import Tidied, memory_returner
from .vocabulary import Vocabulary

logger = logging.getLogger("mlx_gemma_mtp.server")

T = TypeVar("T")

PAGE = Path(__file__).with_name("page.html")
POSTED = frozenset({"/chat/completions", "/v1/chat/completions", "/v1/completions"})
ENDPOINTS = POSTED | {
    "/",
    "/health",
    "/metrics",
    "/openapi.json",
    "/stats",
    "/v1/models",
}
# The page is one file with its own script; nothing else may be fetched or run.
_PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


@dataclass(frozen=True)
class Desk:
    """What the routes work with.

    Attributes:
        settings: The command's.
        bridge: The way to the engine.
        body_parser: Makes choices.
        prompts: Makes prompts, in ``lanes``.
        dialogue: How answers are marked.
        forced_calls: Finds which calls an answer must have.
        vocabulary: The tokens' texts.
        forms: Compiles what answers must be, in ``lanes``.
        lanes: The threads of both.
    """

    settings: Settings
    bridge: Bridge
    body_parser: BodyParser
    prompts: Prompts
    dialogue: Dialogue
    forced_calls: ForcedCalls
    vocabulary: Vocabulary
    forms: Forms
    lanes: Lanes

    async def prepared(
        self,
        request: Request,
        num_choices: int,
        size: int,
        function: Callable[[], T],
        form: Form | None,
    ) -> tuple[T, BoundConstraint | None]:
        """Let the tokenizer work for a request as long as its client is there.

        Args:
            request: The request.
            num_choices: For which room is kept meanwhile.
            size: What there is to do, in characters.
            function: What uses the tokenizer.
            form: What the answer must be; None for anything.

        Returns:
            What the function returns, and the form, compiled.

        Raises:
            AnswerError: There is no room, the client has gone, the form cannot be
                compiled, or something takes too long.
        """
        with self.bridge.room(num_choices):
            constraint = None
            if form is not None:
                compiled = self.lanes.compile(size, lambda: self.forms.compiled(form))
                late = form.refused(
                    f"it must be compiled within {LIMIT_S:.0f} s: it was not. Make it "
                    "simpler."
                )
                constraint = await _waited(request, compiled, late)
            late = bad_request(
                f"the prompt must be made of the request within {LIMIT_S:.0f} s: "
                "it was not. Send fewer messages, or less text.",
                "messages",
            )
            found = await _waited(request, self.lanes.run(size, function), late)
        return found, constraint


async def _waited(request: Request, work: Awaitable[T], late: AnswerError) -> T:
    """What work gives, as long as its client is there.

    Raises:
        AnswerError: The client has gone; or ``late``, where it takes too long.
    """
    try:
        found = await unless_gone(work, request.receive)
    except TimeoutError:
        raise late from None
    if found is None:
        raise AnswerError(499, "nobody waits for the answer.")
    return found


def make_app(desk: Desk) -> ASGIApp:
    """The application, with what stands in front of it."""
    offer = Offer(
        has_key=desk.settings.api_key is not None,
        has_tools=desk.prompts.has_tools,
        forces_calls=desk.prompts.has_tools and desk.forced_calls.are_possible,
        vocab_size=desk.body_parser.vocab_size,
        max_logprobs=desk.settings.limits.logprobs,
        limits_thoughts=desk.body_parser.limits_thoughts,
    )
    app = DescribedApp(
        offer,
        title="mlx_gemma_mtp.server",
        version=__version__,
        docs_url=None,  # its page would load scripts from elsewhere
        redoc_url=None,
    )
    app.router.route_class = JSONRoute
    _add_handlers(app)
    _add_routes(app, desk)
    settings = desk.settings
    gate: ASGIApp = Gate(
        app,
        api_key=settings.api_key,
        allowed_hosts=settings.allowed_hosts,
        posted=POSTED,
        max_bytes=settings.limits.request_bytes,
    )
    if settings.allowed_origins:
        gate = CORSMiddleware(
            gate,
            allow_origins=settings.allowed_origins,
            allow_methods=["GET", "HEAD", "POST"],
            allow_headers=["*"],
            expose_headers=[ID_HEADER],
        )
    counted = Counted(
        gate, observe=desk.bridge.metrics.observe_request, endpoints=ENDPOINTS
    )
    return Tidied(counted, memory_returner())


def _add_handlers(app: FastAPI) -> None:
    """Let every mistake be told in OpenAI's form."""

    @app.exception_handler(AnswerError)
    async def failed(_: Request, failure: AnswerError) -> Response:
        return failure_response(failure)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        return failure_response(_invalid(error))

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}"
        response = failure_response(AnswerError(error.status_code, message[:300]))
        response.headers.update(error.headers or {})
        if error.status_code == 405:
            methods = set(response.headers["allow"].split(", "))
            head = {"HEAD"} if "GET" in methods else set()
            response.headers["allow"] = ", ".join(sorted(methods | head))
        return response

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> Response:
        # Starlette raises it again, and uvicorn logs it.
        text = "the request has failed; the server's log says why."
        return failure_response(AnswerError(500, text))


def _invalid(error: RequestValidationError) -> AnswerError:
    """What is wrong with a body, one of its mistakes."""
    first: Mapping[str, Any] = max(error.errors(), key=_interest)
    if first["type"] == "json_invalid":
        return AnswerError(400, UNREADABLE)
    place = _place(first, error.body)
    reason = str(first["msg"])
    return AnswerError(
        400,
        f"{place or 'the body'}: {reason[:1].lower()}{reason[1:]}."[:300],
        param=place[:100] or None,
    )


def _interest(mistake: Mapping[str, Any]) -> tuple[bool, int]:
    """How much a mistake says, where a field may be one thing or another.

    That it is not of one type says nothing if it is of another.
    """
    return not mistake["type"].endswith("_type"), len(mistake["loc"])


def _place(mistake: Mapping[str, Any], body: Any) -> str:
    """Where in a body a mistake is, without pydantic's names of alternatives."""
    parts: list[str] = []
    for part in mistake["loc"][1:]:
        is_field = isinstance(body, dict) and part in body
        is_entry = isinstance(body, list) and isinstance(part, int)
        if is_field or is_entry:
            body = body[part]
        if is_field or is_entry or mistake["type"] == "missing":
            parts.append(str(part))
    return ".".join(parts)


def _add_routes(app: FastAPI, desk: Desk) -> None:
    """Every route."""
    _add_chat_routes(app, desk)
    _add_completion_routes(app, desk)
    _add_model_routes(app, desk)
    _add_state_routes(app, desk)


def _add_chat_routes(app: FastAPI, desk: Desk) -> None:
    @app.post("/chat/completions", include_in_schema=False)  # mlx-lm's server has it
    @app.post("/v1/chat/completions", summary="Answer a message")
    async def chat(request: Request, body: ChatBody) -> Response:
        arrived = time.perf_counter()
        desk.body_parser.check(body)
        desk.bridge.check_room(body.n or 1)
        messages = [message.plain() for message in body.messages]
        desk.prompts.check_messages(messages)
        tools = desk.body_parser.tools_of(body, has_tools=desk.prompts.has_tools)
        form = desk.forced_calls.of(body, tools, form_of(body))
        prompt, constraint = await desk.prepared(
            request,
            body.n or 1,
            # Templates look back and forth from each message.
            len(await request.body()) + len(messages) ** 2,
            lambda: desk.prompts.of_messages(
                messages,
                tools=tools,
                template_args=desk.body_parser.template_args_of(body),
                continues_last=body.continue_final_message,
            ),
            form,
        )
        choices = desk.body_parser.of_chat(body, prompt, constraint)
        readers = desk.dialogue.readers(
            tools,
            len(choices),
            opening=prompt.opening,
            has_numbers=bool(body.stream),
            max_calls=1 if body.parallel_tool_calls is False else None,
        )
        style = ChatStyle(
            Envelope.of_chat(body.model or desk.settings.names[0]),
            readers,
            desk.vocabulary,
            has_logprobs=bool(body.logprobs),
        )
        return await _answer(request, desk, body, choices, style, arrived)


def _add_completion_routes(app: FastAPI, desk: Desk) -> None:
    @app.post("/v1/completions", summary="Continue a text")
    async def complete(request: Request, body: CompletionBody) -> Response:
        arrived = time.perf_counter()
        desk.body_parser.check(body)
        given = _listed(body.prompt)
        num_choices = len(given) * (body.n or 1)
        desk.bridge.check_room(num_choices)
        desk.prompts.check_texts(given)
        form = form_of(body)
        prompts, constraint = await desk.prepared(
            request,
            num_choices,
            len(await request.body()),
            lambda: _prompts(desk.prompts, given),
            form,
        )
        choices = desk.body_parser.of_completion(body, prompts, constraint)
        style = CompletionStyle(
            Envelope.of_completion(body.model or desk.settings.names[0]),
            desk.vocabulary,
            has_logprobs=body.logprobs is not None,
        )
        return await _answer(request, desk, body, choices, style, arrived)


def _listed(given: Any) -> list[Any]:
    """The prompts of a body: one or several, as text or as token ids."""
    is_one = isinstance(given, str) or isinstance(given[0], int)
    return [given] if is_one else given


def _prompts(prompts: Prompts, given: list[Any]) -> list[Prompt]:
    return [
        prompts.of_text(each) if isinstance(each, str) else prompts.of_tokens(each)
        for each in given
    ]


async def _answer(
    request: Request,
    desk: Desk,
    body: ChatBody | CompletionBody,
    choices: list[Choice],
    style: Style,
    arrived: float,
) -> Response:
    """Let the engine work, and send what it makes."""
    reply = Reply(choices, arrived)
    answer = Answer(reply, style, num_choices=body.n or 1)
    desk.bridge.submit(reply)

    def let_go() -> None:
        desk.bridge.cancel(reply.jobs)

    try:
        await reply.accepted()
        if body.stream:
            options = body.stream_options
            has_usage = bool(options and options.include_usage)
            return EventStream(answer.chunks(has_usage=has_usage), let_go)
        whole = await unless_gone(answer.whole(), request.receive)
    except BaseException:
        let_go()
        raise
    let_go()
    if whole is None:
        return Response(status_code=499)  # nobody waits for it
    return Response(dumps(whole), media_type="application/json")


def _add_model_routes(app: FastAPI, desk: Desk) -> None:
    created = int(time.time())

    def described(name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": "mlx_gemma_mtp",
        }

    @app.get("/v1/models", summary="What is served")
    async def models() -> Response:
        data = [described(name) for name in desk.settings.names]
        return JSONResponse({"object": "list", "data": data})

    @app.get("/v1/models/{name:path}", summary="One model")
    async def model(name: str) -> Response:
        desk.body_parser.check_model(name)
        return JSONResponse(described(name))


def _add_state_routes(app: FastAPI, desk: Desk) -> None:
    bridge = desk.bridge

    @app.get("/health", summary="Whether requests are taken")
    async def health() -> Response:
        status = bridge.status
        return JSONResponse({"status": status}, 200 if status == "ok" else 503)

    @app.get("/metrics", summary="Everything that is counted, for Prometheus")
    async def metrics() -> Response:
        return Response(
            bridge.metrics.exposition(),
            headers={"content-type": metrics_module.CONTENT_TYPE},
        )

    @app.get("/stats", summary="The page's figures")
    async def stats() -> Response:
        return JSONResponse(bridge.metrics.page())

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(PAGE, headers=_PAGE_HEADERS)
