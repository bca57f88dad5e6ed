"""Three panels of what engines did; matplotlib is imported when it is needed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

MISSING = "--plot needs matplotlib: got none installed. pip install '.[bench]'"


def check_matplotlib() -> None:
    """Find out before anything is measured.

    Raises:
        SystemExit: It is not installed, in one line.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise SystemExit(MISSING) from None


def plot(cells: Sequence[dict[str, Any]], title: str, file: str) -> None:
    """Write a picture.

    Args:
        cells: The cells of the engines section.
        title: The pair and the machine.
        file: Where to, a name that ends in .png, .svg or .pdf.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (rates, gains, times) = plt.subplots(1, 3, figsize=(16, 5))
    _plot_rates(rates, cells)
    _plot_gains(gains, cells)
    _plot_times(times, cells)
    figure.suptitle(title, fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    plt.close(figure)


def _plot_rates(axes: Any, cells: Sequence[dict[str, Any]]) -> None:
    """Tokens per second by engine, a bar per engine with its spread over the cells."""
    found: dict[str, list[float]] = defaultdict(list)
    for cell in cells:
        for name, figures in cell["engines"].items():
            found[name].append(figures["tokens_per_second"])
    names = list(found)
    for i, name in enumerate(names):
        values = found[name]
        axes.barh(i, sum(values) / len(values), color=f"C{i % 10}", alpha=0.6)
        axes.plot(values, [i] * len(values), "k|")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("tokens/s (mean of the cells; a mark per cell)")


def _plot_gains(axes: Any, cells: Sequence[dict[str, Any]]) -> None:
    """Speed-up over plain decoding by acceptance length, a point per run."""
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for cell in cells:
        for name, figures in cell["engines"].items():
            ratios = figures.get("x_plain_runs")
            if figures["drafted"] and ratios:
                lengths = [
                    1 + run["accepted"] / max(1, run["rounds"])
                    for run in figures["runs"]
                ]
                found[name] += list(zip(lengths, ratios, strict=True))
    for name, points in found.items():
        axes.plot(*zip(*points, strict=True), "o", label=name, alpha=0.7)
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set_xlabel("acceptance length (tokens per round)")
    axes.set_ylabel("speed-up over plain, K = 0")
    if found:
        axes.legend(fontsize=7)


def _plot_times(axes: Any, cells: Sequence[dict[str, Any]]) -> None:
    """Milliseconds per round by the prompt's length, a line per engine."""
    found: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for cell in cells:
        for name, figures in cell["engines"].items():
            found[name][cell["prompt_tokens"]].append(figures["ms_per_round"])
    for name, by_length in found.items():
        lengths = sorted(by_length)
        means = [sum(by_length[n]) / len(by_length[n]) for n in lengths]
        axes.plot(lengths, means, "o-", label=name)
    axes.set_xlabel("prompt tokens")
    axes.set_ylabel("ms per round")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=7)
