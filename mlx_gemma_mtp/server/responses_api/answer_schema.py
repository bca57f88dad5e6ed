"""The bodies of answers that ``answer`` makes, as ``/openapi.json`` tells.

Nothing is checked against it while the server runs; tests do that.
"""

from __future__ import annotations

from typing import Any, Literal, NotRequired

from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict

_exactly = with_config(ConfigDict(strict=True, extra="forbid"))
Status = Literal["in_progress", "completed", "incomplete"]


@_exactly
class OutputText(TypedDict):
    """What the user is to read."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[Any]


@_exactly
class ReasoningText(TypedDict):
    """What the model says to itself."""

    type: Literal["reasoning_text", "summary_text"]
    text: str


@_exactly
class OutputMessage(TypedDict):
    """A message."""

    id: str
    type: Literal["message"]
    status: Status
    role: Literal["assistant"]
    content: list[OutputText]


@_exactly
class OutputReasoning(TypedDict):
    """A thought; where a summary was asked for, it stands there."""

    id: str
    type: Literal["reasoning"]
    status: Status
    summary: list[ReasoningText]
    content: NotRequired[list[ReasoningText]]
    encrypted_content: NotRequired[str]


@_exactly
class OutputCall(TypedDict):
    """A call of a function; its arguments are a JSON object as text."""

    id: str
    type: Literal["function_call"]
    status: Status
    call_id: str
    name: str
    arguments: str
    namespace: NotRequired[str]


@_exactly
class OutputCustomCall(TypedDict):
    """A call of a custom tool; its input is any text."""

    id: str
    type: Literal["custom_tool_call"]
    status: Status
    call_id: str
    name: str
    input: str
    namespace: NotRequired[str]


Output = OutputMessage | OutputReasoning | OutputCall | OutputCustomCall


@_exactly
class ResponseFailure(TypedDict):
    """Why there is no answer."""

    code: str
    message: str


@_exactly
class Incomplete(TypedDict):
    """Why an answer has no end."""

    reason: Literal["max_output_tokens"]


@_exactly
class CachedTokens(TypedDict):
    """Where a prompt's tokens came from."""

    cached_tokens: int
    cache_write_tokens: int


@_exactly
class ReasoningTokens(TypedDict):
    """What an answer's tokens are."""

    reasoning_tokens: int


@_exactly
class ResponseUsage(TypedDict):
    """What a response took."""

    input_tokens: int
    input_tokens_details: CachedTokens
    output_tokens: int
    output_tokens_details: ReasoningTokens
    total_tokens: int


@_exactly
class Response(TypedDict):
    """The answer of ``/v1/responses``."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    background: Literal[False]
    error: ResponseFailure | None
    incomplete_details: Incomplete | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, Any]
    model: str
    output: list[Output]
    parallel_tool_calls: bool
    previous_response_id: None
    reasoning: dict[str, Any]
    store: Literal[False]
    temperature: float | None
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_p: float | None
    truncation: Literal["disabled"]
    usage: ResponseUsage | None
    user: str | None


@_exactly
class ResponseEvent(TypedDict):
    """The response begins, goes on or ends."""

    type: Literal[
        "response.created",
        "response.in_progress",
        "response.completed",
        "response.incomplete",
        "response.failed",
    ]
    sequence_number: int
    response: Response


@_exactly
class ItemEvent(TypedDict):
    """An item begins or ends."""

    type: Literal["response.output_item.added", "response.output_item.done"]
    sequence_number: int
    output_index: int
    item: Output


@_exactly
class _OfItem(TypedDict):
    sequence_number: int
    item_id: str
    output_index: int


@_exactly
class PartEvent(_OfItem):
    """A part of an item begins or ends."""

    type: Literal[
        "response.content_part.added",
        "response.content_part.done",
        "response.reasoning_summary_part.added",
        "response.reasoning_summary_part.done",
    ]
    part: OutputText | ReasoningText
    content_index: NotRequired[int]
    summary_index: NotRequired[int]


@_exactly
class TextEvent(_OfItem):
    """A part's text goes on or ends."""

    type: Literal[
        "response.output_text.delta",
        "response.output_text.done",
        "response.reasoning_text.delta",
        "response.reasoning_text.done",
        "response.reasoning_summary_text.delta",
        "response.reasoning_summary_text.done",
    ]
    delta: NotRequired[str]
    text: NotRequired[str]
    logprobs: NotRequired[list[Any]]
    content_index: NotRequired[int]
    summary_index: NotRequired[int]


@_exactly
class CallEvent(_OfItem):
    """What a tool is called with."""

    type: Literal[
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.custom_tool_call_input.delta",
        "response.custom_tool_call_input.done",
    ]
    delta: NotRequired[str]
    arguments: NotRequired[str]
    input: NotRequired[str]
    name: NotRequired[str]


EVENTS = (ResponseEvent, ItemEvent, PartEvent, TextEvent, CallEvent)
