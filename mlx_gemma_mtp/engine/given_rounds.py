"""Rounds whose tokens the caller gives: nothing is drafted, nothing is chosen.

They are the rounds that decode, of the same function and compiled alike, up to the
commit. So what is found of their logits holds for those of a text.
"""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx

from ..models.attention import SharedKV
from ..models.drafter import DraftOutput
from ..models.target import TargetOutput
from ..sampling.params import SamplingParams
from .rounds import Rounds
from .state import RoundState, row_settings


class GivenRounds:
    """Runs rounds over given tokens.

    Args:
        rounds: The engine whose target they run, as it does.
        num_rows: Rows B of the batch.
    """

    def __init__(self, rounds: Rounds, num_rows: int) -> None:
        self._rounds = rounds.with_drafter(_GivenDrafts())
        # The host would decide them all: the round ends before its commit.
        self._settings = row_settings(
            [SamplingParams()] * num_rows, is_host=[True] * num_rows
        )

    def run(
        self,
        tokens: mx.array,
        slabs: list[mx.array],
        *,
        offset: mx.array,
        min_rows: int,
    ) -> TargetOutput:
        """Queue one round; nothing is evaluated here.

        Args:
            tokens: The newest token of each row and K drafts, int32 [B, K + 1].
            slabs: Keys and values of each layer in turn.
            offset: Position of each row's first token, int32 [B].
            min_rows: The target verifies no fewer rows.

        Returns:
            The target's logits and hidden states behind the K + 1 tokens, and slabs
            with their keys and values.
        """
        num_tokens = tokens.shape[1]
        # In place of a hidden state the drafts: it goes from step to step.
        state = RoundState(slabs, tokens[:, :1], tokens[:, None], offset)
        verified, report = self._rounds.verify(
            state,
            self._settings,
            num_draft_tokens=num_tokens - 1,
            min_rows=min_rows,
        )
        hidden = verified.hidden[:, :num_tokens]
        return TargetOutput(report.logits, hidden, verified.slabs)


class _GivenDrafts:
    """A drafter whose hidden state [B, 1, n] is the newest token and the drafts."""

    layer_types = ()

    def __call__(
        self,
        embedding: mx.array,
        hidden: mx.array,
        shared_kv: Mapping[str, SharedKV],
        *,
        position: mx.array,
    ) -> DraftOutput:
        """One candidate, the next draft."""
        rest = hidden[..., 1:]
        token = rest[..., :1]
        return DraftOutput(mx.zeros(token.shape), token, rest)
