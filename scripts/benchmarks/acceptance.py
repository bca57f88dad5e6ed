"""How much of what is drafted is accepted, by rule and number of drafts.

Acceptance length is tokens per round, 1 + accepted / rounds, for greedy drafts:
"generating" while the target continues held-out prompts, "random places" for the first
round at random places of held-out text, where a text that has run into a loop cannot
flatter the drafter. "rules" compares the rules of sampled decoding at several
temperatures, with Gemma's top-k 64 and top-p 0.95, by first rounds at random places.
"""

from __future__ import annotations

import argparse
import random
from typing import cast

import mlx.core as mx

from mlx_gemma_mtp.engine.decoder import Decoder, Request
from mlx_gemma_mtp.engine.rounds import Rounds
from mlx_gemma_mtp.engine.stats import RoundStats
from mlx_gemma_mtp.generation.tokens import draft_block
from mlx_gemma_mtp.pair.pair import Pair
from mlx_gemma_mtp.sampling.acceptance import (
    Draft,
    Verdict,
    accept_block,
    expected_lengths,
)
from mlx_gemma_mtp.sampling.distribution import Distribution
from mlx_gemma_mtp.sampling.params import SamplingParams

from .prompts import prompts_of
from .speed import own_tokens, show

TEMPERATURES = (0.5, 1.0, 1.5)
RULE_DRAFTS = (1, 2, 3, 4, 5, 8)
ROWS = 10  # prompts decoded together where only acceptance counts


def acceptance(
    pair: Pair,
    documents: list[list[int]],
    rng: random.Random,
    args: argparse.Namespace,
) -> dict[str, object]:
    """Acceptance length with K = 4, in three ways."""
    prompts = prompts_of(
        documents, rng, count=args.prompts, length=args.prompt_tokens[0]
    )
    places = prompts_of(documents, rng, count=args.places, length=args.prompt_tokens[0])
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
    return decode(pair, prompts, max_tokens)[1]


def decode(
    pair: Pair, prompts: list[list[int]], max_tokens: int, num_draft_tokens: int = 4
) -> tuple[list[list[int]], RoundStats]:
    """Decode greedily, ten prompts at a time; the tokens of each, and the counts."""
    texts: list[list[int]] = [[] for _ in prompts]
    total = RoundStats()
    for start in range(0, len(prompts), ROWS):
        requests = [Request(p, max_tokens) for p in prompts[start : start + ROWS]]
        decoder = Decoder(pair.rounds, requests, num_draft_tokens=num_draft_tokens)
        for emissions in decoder.run():
            for emission in emissions:
                texts[start + emission.sequence.index] += emission.tokens
        total.merge(decoder.stats)
    return texts, total


def blocks(pair: Pair, places: list[list[int]]) -> RoundStats:
    """Drafts after a text's last token, against the target's own greedy text."""
    total = RoundStats()
    for place in places:
        drafts = draft_block(pair, place, 4)
        text = list(own_tokens(pair, place, 4, 0))
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
    places = prompts_of(documents, rng, count=args.places, length=args.prompt_tokens[0])
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
