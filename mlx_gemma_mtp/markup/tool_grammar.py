"""Answers that call tools as they were declared, as a grammar for llguidance.

A call is ``call:NAME{KEY:VALUE,...}`` between its marks, as Gemma 4's chat template
writes it and ``tool_calls`` reads it. Marks are single tokens: text that spells one is
none. Knows nothing of tokenizers, requests or the engine of grammars.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import RequestError, shorten
from .answer import CALL_END, CALL_START, THOUGHT_END, THOUGHT_START
from .grammar import Grammar, Item, rule_item, text_item, token_item
from .schema_grammar import SchemaGrammar
from .schema_parts import Part
from .tool_calls import QUOTE

AUTO, REQUIRED = "auto", "required"
_TEXT = "/(?s:.+)/"
_NO_ARGUMENTS = {"type": "object", "properties": {}}
_ANY_ARGUMENTS = {"type": "object"}
# Marks that a thought may have. One that opens a call would be read as its end.
_IN_THOUGHTS = (QUOTE, CALL_END, "<|tool>", "<tool|>", "<|think|>")


def tool_grammar(
    tools: Sequence[Mapping[str, Any]],
    marks: Mapping[str, int],
    *,
    choice: str = REQUIRED,
    name: str | None = None,
    is_parallel: bool = True,
    has_thoughts: bool = True,
    has_text: bool = True,
) -> str:
    """The grammar of an answer.

    Args:
        tools: Tools as OpenAI's API has them.
        marks: The tokens of the control tokens' texts; those of calls are needed.
        choice: ``REQUIRED``: one call or more and nothing else. ``AUTO``: any text,
            thoughts and calls; arguments of tools that are ``strict`` follow their
            schema.
        name: The only tool that may be called, where calls are required, and once.
        is_parallel: Whether there may be more than one call.
        has_thoughts: Whether thoughts may stand before required calls. Who masks tokens
            may let thoughts pass unseen.
        has_text: Whether an answer with ``AUTO`` may have text; without it has one call
            or more and nothing else.

    Returns:
        A grammar in llguidance's dialect of Lark. It does not end the turn.

    Raises:
        RequestError: A schema has a keyword that answers cannot be held to, or no
            tool has the name.
    """
    answer = _Answer(tools, marks)
    is_auto = choice == AUTO and name is None
    call = answer.call(name, holds_all=not is_auto)
    if is_auto and has_text:
        return answer.free(call, is_parallel=is_parallel)
    is_parallel = is_parallel and name is None
    return answer.forced(call, is_parallel=is_parallel, has_thoughts=has_thoughts)


class _Answer:
    """Writes the rules of one answer."""

    def __init__(
        self, tools: Sequence[Mapping[str, Any]], marks: Mapping[str, int]
    ) -> None:
        self._tools = tools
        self._marks = {mark: token_item(token) for mark, token in marks.items()}
        self._grammar = Grammar()
        self._text = self._grammar.terminal(_TEXT)

    def call(self, name: str | None, *, holds_all: bool) -> Item:
        """One call; of strict tools alone the schema holds, or of all."""
        calls = [
            self._call(index, is_held=holds_all or self._is_strict(index))
            for index, tool in enumerate(self._tools)
            if name is None or tool["function"]["name"] == name
        ]
        if not calls:
            raise RequestError(
                f"tool_choice must name one of the tools: got {shorten(name)}. "
                "Name a tool of the request."
            )
        return rule_item(self._grammar.rule(*calls))

    def forced(self, call: Item, *, is_parallel: bool, has_thoughts: bool) -> str:
        """The grammar of calls, behind thoughts."""
        calls = _repeated(call, "+") if is_parallel else call
        thoughts = [_repeated(t, "*") for t in self._thought() if has_thoughts]
        return self._grammar.text(self._grammar.rule([*thoughts, calls]))

    def free(self, call: Item, *, is_parallel: bool) -> str:
        """The grammar of text with thoughts and calls in it."""
        parts = [[self._text], [self._marks[QUOTE]], *([t] for t in self._thought())]
        text = rule_item(self._grammar.rule(*parts))
        if is_parallel:
            both = rule_item(self._grammar.rule([text], [call]))
            start = self._grammar.rule([_repeated(both, "*")])
        else:
            some = _repeated(text, "*")
            start = self._grammar.rule([some], [some, call, some])
        return self._grammar.text(start)

    def _thought(self) -> list[Item]:
        """A thought, where the model has marks for it."""
        if not {THOUGHT_START, THOUGHT_END} <= self._marks.keys():
            return []
        marks = [self._marks[m] for m in _IN_THOUGHTS if m in self._marks]
        inside = rule_item(self._grammar.rule([self._text], *([m] for m in marks)))
        start, end = self._marks[THOUGHT_START], self._marks[THOUGHT_END]
        return [rule_item(self._grammar.rule([start, _repeated(inside, "*"), end]))]

    def _is_strict(self, index: int) -> bool:
        return self._tools[index]["function"].get("strict") is True

    def _call(self, index: int, *, is_held: bool) -> list[Item]:
        """A call of one tool; its arguments are free where they are not held to it."""
        function = self._tools[index]["function"]
        schema = function.get("parameters") if is_held else _ANY_ARGUMENTS
        root = Part(
            _NO_ARGUMENTS if schema is None else schema,
            f"/tools/{index}/function/parameters",
        )
        arguments = SchemaGrammar(self._grammar, root, self._marks[QUOTE]).arguments()
        opening = text_item(f"call:{function['name']}")
        return [self._marks[CALL_START], opening, arguments, self._marks[CALL_END]]


def _repeated(item: Item, mark: str) -> Item:
    """A repeated item."""
    return Item(f"{item.text}{mark}", item.rule)
