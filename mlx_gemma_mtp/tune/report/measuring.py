"""A drafter's acceptance in real rounds of the engine, on held-out prompts.

Knows the engine; nothing of training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ...engine.decoder import Decoder, Request
from ...engine.stats import RoundStats
from ...pair.pair import Pair
from ...sampling.params import SamplingParams
from ..data.documents import Document
from .measured import Acceptance, Measured


def measure(
    pair: Pair,
    documents: Sequence[Document],
    params: SamplingParams,
    *,
    num_draft_tokens: int,
    max_tokens: int,
    num_rows: int,
    step_size: int,
) -> Measured:
    """Let the pair continue prompts, drafting K tokens in every round.

    Args:
        pair: Target and drafter.
        documents: Whose prompts.
        params: How tokens are drawn; of a seed each document takes its own, and drafts
            are judged as without one, by block.
        num_draft_tokens: K.
        max_tokens: Most tokens behind each prompt.
        num_rows: How many prompts are continued together.
        step_size: Most tokens of a prompt in one forward.
    """
    kinds: dict[str, RoundStats] = {}
    for start in range(0, len(documents), num_rows):
        group = documents[start : start + num_rows]
        requests = [
            Request(
                document.prompt,
                max_tokens,
                replace(
                    params, seed=(params.seed or 0) + start + i, reproducible=False
                ),
                pair.eos_token_ids,
            )
            for i, document in enumerate(group)
        ]
        decoder = Decoder(
            pair.rounds,
            requests,
            num_draft_tokens=num_draft_tokens,
            prefill_step_size=step_size,
        )
        with pair.wired():
            rows = _counts(decoder, len(requests))
        for document, stats in zip(group, rows, strict=True):
            kinds.setdefault(document.kind, RoundStats()).merge(stats)
    overall = RoundStats()
    for stats in kinds.values():
        overall.merge(stats)
    found = {
        kind: _acceptance(stats, num_draft_tokens) for kind, stats in kinds.items()
    }
    return Measured(_acceptance(overall, num_draft_tokens), found)


def _counts(decoder: Decoder, num_rows: int) -> list[RoundStats]:
    """The counts of each row's rounds, after they were run."""
    counts = [RoundStats() for _ in range(num_rows)]
    for outputs in decoder.run():
        for output in outputs:
            counts[output.sequence.index] = output.sequence.stats
    return counts


def _acceptance(stats: RoundStats, num_draft_tokens: int) -> Acceptance:
    rounds = max(stats.rounds, 1)
    reached = [stats.accepted_at[i] / rounds for i in range(num_draft_tokens)]
    return Acceptance(tuple(reached), stats.rounds)
