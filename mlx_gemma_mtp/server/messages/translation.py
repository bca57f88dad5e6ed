"""From Anthropic's Messages to the body of a chat.

Knows nothing of prompts, of HTTP, or of how an answer is written.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from ..errors import bad_request
from ..schema import BETWEEN_TEXTS, ChatBody, Common, translated
from ..thinking import NO_THINKING
from .schema import (
    Block,
    CountBody,
    MessagesBody,
    MessagesFormat,
    MessagesTool,
    MessagesToolChoice,
    MessagesTurn,
    TextBlock,
    Texts,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
)

_NAMES = {
    "function.parameters": "input_schema",
    "max_thinking_tokens": "thinking.budget_tokens",
    "continue_final_message": "messages",
}
# A line of Claude Code's that is new in every request and tells a model nothing. It
# would part each prompt from the kept ones at its first words.
_BILLING = re.compile(r"^x-anthropic-billing-header:[^\n]*\n*", re.MULTILINE)
_THINKING = "high"  # Anthropic's own default
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def names(body: CountBody) -> dict[str, str]:
    """What a chat calls what a body calls otherwise: for what is said of mistakes."""
    has_old_name = _configured_form(body) is None and body.output_format is not None
    form = "output_format" if has_old_name else "output_config.format"
    return {
        "response_format.json_schema.schema": f"{form}.schema",
        "response_format": form,
        **_NAMES,
    }


def chat_body(body: CountBody) -> ChatBody:
    """The chat's body that says the same.

    Raises:
        AnswerError: It holds what no chat has.
    """
    fields = body.model_dump(include=set(Common.model_fields), exclude_unset=True)
    fields["messages"] = [*_system(body.system), *_messages(body.messages)]
    fields["reasoning_effort"] = _effort(body)
    if body.max_thinking_tokens is None and body.thinking is not None:
        fields["max_thinking_tokens"] = body.thinking.budget_tokens
    if body.tools:
        fields["tools"] = [_tool(i, tool) for i, tool in enumerate(body.tools)]
    if body.tool_choice is not None:
        fields |= _tool_choice(body.tool_choice)
    asked = _configured_form(body) or body.output_format
    if asked is not None:
        form = {"name": "answer", "strict": True, "schema": asked.schema_}
        fields["response_format"] = {"type": "json_schema", "json_schema": form}
    if isinstance(body, MessagesBody):
        fields["max_tokens"] = body.max_tokens
        fields["stop"] = body.stop_sequences
    return translated(fields)


def _configured_form(body: CountBody) -> MessagesFormat | None:
    """The form that the answer is to have, where the newer field says it."""
    return None if body.output_config is None else body.output_config.format


def _effort(body: CountBody) -> str:
    """Whether the model thinks: only where a body asks for it, as Anthropic has it."""
    if body.thinking is None or body.thinking.type == "disabled":
        return NO_THINKING
    effort = body.output_config.effort if body.output_config is not None else None
    return effort or _THINKING


def _system(given: Texts | None) -> list[dict[str, Any]]:
    """The instructions, as the first message."""
    text = _BILLING.sub("", _text(given))
    return [{"role": "system", "content": text}] if text else []


def _messages(given: Sequence[MessagesTurn]) -> Iterator[dict[str, Any]]:
    for message in given:
        blocks: Sequence[Block] = (
            [TextBlock(type="text", text=message.content)]
            if isinstance(message.content, str)
            else message.content
        )
        if message.role == "assistant":
            yield _said(blocks)
        else:
            yield from _asked(message.role, blocks)


def _asked(role: str, blocks: Sequence[Block]) -> Iterator[dict[str, Any]]:
    """What was said to the model: results of calls before what is said beside them."""
    results = [block for block in blocks if isinstance(block, ToolResultBlock)]
    for block in results:
        yield {
            "role": "tool",
            "tool_call_id": block.tool_use_id,
            "content": _result(block),
        }
    texts = [block.text for block in blocks if isinstance(block, TextBlock)]
    if texts or not results:
        yield {"role": role, "content": BETWEEN_TEXTS.join(texts)}


def _said(blocks: Sequence[Block]) -> dict[str, Any]:
    """What the model has said: its texts stand as it wrote them."""
    texts = [block.text for block in blocks if isinstance(block, TextBlock)]
    thoughts = [block.thinking for block in blocks if isinstance(block, ThinkingBlock)]
    calls = [
        {
            "id": block.id,
            "type": "function",
            "function": {"name": block.name, "arguments": block.input},
        }
        for block in blocks
        if isinstance(block, ToolUseBlock)
    ]
    found: dict[str, Any] = {"role": "assistant", "content": "".join(texts)}
    if any(thoughts):
        found["reasoning"] = "\n".join(thoughts)
    if calls:
        found["tool_calls"] = calls
    return found


def _result(block: ToolResultBlock) -> str:
    text = _text(block.content)
    is_plain = block.is_error and not text.lower().startswith("error")
    return f"Error: {text}" if is_plain else text


def _text(given: Texts | None) -> str:
    if given is None or isinstance(given, str):
        return given or ""
    return BETWEEN_TEXTS.join(block.text for block in given)


def _tool(number: int, tool: MessagesTool) -> dict[str, Any]:
    if tool.type not in (None, "custom"):
        name = f"tools[{number}].type"
        raise bad_request(
            f"{name} must be custom: got {tool.type!r}. The server has no tools of its "
            "own: declare one with a name and an input_schema.",
            name,
        )
    function: dict[str, Any] = {"name": tool.name}
    if tool.description is not None:
        function["description"] = tool.description
    if tool.input_schema is not None:
        function["parameters"] = tool.input_schema
    if tool.strict is not None:
        function["strict"] = tool.strict
    return {"type": "function", "function": function}


def _tool_choice(choice: MessagesToolChoice) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if choice.type == "tool":
        if not choice.name:
            raise bad_request(
                "tool_choice.name must name a tool: got none. Add it, or send any.",
                "tool_choice.name",
            )
        function = {"name": choice.name}
        found["tool_choice"] = {"type": "function", "function": function}
    else:
        found["tool_choice"] = _CHOICES[choice.type]
    if choice.disable_parallel_tool_use:
        found["parallel_tool_calls"] = False
    return found
