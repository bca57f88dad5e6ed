"""The bodies of answers that ``openai_format`` makes, as ``/openapi.json`` tells.

Nothing is checked against it while the server runs; tests do that.
"""

from __future__ import annotations

from typing import Literal, NotRequired

from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict

_exactly = with_config(ConfigDict(strict=True, extra="forbid"))


@_exactly
class ErrorDetail(TypedDict):
    """What went wrong."""

    message: str
    type: Literal[
        "invalid_request_error",
        "authentication_error",
        "permission_error",
        "rate_limit_error",
        "server_error",
    ]
    param: str | None
    code: str | None


@_exactly
class Error(TypedDict):
    """Every answer that is an error."""

    error: ErrorDetail


@_exactly
class PromptDetails(TypedDict):
    """Where a prompt's tokens came from."""

    cached_tokens: int


@_exactly
class CompletionDetails(TypedDict):
    """What an answer's tokens are: of thoughts, and of what was predicted or not."""

    reasoning_tokens: int
    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


@_exactly
class Usage(TypedDict):
    """What an answer took."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails


@_exactly
class SpeculativeFigures(TypedDict):
    """What drafting did for an answer."""

    rounds: int
    drafted: int
    accepted: int
    acceptance_length: float
    rule: str


@_exactly
class _Envelope(TypedDict):
    id: str
    created: int
    model: str
    system_fingerprint: str


@_exactly
class _Whole(_Envelope):
    usage: Usage
    speculative: SpeculativeFigures


@_exactly
class _Chunk(_Envelope):
    # Null but in the last one, and only where they were asked for.
    usage: NotRequired[Usage | None]
    speculative: NotRequired[SpeculativeFigures]


@_exactly
class TopLogprob(TypedDict):
    """A token that was likely."""

    token: str
    logprob: float
    bytes: list[int]


@_exactly
class TokenLogprob(TopLogprob):
    """A token of the answer."""

    top_logprobs: list[TopLogprob]


@_exactly
class ChatLogprobs(TypedDict):
    """Log-probabilities of a message."""

    content: list[TokenLogprob]
    refusal: None


@_exactly
class CalledFunctionText(TypedDict):
    """The function of a call; its arguments are a JSON object as text."""

    name: str
    arguments: str


@_exactly
class MessageToolCall(TypedDict):
    """A call in an answer; numbered in a stream."""

    id: str
    type: Literal["function"]
    function: CalledFunctionText
    index: NotRequired[int]


@_exactly
class AnswerMessage(TypedDict):
    """What the model says."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning: NotRequired[str]
    tool_calls: NotRequired[list[MessageToolCall]]


@_exactly
class ChatChoice(TypedDict):
    """One of the answers."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


@_exactly
class ChatCompletion(_Whole):
    """The answer of ``/v1/chat/completions``."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]


@_exactly
class ChatDelta(TypedDict):
    """What a chunk adds to a message."""

    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str]
    reasoning: NotRequired[str]
    tool_calls: NotRequired[list[MessageToolCall]]


@_exactly
class ChatChunkChoice(TypedDict):
    """What a chunk adds to one of the answers."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"] | None


@_exactly
class ChatCompletionChunk(_Chunk):
    """An event of a streamed chat completion."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]


@_exactly
class CompletionLogprobs(TypedDict):
    """Log-probabilities of a text, token by token."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


@_exactly
class _CompletionChoice(TypedDict):
    index: int
    text: str
    logprobs: CompletionLogprobs | None


@_exactly
class CompletionChoice(_CompletionChoice):
    """One of the texts."""

    finish_reason: Literal["stop", "length"]


@_exactly
class CompletionChunkChoice(_CompletionChoice):
    """What a chunk adds to one of the texts."""

    finish_reason: Literal["stop", "length"] | None


@_exactly
class Completion(_Whole):
    """The answer of ``/v1/completions``."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]


@_exactly
class CompletionChunk(_Chunk):
    """An event of a streamed completion."""

    object: Literal["text_completion"]
    choices: list[CompletionChunkChoice]


@_exactly
class Model(TypedDict):
    """A name that requests may use."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


@_exactly
class ModelList(TypedDict):
    """All of them."""

    object: Literal["list"]
    data: list[Model]


@_exactly
class Health(TypedDict):
    """Whether requests are taken."""

    status: Literal["ok", "draining", "failed"]


@_exactly
class Stats(TypedDict):
    """The page's figures."""

    tokens_per_second: float
    live: int
    waiting: int
    acceptance_rate: float
    acceptance_length: float
    acceptance_by_position: list[float]
    rounds_by_num_draft_tokens: dict[str, int]
    num_draft_tokens: int
    model: str
    drafter: str
    has_chat_template: bool
    example: str
    kv_bytes: int
    memory_bytes: int


@_exactly
class TokenList(TypedDict):
    """The tokens of a prompt; ``token_strs`` where they were asked for."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: NotRequired[list[str]]


@_exactly
class TokenText(TypedDict):
    """The text of tokens."""

    prompt: str
