"""The bodies of answers that ``answer`` makes, as ``/openapi.json`` tells.

Nothing is checked against it while the server runs; tests do that.
"""

from __future__ import annotations

from typing import Any, Literal, NotRequired

from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict

_exactly = with_config(ConfigDict(strict=True, extra="forbid"))
StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


@_exactly
class MessageErrorDetail(TypedDict):
    """What went wrong."""

    type: Literal[
        "invalid_request_error",
        "authentication_error",
        "permission_error",
        "not_found_error",
        "timeout_error",
        "request_too_large",
        "rate_limit_error",
        "overloaded_error",
        "api_error",
    ]
    message: str


@_exactly
class MessageError(TypedDict):
    """Every answer that is an error."""

    type: Literal["error"]
    error: MessageErrorDetail
    request_id: str


@_exactly
class ThinkingTokens(TypedDict):
    """What output tokens are."""

    thinking_tokens: int


@_exactly
class MessageUsage(TypedDict):
    """What a message took; tokens of kept caches are no input tokens."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    # Known where the message is whole.
    output_tokens_details: NotRequired[ThinkingTokens]


@_exactly
class AnswerText(TypedDict):
    """What the user is to read."""

    type: Literal["text"]
    text: str


@_exactly
class AnswerThinking(TypedDict):
    """What the model says to itself."""

    type: Literal["thinking"]
    thinking: str
    signature: str


@_exactly
class AnswerToolUse(TypedDict):
    """A call of a tool."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


@_exactly
class MessageAnswer(TypedDict):
    """The answer of ``/v1/messages``."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[AnswerText | AnswerThinking | AnswerToolUse]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessageUsage


@_exactly
class TokenCount(TypedDict):
    """How many tokens a prompt has."""

    input_tokens: int


@_exactly
class MessageStart(TypedDict):
    """The first event."""

    type: Literal["message_start"]
    message: MessageAnswer


@_exactly
class BlockStart(TypedDict):
    """A block begins."""

    type: Literal["content_block_start"]
    index: int
    content_block: AnswerText | AnswerThinking | AnswerToolUse


@_exactly
class BlockPart(TypedDict):
    """What is added to a block: one of the fields beside the type."""

    type: Literal["text_delta", "thinking_delta", "signature_delta", "input_json_delta"]
    text: NotRequired[str]
    thinking: NotRequired[str]
    signature: NotRequired[str]
    partial_json: NotRequired[str]


@_exactly
class BlockDelta(TypedDict):
    """A block goes on."""

    type: Literal["content_block_delta"]
    index: int
    delta: BlockPart


@_exactly
class BlockStop(TypedDict):
    """A block ends."""

    type: Literal["content_block_stop"]
    index: int


@_exactly
class MessageEnd(TypedDict):
    """Why a message ends."""

    stop_reason: StopReason
    stop_sequence: str | None


@_exactly
class MessageDelta(TypedDict):
    """What the message took, and why it ends."""

    type: Literal["message_delta"]
    delta: MessageEnd
    usage: MessageUsage


@_exactly
class MessageStop(TypedDict):
    """The last event."""

    type: Literal["message_stop"]


@_exactly
class Ping(TypedDict):
    """The answer goes on."""

    type: Literal["ping"]


EVENTS = (
    MessageStart,
    BlockStart,
    BlockDelta,
    BlockStop,
    MessageDelta,
    MessageStop,
    Ping,
)
