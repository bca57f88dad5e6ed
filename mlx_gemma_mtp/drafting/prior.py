"""What is thought of a machine and a pair before anything is measured.

Knows nothing of who thinks so, nor of what is learnt later.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..constants import MAX_DRAFT_TOKENS
from .cost_model import NO_KEYS, TYPICAL_COST, TYPICAL_KEY_COST
from .lookup_model import verify_cost


@dataclass(frozen=True)
class Prior:
    """What is thought of a machine and a pair before anything is measured.

    Attributes:
        relative_cost: Round time for K = 0..8 without a context, over that of K = 0:
            9 numbers, the first 1.0.
        acceptance: P(a draft is accepted | those before it were), 0 to 1.
        relative_verify: The same times of rounds that run no drafter; ``()`` where
            they are to be derived.
        key_cost: What each token of context adds to these round times: 9 numbers,
            0.0 or more.
        verify_key_cost: The same of rounds that run no drafter; ``()`` where they are
            to be derived.

    Raises:
        ValueError: Not such numbers.
    """

    relative_cost: tuple[float, ...]
    acceptance: float
    relative_verify: tuple[float, ...] = ()
    key_cost: tuple[float, ...] = NO_KEYS
    verify_key_cost: tuple[float, ...] = ()

    @property
    def costs(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Of rounds with a drafter, what a ``CostModel`` starts from."""
        return self.relative_cost, self.key_cost

    @property
    def verify(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """The same of rounds without a drafter."""
        return (
            self.relative_verify or verify_cost(self.relative_cost),
            self.verify_key_cost or verify_cost(self.key_cost),
        )

    def __post_init__(self) -> None:
        costs = self.relative_cost
        if (
            len(costs) != MAX_DRAFT_TOKENS + 1
            or costs[0] != 1
            or not all(c > 0 for c in costs)
        ):
            raise ValueError(
                f"relative_cost must be 9 positive numbers, the first 1.0: got {costs}"
            )
        keys = self.key_cost
        if len(keys) != MAX_DRAFT_TOKENS + 1 or not all(
            0 <= c < math.inf for c in keys
        ):
            raise ValueError(f"key_cost must be 9 numbers, 0.0 or more: got {keys}")
        if not 0 <= self.acceptance <= 1:
            raise ValueError(f"acceptance must be within 0..1: got {self.acceptance}")


DEFAULT_PRIOR = Prior(TYPICAL_COST, 0.6, key_cost=TYPICAL_KEY_COST)
