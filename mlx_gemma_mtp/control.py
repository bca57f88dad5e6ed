"""What is known of a machine before it has run a round."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Prior:
    """Costs and acceptance to start from.

    Attributes:
        relative_cost: Time of a round with K = 0..8 drafts over that with K = 0.
        acceptance: Probability that a draft is accepted if those before it were.
    """

    relative_cost: tuple[float, ...]
    acceptance: float


DEFAULT_PRIOR = Prior((1.0, 1.3, 1.5, 1.75, 2.0, 2.3, 2.6, 2.9, 3.2), 0.65)
