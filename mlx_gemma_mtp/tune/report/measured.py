"""What was measured of a drafter: acceptance on held-out text, points of its training.

Plain numbers: knows nothing of how they were found.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Acceptance:
    """How many drafts the rounds of some text accepted.

    Attributes:
        reached: reached[i] is the share of rounds that accepted i + 1 drafts or more,
            for i + 1 = 1..K.
        rounds: How many rounds that is a share of.

    Raises:
        ValueError: Not such numbers.
    """

    reached: tuple[float, ...]
    rounds: int

    def __post_init__(self) -> None:
        if self.rounds < 0 or not all(0 <= share <= 1 for share in self.reached):
            raise ValueError(
                "reached must be shares of 0 or more rounds, each 0..1: got "
                f"{self.reached} of {self.rounds}"
            )

    @property
    def length(self) -> float:
        """Acceptance length: tokens per round, 1.0 to K + 1."""
        return 1 + sum(self.reached)

    @property
    def standard_error(self) -> float:
        """Of the length, if rounds were independent; 0.0 before the first round."""
        if not self.rounds:
            return 0.0
        mean = sum(self.reached)
        # E[n²] of the number n of accepted drafts, by the sum of its tail.
        square = sum((2 * i + 1) * share for i, share in enumerate(self.reached))
        return math.sqrt(max(square - mean * mean, 0.0) / self.rounds)

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Acceptance:
        """What ``to_dict`` has written."""
        return cls(tuple(found["reached"]), found["rounds"])

    def to_dict(self) -> dict[str, Any]:
        """Everything and what follows from it, as JSON takes it."""
        return {
            "reached": list(self.reached),
            "rounds": self.rounds,
            "acceptance_length": self.length,
        }


@dataclass(frozen=True)
class Measured:
    """Acceptance of a drafter on held-out text, in rounds that were really run.

    Attributes:
        overall: Of all the text.
        kinds: Of each kind of it.
    """

    overall: Acceptance
    kinds: Mapping[str, Acceptance]

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Measured:
        """What ``to_dict`` has written."""
        kinds = found["kinds"].items()
        return cls(
            Acceptance.from_dict(found["overall"]),
            {kind: Acceptance.from_dict(one) for kind, one in kinds},
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        kinds = {kind: found.to_dict() for kind, found in self.kinds.items()}
        return {"overall": self.overall.to_dict(), "kinds": kinds}


@dataclass(frozen=True)
class Point:
    """Where training was after some steps.

    Attributes:
        step: Steps of the optimizer so far.
        minutes: Of training so far.
        loss: On the training text of late.
        acceptance_length: On held-out text; None where it was not judged.
    """

    step: int
    minutes: float
    loss: float
    acceptance_length: float | None = None
