"""Records of JSON lines: conversations, prompts with answers, texts.

A record is one line of a ``.jsonl`` file, an object in one of the forms that mlx-lm's
training takes: ``{"messages": [...]}``, ``{"prompt": ..., "completion": ...}`` or
``{"text": ...}``. A key whose value is ``null`` counts as absent, and keys that mean
nothing here are passed over. Knows nothing of tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...errors import shorten
from .lines import Place

_MAX_KIND_LENGTH = 64  # it names a row of the report
_ASSISTANT = "assistant"
_FORMS = '{"messages": [...]}, {"prompt": "..."} or {"text": "..."}'
_MEND = "Mend or remove it."


@dataclass(frozen=True)
class TextRecord:
    """A text without a beginning that asks for the rest."""

    text: str


@dataclass(frozen=True)
class PromptRecord:
    """What a user asks, and what was answered where the data says so."""

    prompt: str
    completion: str | None = None


@dataclass(frozen=True)
class ChatRecord:
    """A conversation.

    Attributes:
        messages: At least one; each has a role, and a text as content or calls of
            tools, whose arguments are objects.
        tools: Tools that the model may call; None for none.
    """

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None

    def up_to_answer(self) -> ChatRecord:
        """The same up to the last answer; no messages where there is none."""
        last = max((i for i, m in enumerate(self.messages) if is_answer(m)), default=-1)
        return ChatRecord(self.messages[: last + 1], self.tools)


Record = TextRecord | PromptRecord | ChatRecord


def is_answer(message: dict[str, Any]) -> bool:
    """Whether a message is the assistant's."""
    return bool(message["role"] == _ASSISTANT)


def prompt_as_chat(record: PromptRecord) -> ChatRecord:
    """A prompt, and its completion where it has one, as a conversation."""
    messages = [{"role": "user", "content": record.prompt}]
    if record.completion is not None:
        messages.append({"role": _ASSISTANT, "content": record.completion})
    return ChatRecord(messages)


def parse_record(line: str, place: Place) -> tuple[Record, str | None]:
    """The record on a line, and its kind where it names one.

    Args:
        line: The line; not blank.
        place: Where it stands.

    Raises:
        DataError: It is no JSON object, or none of a known form.
    """
    whole = _parse_object(line.rstrip("\r\n"), "the line", place)
    fields = {key: value for key, value in whole.items() if value is not None}
    kind = _parse_kind(fields.get("kind"), place)
    # As mlx-lm's: data sets keep a conversation's first prompt beside it.
    if "messages" in fields and not {"prompt", "completion"} <= fields.keys():
        return _parse_chat(fields, place), kind
    if "prompt" in fields:
        prompt = _parse_text(fields["prompt"], "the prompt", place)
        if "completion" not in fields:
            return PromptRecord(prompt), kind
        completion = _parse_text(fields["completion"], "the completion", place)
        return PromptRecord(prompt, completion), kind
    if "text" in fields:
        return TextRecord(_parse_text(fields["text"], "the text", place)), kind
    found = f"the keys {shorten(list(fields))}" if fields else "an empty one"
    next_step = "Name the parts of the record so."
    raise place.error("the record", f"an object such as {_FORMS}", found, next_step)


def _parse_object(text: str, what: str, place: Place) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        found = f"{error.msg.removesuffix(' at')} at column {error.colno}"
        raise place.error(what, "a JSON object", found, _MEND) from error
    except (ValueError, RecursionError) as error:  # ValueError: thousands of digits
        raise place.error(what, "a JSON object", str(error), _MEND) from error
    if not isinstance(value, dict):
        raise place.error(what, "a JSON object", shorten(value), _MEND)
    return value


def _parse_kind(kind: Any, place: Place) -> str | None:
    if kind is None:
        return None
    is_name = isinstance(kind, str) and kind.isprintable() and kind.strip()
    if not is_name or len(kind) > _MAX_KIND_LENGTH:
        constraint = f"a printable name of at most {_MAX_KIND_LENGTH} characters"
        next_step = "It names the kind of text in the report."
        raise place.error("the kind", constraint, shorten(kind), next_step)
    return str(kind)


def _parse_text(value: Any, what: str, place: Place) -> str:
    """A text that says something."""
    if not isinstance(value, str):
        raise place.error(what, "a string", shorten(value), _MEND)
    if not value.strip():
        raise place.error(what, "a string with text", "an empty one", _MEND)
    return value


def _parse_chat(fields: dict[str, Any], place: Place) -> ChatRecord:
    messages = _parse_list(fields["messages"], _parse_message, "the messages", place)
    if not messages:
        raise place.error("the messages", "at least one", "none", _MEND)
    tools = fields.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise place.error("the tools", "a list", shorten(tools), _MEND)
    return ChatRecord(messages, tools or None)


def _parse_list(
    value: Any, parse: Callable[[Any, Place], Any], what: str, place: Place
) -> list[Any]:
    if not isinstance(value, list):
        raise place.error(what, "a list", shorten(value), _MEND)
    return [parse(item, place) for item in value]


def _parse_message(value: Any, place: Place) -> dict[str, Any]:
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        constraint = 'an object such as {"role": "user", "content": "..."}'
        raise place.error("a message", constraint, shorten(value), _MEND)
    content, calls = value.get("content"), value.get("tool_calls")
    is_text = isinstance(content, str) or (content is None and calls is not None)
    if not is_text:
        constraint = 'a string, or absent beside "tool_calls"'
        next_step = "Pictures, sounds and lists of parts are not read. " + _MEND
        found = shorten(content)
        raise place.error("the content of a message", constraint, found, next_step)
    message = {**value, "content": content or ""}
    if calls is not None:
        message["tool_calls"] = _parse_list(calls, _parse_call, "the tool_calls", place)
    return message


def _parse_call(value: Any, place: Place) -> dict[str, Any]:
    """A call of a tool, its arguments as an object, which chat templates expect."""
    function = value.get("function") if isinstance(value, dict) else None
    if not isinstance(function, dict):
        constraint = 'an object such as {"function": {"name": ..., "arguments": ...}}'
        raise place.error("a tool call", constraint, shorten(value), _MEND)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        what = "the arguments of a tool call"
        arguments = _parse_object(arguments, what, place) if arguments.strip() else {}
    return {**value, "function": {**function, "arguments": arguments}}
