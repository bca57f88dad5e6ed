"""What it would give to verify only the drafts that the drafter itself is sure of.

    python scripts/studies/confidence.py                 all of it
    python scripts/studies/confidence.py --blocks FILE   keeps what was recorded

First the embedded pair: how well the drafter's probability of its own draft tells
whether the draft stands. Then rounds on modelled machines, of the recorded blocks and
of made-up ones whose probabilities say more or less: who decides how many drafts are
verified, and what that gives over the best fixed number. Nothing is timed.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import astuple
from itertools import chain, pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from mlx_gemma_mtp.constants import MAX_DRAFT_TOKENS
from mlx_gemma_mtp.drafting.chips import CHIPS
from mlx_gemma_mtp.drafting.growth import constants_of, with_kernel
from mlx_gemma_mtp.drafting.speed_model import model
from mlx_gemma_mtp.models.families import FAMILIES
from mlx_gemma_mtp.sampling.params import SamplingParams
from scripts.benchmarks.models import ModelSpec
from scripts.benchmarks.sources import source_prompts
from scripts.studies.confidence_blocks import Block, record
from scripts.studies.confidence_rules import (
    ChanceModel,
    Confident,
    Costs,
    Text,
    auc,
    best_fixed,
    by_both,
    by_last,
    by_level,
    controller_of,
    log_loss,
    logit,
    play_controller,
    sigmoid,
    trials,
)

_RULES = {"greedy": SamplingParams(), "seed": SamplingParams(1.0, 0.95, 64)}
_MAX_TOKENS = 81
_FAMILIES = ("31b", "26b-a4b", "e2b")
_CHIPS = (("M1 Max", False), ("M1 Max", True), ("M3 Max", False), ("M5 Max", False))
_CONTEXT = 1024
# Seconds that the device waits while the host reads probabilities and encodes what
# follows: assumed. Nobody has measured it on a Mac.
_PRICES = (0.0, 0.3e-3, 1e-3)
_DRAFTED = (2, 3, 4, 6, 8)
# Acceptance, how much tokens differ in difficulty and what is wrong with what the
# drafter says of it, in log-odds; and how alike neighbours are.
_MADE_UP = ((0.75, 1.5, 0.5), (0.6, 1.5, 0.5), (0.85, 1.5, 0.5), (0.75, 3.0, 0.5))
_ALIKE = 0.5
_LENGTH = 300

Kinds = dict[str, list[list[Block]]]


def main() -> None:
    """Record, and print what comes of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--blocks", type=Path, help="recorded blocks, made if missing")
    parser.add_argument("--max-tokens", type=int, default=_MAX_TOKENS)
    args = parser.parse_args()
    for rule, kinds in recorded(args.blocks, args.max_tokens).items():
        print(f"\n{rule}: the embedded pair")
        show_predictions(kinds)
        texts = [text for kind in kinds.values() for text in kind]
        show_gains(rule, texts[::2], texts[1::2])
    for cell in _MADE_UP:
        texts = [made_up(*cell, seed=seed) for seed in range(8)]
        name = f"made up: acceptance {cell[0]}, AUC {auc(*_judged(texts)):.2f}"
        show_gains(name, texts[:4], texts[4:])


def recorded(file: Path | None, max_tokens: int) -> dict[str, Kinds]:
    """Blocks by rule and kind of text; from the file where there is one."""
    if file is not None and file.exists():
        return {
            rule: {
                kind: [[Block(n, tuple(probs)) for n, probs in text] for text in texts]
                for kind, texts in kinds.items()
            }
            for rule, kinds in json.loads(file.read_text("utf-8")).items()
        }
    spec = ModelSpec()
    pair, kinds = spec.load(), source_prompts(spec.tokenizer())
    found: dict[str, Kinds] = {
        rule: {
            kind: record(pair, prompts, sampling, max_tokens)
            for kind, (prompts, _) in kinds.items()
        }
        for rule, sampling in _RULES.items()
    }
    if file is not None:
        named = {
            rule: {k: [[astuple(b) for b in t] for t in ts] for k, ts in kinds.items()}
            for rule, kinds in found.items()
        }
        file.write_text(json.dumps(named), "utf-8")
    return found


def show_predictions(kinds: Kinds) -> None:
    """How well probabilities tell what stands: by position, and by kind of text."""
    texts = [text for kind in kinds.values() for text in kind]
    print("draft  judged  stands   AUC   stands where the drafter says so")
    for i in range(MAX_DRAFT_TOKENS):
        judged = [b for t in texts for b in t if b.num_accepted >= i]
        probs, hits = [b.probs[i] for b in judged], [b.num_accepted > i for b in judged]
        share = sum(hits) / len(hits)
        print(
            f"{i + 1:5} {len(hits):7} {share:7.2f} {auc(probs, hits):6.2f}   "
            + " ".join(_bins(probs, hits))
        )
    print("kind          AUC   log-loss: mean   level  +last  +own")
    losses = log_losses(kinds)
    for name, some in {**kinds, "all": texts}.items():
        told = " ".join(f"{loss:7.3f}" for loss in losses[name])
        print(f"{name:12} {auc(*_judged(some)):5.2f} {told}")


def log_losses(kinds: Kinds) -> dict[str, list[float]]:
    """Of four ways to foretell drafts, each learnt from other prompts, nats a draft.

    The mean of the position; the acceptance of late; that and how sure the drafter was
    two rounds ago; the acceptance of late and its probability of the draft itself. By
    kind of text, and "all".
    """
    told: dict[str, list[list[float]]] = {k: [[], [], [], []] for k in kinds}
    hits: dict[str, list[bool]] = {k: [] for k in kinds}
    num_folds = min(map(len, kinds.values()))
    for fold in range(num_folds):
        learnt = [
            text
            for texts in kinds.values()
            for i, text in enumerate(texts)
            if i % num_folds != fold
        ]
        means = [_mean(learnt, i) for i in range(MAX_DRAFT_TOKENS)]
        models = [
            ChanceModel(learnt, by_level),
            ChanceModel(learnt, by_last, lag=1),
            ChanceModel(learnt, by_both),
        ]
        for kind, texts in kinds.items():
            tested = texts[fold::num_folds]
            walks = [trials(tested, m.features, lag=m.lag) for m in models]
            for steps in zip(*walks, strict=True):
                block = steps[0][0]
                count = min(block.num_accepted + 1, MAX_DRAFT_TOKENS)
                chances = [means]
                chances += [m.at(r) for m, (_, r) in zip(models, steps, strict=True)]
                hits[kind] += [i < block.num_accepted for i in range(count)]
                for one, each in zip(told[kind], chances, strict=True):
                    one += each[:count]
    told["all"] = [list(chain(*some)) for some in zip(*told.values(), strict=True)]
    hits["all"] = list(chain(*hits.values()))
    return {k: [log_loss(one, hits[k]) for one in told[k]] for k in told}


def show_gains(name: str, learnt: Sequence[Text], texts: Sequence[Text]) -> None:
    """Tokens per second over those of the best fixed number, by machine and rule."""
    prices = " ".join(f"{1e3 * price:4.1f} ms" for price in _PRICES)
    print(
        f"\n{name}\nfamily   chip          best K  control  level   last  own: {prices}"
    )
    for family in _FAMILIES:
        for chip, has_kernel in _CHIPS:
            machine = f"{chip}{', kernel' if has_kernel else ''}"
            best, *gains = gains_of(costs_of(chip, family, has_kernel), learnt, texts)
            told = " ".join(f"{gain:7.3f}" for gain in gains)
            print(f"{family:8} {machine:14} {best:4.0f} {told}", flush=True)


def gains_of(
    costs: Costs, learnt: Sequence[Text], texts: Sequence[Text]
) -> list[float]:
    """The best fixed K, and over its tokens per second those of other rules.

    These are the package's controller; a rule that knows the true costs and goes by the
    acceptance of late; one that also knows how sure the drafter was two rounds ago; and
    one that reads its probabilities before it verifies, at some prices.

    Args:
        costs: Of the machine.
        learnt: Texts that all rules have learnt from.
        texts: What they are judged by.
    """
    fixed = best_fixed(texts, costs)
    controller = controller_of(costs, _mean(learnt, 0))
    play_controller(learnt, costs, controller)
    own = ChanceModel(learnt, by_both)

    def confident(num_drafts: int, price_s: float) -> float:
        return Confident(own, num_drafts, price_s).best_play(texts, costs).rate

    num_drafts = max(_DRAFTED, key=lambda k: confident(k, 0.0))
    rates = [
        play_controller(texts, costs, controller).rate,
        *(
            Confident(ChanceModel(learnt, told, lag=1)).best_play(texts, costs).rate
            for told in (by_level, by_last)
        ),
        *(confident(num_drafts, price_s) for price_s in _PRICES),
    ]
    return [fixed.verified / fixed.rounds, *(rate / fixed.rate for rate in rates)]


def costs_of(chip: str, family: str, has_kernel: bool) -> Costs:
    """What the parts of a round take on a chip, as modelled."""
    constants = constants_of(CHIPS[chip])
    if has_kernel:
        constants = with_kernel(constants)
    modelled = model(
        CHIPS[chip], FAMILIES[family], context=_CONTEXT, constants=constants
    )
    rows = range(1, MAX_DRAFT_TOKENS + 2)
    return Costs(modelled.step_s(), tuple(modelled.pass_s(each) for each in rows))


def made_up(mean: float, spread: float, wrong: float, *, seed: int) -> list[Block]:
    """A text some of whose tokens are hard to draft, as the drafter knows by and large.

    Args:
        mean: P(a draft stands), over all tokens.
        spread: Deviation of its log-odds from token to token.
        wrong: Deviation of what the drafter says of them.
        seed: Of the text.
    """
    rng = random.Random(f"{mean} {spread} {wrong} {seed}")
    usual = _usual(mean, spread)
    ease = [rng.gauss(0, 1)]
    while len(ease) < _LENGTH + MAX_DRAFT_TOKENS:
        new = math.sqrt(1 - _ALIKE**2) * rng.gauss(0, 1)
        ease.append(_ALIKE * ease[-1] + new)
    text = []
    for i in range(_LENGTH):
        odds = [usual + spread * z for z in ease[i : i + MAX_DRAFT_TOKENS]]
        stands = [rng.random() < sigmoid(each) for each in odds]
        probs = tuple(sigmoid(each + rng.gauss(0, wrong)) for each in odds)
        text.append(Block([*stands, False].index(False), probs))
    return text


def _usual(mean: float, spread: float) -> float:
    """Log-odds around which the mean of the probabilities is that."""
    rng = random.Random(0)
    points = [spread * rng.gauss(0, 1) for _ in range(2000)]
    low, high = -20.0, 20.0
    for _ in range(40):
        middle = (low + high) / 2
        is_low = sum(sigmoid(middle + x) for x in points) < mean * len(points)
        low, high = (middle, high) if is_low else (low, middle)
    return low


def _judged(texts: Sequence[Text]) -> tuple[list[float], list[bool]]:
    """Probabilities of drafts whose predecessors stand, and whether they do too."""
    pairs = [pair for text in texts for block in text for pair in _pairs(block)]
    return [prob for prob, _ in pairs], [hit for _, hit in pairs]


def _pairs(block: Block) -> Iterator[tuple[float, bool]]:
    for i in range(min(block.num_accepted + 1, MAX_DRAFT_TOKENS)):
        yield block.probs[i], i < block.num_accepted


def _mean(texts: Sequence[Text], i: int) -> float:
    """How often draft i + 1 stands where those before it do, inside 0 and 1."""
    hits = [b.num_accepted > i for t in texts for b in t if b.num_accepted >= i]
    return sigmoid(logit((sum(hits) + 0.5) / (len(hits) + 1)))


def _bins(probs: Sequence[float], hits: Sequence[bool]) -> list[str]:
    """How often drafts of some probability stand, and how many these are."""
    edges = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 1.01)
    told = []
    for low, high in pairwise(edges):
        here = [h for p, h in zip(probs, hits, strict=True) if low <= p < high]
        share = f"{sum(here) / len(here):.2f}" if here else "-"
        told.append(f"{low:g}+: {share} ({len(here)})")
    return told


if __name__ == "__main__":
    main()
