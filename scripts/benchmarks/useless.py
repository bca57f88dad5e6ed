"""What automatic draft lengths cost where no draft is ever right.

The drafter is one of random weights, so that its drafts are accepted by chance alone;
plain decoding of the same pair takes turns with it, a few tokens each. Traces are made
and the controller has learnt before anything is timed, as in a process that has run a
while.
"""

from __future__ import annotations

import argparse
import random
import statistics
from typing import Any

import mlx.core as mx

from mlx_gemma_mtp.constants import DRAFTER
from mlx_gemma_mtp.models.drafter import Drafter
from mlx_gemma_mtp.pair.pair import Pair

from .prompts import prompts_of
from .speed import own_tokens, seconds_in_turn, show

_TURN = 7  # tokens
SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature 1, top-k 64, top-p 0.95": {"temp": 1.0, "top_k": 64, "top_p": 0.95},
}


def useless_pair(pair: Pair, seed: int) -> Pair:
    """The same target with a drafter of random weights."""
    if pair.drafter is None:
        raise SystemExit("the pair must have a drafter for a random one in its place")
    mx.random.seed(seed)
    drafter = Drafter(pair.drafter.config)
    drafter.set_dtype(pair.drafter.model.norm.weight.dtype)
    return Pair(pair.target, drafter)


def useless(
    pair: Pair,
    documents: list[list[int]],
    rng: random.Random,
    args: argparse.Namespace,
) -> dict[str, object]:
    """Time per token with automatic draft lengths over plain decoding's."""
    pair = useless_pair(pair, args.seed)
    prompts = prompts_of(
        documents, rng, count=args.repeats, length=args.prompt_tokens[0]
    )
    show(f"\n{'a drafter of random weights, auto over plain':46} median   range")
    figures: dict[str, object] = {}
    for name, settings in SAMPLINGS.items():
        for _ in range(2):
            side_by_side(pair, prompts[0], args.max_tokens, **settings)
        ratios = []
        for prompt in prompts:
            seconds = side_by_side(pair, prompt, args.max_tokens, **settings)
            ratios.append(seconds["auto"] / seconds[0])
        median = statistics.median(ratios)
        show(f"{name:46} {median:6.3f}   {min(ratios):.3f} to {max(ratios):.3f}")
        figures[name] = {"x_plain_time": median, "ratios": ratios}
    return figures


def side_by_side(
    pair: Pair, prompt: list[int], max_tokens: int, **settings: Any
) -> dict[int | str, float]:
    """Seconds of both, a few tokens of one and of the other in turn."""
    ways: list[int | str] = [0, "auto"]
    settings = {**settings, "draft_source": DRAFTER}
    texts = {way: own_tokens(pair, prompt, max_tokens, way, **settings) for way in ways}
    return seconds_in_turn(texts, max_tokens, turn=_TURN)
