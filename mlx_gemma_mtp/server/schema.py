"""The bodies of requests, as OpenAI's API has them and mlx-lm's and vLLM's servers do.

A field of the wrong type is refused; fields that are not known are ignored, because
clients send many. What is known and cannot be done here is refused in ``orders``.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, field_validator

from ..arguments import MAX_BIAS
from ..config import MAX_DRAFT_TOKENS

T = TypeVar("T")

MAX_CHOICES = 128
MAX_STOPS = 16
_MAX_INTEGER = 2**31 - 1
# Of prompts and messages; no context holds as many.
_MAX_LISTED = 2**16

Number = Annotated[float, Field(allow_inf_nan=False)]
Probability = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Bias = Annotated[float, Field(ge=-MAX_BIAS, le=MAX_BIAS, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, le=_MAX_INTEGER)]
StopString = Annotated[str, Field(min_length=1)]
TokenId = Annotated[int, Field(ge=0, le=_MAX_INTEGER)]
# The first mistake is told: a million others would take a minute to gather.
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
Listed = Annotated[list[T], Field(min_length=1, max_length=_MAX_LISTED, fail_fast=True)]


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class _Numbers(_Body):
    @field_validator("*", mode="before")
    @classmethod
    def _read_numbers(cls, value: Any) -> Any:
        if isinstance(value, list) and list in set(map(type, value)):
            return [_whole(each) for each in value]
        return _whole(value)


class Speculative(_Numbers):
    """How a request is drafted: the package's own field.

    Attributes:
        num_draft_tokens: Most drafts a round, 0 for plain decoding; ``"auto"`` for as
            many as are expected to be fastest.
    """

    num_draft_tokens: (
        Annotated[int, Field(ge=0, le=MAX_DRAFT_TOKENS)] | Literal["auto"] | None
    ) = None


class StreamOptions(_Body):
    """What a stream has beside the text."""

    include_usage: bool | None = None


class _Generation(_Numbers):
    """What both kinds of requests say of the tokens."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=_MAX_INTEGER)] | None = None
    stop: str | Annotated[list[StopString], Field(max_length=MAX_STOPS)] | None = None
    temperature: Annotated[Number, Field(ge=0)] | None = None
    top_p: Probability | None = None
    top_k: Annotated[int, Field(ge=-1, le=_MAX_INTEGER)] | None = None
    min_p: Probability | None = None
    xtc_probability: Probability | None = None
    xtc_threshold: Annotated[Number, Field(ge=0, le=0.5)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    logit_bias: dict[str, Bias] | None = None
    repetition_penalty: Annotated[Number, Field(ge=0, le=MAX_BIAS)] | None = None
    repetition_context_size: Count | None = None
    presence_penalty: Bias | None = None
    presence_context_size: Count | None = None
    frequency_penalty: Bias | None = None
    frequency_context_size: Count | None = None
    speculative: Speculative | None = None


class CompletionBody(_Generation):
    """The body of ``/v1/completions``."""

    prompt: str | TokenIds | Listed[str] | Listed[TokenIds]
    logprobs: Annotated[int, Field(ge=0)] | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None


class TextPart(_Body):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


def _refuse(name: str) -> None:
    """NaN and its like, which Python takes for JSON."""
    raise ValueError(name)


class CalledFunction(_Body):
    """What an earlier answer called."""

    model_config = ConfigDict(strict=True, extra="allow")

    name: str
    arguments: str | dict[str, Any] | None = None

    @field_validator("arguments")
    @classmethod
    def _parse(cls, value: Any) -> Any:
        """Arguments as an object, which chat templates expect."""
        if not isinstance(value, str):
            return value
        try:
            found = json.loads(value, parse_constant=_refuse) if value.strip() else {}
        except RecursionError:
            raise ValueError("must not be nested so deeply") from None
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise ValueError("must be a JSON object")
        return found


class ToolCall(_Body):
    """A call in an earlier answer."""

    model_config = ConfigDict(strict=True, extra="allow")

    function: CalledFunction


class Message(_Body):
    """A message of a conversation; further fields go to the chat template."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None

    def plain(self) -> dict[str, Any]:
        """The message as chat templates read it: its content is text."""
        found = self.model_dump(exclude_unset=True)
        if isinstance(self.content, list):
            found["content"] = "".join(part.text for part in self.content)
        elif self.content is None:
            found["content"] = ""
        return found


def _whole(value: Any) -> Any:
    """A number as JSON means it, where 4.0 is 4; also those of a list."""
    if isinstance(value, float):
        return int(value) if value.is_integer() else value
    if isinstance(value, list) and float in set(map(type, value)):
        return [_whole(each) for each in value]
    return value


class Function(_Body):
    """What a tool is called and takes."""

    model_config = ConfigDict(strict=True, extra="allow")

    name: Annotated[str, Field(min_length=1, max_length=256)]
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(_Body):
    """A tool that the model may call."""

    model_config = ConfigDict(strict=True, extra="allow")

    type: Literal["function"]
    function: Function


class ResponseFormat(_Body):
    """The form of an answer."""

    type: str


class ChatBody(_Generation):
    """The body of ``/v1/chat/completions``."""

    messages: Listed[Message]
    max_completion_tokens: Annotated[int, Field(ge=1, le=_MAX_INTEGER)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0)] | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    reasoning_effort: Annotated[str, Field(max_length=64)] | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
