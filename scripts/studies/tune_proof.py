"""Measure what tuning a drafter is for, from end to end, with the embedded pair.

    python scripts/studies/tune_proof.py             both claims, an hour on 2 cores
    python scripts/studies/tune_proof.py retuned     only this one
    python scripts/studies/tune_proof.py centroids   a comparison: it claims no length

retuned    The target is fine-tuned on English prose, so that its drafter falls behind;
           tuning the drafter wins back what was lost, and the target's text stays what
           it is.
scratch    A drafter with random weights is trained for as long as the shipped one was.
centroids  The same with a centroid head, as drafters of E2B and E4B have.

Acceptance length is tokens per round with four drafts, greedy, in the engine, on
held-out text: what a training chooses its best weights by is other text.
The exit status is 1 where a claim does not hold.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import mlx.core as mx

from mlx_gemma_mtp.cli.tables import aligned
from mlx_gemma_mtp.errors import MTPError
from mlx_gemma_mtp.generation.encoding import encode_text
from mlx_gemma_mtp.machine import describe_machine
from mlx_gemma_mtp.pair.load import embedded_pair_path, load_pair, load_tokenizer
from mlx_gemma_mtp.tune.fresh import fresh_config, fresh_drafter
from mlx_gemma_mtp.tune.pipeline import tune
from mlx_gemma_mtp.tune.report.result import write_drafter
from mlx_gemma_mtp.tune.request import TextSettings, TuneRequest
from mlx_gemma_mtp.tune.settings import TrainingSettings
from scripts import openblas, train_drafter
from scripts.benchmarks.acceptance import decode, describe_stats
from scripts.benchmarks.prompts import prompts_of, read_documents
from scripts.benchmarks.speed import show
from scripts.progress import log, logged
from scripts.studies import finetune_target
from scripts.studies.finetune_target import finetune

CLAIMED = ("retuned", "scratch")
PARTS = (*CLAIMED, "centroids")
# A sixteenth of 1,024 tokens is looked at; published heads look at a 64th of theirs.
CENTROIDS = {
    "use_ordered_embeddings": True,
    "num_centroids": 128,
    "centroid_intermediate_top_k": 8,
}
TEXTS = TextSettings(num_texts=600, prompt_tokens=48, max_tokens=96, num_rows=64)
# The clock ends it, neither steps nor patience.
TRAINING = TrainingSettings(
    minutes=7,
    steps=100_000,
    patience=100_000,
    batch_size=3,
    judge_every=50,
    learning_rate=1e-3,
    seed=1,
)
LEAST_WON_BACK = 0.8
MOST_MINUTES = 20  # of the whole command: texts, measurements, training
LEAST_OF_SHIPPED = 0.9


@dataclass(frozen=True)
class Claim:
    """Something that must hold.

    Attributes:
        what: In words.
        wanted: How much it must be, in words.
        found: How much it is, in words.
        holds: Whether that is so.
    """

    what: str
    wanted: str
    found: str
    holds: bool


@dataclass(frozen=True)
class Decoded:
    """What a pair wrote after the prompts.

    Attributes:
        texts: The tokens after each prompt.
        length: The acceptance length.
        figures: Counts, as JSON takes them.
    """

    texts: list[list[int]]
    length: float
    figures: dict[str, object]


@dataclass(frozen=True)
class Part:
    """What a part has found.

    Attributes:
        figures: As JSON takes them.
        claims: What must hold.
    """

    figures: dict[str, Any]
    claims: list[Claim]


def retuned(args: argparse.Namespace, work: Path) -> Part:
    """Fine-tune the target, tune its drafter, measure."""
    shipped, target, tuned = (
        embedded_pair_path() / "drafter",
        work / "target",
        "drafter",
    )
    finetune(work, steps=args.finetune_steps)
    prompts = _prose_prompts(work / "heldout.jsonl", args)
    show(f"\nretuned: {len(prompts)} prompts of held-out prose")
    original = _decoded(
        "the shipped drafter, the target as it was",
        *(embedded_pair_path(), shipped, prompts, args.max_tokens),
    )
    before = _decoded(
        "the shipped drafter, the target fine-tuned",
        *(target, shipped, prompts, args.max_tokens),
    )
    began = time.monotonic()
    report = tune(
        TuneRequest(
            model=str(target),
            draft_model=str(shipped),
            data=(str(work / "train.jsonl"),),
            output=work / tuned,
            texts=replace(TEXTS, num_texts=args.num_texts or TEXTS.num_texts),
            training=replace(TRAINING, minutes=args.retuned_minutes),
            hardware=tuple(openblas.described()),
        ),
        tell=log,
        progress=logged,
    )
    minutes = (time.monotonic() - began) / 60
    after = _decoded(
        "the tuned drafter, the target fine-tuned",
        *(target, work / tuned, prompts, args.max_tokens),
    )
    plain = decode(load_pair(target, False), prompts, args.max_tokens, 0)[0]
    num_same = _num_same(plain, before.texts, after.texts)
    return Part(
        {
            "original": original.figures,
            "before": before.figures,
            "after": after.figures,
            "same_texts": num_same,
            "texts": len(prompts),
            "minutes": minutes,
            "tuning": report.to_dict(),
        },
        [
            _won_back(original.length, before.length, after.length),
            Claim(
                "retuned: minutes that tuning took, in all",
                f"{MOST_MINUTES} or less",
                f"{minutes:.1f}",
                minutes <= MOST_MINUTES,
            ),
            _same_text("retuned", num_same, len(prompts)),
        ],
    )


def _won_back(original: float, before: float, after: float) -> Claim:
    """Of acceptance lengths: how much of what fine-tuning took has come back."""
    lost, won = original - before, after - before
    share = f"{won / lost:.0%}" if lost > 0 else "nothing was lost"
    return Claim(
        "retuned: share of the lost acceptance length won back",
        f"{LEAST_WON_BACK:.0%} or more",
        f"{won:.2f} of {lost:.2f}, {share}",
        0 < LEAST_WON_BACK * lost <= won,
    )


def scratch(args: argparse.Namespace, work: Path) -> Part:
    """Train a drafter from random weights, measure it beside the shipped one."""
    part = _from_scratch("scratch", args, work)
    share, found = _of_shipped(part)
    claim = Claim(
        "scratch: acceptance length, of the shipped drafter's",
        f"{LEAST_OF_SHIPPED:.0%} or more",
        found,
        share >= LEAST_OF_SHIPPED,
    )
    return replace(part, claims=[claim, *part.claims])


def centroids(args: argparse.Namespace, work: Path) -> Part:
    """The same with a centroid head, whose clusters and weights are as random."""
    target = load_pair(embedded_pair_path()).target
    config = {**fresh_config(target), **CENTROIDS}
    drafter, config = fresh_drafter(target, seed=args.seed, config=config)
    write_drafter(work / "fresh", drafter, config, training={})
    part = _from_scratch("centroids", args, work, str(work / "fresh"))
    show(f"centroids: acceptance length {_of_shipped(part)[1]}")
    return part


def _of_shipped(part: Part) -> tuple[float, str]:
    """The new acceptance length over the shipped drafter's, also in words."""
    new, old = (
        part.figures[name]["acceptance_length"] for name in ("scratch", "shipped")
    )
    return new / old, f"{new:.2f} of {old:.2f}, {new / old:.0%}"


def _from_scratch(
    name: str, args: argparse.Namespace, work: Path, draft_model: str | None = None
) -> Part:
    """Train from random weights on the corpus, measure beside the shipped drafter.

    Args:
        name: Of the part.
        args: The command's.
        work: Its folder.
        draft_model: A drafter with random weights; None for the one that goes with the
            target.
    """
    target, output = embedded_pair_path(), work / "drafter"
    texts = train_drafter.TEXTS
    report = train_drafter.train_drafter(
        target,
        output,
        work / "work",
        draft_model=draft_model,
        texts=replace(texts, num_texts=args.num_texts or texts.num_texts),
        training=replace(train_drafter.TRAINING, minutes=args.scratch_minutes),
    )
    documents, rng = read_documents(load_tokenizer(target)), random.Random(args.seed)
    prompts = prompts_of(documents, rng, count=args.prompts, length=args.prompt_tokens)
    show(f"\n{name}: {len(prompts)} prompts of held-out code")
    old = _decoded(
        "the shipped drafter",
        *(target, target / "drafter", prompts, args.max_tokens),
    )
    new = _decoded(
        "the drafter trained from random weights",
        *(target, output, prompts, args.max_tokens),
    )
    plain = decode(load_pair(target, False), prompts, args.max_tokens, 0)[0]
    num_same = _num_same(plain, old.texts, new.texts)
    return Part(
        {
            "shipped": old.figures,
            "scratch": new.figures,
            "same_texts": num_same,
            "texts": len(prompts),
            "training": report.to_dict(),
        },
        [_same_text(name, num_same, len(prompts))],
    )


def _decoded(
    what: str, target: Path, drafter: Path, prompts: list[list[int]], max_tokens: int
) -> Decoded:
    """Continue prompts with a pair; its acceptance is shown."""
    texts, stats = decode(load_pair(target, drafter), prompts, max_tokens)
    return Decoded(texts, stats.acceptance_length, describe_stats(what, stats))


def _prose_prompts(path: Path, args: argparse.Namespace) -> list[list[int]]:
    """Random stretches of the prose that no training has seen."""
    tokenizer = load_tokenizer(embedded_pair_path())
    records = map(json.loads, path.read_text("utf-8").splitlines())
    documents = [encode_text(tokenizer, record["text"]) for record in records]
    rng = random.Random(args.seed)
    return prompts_of(documents, rng, count=args.prompts, length=args.prompt_tokens)


def _num_same(*texts: list[list[int]]) -> int:
    """After how many prompts all wrote the same."""
    return sum(
        all(text == same[0] for text in same) for same in zip(*texts, strict=True)
    )


def _same_text(part: str, num_same: int, num_texts: int) -> Claim:
    return Claim(
        f"{part}: texts that are the same with either drafter and with none",
        "all",
        f"{num_same} of {num_texts}",
        num_same == num_texts,
    )


def prove(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Run the parts that were asked for; the figures, with all claims."""
    machine = describe_machine(str(mx.default_device()), *openblas.described())
    show(machine)
    figures: dict[str, Any] = {"machine": machine}
    claims: list[Claim] = []
    functions = {
        "retuned": retuned,
        "scratch": scratch,
        "centroids": centroids,
    }
    for name in args.parts or CLAIMED:
        folder = work / name
        folder.mkdir(parents=True)
        part = functions[name](args, folder)
        figures[name] = part.figures
        claims += part.claims
    show()
    for line in aligned(
        [
            ("claim", "must be", "is", "holds"),
            *(
                (claim.what, claim.wanted, claim.found, "yes" if claim.holds else "NO")
                for claim in claims
            ),
        ],
        left=(0,),
    ):
        show(line)
    show(machine)
    return {**figures, "claims": [asdict(claim) for claim in claims]}


def configure_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "parts",
        nargs="*",
        metavar="PART",
        help="retuned, scratch (default: these two), centroids",
    )
    parser.add_argument(
        "--retuned-minutes",
        type=float,
        default=TRAINING.minutes,
        help="of training in retuned (default: %(default)g)",
    )
    parser.add_argument(
        "--scratch-minutes",
        type=float,
        default=train_drafter.TRAINING.minutes,
        help="of training in scratch and centroids (default: %(default)g)",
    )
    parser.add_argument("--finetune-steps", type=int, default=finetune_target.STEPS)
    parser.add_argument(
        "--num-texts", type=int, help="texts to learn from (default: each part's own)"
    )
    parser.add_argument("--prompts", type=int, default=100, help="to measure on")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0, help="of the prompts")
    parser.add_argument(
        "--work", type=Path, metavar="FOLDER", help="keep targets and drafters here"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print; 0 where all claims hold, else 1."""
    parser = configure_parser()
    args = parser.parse_args(argv)
    for name in args.parts:
        if name not in PARTS:
            parser.error(f"a part must be {', '.join(PARTS)}: got {name}")
    if args.work is not None and args.work.exists():
        parser.error(f"--work must not be there yet: got {args.work}")
    openblas.prefer(log)
    with ExitStack() as stack:
        work = args.work or Path(stack.enter_context(TemporaryDirectory()))
        try:
            figures = prove(args, work)
        except MTPError as error:
            raise SystemExit(str(error)) from None
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", "utf-8")
    return 0 if all(claim["holds"] for claim in figures["claims"]) else 1


if __name__ == "__main__":
    sys.exit(main())
