"""How much faster a drafter should make decoding: a prediction, not a measurement.

Acceptance is measured, what a round costs is modelled, assumed, or measured where the
pair has run here; a speed-up is the first over the second, at the best number K of
drafts. Positions past those measured are not considered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...constants import MAX_DRAFT_TOKENS
from ...drafting.chips import CHIPS
from ...drafting.prior import DEFAULT_PRIOR, Prior
from ...drafting.speed_model import Model, default_draft_bits, model
from ...models.families import FAMILIES

EXAMPLES = ("M1 Max", "M3 Max", "M4 Max", "M5 Max")
MODELLED, ASSUMED, MEASURED = "modelled", "assumed", "measured"


@dataclass(frozen=True)
class Costs:
    """What rounds cost somewhere.

    Attributes:
        where: The chip, or what stands for one.
        origin: ``MODELLED``, ``ASSUMED`` or ``MEASURED``.
        relative_cost: Time of a round with K drafts over that of one without, for
            K = 0, 1, ...; the first is 1.0.

    Raises:
        ValueError: Not such numbers.
    """

    where: str
    origin: str
    relative_cost: tuple[float, ...]

    def __post_init__(self) -> None:
        costs = self.relative_cost
        if not costs or costs[0] != 1 or not all(cost > 0 for cost in costs):
            raise ValueError(
                f"relative_cost must be positive numbers, the first 1.0: got {costs}"
            )


@dataclass(frozen=True)
class Best:
    """The number of drafts that decodes fastest, and how much faster than none."""

    num_draft_tokens: int
    speedup: float


@dataclass(frozen=True)
class Speedup:
    """A drafter before and after its training.

    Attributes:
        where: The chip, or what stands for one.
        origin: Where the costs of a round are from.
        before: With the drafter as it was.
        after: With the drafter as it is.
    """

    where: str
    origin: str
    before: Best
    after: Best

    @property
    def gain(self) -> float:
        """Speed after over speed before."""
        return self.after.speedup / self.before.speedup


@dataclass(frozen=True)
class Prediction:
    """What to expect of a drafter before and after its training.

    Attributes:
        assumptions: What was taken for given, in words.
        speedups: Over plain decoding, by place.
    """

    assumptions: str
    speedups: tuple[Speedup, ...]


def best(reached: Sequence[float], relative_cost: Sequence[float]) -> Best:
    """Return the best K of those measured, 0 where no drafting pays.

    Args:
        reached: Share of rounds that accepted 1, 2, ... drafts or more. That of
            shorter draft blocks is taken to be the same.
        relative_cost: As in ``Costs``.
    """
    found, tokens = Best(0, 1.0), 1.0
    for k, (share, cost) in enumerate(
        zip(reached, relative_cost[1:], strict=False), start=1
    ):
        tokens += share
        if tokens / cost > found.speedup:
            found = Best(k, tokens / cost)
    return found


def predict(
    before: Sequence[float],
    after: Sequence[float],
    *,
    family: str | None,
    prior: Prior = DEFAULT_PRIOR,
    bits: int = 4,
    draft_bits: int | None = None,
    context: int = 0,
    relative_cost: Sequence[float] | None = None,
) -> Prediction:
    """Return what to expect of a drafter before and after its training.

    Args:
        before: Share of rounds that accepted 1, 2, ... drafts or more.
        after: The same of the trained drafter.
        family: The target's published family, as from ``family_of()``; None, or
            another name, if it is of none.
        prior: What is expected of a target of no family here, from ``Pair.prior``.
        bits: Of a target's weight, 16 for bfloat16.
        draft_bits: Of a drafter's weight; None for the converter's choice.
        context: Tokens in the cache.
        relative_cost: Time of rounds with K = 0, 1, ... drafts over that of the first,
            as measured on this machine; None where it was not.

    Raises:
        ValueError: ``relative_cost`` is not such numbers.
    """
    shapes = FAMILIES.get(family or "")
    if shapes is None:
        costs = [_typical(prior)]
        words = "costs that were not measured here are a typical target's"
    else:
        if draft_bits is None:
            draft_bits = default_draft_bits(shapes)
        costs = [
            _modelled(
                model(chip, shapes, bits=bits, draft_bits=draft_bits, context=context)
            )
            for chip in map(CHIPS.__getitem__, EXAMPLES)
        ]
        words = (
            f"modelled for {shapes.size} in {bits} bits, its drafter in "
            f"{draft_bits}, one sequence, {context:,} tokens in the cache; how far off "
            "that can be: docs/speed-model.md of mlx_gemma_mtp"
        )
    if relative_cost is not None:
        costs.append(Costs("this machine", MEASURED, tuple(relative_cost)))
    return Prediction(words, tuple(_speedup(before, after, place) for place in costs))


def _modelled(speed: Model) -> Costs:
    ks = range(MAX_DRAFT_TOKENS + 1)
    costs = tuple(speed.relative_cost(k) for k in ks)
    return Costs(speed.chip.name, MODELLED, costs)


def _typical(prior: Prior) -> Costs:
    if prior == DEFAULT_PRIOR:
        return Costs("a typical machine", ASSUMED, prior.relative_cost)
    return Costs("a typical target on this chip", MODELLED, prior.relative_cost)


def _speedup(before: Sequence[float], after: Sequence[float], costs: Costs) -> Speedup:
    relative = costs.relative_cost
    return Speedup(
        costs.where, costs.origin, best(before, relative), best(after, relative)
    )
