"""From runs to figures, and from figures to tables."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .compare import Cell, CellRuns, Runs

Figures = dict[str, Any]
Row = tuple[str, ...]

SPEED_COLUMNS = (
    "tokens/s",
    "min to max",
    "x mlx-lm",
    "x plain",
    "tokens/round",
    "accepted",
    "ms/round",
    "host ms",
    "MLX GB",
    "RSS GB",
)
GRAPH_COLUMNS = (
    "tokens/round",
    "nodes",
    "launches",
    "evaluations",
    "host ms",
    "nodes/token",
    "launches/token",
    "host ms/token",
)
_NAME_WIDTH = 34


def cell_figures(cell: Cell, found: CellRuns, bases: Mapping[str, str]) -> Figures:
    """The figures of a cell.

    Args:
        cell: Where it stands.
        found: Its runs.
        bases: Engines to compare with by the name of the ratio.
    """
    return {
        **vars(cell),
        "engines": engine_figures(found.runs, bases),
        "reasons": found.reasons,
        "order": found.order,
    }


def engine_figures(runs: Runs, bases: Mapping[str, str]) -> dict[str, Figures]:
    """The figures of every engine: medians, spreads, and medians of ratios."""
    return {name: _engine(name, runs, bases) for name in runs}


def _engine(name: str, runs: Runs, bases: Mapping[str, str]) -> Figures:
    own = runs[name]
    rates = [run["tokens"] / run["seconds"] for run in own]
    total = {key: sum(run[key] for run in own) for key in own[0]}
    figures = {
        "tokens_per_second": statistics.median(rates),
        "slowest": min(rates),
        "fastest": max(rates),
        "acceptance_length": 1 + total["accepted"] / max(1, total["rounds"]),
        "acceptance_rate": total["accepted"] / max(1, total["drafted"]),
        "drafted": total["drafted"],
        "ms_per_round": _median(own, lambda run: 1000 * run["seconds"] / run["steps"]),
        "host_ms_per_round": _median(
            own, lambda run: 1000 * run["host_s"] / run["steps"]
        ),
        "prefill_s": _median(own, lambda run: run["prefill_s"]),
        "peak_memory_gb": max(run["peak_memory_gb"] for run in own),
        "max_rss_gb": max(run["max_rss_gb"] for run in own),
        "runs": own,
    }
    for key, base in bases.items():
        if base in runs:
            theirs = [run["tokens"] / run["seconds"] for run in runs[base]]
            ratios = [a / b for a, b in zip(rates, theirs, strict=True)]
            figures[key] = statistics.median(ratios)
            figures[f"{key}_runs"] = ratios
    return figures


def _median(
    runs: Sequence[dict[str, float]], value: Callable[[dict[str, float]], float]
) -> float:
    return statistics.median(value(run) for run in runs)


def speed_rows(engines: Mapping[str, Figures]) -> list[Row]:
    """A table's rows, the engine's name first; columns are ``SPEED_COLUMNS``."""
    return [(name, *_speed_row(figures)) for name, figures in engines.items()]


def _speed_row(figures: Figures) -> Row:
    has_drafts = figures["drafted"] > 0
    return (
        f"{figures['tokens_per_second']:.1f}",
        f"{figures['slowest']:.1f} to {figures['fastest']:.1f}",
        *(
            f"{figures[key]:.2f}" if key in figures else "-"
            for key in ("x_mlx_lm", "x_plain")
        ),
        f"{figures['acceptance_length']:.2f}" if has_drafts else "-",
        f"{figures['acceptance_rate']:.0%}" if has_drafts else "-",
        f"{figures['ms_per_round']:.2f}",
        f"{figures['host_ms_per_round']:.2f}",
        f"{figures['peak_memory_gb']:.3f}",
        f"{figures['max_rss_gb']:.2f}",
    )


def graph_rows(engines: Mapping[str, Figures]) -> list[Row]:
    """A table's rows, the engine's name first; columns are ``GRAPH_COLUMNS``."""
    return [
        (
            name,
            f"{figures['tokens_per_round']:.2f}",
            f"{figures['nodes_per_round']:.0f}",
            f"{figures['launches_per_round']:.0f}",
            f"{figures['evaluations_per_round']:.0f}",
            f"{figures['host_ms_per_round']:.2f}",
            f"{figures['nodes_per_token']:.0f}",
            f"{figures['launches_per_token']:.0f}",
            f"{figures['host_ms_per_token']:.2f}",
        )
        for name, figures in engines.items()
    ]


def text_table(title: str, columns: Sequence[str], rows: Sequence[Row]) -> list[str]:
    """A table for a terminal, a line each."""
    widths = [
        max([len(column), *(len(row[i]) for row in rows)])
        for i, column in enumerate(columns, start=1)
    ]
    lines = []
    for name, *values in [(title, *columns), *rows]:
        cells = (f"{v:>{w}}" for v, w in zip(values, widths, strict=True))
        lines.append(f"{name:{_NAME_WIDTH}} " + "  ".join(cells))
    return lines


def markdown_table(
    title: str, columns: Sequence[str], rows: Sequence[Row]
) -> list[str]:
    """The same for Markdown."""
    ruler = ("---", *("---:" for _ in columns))
    return [f"| {' | '.join(row)} |" for row in [(title, *columns), ruler, *rows]]


def reason_lines(reasons: Mapping[str, str]) -> list[str]:
    """A line for every engine without figures."""
    return [f"{name}: skipped: {reason}" for name, reason in reasons.items()]


class Report:
    """Shows tables as they come and keeps them for a file."""

    def __init__(self, machine: str) -> None:
        self._markdown: list[str] = []
        self.line(machine)

    def line(self, text: str = "") -> None:
        """A line of text."""
        print(text, flush=True)
        self._markdown += [text, ""]

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Row]) -> None:
        """A table."""
        if rows:
            print("\n" + "\n".join(text_table(title, columns, rows)), flush=True)
            self._markdown += [*markdown_table(title, columns, rows), ""]

    def reasons(self, reasons: Mapping[str, str]) -> None:
        """Why engines are missing."""
        for line in reason_lines(reasons):
            self.line(line)

    def markdown(self) -> str:
        """Everything in Markdown."""
        return "\n".join(self._markdown)
