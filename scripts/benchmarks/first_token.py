"""Many short prompts at once: the time to the first token of each.

The same requests join an empty batch, their prompts read one by one and together,
interleaved. As soon as each has its first token all are let go of.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from dataclasses import replace

from mlx_gemma_mtp.engine.decoder import Decoder, Request
from mlx_gemma_mtp.pair.pair import Pair
from mlx_gemma_mtp.pair.planning import make_batch_plan

from .prompts import prompts_of
from .speed import show

_LENGTHS = (20, 60)  # of the prompts, tokens, drawn evenly
_METHODS = {"one by one": False, "together": True}
_MANY = 16  # tokens of an answer; no answer ends before all have their first one


def first_token(
    pair: Pair, documents: list[list[int]], rng: random.Random, args: argparse.Namespace
) -> dict[str, dict[str, dict[str, float]]]:
    """Milliseconds to the first tokens by the number of prompts: mean and last."""
    figures = {}
    for num_prompts in args.prompts_at_once:
        times: dict[str, list[list[float]]] = {name: [] for name in _METHODS}
        for repeat in range(args.repeats + 1):
            lengths = [rng.randint(*_LENGTHS) for _ in range(num_prompts)]
            prompts = [
                prompts_of(documents, rng, count=1, length=length)[0]
                for length in lengths
            ]
            names = list(_METHODS)
            for name in names if repeat % 2 else reversed(names):
                found = first_token_ms(pair, prompts, pads=_METHODS[name])
                if repeat:  # the first one compiles
                    times[name].append(found)
        figures[str(num_prompts)] = _reported(num_prompts, times)
    return figures


def first_token_ms(pair: Pair, prompts: list[list[int]], *, pads: bool) -> list[float]:
    """Milliseconds until each prompt has its first token, in rising order.

    Args:
        pair: Target and drafter.
        prompts: They all come at once.
        pads: Whether they may be padded and read in one forward.
    """
    plan = make_batch_plan(pair, num_draft_tokens=0)
    decoder = Decoder(
        pair.rounds,
        num_draft_tokens=plan.draft_policy,
        route=replace(plan.route, pads_prompts=pads),
        max_rows=len(prompts),
    )
    start = time.perf_counter()
    for prompt in prompts:
        decoder.add(Request(prompt, _MANY))
    times: list[float] = []
    while len(times) < len(prompts):
        outputs = decoder.step().outputs
        elapsed = 1e3 * (time.perf_counter() - start)
        times += [elapsed for output in outputs if output.sequence.num_emitted == 1]
    decoder.close()
    return times


def _reported(
    num_prompts: int, times: dict[str, list[list[float]]]
) -> dict[str, dict[str, float]]:
    """Print and return medians, and medians of the ratios within each repeat."""
    title = f"first tokens, {num_prompts} prompts, ms"
    show(f"\n{title:28} {'mean':>9} {'last':>9} {'x mean':>9} {'x last':>9}")
    means, lasts = (
        {name: [of(each) for each in found] for name, found in times.items()}
        for of in (statistics.mean, max)
    )
    base = next(iter(times))
    figures = {}
    for name in times:
        found = {
            "mean_ms": statistics.median(means[name]),
            "last_ms": statistics.median(lasts[name]),
            "x_mean": _ratio(means[base], means[name]),
            "x_last": _ratio(lasts[base], lasts[name]),
        }
        mean, last, x_mean, x_last = found.values()
        show(f"{name:28} {mean:9.1f} {last:9.1f} {x_mean:9.2f} {x_last:9.2f}")
        figures[name] = found
    return figures


def _ratio(before: list[float], after: list[float]) -> float:
    """How many times as soon, the median over the repeats."""
    return statistics.median(b / a for b, a in zip(before, after, strict=True))
