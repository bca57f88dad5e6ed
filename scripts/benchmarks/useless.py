"""What automatic draft lengths cost where no draft is ever right.

The drafter is one of random weights, so that its drafts are accepted by chance alone;
plain decoding of the same pair is interleaved with it. Traces are made and the
controller has learnt before anything is timed, as in a process that has run a while.
"""

from __future__ import annotations

import argparse
import random
import statistics
from typing import Any

import mlx.core as mx

from mlx_gemma_mtp.drafter import Drafter
from mlx_gemma_mtp.pair import Pair

from .prompts import prompts_of
from .speed import own_tokens, rate, show

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
        for count in (0, "auto", "auto"):
            rate(own_tokens(pair, prompts[0], args.max_tokens, count, **settings))
        ratios = []
        for i, prompt in enumerate(prompts):
            order: list[int | str] = [0, "auto"] if i % 2 else ["auto", 0]
            rates = {
                count: rate(
                    own_tokens(pair, prompt, args.max_tokens, count, **settings)
                )
                for count in order
            }
            ratios.append(rates[0] / rates["auto"])
        median = statistics.median(ratios)
        show(f"{name:46} {median:6.3f}   {min(ratios):.3f} to {max(ratios):.3f}")
        figures[name] = {"x_plain_time": median, "ratios": ratios}
    return figures
