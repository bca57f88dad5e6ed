"""Texts as tokens and back, as vLLM's ``/tokenize`` and ``/detokenize`` have it."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from pydantic import Field

from .conversation import conversation_of
from .desk import Desk
from .errors import bad_request
from .openai_format import dumps
from .schema import Listed, Message, Numbers, TokenId, Tool, translated

TOKENIZE, DETOKENIZE = "/tokenize", "/detokenize"
_OF_CHATS = frozenset(
    {
        "model",
        "messages",
        "tools",
        "reasoning_effort",
        "continue_final_message",
        "chat_template_kwargs",
    }
)


class _Body(Numbers):
    model: str | None = None


class TokenizeBody(_Body):
    """The body of ``/tokenize``: a text or a conversation."""

    prompt: str | None = None
    messages: Listed[Message] | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True)] | None = None
    reasoning_effort: Annotated[str, Field(max_length=64)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(_Body):
    """The body of ``/detokenize``."""

    tokens: Annotated[list[TokenId], Field(fail_fast=True)]


def add_routes(app: FastAPI, desk: Desk) -> None:
    """Let an application answer them."""

    @app.post(TOKENIZE, summary="A prompt's tokens")
    async def tokenize(request: Request, body: TokenizeBody) -> Response:
        desk.body_parser.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise bad_request(
                "the body must hold prompt or messages: got both or none. Send one.",
                "prompt",
            )
        if body.prompt is not None:
            tokens = await _tokens_of_text(request, desk, body.prompt, body)
        else:
            tokens = await _tokens_of_chat(request, desk, body)
        found: dict[str, Any] = {
            "count": len(tokens),
            "max_model_len": desk.body_parser.model_len,
            "tokens": tokens,
        }
        if body.return_token_strs:
            found["token_strs"] = desk.vocabulary.pieces_of(tokens)
        return Response(dumps(found), media_type="application/json")

    @app.post(DETOKENIZE, summary="The text of tokens")
    async def detokenize(request: Request, body: DetokenizeBody) -> Response:
        desk.body_parser.check_model(body.model)
        for token in body.tokens:
            desk.body_parser.check_id("tokens", token)
        text, _ = await desk.prepared(
            request,
            1,
            len(body.tokens),
            lambda: desk.vocabulary.text_of_all(body.tokens),
            None,
        )
        return Response(dumps({"prompt": text}), media_type="application/json")


async def _tokens_of_text(
    request: Request, desk: Desk, text: str, body: TokenizeBody
) -> list[int]:
    """The tokens of a text, the one that begins a sequence included if it is to be."""
    desk.prompts.check_texts([text])
    is_part = body.add_special_tokens is False
    make = desk.prompts.of_part if is_part else desk.prompts.of_text
    prompt, _ = await desk.prepared(
        request,
        1,
        len(text),
        lambda: make(text),
        None,
    )
    return prompt.tokens


async def _tokens_of_chat(
    request: Request, desk: Desk, body: TokenizeBody
) -> list[int]:
    """The tokens of a conversation, as ``/v1/chat/completions`` reads it."""
    if body.add_special_tokens:
        raise bad_request(
            "add_special_tokens must be left out beside messages: the chat template "
            "writes these tokens.",
            "add_special_tokens",
        )
    fields = body.model_dump(include=set(_OF_CHATS), exclude_unset=True)
    opens_answer = body.add_generation_prompt is not False
    if not opens_answer:
        fields["continue_final_message"] = False
    asked = await conversation_of(
        request, desk, translated(fields), opens_answer=opens_answer
    )
    return asked.prompt.tokens
