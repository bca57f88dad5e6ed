"""Acceptance by coin: a target that takes drafts as often as it is told to.

So the speed of shapes can be measured whose weights are random, at the acceptance that
trained ones have. The target's logits are computed as always; then the logit of each
draft is raised above all others, or lowered below them, by a coin that is a function of
the place and the newest token. Every rule, the greedy one included, and the kernels
then decide as they always do, which a scripted rule of acceptance would bypass.

The price is one more pass over the block's logits in each round.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from mlx_gemma_mtp.cache.prompt import PrefillCache
from mlx_gemma_mtp.engine.model_types import TargetLike
from mlx_gemma_mtp.engine.rounds import Rounds
from mlx_gemma_mtp.models.target import Prefilled, TargetOutput
from mlx_gemma_mtp.sampling.noise import COIN, Stream, uniform_noise

_SEED = 0x5EED
# Beyond every logit, and finite: differences stay numbers at any temperature.
_FAR = 1e4


class ScriptedTarget:
    """A target whose verdicts about drafts are coins.

    Args:
        target: The target that does the work.
        acceptance: How often a draft stands if all before it do, 0 to 1.
    """

    def __init__(self, target: TargetLike, acceptance: float) -> None:
        self._target = target
        self._acceptance = acceptance
        self.layout = target.layout
        self.vocab_size = target.vocab_size
        self.embed = target.embed

    def prefill(
        self, tokens: mx.array, caches: list[PrefillCache], sizes: Sequence[int]
    ) -> Prefilled:
        """Read chunks of prompts as the target does."""
        return self._target.prefill(tokens, caches, sizes)

    def verify(
        self, tokens: mx.array, slabs: list[mx.array], **places: Any
    ) -> TargetOutput:
        """Verify as the target does, then let coins decide about the drafts."""
        output = self._target.verify(tokens, slabs, **places)
        drafts = tokens[:, 1:]
        num_draft_tokens = drafts.shape[1]
        if not num_draft_tokens:
            return output
        positions = places["offset"][:, None] + mx.arange(1, num_draft_tokens + 1)
        rows = mx.arange(tokens.shape[0], dtype=mx.uint32)
        # By the token too, or every prompt of one length would see the same coins.
        seed = mx.stack([rows + _SEED, tokens[:, 0].astype(mx.uint32)], axis=1)
        coins = uniform_noise(seed, positions, Stream(COIN, places["offset"]))
        forced = mx.where(coins < self._acceptance, _FAR, -_FAR)
        forced = forced.astype(output.logits.dtype)
        judged = mx.put_along_axis(
            output.logits[:, :num_draft_tokens],
            drafts[..., None],
            forced[..., None],
            axis=-1,
        )
        logits = mx.concatenate([judged, output.logits[:, num_draft_tokens:]], axis=1)
        return TargetOutput(logits, output.hidden, output.slabs)


def scripted_rounds(rounds: Rounds, acceptance: float, *, use_compile: bool) -> Rounds:
    """The same target and drafter, with coins for verdicts."""
    target = ScriptedTarget(rounds.target, acceptance)
    return Rounds(target, rounds.drafter, use_compile=use_compile)
