"""Whether texts go on as they did where their newest tokens stood before.

The host knows what a text would have drafted for itself in every round. Compared with
the tokens that come, it says how many of these drafts would have stood: so that is
learnt at no cost, wherever the drafts come from.

Knows nothing of arrays, nor of who uses what is learnt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..constants import MAX_DRAFT_TOKENS
from ..drafting.policy import DraftPolicy
from .known_text import num_equal
from .sequence import TokenSequence


@dataclass(frozen=True)
class _Expected:
    """What may come in a text.

    Attributes:
        sequence: Whose text.
        start: How many tokens it had emitted before the first of them.
        tokens: What followed where its newest tokens stood before.
        length: How long its match was when the round was chosen.
        policy: Who is told.
    """

    sequence: TokenSequence
    start: int
    tokens: Sequence[int]
    length: int
    policy: DraftPolicy

    def num_same(self) -> int | None:
        """How many of them have come; None while that is open."""
        came = self.sequence.emitted[self.start : self.start + len(self.tokens)]
        count = num_equal(self.tokens, came)
        return count if count < len(came) or count == len(self.tokens) else None


class Followed:
    """What is expected of the texts of a batch, and what has come."""

    def __init__(self) -> None:
        self._expected: list[_Expected] = []

    def note(
        self, sequence: TokenSequence, length: int, *, policy: DraftPolicy
    ) -> None:
        """Hear that a round of a live sequence was read, before its tokens are emitted.

        Args:
            sequence: The sequence.
            length: How long its match was when the round was chosen.
            policy: Who chose it.
        """
        if sequence.text is None:
            return
        drafts = sequence.text.following[:MAX_DRAFT_TOKENS]
        start = sequence.num_emitted
        self._expected.append(_Expected(sequence, start, drafts, length, policy))

    def compare(self) -> None:
        """Tell of all whose tokens have come; of those that have ended nothing more."""
        waiting = []
        for each in self._expected:
            num_same = each.num_same()
            if num_same is not None:
                each.policy.observe_match(each.length, num_same)
            elif each.sequence.is_live:
                waiting.append(each)
        self._expected = waiting

    def clear(self) -> None:
        """Expect nothing any more."""
        self._expected.clear()
