"""The bodies of requests, as OpenAI's API has them and mlx-lm's and vLLM's servers do.

A field of the wrong type is refused. Fields that no attribute stands for come through
as they are: ``fields`` says which of them are refused and which mean nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from ..cli.checks import MAX_BIAS
from ..constants import AUTO, MAX_DRAFT_TOKENS, MAX_INTEGER
from ..markup.tool_calls import MAX_DEPTH
from ..structure.constraint import MAX_TEXTS
from .errors import bad_request
from .json_body import refuse_constant

T = TypeVar("T")

MAX_CHOICES = 128
MAX_STOPS = 16
MAX_STOP_TOKENS = 1024
MAX_SALT = 1024  # characters
BETWEEN_TEXTS = "\n\n"  # of a message that came in several: they are paragraphs
NO_LIMIT = -1  # of tokens; so does null where it stands in a body
# Of prompts and messages; no context holds as many.
MAX_LISTED = 2**16

Number = Annotated[float, Field(allow_inf_nan=False)]
Probability = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Bias = Annotated[float, Field(ge=-MAX_BIAS, le=MAX_BIAS, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, le=MAX_INTEGER)]
ThinkingLimit = Annotated[int, Field(ge=NO_LIMIT, le=MAX_INTEGER)]
StopString = Annotated[str, Field(min_length=1)]
TokenId = Annotated[int, Field(ge=0, le=MAX_INTEGER)]
# The first mistake is told: a million others would take a minute to gather.
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
Listed = Annotated[list[T], Field(min_length=1, max_length=MAX_LISTED, fail_fast=True)]
# Parts of a message that are no text, by their types, and what people call them.
MEDIA = {
    "image_url": "an image",
    "input_image": "an image",
    "image": "an image",
    "input_audio": "audio",
    "audio_url": "audio",
    "audio": "audio",
    "video_url": "a video",
    "input_video": "a video",
    "video": "a video",
    "file": "a file",
    "input_file": "a file",
    "document": "a file",
}


def _not_zero(value: int) -> int:
    if value == 0:
        raise PydanticCustomError(
            "token_limit", "must be 1 or more, or -1 for no limit: got 0"
        )
    return value


def only_text(part: Any) -> Any:
    """A message's part, which is no image and no sound."""
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(kind, str) and kind in MEDIA:
        raise PydanticCustomError(
            "media",
            "this server reads text only: got {what} ({kind}). Leave it out",
            {"what": MEDIA[kind], "kind": kind},
        )
    return part


TokenLimit = Annotated[
    int,
    Field(ge=NO_LIMIT, json_schema_extra={"not": {"const": 0}}),
    AfterValidator(_not_zero),
]


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class Numbers(_Body):
    """A body whose whole numbers may have a point, as JSON has them."""

    @field_validator("*", mode="before")
    @classmethod
    def _read_numbers(cls, value: Any) -> Any:
        if isinstance(value, list) and list in set(map(type, value)):
            return [_whole(each) for each in value]
        return _whole(value)


class Speculative(Numbers):
    """How a request is drafted: the package's own field.

    Attributes:
        num_draft_tokens: Most drafts a round, 0 for plain decoding; ``"auto"`` for as
            many as are expected to be fastest.
        sources: Where drafts may come from: ``"drafter"``, ``"lookup"`` or both; left
            out, wherever the server lets them.
    """

    num_draft_tokens: (
        Annotated[int, Field(ge=0, le=MAX_DRAFT_TOKENS)] | Literal["auto"] | None
    ) = None
    sources: (
        Annotated[list[Literal["drafter", "lookup"]], Field(min_length=1)] | None
    ) = None

    @property
    def draft_source(self) -> str:
        """The one source that is left, or either."""
        named = set(self.sources or ())
        return named.pop() if len(named) == 1 else AUTO


class StreamOptions(_Body):
    """What a stream has beside the text."""

    include_usage: bool | None = None


class JSONSchemaFormat(_Body):
    """A schema that an answer follows; its name and description mean nothing."""

    model_config = ConfigDict(strict=True, extra="forbid")

    name: Annotated[str, Field(max_length=64)] | None = None
    description: str | None = None
    strict: bool | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class ResponseFormat(_Body):
    """The form of an answer, as OpenAI has it."""

    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchemaFormat | None = None


class StructuredOutputs(_Body):
    """The form of an answer, as vLLM has it: one of the first five.

    The others are what its client sends beside them, with the values that say nothing
    here: JSON has no white space, and each schema its own properties.
    """

    model_config = ConfigDict(strict=True, extra="forbid")

    json_: Annotated[dict[str, Any] | str | None, Field(alias="json")] = None
    regex: str | None = None
    choice: (
        Annotated[
            list[Annotated[str, Field(min_length=1)]],
            Field(min_length=1, max_length=MAX_TEXTS, fail_fast=True),
        ]
        | None
    ) = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_fallback: bool | None = None
    disable_any_whitespace: bool | None = None
    disable_additional_properties: Literal[False] | None = None
    whitespace_pattern: None = None
    structural_tag: None = None


class Common(Numbers):
    """What the bodies of all dialects may say.

    ``min_p``, ``seed``, ``max_thinking_tokens``, ``cache_salt`` and ``speculative`` are
    the package's own, or other servers'.
    """

    model_config = ConfigDict(strict=True, extra="allow")

    model: str | None = None
    stream: bool | None = None
    temperature: Annotated[Number, Field(ge=0)] | None = None
    top_p: Probability | None = None
    top_k: Annotated[int, Field(ge=-1, le=MAX_INTEGER)] | None = None
    min_p: Probability | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    max_thinking_tokens: ThinkingLimit | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=MAX_SALT)] | None = None
    speculative: Speculative | None = None


class _Generation(Common):
    """What both kinds of requests say of the tokens."""

    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    max_tokens: TokenLimit | None = None
    max_completion_tokens: TokenLimit | None = None
    min_tokens: Count | None = None
    thinking_token_budget: ThinkingLimit | None = None  # vLLM's name for it
    stop: str | Annotated[list[StopString], Field(max_length=MAX_STOPS)] | None = None
    stop_token_ids: (
        Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKENS)] | None
    ) = None
    ignore_eos: bool | None = None
    xtc_probability: Probability | None = None
    xtc_threshold: Annotated[Number, Field(ge=0, le=0.5)] | None = None
    logit_bias: dict[str, Bias] | None = None
    repetition_penalty: Annotated[Number, Field(ge=0, le=MAX_BIAS)] | None = None
    repetition_context_size: Count | None = None
    presence_penalty: Bias | None = None
    presence_context_size: Count | None = None
    frequency_penalty: Bias | None = None
    frequency_context_size: Count | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None


class CompletionBody(_Generation):
    """The body of ``/v1/completions``."""

    prompt: str | TokenIds | Listed[str] | Listed[TokenIds]
    logprobs: Annotated[int, Field(ge=0)] | None = None
    best_of: int | None = None


class TextPart(_Body):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class RefusalPart(_Body):
    """A part of an earlier answer that refused something: text as well."""

    type: Literal["refusal"]
    refusal: str


# Of a call; some clients count them.
CallId = str | int | None

Part = Annotated[
    Annotated[TextPart | RefusalPart, Field(discriminator="type")],
    BeforeValidator(only_text),
]


def _is_flat(value: Any, depth: int = MAX_DEPTH) -> bool:
    """Whether values are nested no deeper than in any call that is read."""
    if not isinstance(value, (dict, list)):
        return True
    inner = value.values() if isinstance(value, dict) else value
    return depth > 0 and all(_is_flat(each, depth - 1) for each in inner)


class CalledFunction(_Body):
    """What an earlier answer called."""

    model_config = ConfigDict(strict=True, extra="allow")

    name: str
    arguments: str | dict[str, Any] | None = None

    @model_validator(mode="after")
    def _with_arguments(self) -> CalledFunction:
        """A call without arguments, as one with none: templates raise for it."""
        if self.arguments is None:
            self.arguments = {}
        return self

    @field_validator("arguments")
    @classmethod
    def _parse(cls, value: Any) -> Any:
        """Arguments as an object, which chat templates expect.

        A text that is none stays as it is: models write such arguments, and clients
        send them back with every later request of the conversation.
        """
        if not isinstance(value, str):
            return value
        try:
            found = (
                json.loads(value, parse_constant=refuse_constant)
                if value.strip()
                else {}
            )
            json.dumps(found, ensure_ascii=False, allow_nan=False).encode()
        except (RecursionError, ValueError):  # or half of a surrogate pair
            return value
        return found if isinstance(found, dict) and _is_flat(found) else value


class ToolCall(_Body):
    """A call in an earlier answer."""

    model_config = ConfigDict(strict=True, extra="allow")

    id: CallId = None
    function: CalledFunction


class Message(_Body):
    """A message of a conversation; further fields go to the chat template."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: str | Annotated[list[Part], Field(fail_fast=True)] | None = None
    refusal: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None
    tool_call_id: CallId = None
    tool_responses: Annotated[list[dict[str, Any]], Field(fail_fast=True)] | None = None

    def plain(self) -> dict[str, Any]:
        """The message as chat templates read it: its content is text."""
        found = self.model_dump(exclude_unset=True, exclude={"refusal"})
        found["content"] = _joined(self.content) + (self.refusal or "")
        return found


def _joined(content: str | Sequence[TextPart | RefusalPart] | None) -> str:
    """The text of a content and of its parts."""
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(
        part.text if isinstance(part, TextPart) else part.refusal for part in content
    )


class Prediction(_Body):
    """What much of the answer may be, as OpenAI has it."""

    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["content"]
    content: str | Annotated[list[Part], Field(fail_fast=True)]

    @property
    def text(self) -> str:
        """All of it."""
        return _joined(self.content)


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


class ChatBody(_Generation):
    """The body of ``/v1/chat/completions``."""

    messages: Listed[Message]
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0)] | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    prediction: Prediction | None = None
    reasoning_effort: Annotated[str, Field(max_length=64)] | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


def translated(fields: Mapping[str, Any]) -> ChatBody:
    """The chat's body that another dialect's says.

    Args:
        fields: Its fields.

    Raises:
        AnswerError: No chat has them.
    """
    try:
        return ChatBody.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise bad_request(f"{place}: {first['msg']}."[:300], place[:100]) from None
