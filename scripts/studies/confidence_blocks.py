"""Blocks of a pair: what the drafter thinks of its own drafts, and how many stand.

A block of 8 drafts is made behind every token of a text: each round emits one token, so
that no place is left out, whatever would have been accepted there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import mlx.core as mx

from mlx_gemma_mtp.constants import MAX_DRAFT_TOKENS
from mlx_gemma_mtp.engine import round as engine_round
from mlx_gemma_mtp.engine.decoder import Decoder, Request
from mlx_gemma_mtp.engine.rounds import Rounds
from mlx_gemma_mtp.pair.pair import Pair
from mlx_gemma_mtp.sampling.acceptance import Accepted, Draft, cut
from mlx_gemma_mtp.sampling.params import SamplingParams


@dataclass(frozen=True)
class Block:
    """The drafts behind one token of a text.

    Attributes:
        num_accepted: How many of them stand, 0 to 8.
        probs: The drafter's probability of each, at temperature 1 and unfiltered: 8
            numbers above 0, 1.0 at most.
    """

    num_accepted: int
    probs: tuple[float, ...]


def record(
    pair: Pair, prompts: Sequence[list[int]], sampling: SamplingParams, max_tokens: int
) -> list[list[Block]]:
    """The blocks of each prompt's text, in order; greedy or of a seed.

    Args:
        pair: A target and its drafter.
        prompts: At least one token id each.
        sampling: How tokens are chosen; drafts are judged by equality. Each prompt
            has a seed of its own.
        max_tokens: Tokens of each text; one block fewer.
    """
    recorder = _Recorder()
    # Not compiled: what is read must be arrays, not the places of a trace.
    rounds = Rounds(pair.rounds.target, pair.drafter, use_compile=False)
    requests = [
        Request(prompt, max_tokens, replace(sampling, seed=seed))
        for seed, prompt in enumerate(prompts)
    ]
    with (
        patch.object(engine_round, "propose", recorder.propose),
        patch.object(engine_round, "decide", recorder.decide),
    ):
        decoder = Decoder(rounds, requests, num_draft_tokens=MAX_DRAFT_TOKENS)
        for _ in decoder.run():
            pass
    used = recorder.rounds[: max_tokens - 1]  # the last one may have been in vain
    return [list(blocks) for blocks in zip(*used, strict=True)]


class _Recorder:
    """Stands before the choices of a round, and reads what goes through.

    Attributes:
        rounds: For each round, a block of each row.
    """

    def __init__(self) -> None:
        self.rounds: list[list[Block]] = []
        self._probs: list[mx.array] = []
        self._propose, self._decide = engine_round.propose, engine_round.decide

    def propose(self, logits: mx.array, *args: Any, **settings: Any) -> Draft:
        """Note the probability of one draft, [B, 1]."""
        draft = self._propose(logits, *args, **settings)
        token_ids, tokens = settings["token_ids"], draft.tokens[..., None]
        log_probs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        if token_ids is None:
            own = mx.take_along_axis(log_probs, tokens, axis=-1)
        else:
            is_own = token_ids == tokens
            own = mx.where(is_own, log_probs, -mx.inf).max(axis=-1, keepdims=True)
        self._probs.append(mx.exp(own.squeeze(-1).astype(mx.float32)))
        return draft

    def decide(self, draft: Draft, *args: Any, **settings: Any) -> Accepted:
        """Note how many of a block stand, and let one token of it be emitted."""
        accepted = self._decide(draft, *args, **settings)
        probs = mx.concatenate(self._probs, axis=1)
        self._probs = []
        mx.eval(probs, accepted.num_accepted)
        numbers: Any = accepted.num_accepted.tolist()
        rows: Any = probs.tolist()
        self.rounds.append(
            [Block(n, tuple(row)) for n, row in zip(numbers, rows, strict=True)]
        )
        return cut(draft.tokens, accepted, mx.zeros_like(accepted.num_accepted))
