"""Calls of tools that an answer must have: from ``tool_choice`` to a constraint.

Knows nothing of HTTP, of prompts, or of how a grammar is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..markup.answer import CALL_END, CALL_START, marks_of
from ..markup.tool_calls import QUOTE
from ..markup.tool_grammar import AUTO, REQUIRED, tool_grammar
from ..structure.constraint import Constraint, grammar
from .errors import bad_request
from .forms import Form, check_end
from .schema import ChatBody

NONE = "none"


@dataclass(frozen=True)
class ToolChoice:
    """What a request says of calls.

    Attributes:
        kind: ``AUTO``, ``REQUIRED`` or ``NONE``.
        name: The only tool that may be called, where one is named.
    """

    kind: str
    name: str | None = None

    @classmethod
    def of(cls, body: ChatBody) -> ToolChoice:
        """That of a request.

        Raises:
            AnswerError: It is another form, or calls are required of no tools, or of
                one that is not there.
        """
        given = body.tool_choice or AUTO
        if isinstance(given, str):
            found = cls(given)
        else:
            function = given.get("function")
            name = function.get("name") if isinstance(function, dict) else None
            found = cls(REQUIRED, name) if isinstance(name, str) else cls("")
        if found.kind not in (AUTO, REQUIRED, NONE):
            raise bad_request(
                "tool_choice must be auto, none, required or a function's name: got "
                f'{given!r:.60}. Name it by {{"type": "function", "function": '
                '{"name": ...}}.',
                "tool_choice",
            )
        names = [tool.function.name for tool in body.tools or ()]
        is_there = bool(names) if found.name is None else found.name in names
        if found.kind == REQUIRED and not is_there:
            raise bad_request(
                f"tool_choice must name one of the {len(names)} tools: got "
                f"{given!r:.60}. Declare it in tools.",
                "tool_choice",
            )
        return found


class ForcedCalls:
    """Finds what holds answers to calls, for one model.

    Args:
        tokenizer: mlx-lm's.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._marks = {name: i for i, name in marks_of(tokenizer).tokens.items()}

    @property
    def are_possible(self) -> bool:
        """Whether the marks of calls are tokens."""
        return {CALL_START, CALL_END, QUOTE} <= self._marks.keys()

    def of(self, body: ChatBody, tools: Sequence[dict[str, Any]]) -> Form | None:
        """What holds an answer to calls; None where it is free.

        Args:
            body: The request.
            tools: The tools that the model may call; none where it may not.

        Raises:
            AnswerError: Calls cannot be forced of this model.
        """
        if not tools:
            return None
        choice = ToolChoice.of(body)
        if choice.kind == AUTO and not (self.are_possible and _any_strict(tools)):
            return None
        if not self.are_possible:
            raise bad_request(
                "tool_choice must be auto or none for this model: got "
                f"{body.tool_choice!r:.60}. Its marks of calls are no tokens, so no "
                "call can be forced.",
                "tool_choice",
            )
        check_end(body)
        is_parallel = body.parallel_tool_calls is not False

        def make() -> Constraint:
            lark = tool_grammar(
                tools,
                self._marks,
                choice=choice.kind,
                name=choice.name,
                is_parallel=is_parallel,
                has_thoughts=False,  # masks let them pass where they are asked for
            )
            return grammar(lark, what="tools")

        return Form("tools", make)


def _any_strict(tools: Sequence[dict[str, Any]]) -> bool:
    return any(tool["function"].get("strict") is True for tool in tools)
