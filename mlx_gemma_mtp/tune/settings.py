"""What a training run is asked to do, checked. Knows nothing of how it is done."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from ..constants import MAX_DRAFT_TOKENS
from ..errors import RequestError

_MOST_SEEDS = 2**48  # every text adds its number to it


@dataclass(frozen=True)
class TrainingSettings:
    """How a drafter is trained.

    Attributes:
        num_draft_tokens: K, steps unrolled from every place.
        learning_rate: The highest one.
        steps: Most optimizer steps.
        minutes: Most minutes of training, those before a resumption included; the
            learning rate follows whichever of steps and minutes is nearer to its end.
            None for no limit: then a run depends on nothing but data and seed.
        batch_size: Texts of an optimizer step; their gradients are accumulated.
        num_places: Most places of a text whose activations are in memory together; None
            for as many as take about a gigabyte.
        judge_every: Steps between measurements of the held-out acceptance length.
        save_every: Steps between checkpoints.
        patience: Measurements without a better one after which training ends.
        lora_rank: Rank of adapters that are trained in place of the weights, or None.
        seed: Of the order of texts and of new weights.
    """

    num_draft_tokens: int = 4
    learning_rate: float = 3e-4
    steps: int = 1000
    minutes: float | None = None
    batch_size: int = 4
    num_places: int | None = None
    judge_every: int = 50
    save_every: int = 50
    patience: int = 10
    lora_rank: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            RequestError: A value outside its range.
        """
        k = self.num_draft_tokens
        _check("--num-draft-tokens", k, 1 <= k <= MAX_DRAFT_TOKENS, "1 to 8")
        is_rate = 0 < self.learning_rate < math.inf
        _check("--learning-rate", self.learning_rate, is_rate, "above 0 and finite")
        is_seed = 0 <= self.seed < _MOST_SEEDS
        _check("--seed", self.seed, is_seed, f"from 0 to {_MOST_SEEDS - 1}")
        minutes = self.minutes
        _check("--minutes", minutes, minutes is None or minutes > 0, "above 0")
        rank = self.lora_rank
        _check("--lora-rank", rank, rank is None or rank >= 1, "1 or more")
        for name in _COUNTS:
            value = getattr(self, name)
            is_count = value is None or value >= 1
            _check(f"--{name.replace('_', '-')}", value, is_count, "1 or more")

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain data."""
        return asdict(self)


_COUNTS = (
    "steps",
    "batch_size",
    "num_places",
    "judge_every",
    "save_every",
    "patience",
)


def _check(flag: str, value: object, is_valid: bool, constraint: str) -> None:
    if not is_valid:
        raise RequestError(f"{flag} must be {constraint}: got {value}. Change it.")
