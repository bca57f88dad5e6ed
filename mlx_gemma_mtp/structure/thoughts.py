"""Where an answer begins: behind its thought, told by token ids.

A thought is free but for its length, the answer behind it may not be. The prompt says
whether there may be one: it opens a thought itself, or has the token that asks for
thinking. Text of any form may have further ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from ..markup.answer import (
    RESULT_END,
    THINK,
    THOUGHT_END,
    THOUGHT_OPENING,
    THOUGHT_START,
    TURN_START,
    marks_of,
)


class Phase(Enum):
    """What the next token belongs to."""

    OPEN = "a thought may begin, or the answer"
    THOUGHT = "a thought"
    ANSWER = "the answer"


@dataclass(frozen=True)
class Place:
    """Where a row stands.

    Attributes:
        phase: What its next token belongs to.
        num_thought: Tokens that it has thought, without marks and names.
        name: What is left of the name of a thought that has just begun.
    """

    phase: Phase
    num_thought: int = 0
    name: tuple[int, ...] = ()


@dataclass(frozen=True)
class Thoughts:
    """Tells thoughts from answers by tokens, and where a thought must end.

    Attributes:
        start: Opens a thought; None where the model has no such token.
        end: Closes it.
        asks: In a prompt it asks for thinking.
        openers: What stands last before a turn's part of the model's own.
        name: Stands between ``start`` and what is thought; its last token is a line
            end, which also stands before ``end``.
        limit: Most tokens of all thoughts of a row, marks, names and the prompt's part
            not counted; None for any number.
        may_recur: Whether a thought may begin at any place of the answer.
    """

    start: int | None
    end: int | None
    asks: int | None
    openers: frozenset[int]
    name: tuple[int, ...] = ()
    limit: int | None = None
    may_recur: bool = False

    @classmethod
    def of(cls, tokenizer: Any) -> Thoughts:
        """Those of a tokenizer, of any length, one in a row at most."""
        ids = {name: token for token, name in marks_of(tokenizer).tokens.items()}
        openers = (ids.get(name) for name in (TURN_START, RESULT_END))
        return cls(
            ids.get(THOUGHT_START),
            ids.get(THOUGHT_END),
            ids.get(THINK),
            frozenset(token for token in openers if token is not None),
            _name_of(tokenizer) if THOUGHT_START in ids else (),
        )

    @property
    def are_told(self) -> bool:
        """Whether tokens tell where they begin and end."""
        return self.start is not None and self.end is not None

    def behind(self, prompt: Sequence[int]) -> Place:
        """Where the first token behind a prompt stands."""
        if not self.are_told:
            return Place(Phase.ANSWER)
        phase = Phase.OPEN if self.may_recur or self.asks in prompt else Phase.ANSWER
        for i in reversed(range(len(prompt))):
            token = prompt[i]
            if token == self.start:
                return self._within(prompt[i + 1 :])
            if token == self.end:
                return Place(Phase.OPEN if self.may_recur else Phase.ANSWER)
            if token in self.openers:
                break
        return Place(phase)

    def _within(self, begun: Sequence[int]) -> Place:
        """Where a row stands whose prompt has begun a thought."""
        place = Place(Phase.THOUGHT, name=self.name)
        for token in begun:
            place = self.behind_token(place, token)
        return replace(place, num_thought=0)

    def behind_token(self, place: Place, token: int) -> Place:
        """What comes behind a token that stands at a place."""
        if place.phase is not Phase.THOUGHT:
            if place.phase is Phase.OPEN and token == self.start:
                return replace(place, phase=Phase.THOUGHT, name=self.name)
            return replace(place, phase=self._answer)
        if token == self.end:
            return replace(place, phase=self._answer, name=())
        if token in place.name[:1]:
            return replace(place, name=place.name[1:])
        return replace(place, num_thought=place.num_thought + 1, name=())

    @property
    def _answer(self) -> Phase:
        return Phase.OPEN if self.may_recur else Phase.ANSWER

    def may_begin(self, place: Place) -> bool:
        """Whether a thought may begin at a place."""
        has_left = self.limit is None or place.num_thought < self.limit
        return place.phase is Phase.OPEN and has_left

    def closing(self, place: Place) -> tuple[int, ...]:
        """The only tokens that go on in a thought; none where all do.

        A thought's last token is the line end before its mark, or the mark comes at
        once. A name that has begun is ended first.
        """
        assert self.end is not None
        if self.limit is None or place.num_thought < self.limit - 1:
            return ()
        if place.name:
            return place.name[:1]
        has_left = place.num_thought < self.limit
        return (*self.name[-1:], self.end) if has_left else (self.end,)

    def allow(self, place: Place, token: int) -> bool:
        """Whether a token may stand at a place, as far as thoughts are concerned."""
        if place.phase is Phase.THOUGHT:
            closing = self.closing(place)
            return not closing or token in closing
        is_start = place.phase is Phase.OPEN and token == self.start
        return not is_start or self.may_begin(place)


def _name_of(tokenizer: Any) -> tuple[int, ...]:
    """The tokens of what stands behind the mark that opens a thought."""
    found = tokenizer.encode(THOUGHT_OPENING, add_special_tokens=False)
    return tuple(found[1:])
