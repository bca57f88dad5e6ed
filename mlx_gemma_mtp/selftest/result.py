"""What a section of the self-test found. Knows nothing of sections."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

PASS, FAIL, SKIP, INFO = "pass", "fail", "skip", "info"


@dataclass(frozen=True)
class Result:
    """What one section found.

    Attributes:
        name: The section's.
        status: ``PASS`` or ``FAIL`` where something must hold, ``INFO`` where nothing
            does, ``SKIP`` where nothing could be looked at.
        sentence: What it comes to, one line.
        lines: More for the page, a few lines.
        figures: Everything that was measured, as JSON takes it.
        seconds: What the section took.
        spread: How far timings of the same thing lie apart, see ``busy.spread``; None
            where nothing is timed, or too seldom.
        caution: Why timings are not to be relied on, in words; empty where they are.
    """

    name: str
    status: str
    sentence: str
    lines: tuple[str, ...] = ()
    figures: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    spread: float | None = None
    caution: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        return {
            "name": self.name,
            "status": self.status,
            "sentence": self.sentence,
            "lines": list(self.lines),
            "figures": self.figures,
            "seconds": self.seconds,
            "spread": self.spread,
            "caution": self.caution,
        }


def status_of(statuses: Iterable[str]) -> str:
    """The status of several things together: one failure fails all of them."""
    found = set(statuses)
    return next((s for s in (FAIL, PASS, INFO) if s in found), SKIP)
