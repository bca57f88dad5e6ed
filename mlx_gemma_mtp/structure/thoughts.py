"""Where an answer begins: behind its thought, told by token ids.

A thought is free, the answer behind it is not. The prompt says whether there may be
one: it opens a thought itself, or has the token that asks for thinking.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from ..markup.answer import (
    RESULT_END,
    THINK,
    THOUGHT_END,
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
class Thoughts:
    """Tells thoughts from answers by tokens.

    Attributes:
        start: Opens a thought; None where the model has no such token.
        end: Closes it.
        asks: In a prompt it asks for thinking.
        openers: What stands last before a turn's part of the model's own.
    """

    start: int | None
    end: int | None
    asks: int | None
    openers: frozenset[int]

    @classmethod
    def of(cls, tokenizer: Any) -> Thoughts:
        """Those of a tokenizer."""
        ids = {name: token for token, name in marks_of(tokenizer).tokens.items()}
        openers = (ids.get(name) for name in (TURN_START, RESULT_END))
        return cls(
            ids.get(THOUGHT_START),
            ids.get(THOUGHT_END),
            ids.get(THINK),
            frozenset(token for token in openers if token is not None),
        )

    def behind(self, prompt: Sequence[int]) -> Phase:
        """What the first token behind a prompt belongs to."""
        if self.start is None or self.end is None:
            return Phase.ANSWER
        for token in reversed(prompt):
            if token == self.start:
                return Phase.THOUGHT
            if token == self.end:
                return Phase.ANSWER
            if token in self.openers:
                break
        return Phase.OPEN if self.asks in prompt else Phase.ANSWER

    def behind_token(self, phase: Phase, token: int) -> Phase:
        """What comes behind a token that stands in a phase."""
        if phase is Phase.THOUGHT:
            return Phase.ANSWER if token == self.end else Phase.THOUGHT
        is_start = phase is Phase.OPEN and token == self.start
        return Phase.THOUGHT if is_start else Phase.ANSWER
