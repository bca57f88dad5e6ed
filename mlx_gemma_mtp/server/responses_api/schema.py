"""The bodies of requests, as OpenAI's Responses have them.

A field of the wrong type is refused. Fields that no attribute stands for come through
as they are: ``REFUSED`` and ``WITHOUT_EFFECT`` say which of them are refused and which
mean nothing.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag

from ...constants import MAX_INTEGER
from .. import fields
from ..schema import MAX_LISTED, Common, only_text

_STATELESS = "nothing is stored here. Send the items of the conversation in input"
_NOT_LATER = "answers are given at once. Ask for a stream"
REFUSED: dict[str, tuple[str, tuple[Any, ...]]] = {
    "background": (_NOT_LATER, (False,)),
    "conversation": (_STATELESS, ()),
    "messages": ("they belong to /v1/chat/completions. Send input", ()),
    "moderation": ("nobody watches over texts here", ()),
    "previous_response_id": (_STATELESS, ()),
    "prompt": ("no prompts are stored here. Send instructions and input", ()),
    "top_logprobs": ("log-probabilities are those of /v1/chat/completions", (0,)),
}
WITHOUT_EFFECT = fields.WITHOUT_EFFECT | {
    "access_programs",
    "background_options",
    "client_metadata",
    "context_management",
    "image",
    "max_tool_calls",
    "stream_options",
    "truncation",
}


class _Item(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class TextContent(_Item):
    """A part of a message, or of what a call has given."""

    type: Literal["input_text", "output_text", "text", "summary_text", "reasoning_text"]
    text: str


class RefusalContent(_Item):
    """A part of an earlier answer that refused something: text as well."""

    type: Literal["refusal"]
    refusal: str


ContentPart = Annotated[
    Annotated[TextContent | RefusalContent, Field(discriminator="type")],
    BeforeValidator(only_text),
]
Content = str | Annotated[list[ContentPart], Field(fail_fast=True)]


class MessageItem(_Item):
    """A message; the only item that need not say what it is."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Content


class CallItem(_Item):
    """A call in an earlier answer: of a function, or of a custom tool."""

    type: Literal["function_call", "custom_tool_call"]
    call_id: str
    name: str
    namespace: str | None = None
    arguments: str | None = None
    input: str | None = None


class OutputItem(_Item):
    """What a call has given."""

    type: Literal["function_call_output", "custom_tool_call_output"]
    call_id: str
    output: Content


class ReasoningItem(_Item):
    """What an earlier answer has thought."""

    type: Literal["reasoning"]
    summary: Annotated[list[TextContent], Field(fail_fast=True)] | None = None
    content: Annotated[list[TextContent], Field(fail_fast=True)] | None = None
    encrypted_content: str | None = None


_TAGS = {
    "message": "message",
    "function_call": "call",
    "custom_tool_call": "call",
    "function_call_output": "output",
    "custom_tool_call_output": "output",
    "reasoning": "reasoning",
}


def _tag(item: Any) -> str | None:
    """Which item it is."""
    if isinstance(item, MessageItem | CallItem | OutputItem | ReasoningItem):
        return _TAGS[item.type]
    kind = item.get("type", "message") if isinstance(item, dict) else None
    return _TAGS.get(kind) if isinstance(kind, str) else None


InputItem = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("call")]
    | Annotated[OutputItem, Tag("output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(
        _tag,
        custom_error_type="item",
        custom_error_message=f"type must be one of {', '.join(_TAGS)}",
    ),
]


class ResponsesTool(_Item):
    """A tool: a function, a custom one, or several with a common name."""

    type: Annotated[str, Field(max_length=64)]
    name: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    format: dict[str, Any] | None = None
    tools: Annotated[list[dict[str, Any]], Field(fail_fast=True)] | None = None


class TextFormat(_Item):
    """The form of an answer."""

    type: Literal["text", "json_object", "json_schema"]
    name: Annotated[str, Field(max_length=64)] | None = None
    strict: bool | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None


class TextConfig(_Item):
    """How an answer's text is to be."""

    format: TextFormat | None = None
    verbosity: str | None = None


class ReasoningConfig(_Item):
    """Whether the model thinks, and whether the thought is called a summary."""

    effort: Annotated[str, Field(max_length=64)] | None = None
    summary: Annotated[str, Field(max_length=64)] | None = None


class ResponsesBody(Common):
    """The body of ``/v1/responses``."""

    input: (
        str
        | Annotated[
            list[InputItem],
            Field(min_length=1, max_length=MAX_LISTED, fail_fast=True),
        ]
    )
    instructions: str | None = None
    tools: Annotated[list[ResponsesTool], Field(fail_fast=True)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    max_output_tokens: Annotated[int, Field(ge=1, le=MAX_INTEGER)] | None = None
    include: Annotated[list[str], Field(max_length=64)] | None = None
    metadata: dict[str, Any] | None = None
    user: str | None = None
