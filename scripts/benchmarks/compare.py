"""Engines against each other: the same prompts, in turn, each in its own process.

Every engine gets a prompt before any gets the next one, and each prompt begins with
another engine, so that a machine that slows down slows all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .prompts import Tokens
from .workers import Workers

Runs = dict[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class Cell:
    """One place on the axes.

    Attributes:
        kind: The kind of prompts.
        prompt_tokens: How long they are, about.
        sampling: ``"greedy"`` or ``"sampled"``.
        batch_size: How many are decoded together.
    """

    kind: str
    prompt_tokens: int
    sampling: str
    batch_size: int

    @property
    def title(self) -> str:
        """The cell in words."""
        rows = "" if self.batch_size == 1 else f", batch of {self.batch_size}"
        return f"{self.kind}, {self.prompt_tokens} tokens, {self.sampling}{rows}"


@dataclass
class CellRuns:
    """What was measured in a cell.

    Attributes:
        runs: The runs of each engine, a run per prompt, in the same order.
        reasons: Why engines have none.
        order: (prompt, engine) in the order in which they ran.
    """

    runs: Runs = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    order: list[tuple[int, str]] = field(default_factory=list)


def run_cell(
    workers: Workers, cell: Cell, prompts: Sequence[Tokens], max_tokens: int
) -> CellRuns:
    """Warm every engine up, then measure all of them in turn."""
    found = CellRuns()
    settings = {"max_tokens": max_tokens, "sampling": cell.sampling}
    names = []
    for name in workers.names:
        batch = _batch(prompts, 0, cell.batch_size)
        answer = workers.ask(name, "warm_up", prompts=batch, **settings)
        if "error" in answer:
            found.reasons[name] = answer["error"]
        else:
            names.append(name)
    for i in range(len(prompts)):
        batch = _batch(prompts, i, cell.batch_size)
        turn = i % max(1, len(names))
        for name in names[turn:] + names[:turn]:
            if name in found.reasons:
                continue
            answer = workers.ask(name, "run", prompts=batch, **settings)
            if "error" in answer:
                found.reasons[name] = answer["error"]
                continue
            found.order.append((i, name))
            found.runs.setdefault(name, []).append(answer)
    # A run that failed half-way has no fellow in the others' repeats.
    for name in found.reasons:
        found.runs.pop(name, None)
    found.runs = {name: found.runs[name] for name in names if name in found.runs}
    return found


def _batch(prompts: Sequence[Tokens], first: int, size: int) -> list[Tokens]:
    """``size`` prompts from one on, round and round."""
    return [prompts[(first + i) % len(prompts)] for i in range(size)]
