"""What tuning has found. This file knows nothing of how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .choices import Choice, Choices, Shape


@dataclass(frozen=True)
class Tuned:
    """What was found.

    Attributes:
        reason: Why nothing was decided, in words; empty where something was.
        decided: The choice for every shape that was decided; None for MLX.
        bad: Why a kernel must not be used for a shape, by shape.
        reasons: Why MLX multiplies a shape, by shape, also where that is undecided.
        gains: MLX's time over the kernel's, by shape and rows, where timed alone.
        passes: What a pass takes with what was decided, seconds by rows; empty where
            none was timed.
        stock_passes: The same with MLX alone.
        ways: Whether layers are faster by each way that was timed.
        bad_ways: Why a way must not be used, by way.
    """

    reason: str = ""
    decided: Mapping[Shape, Choice | None] = field(default_factory=dict)
    bad: Mapping[Shape, str] = field(default_factory=dict)
    reasons: Mapping[Shape, str] = field(default_factory=dict)
    gains: Mapping[Shape, Mapping[int, float]] = field(default_factory=dict)
    passes: Mapping[int, float] = field(default_factory=dict)
    stock_passes: Mapping[int, float] = field(default_factory=dict)
    ways: Mapping[str, bool] = field(default_factory=dict)
    bad_ways: Mapping[str, str] = field(default_factory=dict)

    @property
    def choices(self) -> Choices:
        """The kernel's matrices, and the ways that won."""
        return Choices(
            {s: c for s, c in self.decided.items() if c is not None},
            frozenset(way for way, has_won in self.ways.items() if has_won),
        )
