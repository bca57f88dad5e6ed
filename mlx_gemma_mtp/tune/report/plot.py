"""The picture of a training; matplotlib is imported when it is needed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .measured import Acceptance, Point

PLOT_NAME = "plot.svg"
MISSING = 'no plot: it needs matplotlib; pip install "mlx_gemma_mtp[tune]"'
_SETTINGS: Any = {
    "svg.hashsalt": "mlx_gemma_mtp",  # else ids inside the file are random
    "svg.fonttype": "none",  # text stays text
    "font.size": 9,
}


def write_plot(
    folder: Path, history: Sequence[Point], before: Acceptance, after: Acceptance
) -> bool:
    """Write ``plot.svg``, the same bytes for the same numbers.

    Args:
        folder: Where to.
        history: Points of the training, in order.
        before: Acceptance of the drafter as it was.
        after: Acceptance of the drafter as it is.

    Returns:
        Whether it was written; it is not without matplotlib.

    Raises:
        OSError: It cannot be written.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        return False
    # Without pyplot, which would choose a window system and keep the figure.
    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(10, 4), layout="constrained")
        training, positions = figure.subplots(1, 2)
        _plot_training(training, history)
        _plot_positions(positions, before, after)
        figure.savefig(folder / PLOT_NAME, format="svg", metadata={"Date": None})
    return True


def _plot_training(axes: Any, history: Sequence[Point]) -> None:
    """Loss, and acceptance length where it was judged, over steps."""
    losses = axes.twinx()
    losses.plot(
        [point.step for point in history],
        [point.loss for point in history],
        color="C1",
        linewidth=1,
    )
    judged = [
        (point.step, point.acceptance_length)
        for point in history
        if point.acceptance_length is not None
    ]
    axes.plot(
        [step for step, _ in judged],
        [length for _, length in judged],
        "o-",
        color="C0",
        markersize=3,
    )
    axes.set_xlabel("steps")
    axes.set_ylabel("tokens per round, held out", color="C0")
    losses.set_ylabel("loss, training text", color="C1")


def _plot_positions(axes: Any, before: Acceptance, after: Acceptance) -> None:
    """Share of rounds that accept so many drafts or more, a bar for each."""
    width = 0.4
    for i, (label, found) in enumerate((("before", before), ("after", after))):
        axes.bar(
            [k + 1 + (i - 0.5) * width for k in range(len(found.reached))],
            found.reached,
            width,
            color=("C7", "C0")[i],
            label=f"{label}: {found.length:.2f} tokens per round",
        )
    most = max(len(before.reached), len(after.reached))
    axes.set_xticks(range(1, most + 1))
    axes.set_ylim(0, 1)
    axes.set_xlabel("drafts accepted, or more")
    axes.set_ylabel("share of rounds, held out")
    axes.legend(fontsize=8)
