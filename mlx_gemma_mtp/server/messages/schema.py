"""The bodies of requests, as Anthropic's Messages have them.

A field of the wrong type is refused. Fields that no attribute stands for come through
as they are: ``REFUSED`` and ``WITHOUT_EFFECT`` say which of them are refused and which
mean nothing.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from ...constants import MAX_INTEGER
from ..schema import MAX_STOPS, Common, Listed, Numbers, StopString, only_text

_NO_FILES = "nothing runs beside the model here"
REFUSED: dict[str, tuple[str, tuple[Any, ...]]] = {
    "compaction": ("nothing is summarized here. Ask for it in a message", ()),
    "container": (_NO_FILES, ()),
    "mcp_servers": ("clients call the tools. Declare them in tools", ([],)),
    "thread": ("nothing is stored here. Send all messages", ()),
}
WITHOUT_EFFECT = frozenset(
    {
        "betas",
        "billing_policy",
        "cache_control",
        "context_management",
        "diagnostics",
        "fallback_credit_token",
        "fallbacks",
        "inference_geo",
        "metadata",
        "service_tier",
        "speed",
        "user_profile_id",
        "workspace_id",
    }
)


class _Block(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class TextBlock(_Block):
    """Text."""

    type: Literal["text"]
    text: str


class ThinkingBlock(_Block):
    """What an earlier answer has thought; its signature says nothing here."""

    type: Literal["thinking"]
    thinking: str


class RedactedBlock(_Block):
    """A thought that only another server can read."""

    type: Literal["redacted_thinking"]


class ToolUseBlock(_Block):
    """A call in an earlier answer."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


TextOnly = Annotated[TextBlock, BeforeValidator(only_text)]
Texts = str | Annotated[list[TextOnly], Field(fail_fast=True)]


class ToolResultBlock(_Block):
    """What a call has given."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: Texts | None = None
    is_error: bool | None = None


Block = Annotated[
    Annotated[
        TextBlock | ThinkingBlock | RedactedBlock | ToolUseBlock | ToolResultBlock,
        Field(discriminator="type"),
    ],
    BeforeValidator(only_text),
]


class MessagesTurn(_Block):
    """A message of a conversation."""

    role: Literal["user", "assistant", "system"]
    content: str | Annotated[list[Block], Field(fail_fast=True)]


class MessagesTool(_Block):
    """A tool that the model may call, and the client runs."""

    type: Annotated[str, Field(max_length=64)] | None = None
    name: Annotated[str, Field(min_length=1, max_length=256)]
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    strict: bool | None = None


class MessagesToolChoice(_Block):
    """Whether tools are called."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Numbers):
    """Whether the model thinks, and how much."""

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: Annotated[int, Field(ge=0, le=MAX_INTEGER)] | None = None


class MessagesFormat(_Block):
    """The form of an answer."""

    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(_Block):
    """How an answer is to be."""

    effort: Annotated[str, Field(max_length=64)] | None = None
    format: MessagesFormat | None = None


class CountBody(Common):
    """The body of ``/v1/messages/count_tokens``."""

    messages: Listed[MessagesTurn]
    system: Texts | None = None
    tools: Annotated[list[MessagesTool], Field(fail_fast=True)] | None = None
    tool_choice: MessagesToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: MessagesFormat | None = None


class MessagesBody(CountBody):
    """The body of ``/v1/messages``."""

    max_tokens: Annotated[int, Field(ge=1, le=MAX_INTEGER)]
    stop_sequences: Annotated[list[StopString], Field(max_length=MAX_STOPS)] | None = (
        None
    )
