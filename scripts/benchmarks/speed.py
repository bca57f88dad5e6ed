"""Speed in one process: tokens per second, and time per round by context.

This package with drafting, this package without, and mlx-lm's own ``generate_step`` on
the same target, interleaved, so that a machine that slows down slows all of them.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any, TypeVar

import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.sample_utils import make_sampler

from mlx_gemma_mtp.engine.decoder import Decoder, Request
from mlx_gemma_mtp.engine.rounds import Rounds
from mlx_gemma_mtp.generation.tokens import generate_tokens
from mlx_gemma_mtp.pair.pair import Pair

from .prompts import prompts_of
from .scripted import scripted_rounds

Key = TypeVar("Key", int | str, str)


def show(line: str = "") -> None:
    """Print a line at once."""
    print(line, flush=True)


def speed(
    pair: Pair,
    documents: list[list[int]],
    rng: random.Random,
    counts: list[int],
    args: argparse.Namespace,
) -> dict[str, object]:
    """Tokens per second after the first token: drafting, plain, mlx-lm."""
    length = args.prompt_tokens[0]
    prompts = prompts_of(documents, rng, count=args.repeats, length=length)
    settings = {"temp": args.temp, "top_p": args.top_p, "top_k": args.top_k}
    sampler = make_sampler(**settings)
    methods: dict[str, Callable[[list[int]], Iterator[object]]] = {
        "mlx-lm generate_step": lambda p: generate_step(
            mx.array(p), pair.target, max_tokens=args.max_tokens, sampler=sampler
        ),
        "plain (K = 0)": lambda p: own_tokens(pair, p, args.max_tokens, 0, **settings),
    }
    methods["drafting, auto"] = lambda p: own_tokens(
        pair, p, args.max_tokens, "auto", **settings
    )
    for count in counts:
        methods[f"drafting, K = {count}"] = lambda p, k=count: own_tokens(  # type: ignore[misc]
            pair, p, args.max_tokens, k, **settings
        )
        if args.temp:
            methods[f"drafting, K = {count}, by block"] = lambda p, k=count: own_tokens(  # type: ignore[misc]
                pair, p, args.max_tokens, k, reproducible=False, **settings
            )
    for method in methods.values():  # compile before anything is timed
        rate(method(prompts[0]))
    rates: dict[str, list[float]] = {name: [] for name in methods}
    for i, prompt in enumerate(prompts):
        names = list(methods)
        for name in names[i % len(names) :] + names[: i % len(names)]:
            rates[name].append(rate(methods[name](prompt)))
    return report_speed(rates)


def own_tokens(
    pair: Pair, prompt: list[int], max_tokens: int, count: int | str, **settings: Any
) -> Generator[Any, None, None]:
    """This package's tokens, without an end, greedy or of a fixed seed."""
    return generate_tokens(
        pair,
        prompt,
        max_tokens=max_tokens,
        num_draft_tokens=count,
        seed=0,
        eos_token_ids=(),
        **settings,
    )


def seconds_in_turn(
    texts: Mapping[Key, Generator[Any, None, None]], max_tokens: int, *, turn: int
) -> dict[Key, float]:
    """Seconds of texts behind their first tokens, a few tokens of each in turn.

    A machine that slows down for a second then slows all. The texts are closed.

    Args:
        texts: What gives the tokens of each.
        max_tokens: Of each text.
        turn: How many tokens at a time.
    """
    for text in texts.values():
        next(text)
    seconds = dict.fromkeys(texts, 0.0)
    order = list(texts)
    for _ in range((max_tokens - 1) // turn):
        order.reverse()
        for key in order:
            start = time.perf_counter()
            for _ in range(turn):
                next(texts[key])
            mx.synchronize()  # a round in flight is not another's
            seconds[key] += time.perf_counter() - start
    for text in texts.values():
        text.close()
    return seconds


def rate(tokens: Iterator[object]) -> float:
    """Tokens per second of a generator, from its first token on."""
    next(tokens)
    start = time.perf_counter()
    count = sum(1 for _ in tokens)
    return count / (time.perf_counter() - start)


def report_speed(rates: dict[str, list[float]]) -> dict[str, object]:
    """Print and return medians, and medians of the ratios within each repeat."""
    names = list(rates)
    show(f"\n{'tokens per second, median':28} {'':>8} {'x mlx-lm':>9} {'x plain':>9}")
    figures: dict[str, object] = {}
    for name in names:
        median = statistics.median(rates[name])
        ratios = [
            statistics.median(
                a / b for a, b in zip(rates[name], rates[other], strict=True)
            )
            for other in names[:2]
        ]
        show(f"{name:28} {median:8.1f} {ratios[0]:9.2f} {ratios[1]:9.2f}")
        figures[name] = {
            "tokens_per_second": median,
            "x_mlx_lm": ratios[0],
            "x_plain": ratios[1],
        }
    return figures


def context(
    pair: Pair,
    documents: list[list[int]],
    rng: random.Random,
    counts: list[int],
    args: argparse.Namespace,
) -> dict[str, object]:
    """Milliseconds per round against the length of the context."""
    ks = sorted({0, *counts})
    show(f"\n{'ms per round, median':28} " + " ".join(f"{f'K = {k}':>9}" for k in ks))
    rounds = pair.rounds
    if args.scripted_acceptance:
        rounds = scripted_rounds(rounds, args.scripted_acceptance[0], use_compile=True)
    figures: dict[str, object] = {}
    for length in args.contexts:
        (prompt,) = prompts_of(documents, rng, count=1, length=length)
        times: dict[int, list[float]] = {k: [] for k in ks}
        for repeat in range(args.repeats + 1):
            for k in ks:
                elapsed = round_ms(rounds, prompt, k)
                if repeat:  # the first one compiles
                    times[k].append(elapsed)
        medians = {k: statistics.median(times[k]) for k in ks}
        show(
            f"{f'context of {length} tokens':28} "
            + " ".join(f"{medians[k]:9.2f}" for k in ks)
        )
        figures[str(length)] = {f"K = {k}": medians[k] for k in ks}
    return figures


def round_ms(
    rounds: Rounds, prompt: list[int], count: int, num_rounds: int = 20
) -> float:
    """Milliseconds per round over a few rounds that follow a prompt."""
    decoder = Decoder(
        rounds,
        [Request(prompt, (num_rounds + 4) * (count + 1))],
        num_draft_tokens=count,
    )
    run = decoder.run()
    for _ in range(3):
        next(run)
    start = time.perf_counter()
    for _ in range(num_rounds - 2):
        next(run)
    elapsed = time.perf_counter() - start
    run.close()
    return 1000 * elapsed / (num_rounds - 2)
