"""Calls of tools, read as Gemma 4's chat template writes them.

A call is ``call:NAME{KEY:VALUE,...}``. Keys stand bare, strings between two ``<|"|>``,
objects and lists as in JSON, numbers as Python prints them. A text is first read so
and in no other way. Where that fails it is read once more with what models write beside
the template: white space, trailing commas, ``key=value``, other quotes, bare words. The
schema of the tool decides then: a bare word is read only where it says that a string
stands there.

Knows nothing of marks around a call, of streams, or of how a call is handed on.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .tools import Schema, Tools

QUOTE = '<|"|>'
MAX_DEPTH = 150  # of nested values; Python's own stack is the reason

_STOP = re.compile(r'[,{}\[\]]|<\|"\|>')  # behind a key or a bare value
_SPACE = re.compile(r"\s*")
_NUMBER = re.compile(r"-?[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_LEADING_ZERO = re.compile(r"-?0[0-9]")
# The template of April writes None, those of July write null.
_WORDS = {"true": True, "false": False, "null": None, "None": None}
_PYTHON_WORDS = {"True": True, "False": False}
# JSON has no such numbers: they stay words.
_NO_NUMBERS = frozenset({"nan", "inf", "-inf", "NaN", "Infinity", "-Infinity"})
_QUOTES = ('"', "'")
_CALL = "call:"


def _quoted_before(ends: str) -> dict[str, re.Pattern[str]]:
    """Strings in common quotes, of which one is the end only before these characters.

    Quotes inside them are often not escaped.
    """
    return {
        quote: re.compile(
            rf"{quote}((?:[^{quote}\\]|\\.|{quote}(?!\s*[{ends}]))*){quote}", re.DOTALL
        )
        for quote in _QUOTES
    }


_VALUE_ENDS = _quoted_before(r",}\]")
_KEY_ENDS = _quoted_before(":=")


class UnreadableCallError(ValueError):
    """A text is no call."""


@dataclass(frozen=True)
class ToolCall:
    """One call.

    Attributes:
        name: The tool.
        arguments: Values that JSON has.
    """

    name: str
    arguments: dict[str, Any]


def read_calls(text: str, tools: Tools) -> list[ToolCall]:
    """Read what stands between ``<|tool_call>`` and ``<tool_call|>``.

    Takes time linear in the length of the text.

    Args:
        text: The text, without the marks.
        tools: The tools that may be called; others are read too.

    Returns:
        At least one call. Some models write several between one pair of marks.

    Raises:
        UnreadableCallError: It is something else.
    """
    try:
        return _Parser(text, tools, is_exact=True).calls()
    except UnreadableCallError:
        return _Parser(text, tools, is_exact=False).calls()


class _Parser:
    """Reads a text from its beginning to its end.

    Args:
        text: The text.
        tools: The tools that may be called.
        is_exact: Whether it is read as the template writes and in no other way.
    """

    def __init__(self, text: str, tools: Tools, *, is_exact: bool) -> None:
        self._text = text
        self._tools = tools
        self._is_exact = is_exact
        self._at = 0
        self._depth = 0

    def calls(self) -> list[ToolCall]:
        """All calls of the text."""
        found = [self._call()]
        self._skip_space()
        while self._at < len(self._text):
            if self._is_exact:
                raise UnreadableCallError("there is more behind the call")
            self._take(",")
            found.append(self._call())
            self._skip_space()
        return found

    def _call(self) -> ToolCall:
        self._skip_space()
        has_word = self._take(_CALL)
        if self._is_exact and not has_word:
            raise UnreadableCallError("no call begins")
        self._skip_space()
        name = self._name(is_sure=has_word)
        return ToolCall(name, self._object(self._tools.schema_of(name)))

    def _name(self, *, is_sure: bool) -> str:
        """The name of a tool; behind it stands the brace of its arguments."""
        for name in self._tools.names.at(self._text, self._at):
            end = self._space_behind(self._at + len(name))
            if self._has("{", end):
                self._at = end
                return name
        end = self._text.find("{", self._at)
        name = self._text[self._at : max(end, self._at)]
        if not self._is_exact:
            name = name.rstrip()
        if end < 0 or not is_sure or not name or any(c.isspace() for c in name):
            raise UnreadableCallError("no tool is named")
        self._at = end
        return name

    def _value(self, schema: Schema) -> Any:
        self._skip_space()
        if self._take(QUOTE):
            return self._up_to_quote()
        if self._has("{") or self._has("["):
            self._depth += 1
            if self._depth > MAX_DEPTH:
                raise UnreadableCallError("values are nested too deeply")
            is_object = self._has("{")
            found = self._object(schema) if is_object else self._list(schema.items)
            self._depth -= 1
            return found
        if self._has_other_quote(self._at):
            return self._quoted(_VALUE_ENDS)
        end = self._bare_end(self._at)
        value = self._scalar(self._text[self._at : end], schema)
        self._at = end
        return value

    def _object(self, schema: Schema) -> dict[str, Any]:
        found: dict[str, Any] = {}
        self._expect("{")
        self._skip_space()
        while True:
            key = self._declared_key(schema)
            if key is None and self._has("}") and self._may_end(found):
                break
            key = self._other_key(schema) if key is None else key
            self._check_order(found, key)
            found[key] = self._value(schema.of(key))
            self._end_entry("}")
        self._expect("}")
        return found

    def _list(self, items: Schema) -> list[Any]:
        found: list[Any] = []
        self._expect("[")
        self._skip_space()
        while not (self._has("]") and self._may_end(found)):
            found.append(self._value(items))
            self._end_entry("]")
        self._expect("]")
        return found

    def _may_end(self, found: Any) -> bool:
        """Whether an end may stand here: not behind a comma in the template's form."""
        return not (found and self._is_exact and self._text[self._at - 1] == ",")

    def _end_entry(self, end: str) -> None:
        self._skip_space()
        if not self._has(end):
            self._expect(",")
            self._skip_space()

    def _check_order(self, found: dict[str, Any], key: str) -> None:
        """Keys are sorted in the template's form.

        A key that begins with a space is told so from one behind a space: it would
        stand before the others.
        """
        has_space = key != key.strip()
        last = next(reversed(found), None)
        is_sorted = last is None or last.lower() <= key.lower()
        if self._is_exact and has_space and not is_sorted:
            raise UnreadableCallError("a key has white space around it")

    def _declared_key(self, schema: Schema) -> str | None:
        """The declared key that stands here, if one does; its value follows."""
        for name in schema.keys.at(self._text, self._at):
            end = self._value_behind(name, schema)
            if end is not None:
                self._at = end
                return name
        return None

    def _other_key(self, schema: Schema) -> str:
        """A key that is not declared; its value follows."""
        quoted = self._quoted_key()
        return self._bare_key(schema) if quoted is None else quoted

    def _value_behind(self, name: str, schema: Schema) -> int | None:
        """Where the value begins, if this text is a declared key."""
        end = self._space_behind(self._at + len(name))
        if self._has("=", end) and self._is_exact:
            raise UnreadableCallError("a declared key has another mark behind it")
        if not (self._has(":", end) or self._has("=", end)):
            return None
        end = self._space_behind(end + 1)
        if self._begins_value(end) or self._has_other_quote(end):
            return end
        stop = _STOP.search(self._text, end)
        if stop is None or stop.group() not in (",", "}"):
            return None
        is_string = schema.of(name).is_string
        try:
            self._scalar(self._text[end : stop.start()], schema.of(name))
        except UnreadableCallError:
            if is_string:  # a bare word, which the other way of reading takes
                raise
            return None
        return end

    def _quoted_key(self) -> str | None:
        """A key between quotes, which some models write; None for another one."""
        if self._is_exact:
            return None
        if self._take(QUOTE):
            key = self._up_to_quote()
        elif self._has_other_quote(self._at):
            key = self._quoted(_KEY_ENDS)
        else:
            return None
        self._skip_space()
        if not self._take("="):
            self._expect(":")
        return key

    def _bare_key(self, schema: Schema) -> str:
        """A key that nothing else is known of: up to the last colon before the value.

        No bare value of the template's has a colon in it.
        """
        stop = _STOP.search(self._text, self._at)
        end = len(self._text) if stop is None else stop.start()
        if self._begins_value(end):
            end = self._colon_before(end)
        else:
            end = self._text.rfind(":", self._at, end)
        if end < self._at:
            raise UnreadableCallError("a key is missing")
        key = self._text[self._at : end]
        bare = key.strip()
        if key != bare and (not self._is_exact or bare in schema.keys):
            if self._is_exact:
                raise UnreadableCallError("a key has white space around it")
            key = bare
        self._at = end + 1
        return key

    def _colon_before(self, end: int) -> int:
        """The place of the colon right before a value; -1 where there is none."""
        while not self._is_exact and end > self._at and self._text[end - 1].isspace():
            end -= 1
        return end - 1 if end > self._at and self._text[end - 1] == ":" else -1

    def _scalar(self, text: str, schema: Schema) -> Any:
        """What a value without quotes and brackets means."""
        if not self._is_exact:
            text = text.strip()
        if text in _WORDS:
            return _WORDS[text]
        if _NUMBER.fullmatch(text) and not _LEADING_ZERO.match(text):
            return _number(text)
        if text in _NO_NUMBERS:
            return text
        if not self._is_exact and schema.is_string and text:
            return text
        if not self._is_exact and text in _PYTHON_WORDS:
            return _PYTHON_WORDS[text]
        raise UnreadableCallError("a value is none")

    def _up_to_quote(self) -> str:
        end = self._text.find(QUOTE, self._at)
        if end < 0:
            raise UnreadableCallError("a string has no end")
        found = self._text[self._at : end]
        self._at = end + len(QUOTE)
        return found

    def _quoted(self, ends: Mapping[str, re.Pattern[str]]) -> str:
        """A string in common quotes."""
        quote = self._text[self._at]
        match = ends[quote].match(self._text, self._at)
        if match is None:
            raise UnreadableCallError("a string has no end")
        self._at = match.end()
        body = match.group(1)
        if quote == "'":
            body = body.replace("\\'", "'").replace('"', '\\"')
        try:
            return str(json.loads(f'"{body}"', strict=False))
        except ValueError:  # its backslashes mean themselves
            return match.group(1)

    def _bare_end(self, start: int) -> int:
        stop = _STOP.search(self._text, start)
        return len(self._text) if stop is None else stop.start()

    def _begins_value(self, at: int) -> bool:
        return self._has("{", at) or self._has("[", at) or self._has(QUOTE, at)

    def _has_other_quote(self, at: int) -> bool:
        return not self._is_exact and (self._has('"', at) or self._has("'", at))

    def _has(self, text: str, at: int | None = None) -> bool:
        return self._text.startswith(text, self._at if at is None else at)

    def _take(self, text: str) -> bool:
        is_there = self._has(text)
        self._at += len(text) if is_there else 0
        return is_there

    def _expect(self, text: str) -> None:
        if not self._take(text):
            raise UnreadableCallError(f"{text} is missing")

    def _skip_space(self) -> None:
        self._at = self._space_behind(self._at)

    def _space_behind(self, at: int) -> int:
        """The place behind white space, which the template does not write."""
        match = None if self._is_exact else _SPACE.match(self._text, at)
        return at if match is None else match.end()


def _number(text: str) -> Any:
    """A number; its text where JSON and Python have none such."""
    is_whole = text.lstrip("-").isdecimal()
    try:
        value = int(text) if is_whole else float(text)
    except ValueError:  # thousands of digits
        return text
    return value if math.isfinite(value) else text
