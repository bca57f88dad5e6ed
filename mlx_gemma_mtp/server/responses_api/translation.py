"""From OpenAI's Responses to the body of a chat.

Knows nothing of prompts, of HTTP, or of how an answer is written.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from typing import Any

from ..errors import bad_request
from ..schema import BETWEEN_TEXTS, ChatBody, Common, translated
from .schema import (
    CallItem,
    Content,
    InputItem,
    MessageItem,
    OutputItem,
    ReasoningItem,
    RefusalContent,
    ResponsesBody,
    TextConfig,
)
from .tools import ToolNames, arguments_of, called

# What a chat calls what a body has by another name: for what is said of mistakes.
NAMES = {
    "response_format.json_schema.schema": "text.format.schema",
    "response_format.json_schema": "text.format.schema",
    "response_format": "text.format",
    "verbosity": "text.verbosity",
    "function.parameters": "parameters",
    "continue_final_message": "input",
    "messages": "input",
}
# A thought goes out and comes back in the field that clients hand on unread: as it is,
# since it is no secret of the server's.
_PLAIN = "plain:"
_MODES = ("auto", "none", "required")


def chat_body(body: ResponsesBody, tools: ToolNames) -> ChatBody:
    """The chat's body that says the same.

    Args:
        body: The request.
        tools: Its tools.

    Raises:
        AnswerError: It holds what no chat has.
    """
    fields = body.model_dump(include=set(Common.model_fields), exclude_unset=True)
    fields["messages"] = _messages(body)
    if tools.functions:
        fields["tools"] = tools.functions
    if body.tool_choice is not None:
        fields["tool_choice"] = _tool_choice(body.tool_choice)
    if body.parallel_tool_calls is not None:
        fields["parallel_tool_calls"] = body.parallel_tool_calls
    if body.max_output_tokens is not None:
        fields["max_tokens"] = body.max_output_tokens
    if body.reasoning is not None and body.reasoning.effort is not None:
        fields["reasoning_effort"] = body.reasoning.effort
    if body.text is not None:
        fields |= _text_fields(body.text)
    return translated(fields)


def wrapped(thought: str) -> str:
    """A thought as ``encrypted_content``."""
    return _PLAIN + base64.b64encode(thought.encode("utf-8", "replace")).decode()


def _unwrapped(given: str | None) -> str:
    """The thought in ``encrypted_content``; empty where another server's is in it."""
    if given is None or not given.startswith(_PLAIN):
        return ""
    try:
        return base64.b64decode(given.removeprefix(_PLAIN), validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        return ""


def _messages(body: ResponsesBody) -> list[dict[str, Any]]:
    """The items as messages: instructions first, each turn of the model's one."""
    items: Sequence[InputItem] = (
        [MessageItem(role="user", content=body.input)]
        if isinstance(body.input, str)
        else body.input
    )
    num_system = 0
    while num_system < len(items) and _is_system(items[num_system]):
        num_system += 1
    system = [body.instructions or "", *map(_said, items[:num_system])]
    text = BETWEEN_TEXTS.join(each for each in system if each)
    first = {"role": "system", "content": text}
    found: list[dict[str, Any]] = [first] if text or num_system else []
    for item in items[num_system:]:
        if isinstance(item, OutputItem):
            result = {"tool_call_id": item.call_id, "content": _text(item.output)}
            found.append({"role": "tool", **result})
        elif isinstance(item, MessageItem) and item.role != "assistant":
            found.append({"role": item.role, "content": _text(item.content)})
        else:
            if not found or found[-1]["role"] != "assistant":
                found.append({"role": "assistant", "content": ""})
            _add(found[-1], item)
    return found


def _is_system(item: InputItem) -> bool:
    return isinstance(item, MessageItem) and item.role in ("system", "developer")


def _said(item: InputItem) -> str:
    return _text(item.content) if isinstance(item, MessageItem) else ""


def _add(message: dict[str, Any], item: InputItem) -> None:
    """Add an item to what the model has said in a turn."""
    if isinstance(item, MessageItem):
        message["content"] += _text(item.content, between="")
    elif isinstance(item, ReasoningItem):
        thought = _thought(item)
        if thought:
            before = message.get("reasoning")
            message["reasoning"] = f"{before}\n{thought}" if before else thought
    elif isinstance(item, CallItem):
        is_custom = item.type == "custom_tool_call"
        arguments = arguments_of(item.input or "") if is_custom else item.arguments
        name = called(item.name, item.namespace)
        message.setdefault("tool_calls", []).append(
            {
                "id": item.call_id,
                "type": "function",
                "function": {"name": name, "arguments": arguments or ""},
            }
        )


def _thought(item: ReasoningItem) -> str:
    """What an item says of a thought, in the best of its places."""
    return (
        "".join(part.text for part in item.content or ())
        or _unwrapped(item.encrypted_content)
        or BETWEEN_TEXTS.join(part.text for part in item.summary or ())
    )


def _text(content: Content, between: str = BETWEEN_TEXTS) -> str:
    if isinstance(content, str):
        return content
    return between.join(
        part.refusal if isinstance(part, RefusalContent) else part.text
        for part in content
    )


def _text_fields(text: TextConfig) -> dict[str, Any]:
    """How the text is to be, in the fields of a chat."""
    found: dict[str, Any] = {}
    if text.verbosity is not None:
        found["verbosity"] = text.verbosity
    if text.format is not None:
        form: dict[str, Any] = {"type": text.format.type}
        if text.format.type == "json_schema" and text.format.schema_ is not None:
            schema = {"name": text.format.name, "strict": text.format.strict}
            form["json_schema"] = {**schema, "schema": text.format.schema_}
        found["response_format"] = form
    return found


def _tool_choice(given: str | dict[str, Any]) -> Any:
    """Which tools are called, in a chat's words.

    Raises:
        AnswerError: It is said in no way that is known.
    """
    if isinstance(given, str):
        if given in _MODES:
            return given
    elif given.get("type") in ("function", "custom"):
        name, namespace = given.get("name"), given.get("namespace")
        if isinstance(name, str) and isinstance(namespace, str | None):
            function = {"name": called(name, namespace)}
            return {"type": "function", "function": function}
    raise bad_request(
        f"tool_choice must be {', '.join(_MODES)} or a function: got {given!r:.60}. "
        'Name it by {"type": "function", "name": ...}.',
        "tool_choice",
    )
