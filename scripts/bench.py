"""Measure a pair on this machine: speed, acceptance, time per round.

    python scripts/bench.py                       the embedded pair
    python scripts/bench.py --model FOLDER_OR_ID  another one

Speed compares this package with drafting, this package without, and mlx-lm's own
``generate_step`` on the same target, in one process and interleaved, so that a machine
that slows down slows all of them. Medians over the repeats and ratios are printed.

Acceptance length is tokens per round, 1 + accepted / rounds, for greedy drafts:
"generating" while the target continues held-out prompts, "random places" for the first
round at random places of held-out text, where a text that has run into a loop cannot
flatter the drafter. "rules" compares the rules of sampled decoding at several
temperatures, with Gemma's top-k 64 and top-p 0.95, by first rounds at random places.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.sample_utils import make_sampler

from mlx_gemma_mtp.acceptance import Draft, Verdict, accept_block, expected_lengths
from mlx_gemma_mtp.config import SamplingParams
from mlx_gemma_mtp.decoder import Decoder, Request
from mlx_gemma_mtp.load import embedded_pair_path, load
from mlx_gemma_mtp.machine import describe_machine
from mlx_gemma_mtp.pair import Pair, pair_of
from mlx_gemma_mtp.rounds import Rounds
from mlx_gemma_mtp.sampling import Distribution
from mlx_gemma_mtp.stats import RoundStats
from mlx_gemma_mtp.tokens import draft_block, generate_tokens

HELD_OUT = Path(__file__).parent / "data" / "heldout.jsonl.gz"
SECTIONS = ("speed", "acceptance", "rules", "context")
TEMPERATURES = (0.5, 1.0, 1.5)
RULE_DRAFTS = (1, 2, 3, 4, 5, 8)
ROWS = 10  # prompts decoded together where only acceptance counts


def configure_parser() -> argparse.ArgumentParser:
    """The benchmark's arguments."""
    parser = argparse.ArgumentParser(description="Measure a pair on this machine.")
    parser.add_argument("sections", nargs="*", choices=[[], *SECTIONS], default=[])
    parser.add_argument("--model", help="folder or Hub id (default: the embedded pair)")
    parser.add_argument("--draft-model", help="folder or Hub id")
    parser.add_argument(
        "--num-draft-tokens",
        type=int,
        nargs="+",
        metavar="K",
        help="drafts per round to time (default: the pair's own number)",
    )
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=100, help="held-out prompts")
    parser.add_argument("--places", type=int, default=500, help="random places")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--temp", type=float, default=0.0, help="for the speed")
    parser.add_argument("--top-k", type=int, default=0, help="for the speed")
    parser.add_argument("--top-p", type=float, default=1.0, help="for the speed")
    parser.add_argument(
        "--contexts", type=int, nargs="+", default=[64, 256, 512, 896], metavar="TOKENS"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="also write the figures here")
    return parser


def main() -> None:
    """Run the sections that were asked for, all by default."""
    args = configure_parser().parse_args()
    model, tokenizer = load(
        args.model or embedded_pair_path(), draft_model=args.draft_model
    )
    pair = pair_of(model)
    documents = read_documents(tokenizer)
    counts = args.num_draft_tokens or [pair.num_draft_tokens]
    figures: dict[str, object] = {"machine": describe_machine(str(mx.default_device()))}
    show(str(figures["machine"]))
    for section in args.sections or SECTIONS:
        rng = random.Random(args.seed)
        if section == "speed":
            figures[section] = speed(pair, documents, rng, counts, args)
        elif section == "acceptance":
            figures[section] = acceptance(pair, documents, rng, args)
        elif section == "rules":
            figures[section] = rules(pair, documents, rng, args)
        else:
            figures[section] = context(pair, documents, rng, counts, args)
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=2), encoding="utf-8")


def read_documents(tokenizer: Any) -> list[list[int]]:
    """Held-out texts as token ids, each with its begin-of-sequence token."""
    with gzip.open(HELD_OUT, "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    return [list(tokenizer.encode(text)) for text in texts]


def prompts_of(
    documents: list[list[int]], rng: random.Random, *, count: int, length: int
) -> list[list[int]]:
    """Random stretches of held-out text."""
    usable = [d for d in documents if len(d) > length]
    prompts = []
    for _ in range(count):
        document = rng.choice(usable)
        start = rng.randrange(len(document) - length)
        prompts.append(document[start : start + length])
    return prompts


def show(line: str = "") -> None:
    """Print a line at once."""
    print(line, flush=True)


# --- speed ------------------------------------------------------------------------


def speed(
    pair: Pair,
    documents: list[list[int]],
    rng: random.Random,
    counts: list[int],
    args: argparse.Namespace,
) -> dict[str, object]:
    """Tokens per second after the first token: drafting, plain, mlx-lm."""
    prompts = prompts_of(documents, rng, count=args.repeats, length=args.prompt_tokens)
    settings = {"temp": args.temp, "top_p": args.top_p, "top_k": args.top_k}
    sampler = make_sampler(**settings)
    methods: dict[str, Callable[[list[int]], Iterator[object]]] = {
        "mlx-lm generate_step": lambda p: generate_step(
            mx.array(p), pair.target, max_tokens=args.max_tokens, sampler=sampler
        ),
        "plain (K = 0)": lambda p: ours(pair, p, args.max_tokens, 0, **settings),
    }
    for count in counts:
        methods[f"drafting, K = {count}"] = lambda p, k=count: ours(  # type: ignore[misc]
            pair, p, args.max_tokens, k, **settings
        )
        if args.temp:
            methods[f"drafting, K = {count}, by block"] = lambda p, k=count: ours(  # type: ignore[misc]
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


def ours(
    pair: Pair, prompt: list[int], max_tokens: int, count: int, **settings: Any
) -> Iterator[object]:
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


# --- acceptance -------------------------------------------------------------------


def acceptance(
    pair: Pair,
    documents: list[list[int]],
    rng: random.Random,
    args: argparse.Namespace,
) -> dict[str, object]:
    """Acceptance length with K = 4, in three ways."""
    prompts = prompts_of(documents, rng, count=args.prompts, length=args.prompt_tokens)
    places = prompts_of(documents, rng, count=args.places, length=args.prompt_tokens)
    show("\nacceptance length, K = 4")
    figures = {
        "generating": describe_stats(
            f"generating {args.max_tokens} tokens from {len(prompts)} held-out prompts",
            decode_all(pair, prompts, args.max_tokens),
        ),
        # A budget of two tokens is the prefill's and exactly one round.
        "random places": describe_stats(
            f"first round at {len(places)} random places of held-out text",
            decode_all(pair, places, 2),
        ),
        "draft_block": describe_stats(
            f"draft_block against greedy text at {len(places)} random places",
            blocks(pair, places),
        ),
    }
    return dict(figures)


def decode_all(pair: Pair, prompts: list[list[int]], max_tokens: int) -> RoundStats:
    """Decode greedily with K = 4, ten prompts at a time; the counts."""
    total = RoundStats()
    for start in range(0, len(prompts), ROWS):
        requests = [Request(p, max_tokens) for p in prompts[start : start + ROWS]]
        decoder = Decoder(pair.rounds, requests, num_draft_tokens=4)
        for _ in decoder.run():
            pass
        total.merge(decoder.stats)
    return total


def blocks(pair: Pair, places: list[list[int]]) -> RoundStats:
    """Drafts after a text's last token, against the target's own greedy text."""
    total = RoundStats()
    for place in places:
        drafts = draft_block(pair, place, 4)
        text = list(ours(pair, place, 4, 0))
        accepted = next((i for i in range(4) if drafts[i] != text[i]), 4)
        total.add_round(drafted=4, accepted=accepted)
    return total


def describe_stats(what: str, stats: RoundStats) -> dict[str, object]:
    """Print and return a measurement of acceptance."""
    by_position = ", ".join(f"{rate:.2f}" for rate in stats.acceptance_by_position)
    show(f"{what:62} {stats.acceptance_length:5.2f}  (by position {by_position})")
    return {
        "acceptance_length": stats.acceptance_length,
        "acceptance_rate": stats.acceptance_rate,
        "by_position": stats.acceptance_by_position,
        "rounds": stats.rounds,
    }


# --- rules ------------------------------------------------------------------------


def rules(
    pair: Pair,
    documents: list[list[int]],
    rng: random.Random,
    args: argparse.Namespace,
) -> dict[str, object]:
    """Acceptance length of sampled rounds, by rule, temperature and K.

    Both rules for drafts from a distribution judge the same drafts, and their coins
    are averaged over, so that a small difference is not lost in chance.
    """
    places = prompts_of(documents, rng, count=args.places, length=args.prompt_tokens)
    ks = " ".join(f"{f'K = {k}':>7}" for k in RULE_DRAFTS)
    show(f"\n{'acceptance length, first round at random places':48} {ks}")
    figures: dict[str, object] = {}
    for temp in TEMPERATURES:
        by_block, one_by_one = judged_lengths(pair, places, temp)
        found = {
            "coupled": coupled_lengths(pair, places, temp),
            "one by one": one_by_one,
            "by block": by_block,
        }
        for name, lengths in found.items():
            what = f"temperature {temp}, {name}"
            show(f"{what:48} " + " ".join(f"{length:7.3f}" for length in lengths))
            figures[what] = dict(zip(map(str, RULE_DRAFTS), lengths, strict=True))
    return figures


def coupled_lengths(pair: Pair, places: list[list[int]], temp: float) -> list[float]:
    """Tokens per round for each K: a shorter block accepts what a longer one would."""
    most = max(RULE_DRAFTS)
    rounds = Rounds(pair.rounds.target, pair.drafter)
    stats = first_rounds(rounds, places, most, temp, reproducible=True)
    reached = stats.acceptance_by_position
    return [1 + sum(reached[:count]) for count in RULE_DRAFTS]


def judged_lengths(
    pair: Pair, places: list[list[int]], temp: float
) -> tuple[list[float], list[float]]:
    """Tokens per round for each K, by block and one by one."""
    seen: list[tuple[Draft, Distribution]] = []

    def remember(draft: Draft, target: Distribution, coins: mx.array) -> Verdict:
        seen.append((draft, target))
        return accept_block(draft, target, coins)

    # Not compiled: what is remembered must be arrays, not the places of a trace.
    rounds = Rounds(
        pair.rounds.target, pair.drafter, verification=remember, use_compile=False
    )
    first_rounds(rounds, places, max(RULE_DRAFTS), temp, reproducible=False)
    by_block, one_by_one = [], []
    for count in RULE_DRAFTS:
        means = [expected_lengths(*shortened(*one, count)) for one in seen]
        blocks, singles = zip(*means, strict=True)
        by_block.append(1 + cast(float, mx.concatenate(list(blocks)).mean().item()))
        one_by_one.append(1 + cast(float, mx.concatenate(list(singles)).mean().item()))
    return by_block, one_by_one


def shortened(
    draft: Draft, target: Distribution, count: int
) -> tuple[Draft, Distribution]:
    """The first K drafts of a block and the K + 1 rows that judge them."""
    source = draft.source
    assert source is not None  # both rules have one
    source = Distribution(source.scores[:, :count], source.token_ids[:, :count], False)
    rows = slice(count + 1)
    judge = Distribution(
        target.scores[:, rows], target.token_ids[:, rows], target.is_whole
    )
    return Draft(draft.tokens[:, :count], source), judge


def first_rounds(
    rounds: Rounds,
    places: list[list[int]],
    count: int,
    temp: float,
    *,
    reproducible: bool,
) -> RoundStats:
    """Counts of the first round after each place, sampled."""
    total = RoundStats()
    for start in range(0, len(places), ROWS):
        requests = [
            # A budget of two tokens is the prefill's and exactly one round.
            Request(place, 2, SamplingParams(temp, 0.95, 64, 0.0, seed, reproducible))
            for seed, place in enumerate(places[start : start + ROWS], start)
        ]
        decoder = Decoder(rounds, requests, num_draft_tokens=count)
        for _ in decoder.run():
            pass
        total.merge(decoder.stats)
    return total


# --- context ----------------------------------------------------------------------


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
    figures: dict[str, object] = {}
    for length in args.contexts:
        (prompt,) = prompts_of(documents, rng, count=1, length=length)
        times: dict[int, list[float]] = {k: [] for k in ks}
        for repeat in range(args.repeats + 1):
            for k in ks:
                elapsed = round_ms(pair, prompt, k)
                if repeat:  # the first one compiles
                    times[k].append(elapsed)
        medians = {k: statistics.median(times[k]) for k in ks}
        show(
            f"{f'context of {length} tokens':28} "
            + " ".join(f"{medians[k]:9.2f}" for k in ks)
        )
        figures[str(length)] = {f"K = {k}": medians[k] for k in ks}
    return figures


def round_ms(pair: Pair, prompt: list[int], count: int, num_rounds: int = 20) -> float:
    """Milliseconds per round over a few rounds that follow a prompt."""
    decoder = Decoder(
        pair.rounds,
        [Request(prompt, (num_rounds + 4) * (count + 1))],
        num_draft_tokens=count,
    )
    rounds = decoder.run()
    for _ in range(3):
        next(rounds)
    start = time.perf_counter()
    for _ in range(num_rounds - 2):
        next(rounds)
    elapsed = time.perf_counter() - start
    rounds.close()
    return 1000 * elapsed / (num_rounds - 2)


if __name__ == "__main__":
    main()
