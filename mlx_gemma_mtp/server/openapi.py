"""The description that the server gives of itself, where FastAPI cannot know it.

FastAPI describes the types of what requests hold. Here are the answers, who may ask,
and which values this server refuses.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from pydantic import TypeAdapter

from ..markup.tool_grammar import AUTO, REQUIRED
from . import answer_schema as answers
from .access import OPEN_PATHS
from .fields import (
    REFUSED_IN_CHATS,
    REFUSED_IN_COMPLETIONS,
    REFUSED_IN_MESSAGES,
    refused_fields,
)
from .forced_calls import NONE
from .messages import answer_schema as messages
from .messages.description import narrow as narrow_messages
from .messages.errors import OVERLOADED
from .messages.errors import PATH as MESSAGES
from .metrics import CONTENT_TYPE
from .request_log import ID_HEADER
from .responses_api import answer_schema as responses
from .responses_api.description import narrow as narrow_responses
from .responses_api.routes import PATH as RESPONSES
from .schema import NO_LIMIT
from .settings import RESERVED
from .thinking import LIMITS
from .tokenizing import DETOKENIZE, TOKENIZE

_JSON = "application/json"
_STREAM = "text/event-stream"
_REFERENCE = "#/components/schemas/"
_WHAT = "OpenAI's and Anthropic's APIs around a Gemma 4 model and its MTP drafter."
WHOLE: dict[str, Any] = {
    "/v1/chat/completions": answers.ChatCompletion,
    "/v1/completions": answers.Completion,
    MESSAGES: messages.MessageAnswer,
    f"{MESSAGES}/count_tokens": messages.TokenCount,
    RESPONSES: responses.Response,
    TOKENIZE: answers.TokenList,
    DETOKENIZE: answers.TokenText,
    "/v1/models": answers.ModelList,
    "/v1/models/{name}": answers.Model,
    "/health": answers.Health,
    "/stats": answers.Stats,
}
# The events of streams, but for errors.
CHUNKS: dict[str, tuple[Any, ...]] = {
    "/v1/chat/completions": (answers.ChatCompletionChunk,),
    "/v1/completions": (answers.CompletionChunk,),
    MESSAGES: messages.EVENTS,
    RESPONSES: responses.EVENTS,
}
_NO_KEY = {401: "The API key is missing or another one."}
_NO_NAME = {403: "The host is not one of this machine's names."}
_ERRORS = {
    400: "The request cannot be answered as it is.",
    404: "The model is not served.",
    405: "The path has another method.",
    408: "The body, or who reads the answer, is too slow.",
    413: "The body is too large.",
    415: "The body's type is not JSON's.",
    429: "Too many requests wait. Try again later.",
    500: "The server has failed.",
    503: "The server is shutting down, or has failed.",
}
_OVERLOADED = "The server is shutting down. Try again later."
_HEADERS = {
    ID_HEADER: {
        "description": "The request's name: its own, or a fresh one.",
        "required": True,
        "schema": {"type": "string"},
    },
    "retry-after": {
        "description": "Seconds after which trying again makes sense.",
        "schema": {"type": "integer"},
    },
}
_GETS = frozenset({"/v1/models", "/v1/models/{name}", "/health", "/metrics", "/stats"})
# Whose streams end with a word of their own.
_ENDED = frozenset({"/v1/chat/completions", "/v1/completions"})
_OF_PATH = {"/v1/models/{name}": (404, 405), "/health": (405, 503)}
_SCHEME = "bearer"
_MAX_DIGITS = 11  # of a token id that is a name, as ``body_parser`` takes it
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_TOP_NEEDS_LOGPROBS = {
    "if": {
        "properties": {"top_logprobs": {"type": "integer", "minimum": 1}},
        "required": ["top_logprobs"],
    },
    "then": {"properties": {"logprobs": {"const": True}}, "required": ["logprobs"]},
}
_FORMS = ("json", "regex", "choice", "grammar")  # of vLLM's field
_SCHEMA_IS_THERE = {
    "if": {"properties": {"type": {"const": "json_schema"}}, "required": ["type"]},
    "then": {
        "properties": {"json_schema": {"type": "object"}},
        "required": ["json_schema"],
    },
}
_NO_TOOLS = {
    "anyOf": [
        {"properties": {"tools": {"maxItems": 0}}},
        {"properties": {"tool_choice": {"const": "none"}}, "required": ["tool_choice"]},
    ]
}


@dataclass(frozen=True)
class Offer:
    """What one server's description depends on.

    Attributes:
        has_key: Whether requests must bring a key.
        has_tools: Whether the chat template has tools.
        forces_calls: Whether calls of them can be required.
        vocab_size: Number of token ids.
        max_logprobs: Most likely tokens that a request may ask for.
        limits_thoughts: Whether a request may limit thoughts.
    """

    has_key: bool
    has_tools: bool
    forces_calls: bool
    vocab_size: int
    max_logprobs: int
    limits_thoughts: bool


class DescribedApp(FastAPI):
    """An application whose description is whole.

    Args:
        offer: What the description depends on.
        settings: FastAPI's.
    """

    def __init__(self, offer: Offer, **settings: Any) -> None:
        super().__init__(description=_WHAT, **settings)
        self._offer = offer

    def openapi(self) -> dict[str, Any]:
        """The description; made once."""
        if self.openapi_schema is None:
            self.openapi_schema = self._completed(super().openapi())
        return self.openapi_schema

    def _completed(self, found: dict[str, Any]) -> dict[str, Any]:
        parts = found["components"]
        schemas = parts["schemas"]
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)  # FastAPI's own form of a mistake
        _make_exact(schemas)
        _narrow(schemas, self._offer)
        schemas.update(_answer_schemas())
        parts["headers"] = _HEADERS
        has_key = self._offer.has_key
        if has_key:
            parts["securitySchemes"] = {_SCHEME: {"type": "http", "scheme": "bearer"}}
        for path, operations in found["paths"].items():
            is_open = path in OPEN_PATHS
            strangers = {} if is_open else _NO_KEY if has_key else _NO_NAME
            for operation in operations.values():
                operation["responses"] = dict(_responses(path, strangers))
                if has_key:
                    operation["security"] = [] if is_open else [{_SCHEME: []}]
        return found


def _make_exact(schema: Any) -> None:
    """Write bounds of integers as integers: FastAPI rounds large ones."""
    if isinstance(schema, list):
        for each in schema:
            _make_exact(each)
    elif isinstance(schema, dict):
        for name, value in schema.items():
            if name in _BOUNDS and isinstance(value, float) and value.is_integer():
                schema[name] = int(value)
            _make_exact(value)


def _narrow(schemas: dict[str, Any], offer: Offer) -> None:
    """Say which values of the right type are refused."""
    chat, text = schemas["ChatBody"], schemas["CompletionBody"]
    for body in (chat, text):
        fields = body["properties"]
        fields["logit_bias"]["propertyNames"] = {
            "pattern": _numbers_to(offer.vocab_size - 1),
            "description": f"Token ids from 0 to {offer.vocab_size - 1}.",
        }
        for name in ("prompt", "stop_token_ids"):
            _bound_tokens(fields.get(name), offer.vocab_size)
    for field in (text["properties"]["logprobs"], chat["properties"]["top_logprobs"]):
        field["anyOf"][0]["maximum"] = offer.max_logprobs
    for body, refused in (
        (chat, REFUSED_IN_CHATS),
        (text, REFUSED_IN_COMPLETIONS),
        (schemas["Message"], REFUSED_IN_MESSAGES),
    ):
        body["properties"].update(refused_fields(refused))
    schemas["ResponseFormat"].update(_SCHEMA_IS_THERE)
    schemas["StructuredOutputs"]["oneOf"] = [
        *(_with(name, {"not": {"type": "null"}}) for name in _FORMS),
        _with("json_object", {"const": True}),
    ]
    fields = chat["properties"]
    names = {"not": {"enum": sorted(RESERVED)}}
    fields["chat_template_kwargs"]["propertyNames"] = names
    chat["allOf"] = (
        [_TOP_NEEDS_LOGPROBS] if offer.has_tools else [_TOP_NEEDS_LOGPROBS, _NO_TOOLS]
    )
    _describe_tool_choice(chat, forces_calls=offer.forces_calls)
    _narrow_tokens(schemas, offer)
    narrow_messages(schemas, has_tools=offer.has_tools)
    narrow_responses(schemas, has_tools=offer.has_tools)
    if not offer.limits_thoughts:
        _narrow_limits(schemas)


def _narrow_limits(schemas: dict[str, Any]) -> None:
    """Say that no body limits thoughts."""
    unlimited = {"enum": [None, NO_LIMIT]}
    for schema in schemas.values():
        fields = schema.get("properties", {})
        fields |= {name: unlimited for name in LIMITS if name in fields}
    schemas["Thinking"]["properties"]["budget_tokens"] = {"type": "null"}


def _narrow_tokens(schemas: dict[str, Any], offer: Offer) -> None:
    """The same of the bodies that are only about tokens."""
    _bound_tokens(schemas["DetokenizeBody"]["properties"], offer.vocab_size)
    body = schemas["TokenizeBody"]
    fields = body["properties"]
    body["oneOf"] = [
        _with("prompt", {"type": "string"}),
        _with("messages", {"type": "array"}),
    ]
    names = {"not": {"enum": sorted(RESERVED)}}
    fields["chat_template_kwargs"]["propertyNames"] = names
    fields["add_special_tokens"] = {"enum": [False, None]}
    if not offer.has_tools:
        fields["tools"] = {
            "anyOf": [{"type": "array", "maxItems": 0}, {"type": "null"}]
        }


def _describe_tool_choice(chat: dict[str, Any], *, forces_calls: bool) -> None:
    """What may be said of calls; some of it takes tools."""
    field = chat["properties"]["tool_choice"]
    field.pop("anyOf")
    free: dict[str, Any] = {"enum": [AUTO, NONE, "", {}, None]}
    if not forces_calls:
        field |= free
        return
    named = {
        "type": "object",
        "properties": {
            "type": {"const": "function"},
            "function": {
                "type": "object",
                "properties": {"name": {"type": "string", "minLength": 1}},
                "required": ["name"],
            },
        },
        "required": ["function"],
    }
    field["anyOf"] = [free, {"const": REQUIRED}, named]
    forced = {"tool_choice": {"anyOf": [{"const": REQUIRED}, named]}}
    some = {"type": "array", "minItems": 1}
    chat.setdefault("allOf", []).append(
        {
            "if": {"properties": forced, "required": ["tool_choice"]},
            "then": {"properties": {"tools": some}, "required": ["tools"]},
        }
    )


def _with(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    """Objects with a field that follows a schema."""
    return {"properties": {name: schema}, "required": [name]}


def _numbers_to(largest: int) -> str:
    """A regular expression of the whole numbers up to one, perhaps after zeros."""
    digits = str(largest)
    rest = len(digits) - 1
    found = [digits, f"[0-9]{{1,{rest}}}"] if rest else [digits]
    for place, digit in enumerate(map(int, digits)):
        if digit:
            follow = f"[0-9]{{{rest - place}}}"
            found.append(f"{digits[:place]}[0-{digit - 1}]{follow}")
    zeros = f"0{{0,{max(_MAX_DIGITS - len(digits), 0)}}}"
    return f"^{zeros}({'|'.join(found)})$"


def _bound_tokens(schema: Any, vocab_size: int) -> None:
    """Let the token ids in a schema be those of the vocabulary."""
    if isinstance(schema, list):
        for each in schema:
            _bound_tokens(each, vocab_size)
    elif isinstance(schema, dict):
        if schema.get("type") == "integer":
            schema["maximum"] = vocab_size - 1
        for each in schema.values():
            _bound_tokens(each, vocab_size)


def _answer_schemas() -> dict[str, Any]:
    """The schemas of all answers, by their names."""
    events = (kind for kinds in CHUNKS.values() for kind in kinds)
    types = [answers.Error, messages.MessageError, *WHOLE.values(), *events]
    _, found = TypeAdapter.json_schemas(
        [(each, "serialization", TypeAdapter(each)) for each in types],
        ref_template=_REFERENCE + "{model}",
    )
    return dict(found["$defs"])


def _responses(
    path: str, strangers: dict[int, str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The answers of a path, by their status; ``strangers`` get some more."""
    yield "200", _response("The answer.", _contents(path), ID_HEADER)
    own = _OF_PATH.get(path, (405,)) if path in _GETS else _ERRORS
    errors = {**strangers, **{status: _ERRORS[status] for status in own}}
    error = _error_of(path)
    for status, text in sorted(errors.items()):
        is_health = path == "/health" and status == 503
        kind = answers.Health if is_health else error
        can_wait = status in (429, 503) and not is_health
        names = [ID_HEADER, "retry-after"] if can_wait else [ID_HEADER]
        is_late = status == 503 and error is messages.MessageError
        told, text = (OVERLOADED, _OVERLOADED) if is_late else (status, text)
        yield str(told), _response(text, _json_of(kind), *names)
    text = "Something else is wrong with the request."
    yield "4XX", _response(text, _json_of(error), ID_HEADER)


def _error_of(path: str) -> Any:
    """How a path tells what went wrong."""
    return messages.MessageError if path.startswith(MESSAGES) else answers.Error


def _contents(path: str) -> dict[str, Any]:
    """What a path answers where nothing is wrong, by its type."""
    if path == "/metrics":
        return {CONTENT_TYPE: {"schema": {"type": "string"}}}
    found = _json_of(WHOLE[path])
    if path in CHUNKS:
        kinds = [*CHUNKS[path], _error_of(path)]
        schema = {"anyOf": [_reference(kind) for kind in kinds]}
        chunk = {"contentMediaType": _JSON, "contentSchema": schema}
        ends = [{"const": "[DONE]"}] if path in _ENDED else []
        data = {"type": "string", "anyOf": [*ends, chunk]}
        event = {"type": "object", "properties": {"data": data}, "required": ["data"]}
        found[_STREAM] = {"itemSchema": event}
    return found


def _response(text: str, contents: dict[str, Any], *headers: str) -> dict[str, Any]:
    named = {name: {"$ref": f"#/components/headers/{name}"} for name in headers}
    return {"description": text, "headers": named, "content": contents}


def _json_of(kind: Any) -> dict[str, Any]:
    return {_JSON: {"schema": _reference(kind)}}


def _reference(kind: Any) -> dict[str, str]:
    return {"$ref": _REFERENCE + kind.__name__}
