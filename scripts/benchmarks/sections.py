"""The sections that run engines in processes of their own."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import cache
from itertools import product
from typing import Any

from .arguments import engine_specs, graph_specs, model_spec
from .compare import Cell, run_cell
from .engines import MLX_LM, OURS, EngineSpec
from .models import ModelSpec
from .prompts import Tokens, kind_prompts, random_prompts
from .report import (
    GRAPH_COLUMNS,
    SPEED_COLUMNS,
    Report,
    cell_figures,
    graph_rows,
    speed_rows,
)
from .workers import Workers

# The engines that others are compared with, by the name of the ratio.
BASES = {"x_mlx_lm": EngineSpec(MLX_LM).name, "x_plain": EngineSpec(OURS).name}
_GRAPH_KIND = "code"
_FEWEST_TOKENS = 40  # enough rounds that are like each other


def engines(args: argparse.Namespace, report: Report) -> dict[str, Any]:
    """Compare engines by kind and length of prompts, sampling and batch size."""
    model, specs = model_spec(args), engine_specs(args)
    cells = []
    with Workers(model, specs, one_process=args.one_process) as workers:
        report.line(f"\nengines, {model.title}, {args.max_tokens} tokens a prompt")
        report.reasons(workers.skipped)
        for cell, prompts in _cells(args, model, workers.vocab_size, report):
            found = run_cell(workers, cell, prompts, args.max_tokens)
            figures = cell_figures(cell, found, BASES)
            report.table(cell.title, SPEED_COLUMNS, speed_rows(figures["engines"]))
            report.reasons(found.reasons)
            cells.append(figures)
        skipped = workers.skipped
    return {"model": model.title, "cells": cells, "skipped": skipped}


def graph(args: argparse.Namespace, report: Report) -> dict[str, Any]:
    """Graph and host time per round and per token of each engine, one prompt."""
    model, specs = model_spec(args), graph_specs(args)
    figures, skipped = {}, {}
    with Workers(model, specs, one_process=True) as workers:
        skipped.update(workers.skipped)
        (prompt,) = _prompts(
            model,
            _GRAPH_KIND,
            workers.vocab_size,
            count=1,
            length=args.prompt_tokens[0],
        )
        for name in workers.names:
            answer = workers.ask(
                name,
                "graph",
                prompt=prompt,
                max_tokens=max(args.max_tokens, _FEWEST_TOKENS),
                sampling=args.samplings[0],
            )
            if "error" in answer:
                skipped[name] = answer["error"]
            else:
                figures[name] = answer
    title = f"per round, {args.samplings[0]}"
    report.line(f"\ngraph, {model.title}")
    report.table(title, GRAPH_COLUMNS, graph_rows(figures))
    report.reasons(skipped)
    return {"model": model.title, "engines": figures, "skipped": skipped}


def _cells(
    args: argparse.Namespace, model: ModelSpec, vocab_size: int, report: Report
) -> Iterator[tuple[Cell, list[Tokens]]]:
    """The cells with their prompts; what has no prompts is said and left out."""
    if not vocab_size:
        return  # no engine could be made, and each has said why
    axes = (args.samplings, args.prompt_tokens, args.batch_sizes, args.kinds)
    said = set()
    for sampling, length, batch_size, kind in product(*axes):
        prompts = _prompts(
            model, kind, vocab_size, count=args.prompts_per_kind, length=length
        )
        if not isinstance(prompts, str):
            yield Cell(kind, length, sampling, batch_size), prompts
        elif kind not in said:
            said.add(kind)
            report.line(f"{kind}: skipped: {prompts}")


def _prompts(
    model: ModelSpec, kind: str, vocab_size: int, *, count: int, length: int
) -> Any:
    """Prompts, or why there are none."""
    tokenizer = _tokenizer(model)
    if tokenizer is None:
        return random_prompts(vocab_size, kind, count=count, length=length)
    return kind_prompts(tokenizer, kind, count=count, length=length)


@cache
def _tokenizer(model: ModelSpec) -> Any:
    return model.tokenizer()
