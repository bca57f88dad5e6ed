"""What an answer of Gemma 4's means: content, thoughts, and calls of tools.

``<|channel>thought`` and a line end open a thought, a line end and ``<channel|>``
close it; ``<|tool_call>`` and ``<tool_call|>`` stand around a call, whose strings may
hold any of these marks. All else is content. Marks are control tokens: none is ever
shown, and no text is lost.

Every front end reads answers with ``AnswerReader``. It knows nothing of tokens, of HTTP
or of terminals.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from .tool_calls import QUOTE, ToolCall, UnreadableCallError, read_calls
from .tools import Tools

CONTENT = "content"
REASONING = "reasoning"
CALL = "call"

THOUGHT_START = "<|channel>"
THOUGHT_END = "<channel|>"
CALL_START = "<|tool_call>"
CALL_END = "<tool_call|>"
TURN_START = "<|turn>"
TURN_END = "<turn|>"
THINK = "<|think|>"  # in a prompt: asks for thoughts
RESULT_END = "<tool_response|>"
# Without <mask> and <unk>, which rule nothing: <mask> is a word of SVG.
_MARKS = (
    *("<|tool>", "<tool|>", CALL_START, CALL_END, "<|tool_response>"),
    *(RESULT_END, QUOTE, THINK, THOUGHT_START, THOUGHT_END),
    *(TURN_START, TURN_END, "<|image>", "<|image|>", "<image|>", "<|audio>"),
    *("<|audio|>", "<audio|>", "<|video|>", "<pad>", "<bos>", "<eos>"),
)
_LABEL = "thought"
_LABELLED = re.compile(rf"(?:{_LABEL}\b)?\n?")
# What opens a thought, as templates and models write it.
THOUGHT_OPENING = f"{THOUGHT_START}{_LABEL}\n"


# Of text that ordinary tokens spell each < has a second character behind it, so that
# none is taken for a mark. Unicode has that place for no character; where a text has it
# all the same, it stays.
_SPELLED = "<\ufdd0"


def spelled(text: str) -> str:
    """Text of ordinary tokens, in which no mark is."""
    return text.replace("<", _SPELLED)


def plain(text: str) -> str:
    """Text as it is to be seen, of ordinary tokens or not."""
    return text.replace(_SPELLED, "<")


def cut(text: str, num_characters: int) -> tuple[str, str]:
    """A text's beginning of so many characters that are to be seen, and its rest."""
    if _SPELLED not in text:
        return text[:num_characters], text[num_characters:]
    end = 0
    for _ in range(num_characters):
        end += len(_SPELLED) if text.startswith(_SPELLED, end) else 1
    return text[:end], text[end:]


@dataclass(frozen=True)
class Part:
    """A part of an answer.

    Attributes:
        kind: ``CONTENT``, ``REASONING`` or ``CALL``.
        text: The text; empty for a call.
        call: The call.
    """

    kind: str
    text: str = ""
    call: ToolCall | None = None


class Marks:
    """The control tokens that a model's answers may have.

    Args:
        names: Their texts.
        tokens: Their texts by their ids, where all of them are tokens; else nothing,
            and text that spells one counts for it.

    Attributes:
        pattern: Finds one.
        tokens: The same.
    """

    def __init__(
        self, names: Collection[str], tokens: Mapping[int, str] | None = None
    ) -> None:
        words = map(re.escape, sorted(names, key=len, reverse=True))
        self.pattern = re.compile("|".join(words) or r"(?!)")
        self.tokens = dict(tokens or {})
        # All of them begin with the only < in them.
        self._beginnings = {name[:n] for name in names for n in range(1, len(name))}
        self._longest = max(map(len, names), default=0)

    def num_held(self, text: str, start: int) -> int:
        """Length of a text's end, behind ``start``, that may begin a mark."""
        last = text.rfind("<", max(start, len(text) - self._longest))
        return len(text) - last if last >= 0 and text[last:] in self._beginnings else 0


def marks_of(tokenizer: Any) -> Marks:
    """Gemma 4's marks that a tokenizer has as tokens, or its chat template writes.

    Others are no more than text.
    """
    template = tokenizer.chat_template
    written = template if isinstance(template, str) else ""
    known: dict[str, int] = tokenizer.get_added_vocab()
    names = [mark for mark in _MARKS if mark in known or mark in written]
    are_tokens = all(name in known for name in names)
    return Marks(names, {known[name]: name for name in names} if are_tokens else None)


class AnswerReader:
    """Reads one answer, in pieces of any length, in linear time.

    Args:
        marks: The control tokens, ``marks_of`` the tokenizer.
        tools: The tools that may be called; None where the text of a call is content.
        opening: The text before the answer, from the turn's beginning on: what the
            prompt itself has opened. None of it is a part of the answer.
        max_calls: Most calls to read, the text of others is gone; None for all.

    Attributes:
        is_cut_off: Whether the answer has ended inside a call.
        num_unread: Calls that could not be read, and are content.
    """

    def __init__(
        self,
        marks: Marks,
        tools: Tools | None = None,
        *,
        opening: str = "",
        max_calls: int | None = None,
    ) -> None:
        self._marks = marks
        self._tools = tools
        self._max_calls = max_calls
        self._num_calls = 0
        self._parts: list[Part] = []
        self._held = ""  # may be the beginning of a mark
        self._is_thought = False
        self._label: str | None = (
            None  # what follows a thought's mark, until it is sure
        )
        self._line_end = ""  # at the end of a thought, may belong to its closing mark
        self._has_thought = False  # there was another one before
        self._call: list[str] | None = None
        self._is_string = False
        self._has_strings = True  # False where one has no end
        # Characters that are none of the answer: held back, and of a call.
        self._num_known = self._num_known_call = 0
        self.is_cut_off = False
        self.num_unread = 0
        self.read(opening)
        self._has_thought = False
        self._num_known = sum(map(len, (self._held, self._line_end, self._label or "")))
        self._num_known_call = sum(map(len, self._call or ()))

    @property
    def is_thought(self) -> bool:
        """Whether what comes next belongs to a thought."""
        return self._is_thought

    def read(self, text: str, *, is_last: bool = False) -> list[Part]:
        """What more text means.

        Args:
            text: The next piece.
            is_last: Whether the answer ends with it.

        Returns:
            What is certain by now, in order.
        """
        self._read(text, is_last=is_last)
        if is_last:
            self._end()
        found, self._parts = self._parts, []
        return found

    def _read(self, text: str, *, is_last: bool) -> None:
        text, self._held = self._held + text, ""
        start = 0
        for mark in self._marks.pattern.finditer(text):
            self._add(text[start : mark.start()])
            self._take(mark.group())
            start = mark.end()
        end = len(text) if is_last else len(text) - self._marks.num_held(text, start)
        self._add(text[start:end])
        self._held = text[end:]

    def _add(self, text: str) -> None:
        """Text without marks."""
        if not text:
            return
        if self._call is not None:
            self._call.append(text)
        elif self._is_thought:
            self._think(text)
        else:
            self._emit(CONTENT, text)

    def _take(self, mark: str) -> None:
        """A mark: it changes what the text behind it is."""
        if self._call is not None:
            if mark == QUOTE or (self._is_string and self._has_strings):
                self._is_string ^= mark == QUOTE
                self._call.append(mark)
                return
            self._end_call()
        if mark == QUOTE:
            self._add('"')
        elif mark == CALL_START and self._tools is not None:
            self._call, self._is_string = [], False
            self._num_known_call = 0
        elif mark == THOUGHT_START:
            self._end_label()
            self._is_thought, self._label = True, ""
            self._line_end = "\n" if self._has_thought else ""  # between two thoughts
        elif mark == THOUGHT_END:
            self._end_label()
            self._is_thought, self._line_end = False, ""
        self._num_known = 0

    def _think(self, text: str) -> None:
        """Text of a thought."""
        if self._label is not None:
            text, self._label = self._label + text, None
            if len(text) < len(_LABEL) + 1 and f"{_LABEL}\n".startswith(text):
                self._label = text
                return
            label = _LABELLED.match(text)
            if label:
                text = text[label.end() :]
                self._num_known *= not label.end()
        text, self._line_end = self._line_end + text, ""
        if text.endswith("\n"):
            text, self._line_end = text[:-1], "\n"
        self._emit(REASONING, text)

    def _end_label(self) -> None:
        """What was held back as a label, where a mark or the end follows."""
        label, self._label = self._label, None
        if label and label != _LABEL:
            self._emit(REASONING, label)

    def _emit(self, kind: str, text: str) -> None:
        text, self._num_known = plain(text[self._num_known :]), 0
        if text:
            self._parts.append(Part(kind, text))
            self._has_thought |= kind == REASONING

    def _end_call(self) -> None:
        """Read the call whose text is complete; one that is none is text."""
        assert self._call is not None
        assert self._tools is not None
        text, self._call = "".join(self._call), None
        known, self._num_known_call = self._num_known_call, 0
        if self._num_calls == self._max_calls:
            return
        try:
            calls = read_calls(plain(text), self._tools)
        except UnreadableCallError:
            self.num_unread += 1
            self._num_known = 0
            self._add(self._marks.pattern.sub(_as_text, text[known:]))
            return
        left = None if self._max_calls is None else self._max_calls - self._num_calls
        self._parts += [Part(CALL, call=call) for call in calls[:left]]
        self._num_calls += len(calls[:left])

    def _end(self) -> None:
        """The answer is over: nothing is held back any longer."""
        if self._call is not None and self._is_string and self._has_strings:
            # Nobody wrote the end of this string: it hides all the marks behind it.
            text, known = "".join(self._call), self._num_known_call
            self._call, self._has_strings = None, False
            self._take(CALL_START)
            self._num_known_call = known
            self._read(text, is_last=True)
        if self._call is not None:
            before = self.num_unread
            self._end_call()
            self.is_cut_off = self.num_unread > before
        self._end_label()
        if self._is_thought:
            self._emit(REASONING, self._line_end)


def _as_text(mark: re.Match[str]) -> str:
    """What is left of a mark in the text of a call that is none."""
    return '"' if mark.group() == QUOTE else ""
