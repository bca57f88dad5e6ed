"""What an answer's text means, in the form of OpenAI's API.

``AnswerReader`` tells content, thoughts and calls apart; here they become parts of a
message.
"""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..markup.answer import (
    CALL,
    REASONING,
    THOUGHT_OPENING,
    AnswerReader,
    Part,
    marks_of,
)
from ..markup.tool_calls import ToolCall
from ..markup.tools import Tools

logger = logging.getLogger("mlx_gemma_mtp.server")


@dataclass
class Delta:
    """What a piece of text adds to a message.

    Attributes:
        content: What the user is to read.
        reasoning: What the model says to itself.
        tool_calls: Calls as OpenAI's API has them.
    """

    content: str = ""
    reasoning: str = ""
    tool_calls: list[dict[str, Any]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.content or self.reasoning or self.tool_calls)

    def add(self, other: Delta) -> None:
        """Append a later one."""
        self.content += other.content
        self.reasoning += other.reasoning
        self.tool_calls += other.tool_calls


class Dialogue:
    """How the answers of a model are marked.

    Args:
        tokenizer: mlx-lm's.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._marks = marks_of(tokenizer)

    def readers(
        self,
        tools: Sequence[Any] | None,
        count: int,
        *,
        opening: str = "",
        has_numbers: bool = False,
        max_calls: int | None = None,
    ) -> list[Reader]:
        """Readers for the answers of one request.

        Args:
            tools: Tools that the model may call; None for none.
            count: How many answers.
            opening: What the prompt has written of the answer's turn.
            has_numbers: Whether calls have an ``index``, as in a stream.
            max_calls: Most calls to read of an answer; None for all.
        """
        known = Tools(tools) if tools else None
        return [
            Reader(
                AnswerReader(self._marks, known, opening=opening, max_calls=max_calls),
                has_numbers=has_numbers,
            )
            for _ in range(count)
        ]

    def reader(
        self,
        tools: Sequence[Any] | None,
        *,
        is_reasoning: bool = False,
        has_numbers: bool = False,
    ) -> Reader:
        """A reader for one answer.

        Args:
            tools: Tools that the model may call; None for none.
            is_reasoning: Whether the answer begins inside a thought.
            has_numbers: Whether calls have an ``index``, as in a stream.
        """
        opening = THOUGHT_OPENING if is_reasoning else ""
        return self.readers(tools, 1, opening=opening, has_numbers=has_numbers)[0]


class Reader:
    """Reads one answer.

    Args:
        answer: Tells its parts.
        has_numbers: Whether calls have an ``index``.

    Attributes:
        num_calls: Calls that were handed on.
    """

    def __init__(self, answer: AnswerReader, *, has_numbers: bool) -> None:
        self._answer = answer
        self._has_numbers = has_numbers
        self.num_calls = 0

    @property
    def has_calls(self) -> bool:
        """Whether a tool was called."""
        return self.num_calls > 0

    def read(self, text: str, *, is_last: bool) -> Delta:
        """What more text means.

        Args:
            text: The next piece.
            is_last: Whether the answer ends with it.
        """
        delta = Delta()
        number = self.num_calls
        for part in self.parts(text, is_last=is_last):
            if part.call is not None:
                delta.tool_calls.append(self._written(part.call, number))
                number += 1
            elif part.kind == REASONING:
                delta.reasoning += part.text
            else:
                delta.content += part.text
        return delta

    def parts(self, text: str, *, is_last: bool) -> list[Part]:
        """The same in the order in which it was said.

        Args:
            text: The next piece.
            is_last: Whether the answer ends with it.
        """
        num_unread = self._answer.num_unread
        found = self._answer.read(text, is_last=is_last)
        self.num_calls += sum(part.kind == CALL for part in found)
        if self._answer.num_unread > num_unread:
            reason = "has no end" if self._answer.is_cut_off else "cannot be read"
            logger.warning("a tool call %s; its text is content", reason)
        return found

    def _written(self, call: ToolCall, number: int) -> dict[str, Any]:
        numbered = {"index": number} if self._has_numbers else {}
        return {
            **numbered,
            "id": f"call_{secrets.token_hex(12)}",
            "type": "function",
            "function": {"name": call.name, "arguments": written(call)},
        }


def written(call: ToolCall) -> str:
    """The arguments of a call as JSON."""
    return json.dumps(call.arguments, ensure_ascii=False, allow_nan=False)
