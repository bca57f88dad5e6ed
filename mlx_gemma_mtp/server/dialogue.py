"""What an answer's text means: content, reasoning, calls of tools.

mlx-lm finds the marks between them and reads the calls; here the parts are put
together. Text whose call cannot be read is content, so nothing is lost.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mlx_lm.generate import TextStateMachine, make_text_state_machine
from mlx_lm.server import ToolCallFormatter

logger = logging.getLogger("mlx_gemma_mtp.server")

_TOOL = "tool"
_REASONING = "reasoning"


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
        self._tokenizer = tokenizer
        self._machine = make_text_state_machine(tokenizer)

    def reader(
        self, tools: Sequence[Any] | None, *, is_reasoning: bool, has_numbers: bool
    ) -> Reader:
        """A reader for one answer.

        Args:
            tools: Tools that the model may call; None for none.
            is_reasoning: Whether the answer begins inside its reasoning.
            has_numbers: Whether calls have an ``index``, as in a stream.
        """
        initial = _REASONING if is_reasoning else "normal"
        calls = None
        if tools and self._tokenizer.has_tool_calling:
            calls = ToolCallFormatter(
                self._tokenizer.tool_parser, tools, streaming=has_numbers
            )
        marks = (
            self._tokenizer.tool_call_start or "",
            self._tokenizer.tool_call_end or "",
        )
        return Reader(self._machine.make_state(initial), calls, marks)


class Reader:
    """Reads one answer.

    Args:
        state: mlx-lm's state of the text.
        calls: Reads the text of calls; None where there are no tools.
        marks: What stands around a call.

    Attributes:
        has_calls: Whether a tool was called.
    """

    def __init__(
        self, state: Any, calls: ToolCallFormatter | None, marks: tuple[str, str]
    ) -> None:
        self._state = state
        self._calls = calls
        self._marks = marks
        self._call = ""
        self.has_calls = False

    def read(self, text: str, *, is_last: bool) -> Delta:
        """What more text means.

        Args:
            text: The next piece.
            is_last: Whether the answer ends with it.
        """
        delta = Delta()
        for character in text:
            # One at a time: what a step lets go of then belongs to the state before.
            before = self._state[0]
            self._state, certain, after = TextStateMachine.step(self._state, character)
            self._sort(delta, before, certain)
            if before == _TOOL and after != _TOOL:
                self._end_call(delta, self._marks[1])
        if is_last:
            before = self._state[0]
            self._state, rest, _ = TextStateMachine.flush(self._state)
            self._sort(delta, before, rest)
            if before == _TOOL:
                self._end_call(delta, "")
        return delta

    def _sort(self, delta: Delta, state: str, text: str) -> None:
        if state == _TOOL:
            self._call += text
        elif state == _REASONING:
            delta.reasoning += text
        else:
            delta.content += text

    def _end_call(self, delta: Delta, end: str) -> None:
        """Read the call whose text is complete."""
        text, self._call = self._call, ""
        calls = self._read_call(text)
        if calls:
            self.has_calls = True
            delta.tool_calls += calls
        else:
            delta.content += f"{self._marks[0]}{text}{end}"

    def _read_call(self, text: str) -> list[dict[str, Any]]:
        if self._calls is None:
            return []
        try:
            return list(self._calls([text]))
        except Exception as error:  # noqa: BLE001 - the model may write anything
            logger.warning("a tool call could not be read: %r", error)
            return []
