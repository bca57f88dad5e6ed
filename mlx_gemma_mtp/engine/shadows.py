"""Drafts made beside plain rounds: how many of them are the tokens that come.

So it is learnt how many drafts would be accepted, at the cost of the drafter alone and
without any change of the text. Of rows that draw their tokens it is what equality under
shared noise accepts: no more than their own rule would.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import mlx.core as mx

from ..drafting.policy import DraftPolicy
from .known_text import num_equal
from .sequence import TokenSequence


@dataclass(frozen=True)
class _Shadow:
    """Drafts of one moment.

    Attributes:
        drafts: For each seat the tokens that may come, int32 [B, N]; queued.
        sequences: Who sat there.
        starts: How many tokens each will have emitted before the first of them.
        policy: Who asked for them.
    """

    drafts: mx.array
    sequences: tuple[TokenSequence | None, ...]
    starts: tuple[int, ...]
    policy: DraftPolicy

    @property
    def is_due(self) -> bool:
        """Whether all tokens have come that will."""
        end = self.drafts.shape[1]
        return all(
            sequence is None
            or not sequence.is_live
            or sequence.num_emitted >= start + end
            for sequence, start in zip(self.sequences, self.starts, strict=True)
        )

    def num_accepted(self) -> list[int]:
        """Of each one that says it: how many drafts came true, from the first on."""
        counts = []
        for sequence, start, drafts in zip(
            self.sequences,
            self.starts,
            cast(list[list[int]], self.drafts.tolist()),
            strict=True,
        ):
            if sequence is None:
                continue
            tokens = sequence.emitted[start : start + len(drafts)]
            count = num_equal(drafts, tokens)
            if count < len(tokens) or count == len(drafts):  # else its text has ended
                counts.append(count)
        return counts


class Shadows:
    """Drafts that wait for the tokens to compare them with."""

    def __init__(self) -> None:
        self._waiting: deque[_Shadow] = deque()

    def add(
        self,
        drafts: mx.array,
        sequences: Sequence[TokenSequence | None],
        *,
        in_flight: Sequence[Sequence[TokenSequence | None]],
        policy: DraftPolicy,
    ) -> None:
        """Let drafts wait.

        Args:
            drafts: For each seat, int32 [B, N]; queued on the device.
            sequences: Who sits there.
            in_flight: Who sits in each of the plain rounds that are queued before.
            policy: Who is told.
        """
        starts = tuple(
            s.num_emitted + sum(s in queued for queued in in_flight) if s else 0
            for s in sequences
        )
        self._waiting.append(_Shadow(drafts, tuple(sequences), starts, policy))

    def compare(self) -> None:
        """Tell who asked of all drafts whose tokens have come."""
        while self._waiting and self._waiting[0].is_due:
            shadow = self._waiting.popleft()
            shadow.policy.observe_shadow(shadow.drafts.shape[1], shadow.num_accepted())

    def clear(self) -> None:
        """Let go of all drafts: their tokens do not come, or they have failed."""
        while self._waiting:
            shadow = self._waiting.popleft()
            shadow.policy.observe_shadow(shadow.drafts.shape[1], [])
