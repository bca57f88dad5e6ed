"""Calls of tools that an answer must have, or may: from ``tool_choice`` to constraints.

Knows nothing of HTTP, of prompts, or of how a grammar is written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..markup.answer import CALL_END, CALL_START, marks_of
from ..markup.tool_calls import QUOTE
from ..markup.tool_grammar import AUTO, REQUIRED, tool_grammar
from ..structure.constraint import Constraint, either, grammar
from .errors import AnswerError, bad_request
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

    def of(
        self,
        body: ChatBody,
        tools: Sequence[dict[str, Any]],
        form: Form | None = None,
    ) -> Form | None:
        """What holds an answer to calls, or to a form; None where it is free.

        Args:
            body: The request.
            tools: The tools that the model may call; none where it may not.
            form: What the answer must be where it calls none. Where calls are required
                it means nothing.

        Raises:
            AnswerError: Calls cannot be forced of this model.
        """
        if not tools:
            return form
        choice = ToolChoice.of(body)
        is_auto = choice.kind == AUTO
        if is_auto and form is None and not (self.are_possible and _any_strict(tools)):
            return None
        if not self.are_possible:
            raise self._impossible(body, form if is_auto else None)
        check_end(body)
        calls = Form("tools", self._maker(body, tools, has_text=form is None))
        if form is None or not is_auto:
            return calls
        return Form(form.place, lambda: either(calls.made(), form.made()))

    def _maker(
        self, body: ChatBody, tools: Sequence[dict[str, Any]], *, has_text: bool
    ) -> Callable[[], Constraint]:
        """What makes a constraint to calls, or to text with calls where it may be."""
        choice = ToolChoice.of(body)

        def make() -> Constraint:
            lark = tool_grammar(
                tools,
                self._marks,
                choice=choice.kind,
                name=choice.name,
                is_parallel=body.parallel_tool_calls is not False,
                has_thoughts=False,  # masks let them pass where they are asked for
                has_text=has_text,
            )
            return grammar(lark, what="grammar of the tools")

        return make

    def _impossible(self, body: ChatBody, form: Form | None) -> AnswerError:
        """A request for which calls would have to be told from text by tokens."""
        reason = "Its marks of calls are no tokens"
        if form is not None:
            return form.refused(
                "it must stand without tools that may be called for this model: got "
                f"both. {reason}. Leave out one of them, or send tool_choice: none."
            )
        return bad_request(
            f"tool_choice must be auto or none for this model: got "
            f"{body.tool_choice!r:.60}. {reason}, so no call can be forced.",
            "tool_choice",
        )


def _any_strict(tools: Sequence[dict[str, Any]]) -> bool:
    return any(tool["function"].get("strict") is True for tool in tools)
