"""Measure a pair on this machine: speed, acceptance, engines, graphs.

    python scripts/bench.py                       the embedded pair, every section
    python scripts/bench.py engines graph         only these
    python scripts/bench.py --model FOLDER_OR_ID  another pair
    python scripts/bench.py engines --shapes 12b --layers 6 --scripted-acceptance 0.75

speed       tokens per second of this package and of mlx-lm, in one process
acceptance  tokens per round on held-out text
rules       tokens per round of the rules of sampled decoding
context     time per round by the length of the context
useless     what automatic draft lengths cost with a drafter of random weights
batch       many requests at once: this package's batches and mlx-lm's
first       time to the first token of short prompts that come at once
structure   what masks cost, and what forced tokens give (needs the extra structure)
sources     what drafts from the text itself add, by kind of text
engines     engines against each other by kind of prompt, each in its own process:
            mlx-lm, this package plain and drafting, mlx-lm with two models, mlx-vlm
graph       nodes, kernel launches and host time per round and per token

Medians and ratios of interleaved runs are printed; see benchmarks/ for each section.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import random
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import mlx.core as mx

from mlx_gemma_mtp.errors import MTPError
from mlx_gemma_mtp.machine import describe_machine
from scripts import openblas
from scripts.benchmarks import plot, sections
from scripts.benchmarks.acceptance import acceptance, rules
from scripts.benchmarks.arguments import SECTIONS, configure_parser, model_spec
from scripts.benchmarks.batch import batch
from scripts.benchmarks.first_token import first_token
from scripts.benchmarks.prompts import random_prompts, read_documents
from scripts.benchmarks.report import Report
from scripts.benchmarks.sources import sources
from scripts.benchmarks.speed import context, speed
from scripts.benchmarks.structure import structure
from scripts.benchmarks.useless import useless


def main() -> None:
    """Run the sections that were asked for, all by default."""
    args = configure_parser(__doc__ or "").parse_args()
    if args.openblas is not None:
        openblas.require(args.openblas)
    figures = run(args)
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=2), encoding="utf-8")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run sections and return their figures."""
    if args.plot:
        plot.check_matplotlib()
    device = str(mx.default_device())
    machine = describe_machine(device, *openblas.described(), *other_versions())
    figures: dict[str, Any] = {"machine": machine}
    report = Report(machine)
    wanted = args.sections or SECTIONS
    try:
        figures |= in_this_process(args, wanted)
        for name in ("engines", "graph"):
            if name in wanted:
                figures[name] = getattr(sections, name)(args, report)
    except MTPError as error:
        raise SystemExit(str(error)) from None
    if args.markdown:
        Path(args.markdown).write_text(report.markdown(), encoding="utf-8")
    if args.plot and "engines" in figures:
        title = f"{figures['engines']['model']}\n{machine}"
        plot.plot(figures["engines"]["cells"], title, args.plot)
    return figures


def other_versions() -> list[str]:
    """Versions of what is compared with where it is installed."""
    try:
        return [f"mlx-vlm {importlib.metadata.version('mlx-vlm')}"]
    except importlib.metadata.PackageNotFoundError:
        return []


def in_this_process(args: argparse.Namespace, wanted: Any) -> dict[str, Any]:
    """The sections that share one process and one copy of the weights."""
    functions: dict[str, Any] = {
        "speed": speed,
        "acceptance": acceptance,
        "rules": rules,
        "context": context,
        "useless": useless,
        "batch": batch,
        "first": first_token,
    }
    names = [name for name in functions if name in wanted]
    with_tokenizer = {"structure", "sources"} & {*wanted}
    if not names and not with_tokenizer:
        return {}
    model = model_spec(args)
    pair, tokenizer = model.load(), model.tokenizer()
    if tokenizer is None:
        length = max(*args.contexts, *args.prompt_tokens) + 1
        documents = random_prompts(pair.vocab_size, "", count=4, length=length)
    else:
        documents = read_documents(tokenizer)
    counts = [k for k in args.num_draft_tokens or [] if isinstance(k, int)]
    counts = counts or [pair.num_draft_tokens]
    figures = {}
    for name in names:
        rng = random.Random(args.seed)
        settings = (counts, args) if name in ("speed", "context") else (args,)
        figures[name] = functions[name](pair, documents, rng, *settings)
    if with_tokenizer and tokenizer is None:
        raise SystemExit("sections of kinds of text need a pair with a tokenizer")
    if "sources" in wanted:
        figures["sources"] = sources(pair, tokenizer, args)
    if "structure" in wanted:
        rng = random.Random(args.seed)
        figures["structure"] = structure(pair, documents, rng, args, tokenizer)
    return figures


if __name__ == "__main__":
    main()
