"""What a training has brought, as text: for the terminal, for JSON, for a model card.

Acceptance is measured, in the process that trained; speed is predicted, and says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...cli.tables import aligned, one_line, size
from ...errors import OutputError
from .card import CARD_NAME, card
from .measured import Acceptance, Measured, Point
from .plot import MISSING, PLOT_NAME, write_plot
from .speedup import Best, Prediction

Rows = list[tuple[str, ...]]

MEASURED = (
    "Measured on held-out text, in real rounds of the process that trained; ± is one "
    "standard error, if rounds were independent"
)
PREDICTED = (
    "Predicted speed-up over plain decoding, at the best K of those measured. It is "
    "computed, not measured: measured acceptance over the costs of a round"
)


@dataclass(frozen=True)
class Report:
    """What a training has brought, and what it took.

    Attributes:
        target: The Hub id of the target, or the name of its folder (no slash).
        drafter: The same of the drafter that training began with; None for random
            weights.
        before: Acceptance of the drafter as it was.
        after: Acceptance of the drafter as it is, on the same prompts.
        history: Points of the training, in order.
        settings: What was asked for, by name, in values that JSON has.
        minutes: Taken, by stage.
        peak_memory_bytes: The most that MLX held, of all processes together.
        records_bytes: Of what the target was asked once, on disk.
        prediction: Of speed.
        machine: Hardware and versions, as from ``describe_machine()``.
        command: The command line; empty where there was none.
        usage: The command line that decodes with the drafter, as from ``card.usage()``;
            empty for one that goes by the names.
        license: Of the drafter's weights, an id that the Hub knows; None if unknown,
            which takes Google's for what Google publishes.
    """

    target: str
    drafter: str | None
    before: Measured
    after: Measured
    history: tuple[Point, ...]
    settings: Mapping[str, Any]
    minutes: Mapping[str, float]
    peak_memory_bytes: int
    records_bytes: int
    prediction: Prediction
    machine: str
    command: str = ""
    usage: str = ""
    license: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Everything and what follows from it, as JSON takes it."""
        return _finite(
            {
                "target": self.target,
                "drafter": self.drafter,
                "acceptance": {
                    "before": self.before.to_dict(),
                    "after": self.after.to_dict(),
                },
                "predicted_speedup": asdict(self.prediction),
                "history": [asdict(point) for point in self.history],
                "settings": dict(self.settings),
                "minutes": dict(self.minutes),
                "peak_memory_bytes": self.peak_memory_bytes,
                "records_bytes": self.records_bytes,
                "machine": self.machine,
                "command": self.command,
            }
        )

    def lines(self) -> list[str]:
        """Everything but settings and command, for a terminal."""
        source = "random weights" if self.drafter is None else self.drafter
        return [
            one_line(f"drafter for {self.target}, trained from {source}"),
            "",
            f"{MEASURED}.",
            *aligned(self.position_rows(), left=(0,)),
            "",
            *aligned(self.kind_rows(), left=(0,)),
            "",
            f"{PREDICTED} ({self.prediction.assumptions}).",
            *aligned(self.speed_rows(), left=(0, 1)),
            "",
            *self.cost_lines(),
            self.machine,
        ]

    def markdown(self, name: str, *, has_plot: bool) -> str:
        """The drafter's README.md.

        Args:
            name: What the drafter will be called: a Hub id or a folder's name.
            has_plot: Whether ``plot.svg`` lies beside it.
        """
        rows = [(key, _shown(value)) for key, value in self.settings.items()]
        return card(
            name,
            target=self.target,
            drafter=self.drafter,
            license_id=self.license,
            acceptance=(f"{MEASURED}.", [self.position_rows(), self.kind_rows()]),
            speed=(f"{PREDICTED} ({self.prediction.assumptions}).", self.speed_rows()),
            costs=[*self.cost_lines(), self.machine],
            settings=[("setting", "value"), *rows] if rows else [],
            command=self.command,
            usage=self.usage,
            plot=PLOT_NAME if has_plot else None,
        )

    def position_rows(self) -> Rows:
        """Acceptance by position: a head, before, after."""
        both = {"before": self.before.overall, "after": self.after.overall}
        most = max(len(found.reached) for found in both.values())
        positions = [str(i) for i in range(1, most + 1)]
        rows: Rows = [
            ("rounds that accept at least", *positions, "tokens per round", "rounds")
        ]
        for name, found in both.items():
            shares = [f"{share:.2f}" for share in found.reached]
            shares += ["-"] * (most - len(shares))
            rows.append((name, *shares, _length(found), f"{found.rounds:,}"))
        return rows

    def kind_rows(self) -> Rows:
        """Acceptance length by kind of text: a head, the kinds, all of them."""
        rows: Rows = [("tokens per round", "before", "after", "change", "rounds")]
        for kind in dict.fromkeys((*self.before.kinds, *self.after.kinds)):
            before, after = self.before.kinds.get(kind), self.after.kinds.get(kind)
            rows.append((one_line(kind), *_change(before, after)))
        rows.append(("all", *_change(self.before.overall, self.after.overall)))
        return rows

    def speed_rows(self) -> Rows:
        """Predicted speed-ups: a head, then a row for each place."""
        rows: Rows = [("on", "costs of a round", "before", "after", "after / before")]
        for found in self.prediction.speedups:
            gain = f"{found.gain:.2f}"
            both = (_speed(found.before), _speed(found.after))
            rows.append((found.where, found.origin, *both, gain))
        return rows

    def cost_lines(self) -> list[str]:
        """What the training took."""
        minutes = [
            f"{one_line(stage)} {time:.1f}" for stage, time in self.minutes.items()
        ]
        total = f"{sum(self.minutes.values()):.1f} in all"
        return [
            *_training(self.history),
            f"minutes: {', '.join([*minutes, total])}",
            f"peak memory {size(self.peak_memory_bytes)}, "
            f"records on disk {size(self.records_bytes)}",
        ]


def write_report(folder: Path, report: Report, *, name: str) -> list[str]:
    """Write a drafter's README.md and its plot.

    Args:
        folder: The drafter's folder.
        report: What to write.
        name: What the drafter will be called: a Hub id or a folder's name.

    Returns:
        What there is to say about it: a line where there is no plot.

    Raises:
        OutputError: The folder cannot be written.
    """
    try:
        has_plot = write_plot(
            folder, report.history, report.before.overall, report.after.overall
        )
        text = report.markdown(name, has_plot=has_plot)
        # A command line may hold bytes of a file's name that are no text.
        (folder / CARD_NAME).write_text(text, encoding="utf-8", errors="replace")
    except OSError as error:
        raise OutputError(
            f"{folder} must be writable: got {error.strerror or error}. Check the "
            "place, then run again."
        ) from error
    return [] if has_plot else [MISSING]


def _length(found: Acceptance | None) -> str:
    if found is None or not found.rounds:
        return "-"
    return f"{found.length:.2f} ± {found.standard_error:.2f}"


def _change(before: Acceptance | None, after: Acceptance | None) -> tuple[str, ...]:
    """Cells of two acceptances: both, how one follows from the other, rounds."""
    change = "-"
    if before and after and before.rounds and after.rounds:
        change = f"{after.length / before.length - 1:+.0%}"
    rounds = " / ".join(
        f"{found.rounds:,}" if found else "-" for found in (before, after)
    )
    return (_length(before), _length(after), change, rounds)


def _speed(found: Best) -> str:
    return f"{found.speedup:.2f}x (K = {found.num_draft_tokens})"


def _training(history: Sequence[Point]) -> Iterator[str]:
    """Steps and loss, and where held-out acceptance length was best, in a line."""
    if not history:
        return
    first, last = history[0], history[-1]
    line = f"training: {last.step:,} steps, loss {first.loss:.3f}"
    if last is not first:
        line += f" to {last.loss:.3f}"
    judged = {p.step: p.acceptance_length for p in history if p.acceptance_length}
    if judged:
        step = max(judged, key=judged.__getitem__)
        line += f"; best acceptance length held out {judged[step]:.2f} at step {step:,}"
    yield line


def _shown(value: Any) -> str:
    """A setting's value for a reader."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    if isinstance(value, (list, tuple)):
        return ", ".join(_shown(part) for part in value)
    return str(value)


def _finite(value: Any) -> Any:
    """The value with None for numbers that JSON has not: a loss may be infinite."""
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
