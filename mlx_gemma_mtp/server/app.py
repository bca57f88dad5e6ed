"""The routes: which request is answered how."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from .._version import __version__
from . import metrics as metrics_module
from . import tokenizing
from .access import Gate
from .choice import Choice
from .conversation import conversation_of
from .desk import Desk
from .errors import AnswerError
from .failures import failure_response
from .forms import form_of
from .json_body import UNREADABLE, JSONRoute
from .messages import routes as messages
from .openai_format import Envelope
from .openapi import DescribedApp, Offer
from .prompts import Prompt, Prompts
from .request_log import ID_HEADER, Counted
from .responses import ChatStyle, ChoiceWriter, CompletionStyle, Style
from .responses_api import routes as responses_api
from .schema import ChatBody, CompletionBody
from .tidy import Tidied, memory_returner

logger = logging.getLogger("mlx_gemma_mtp.server")

PAGE = Path(__file__).with_name("page.html")
POSTED = frozenset(
    {
        "/chat/completions",
        "/v1/chat/completions",
        "/v1/completions",
        messages.PATH,
        messages.COUNT_PATH,
        tokenizing.TOKENIZE,
        tokenizing.DETOKENIZE,
        responses_api.PATH,
    }
)
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
    """Let every mistake be told in the form of the path's dialect."""

    @app.exception_handler(AnswerError)
    async def failed(request: Request, failure: AnswerError) -> Response:
        return failure_response(failure, request.url.path)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return failure_response(_invalid(error), request.url.path)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        path = request.url.path
        message = f"{request.method} {path}: {error.detail}"
        response = failure_response(AnswerError(error.status_code, message[:300]), path)
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
        return failure_response(AnswerError(500, text), request.url.path)


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
    messages.add_routes(app, desk)
    responses_api.add_routes(app, desk)
    tokenizing.add_routes(app, desk)
    _add_model_routes(app, desk)
    _add_state_routes(app, desk)


def _add_chat_routes(app: FastAPI, desk: Desk) -> None:
    @app.post("/chat/completions", include_in_schema=False)  # mlx-lm's server has it
    @app.post("/v1/chat/completions", summary="Answer a message")
    async def chat(request: Request, body: ChatBody) -> Response:
        arrived = time.perf_counter()
        asked = await conversation_of(request, desk, body)
        style = ChatStyle(
            Envelope.of_chat(body.model or desk.settings.names[0]),
            asked.readers(desk),
            desk.vocabulary,
            has_logprobs=bool(body.logprobs),
        )
        return await _answered(request, desk, body, asked.choices(desk), style, arrived)


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
        return await _answered(request, desk, body, choices, style, arrived)


def _listed(given: Any) -> list[Any]:
    """The prompts of a body: one or several, as text or as token ids."""
    is_one = isinstance(given, str) or isinstance(given[0], int)
    return [given] if is_one else given


def _prompts(prompts: Prompts, given: list[Any]) -> list[Prompt]:
    return [
        prompts.of_text(each) if isinstance(each, str) else prompts.of_tokens(each)
        for each in given
    ]


async def _answered(
    request: Request,
    desk: Desk,
    body: ChatBody | CompletionBody,
    choices: list[Choice],
    style: Style,
    arrived: float,
) -> Response:
    """Answer in OpenAI's form of choices."""
    options = body.stream_options
    writer = ChoiceWriter(style, has_usage=bool(options and options.include_usage))
    return await desk.answered(
        request,
        choices,
        writer,
        arrived,
        num_choices=body.n or 1,
        is_stream=bool(body.stream),
    )


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
