"""Many requests at once: tokens per second of whole batches, requests joining.

This package's batches with drafting and without, and mlx-lm's ``BatchGenerator`` on the
same target, interleaved. Twice as many requests as rows, so that rows are taken over;
prompts are part of the time.
"""

from __future__ import annotations

import argparse
import random
import time
from typing import Any

from mlx_lm.generate import BatchGenerator as MlxLmBatchGenerator

from mlx_gemma_mtp.hook.batch_generator import BatchGenerator
from mlx_gemma_mtp.pair.pair import Pair, attach

from .prompts import prompts_of
from .speed import report_speed, show


def batch(
    pair: Pair, documents: list[list[int]], rng: random.Random, args: argparse.Namespace
) -> dict[str, object]:
    """Tokens per second of batches by their number of rows."""
    attach(pair.target, pair)
    figures: dict[str, object] = {}
    for num_rows in args.batch_rows:
        show(f"\n{2 * num_rows} requests, {num_rows} rows")
        prompts = prompts_of(
            documents, rng, count=2 * num_rows, length=args.prompt_tokens[0]
        )
        methods: dict[str, dict[str, Any]] = {
            "mlx-lm BatchGenerator": {"make": MlxLmBatchGenerator},
            "plain (K = 0)": {"make": BatchGenerator, "num_draft_tokens": 0},
            "drafting, auto": {"make": BatchGenerator},
        }
        for count in args.num_draft_tokens or [pair.num_draft_tokens]:
            if isinstance(count, int):
                methods[f"drafting, K = {count}"] = {
                    "make": BatchGenerator,
                    "num_draft_tokens": count,
                }
        rates: dict[str, list[float]] = {name: [] for name in methods}
        for repeat in range(args.repeats + 1):
            names = list(methods)
            start = repeat % len(names)
            for name in names[start:] + names[:start]:
                found = rate(pair, prompts, num_rows, args.max_tokens, **methods[name])
                if repeat:  # the first one compiles
                    rates[name].append(found)
        figures[str(num_rows)] = report_speed(rates)
    return figures


def rate(
    pair: Pair,
    prompts: list[list[int]],
    num_rows: int,
    max_tokens: int,
    *,
    make: Any,
    **settings: Any,
) -> float:
    """Tokens per second of all prompts together."""
    generator = make(
        pair.target,
        completion_batch_size=num_rows,
        prefill_batch_size=min(num_rows, 8),
        **settings,
    )
    start = time.perf_counter()
    generator.insert(prompts, [max_tokens] * len(prompts))
    count = 0
    while responses := generator.next_generated():
        count += len(responses)
    elapsed = time.perf_counter() - start
    generator.close()
    return count / elapsed
