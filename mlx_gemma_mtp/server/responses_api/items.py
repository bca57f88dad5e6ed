"""The items of a response, and the events by which each of them comes about.

Plain data: knows nothing of how it is sent.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import Any, Protocol

from ...markup.tool_calls import ToolCall
from ..answer_parser import written
from .tools import Origin, text_of
from .translation import wrapped

# An event without what all events have: its type, and the fields of its own.
Event = tuple[str, dict[str, Any]]
DONE, OPEN, CUT = "completed", "in_progress", "incomplete"


class Item(Protocol):
    """An item on its way.

    Attributes:
        body: The item as far as it is known.
    """

    body: dict[str, Any]

    def begin(self) -> Iterator[Event]:
        """The events behind the item's own beginning."""

    def add(self, text: str) -> Iterator[Event]:
        """The events of more text."""

    def end(self, status: str) -> Iterator[Event]:
        """The events before the item's own end."""


class TextItem:
    """What the user is to read; see ``Item``."""

    def __init__(self) -> None:
        self.body: dict[str, Any] = {
            "id": f"msg_{secrets.token_hex(12)}",
            "type": "message",
            "status": OPEN,
            "role": "assistant",
            "content": [],
        }
        self._text = ""

    def begin(self) -> Iterator[Event]:
        """See ``Item``."""
        yield "response.content_part.added", {"content_index": 0, "part": self._part}

    def add(self, text: str) -> Iterator[Event]:
        """See ``Item``."""
        self._text += text
        fields = {"content_index": 0, "delta": text, "logprobs": []}
        yield "response.output_text.delta", fields

    def end(self, status: str) -> Iterator[Event]:
        """See ``Item``."""
        fields = {"content_index": 0, "text": self._text, "logprobs": []}
        yield "response.output_text.done", fields
        yield "response.content_part.done", {"content_index": 0, "part": self._part}
        self.body |= {"status": status, "content": [self._part]}

    @property
    def _part(self) -> dict[str, Any]:
        part = {"type": "output_text", "text": self._text}
        return {**part, "annotations": [], "logprobs": []}


class ThoughtItem:
    """What the model says to itself; see ``Item``.

    Args:
        is_summary: Whether it stands where summaries do.
        is_wrapped: Whether it stands as ``encrypted_content`` too.
    """

    def __init__(self, *, is_summary: bool, is_wrapped: bool) -> None:
        self.body: dict[str, Any] = {
            "id": f"rs_{secrets.token_hex(12)}",
            "type": "reasoning",
            "status": OPEN,
            "summary": [],
        }
        self._is_wrapped = is_wrapped
        self._text = ""
        self._field, self._index, self._kind, self._name, self._part_name = (
            (
                "summary",
                "summary_index",
                "summary_text",
                "response.reasoning_summary_text",
                "response.reasoning_summary_part",
            )
            if is_summary
            else (
                "content",
                "content_index",
                "reasoning_text",
                "response.reasoning_text",
                "response.content_part",
            )
        )

    def begin(self) -> Iterator[Event]:
        """See ``Item``."""
        yield f"{self._part_name}.added", {self._index: 0, "part": self._part}

    def add(self, text: str) -> Iterator[Event]:
        """See ``Item``."""
        self._text += text
        yield f"{self._name}.delta", {self._index: 0, "delta": text}

    def end(self, status: str) -> Iterator[Event]:
        """See ``Item``."""
        yield f"{self._name}.done", {self._index: 0, "text": self._text}
        yield f"{self._part_name}.done", {self._index: 0, "part": self._part}
        self.body |= {"status": status, self._field: [self._part]}
        if self._is_wrapped:
            self.body["encrypted_content"] = wrapped(self._text)

    @property
    def _part(self) -> dict[str, Any]:
        return {"type": self._kind, "text": self._text}


class CallOfTool:
    """A call of a tool; see ``Item``.

    Args:
        call: The call.
        origin: What was called, in the request's words.
    """

    def __init__(self, call: ToolCall, origin: Origin) -> None:
        is_custom = origin.is_custom
        self._field = "input" if is_custom else "arguments"
        self._value = text_of(call.arguments) if is_custom else written(call)
        self._name = (
            "response.custom_tool_call_input"
            if is_custom
            else "response.function_call_arguments"
        )
        self.body: dict[str, Any] = {
            "id": f"{'ctc' if is_custom else 'fc'}_{secrets.token_hex(12)}",
            "type": "custom_tool_call" if is_custom else "function_call",
            "status": OPEN,
            "call_id": f"call_{secrets.token_hex(12)}",
            "name": origin.name,
            self._field: "",
        }
        if origin.namespace is not None:
            self.body["namespace"] = origin.namespace

    def begin(self) -> Iterator[Event]:
        """See ``Item``."""
        yield f"{self._name}.delta", {"delta": self._value}

    def add(self, text: str) -> Iterator[Event]:
        """See ``Item``: a call is whole when it begins."""
        raise AssertionError(text)

    def end(self, status: str) -> Iterator[Event]:
        """See ``Item``."""
        fields = {self._field: self._value}
        if self._field == "arguments":
            fields["name"] = self.body["name"]
        yield f"{self._name}.done", fields
        self.body |= {"status": DONE, self._field: self._value}
