"""How fast decoding should be on an Apple chip: a model of it, not a measurement.

A pass of the target over M rows (K + 1 for each of B sequences to verify) takes

    (dense bytes * c(M) + expert bytes * U(M) + B * K/V bytes) / reached bandwidth
    + layers * layer_s

and a draft step the same with the drafter's bytes, B rows and 4 layers. A round is a
pass and K steps. c(M) is what M rows cost over one, U(M) the experts that M rows choose
over those of one. `Constants` holds what was fitted to published figures;
`scripts/roofline.py` prints how far the model is from them.

Not in the model: attention whose cost grows with rows (heads of 512 in long contexts),
heat, and time that the host takes.

K = num_draft_tokens, 0 to 8, never counts the bonus token. Times are in seconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..constants import MAX_DRAFT_TOKENS
from ..models.families import DRAFTER_LAYERS, FAMILIES, Family, bits_per_weight
from .chips import Chip, chip_of
from .controller import DEFAULT_PRIOR, Prior

TYPICAL_FAMILY = "12b"
# Share of the new experts under independent routing that rows have in common: assumed.
EXPERT_DISCOUNT = 0.25
_MATRIX_TILE = 32  # rows that the matrix kernel multiplies at the cost of one
_SHARPNESS = 3  # of the bend between reading weights and arithmetic on rows


@dataclass(frozen=True)
class Constants:
    """What was fitted for GPUs of some generations.

    Attributes:
        efficiency: Share of the published bandwidth that is reached.
        layer_s: Fixed cost of a layer, whatever its size.
        balance: Rows whose arithmetic takes as long as reading the weights once;
            infinite where only reading counts.
        reread: Share of the weights' reading that every row after the first repeats.
    """

    efficiency: float
    layer_s: float
    balance: float = math.inf
    reread: float = 0.0

    def growth(self, rows: int, limit: int) -> float:
        """Cost of a pass's weights for several rows over that for one, at least 1.

        Args:
            rows: Rows of the pass, 1 or more.
            limit: Rows from which the matrix kernel runs. MLX switches where that costs
                the same, so the cost then stays for a tile and grows by the tile.
        """
        tiles = 1.0
        if rows >= limit:
            rows, tiles = limit, float(math.ceil(rows / _MATRIX_TILE))
        bent = self._bend(rows) / self._bend(1)
        return tiles * (bent + self.reread * (rows - 1))

    def fixed_s(self, num_layers: int) -> float:
        """Time of a forward that does not depend on bytes."""
        return num_layers * self.layer_s

    def _bend(self, rows: int) -> float:
        """The larger of reading (1) and arithmetic (rows / balance), rounded off."""
        return float((1 + (rows / self.balance) ** _SHARPNESS) ** (1 / _SHARPNESS))


# Before M3, MLX reads affine weights again for every row; since, once for up to 5 rows.
BEFORE_M3 = Constants(efficiency=0.55, layer_s=0.29e-3, reread=0.88)
M3_M4 = Constants(efficiency=0.90, layer_s=0.136e-3, balance=3.1)
M5 = Constants(efficiency=0.90, layer_s=0.136e-3, balance=3.8)


def constants_of(chip: Chip) -> Constants:
    """Return the constants of the chip's GPU generation."""
    if chip.generation < 15:
        return BEFORE_M3
    return M3_M4 if chip.generation < 17 else M5


def matrix_limit(chip: Chip) -> int:
    """Rows from which MLX multiplies large quantized matrices by its matrix kernel."""
    if chip.is_ultra:
        return 12
    return 6 if chip.generation < 15 else 13


@dataclass(frozen=True)
class Model:
    """A family on a chip, with what decides its speed.

    Attributes:
        chip: The chip.
        family: The family.
        constants: Of the chip's generation, unless others are asked for.
        bits: Of a target's weight.
        draft_bits: Of a drafter's weight.
        batch_size: Sequences decoded together.
        context: Tokens in the cache of each.
    """

    chip: Chip
    family: Family
    constants: Constants
    bits: int = 4
    draft_bits: int = 4
    batch_size: int = 1
    context: int = 0

    def pass_s(self, rows_each: int) -> float:
        """Time of one forward of the target.

        Args:
            rows_each: Rows of every sequence: K + 1 to verify K drafts.
        """
        family = self.family
        rows = rows_each * self.batch_size
        weights = family.dense_weights * self._growth(rows)
        if family.num_experts:
            union = experts_read(rows, family.num_active_experts, family.num_experts)
            weights += family.expert_weights * union
        num_bytes = weights * bits_per_weight(self.bits) / 8
        num_bytes += self.batch_size * family.kv_bytes(self.context)
        return self._forward_s(num_bytes, family.num_hidden_layers)

    def step_s(self) -> float:
        """Time of one draft step."""
        weights = self.family.draft_weights * self._growth(self.batch_size)
        num_bytes = weights * bits_per_weight(self.draft_bits) / 8
        num_bytes += self.batch_size * self.family.draft_kv_bytes(self.context)
        return self._forward_s(num_bytes, DRAFTER_LAYERS)

    def round_s(self, num_draft_tokens: int) -> float:
        """Time of a round with K drafts; K = 0 is plain decoding's."""
        return self.pass_s(num_draft_tokens + 1) + num_draft_tokens * self.step_s()

    def relative_cost(self, num_draft_tokens: int) -> float:
        """Time of a round with K drafts over that of one without."""
        return self.round_s(num_draft_tokens) / self.round_s(0)

    def tokens_per_second(self, num_draft_tokens: int, acceptance: float) -> float:
        """Tokens a second of all sequences together."""
        length = self.batch_size * acceptance_length(num_draft_tokens, acceptance)
        return length / self.round_s(num_draft_tokens)

    def best_draft_tokens(self, acceptance: float) -> int:
        """The K of 0 to 8 that gives most tokens a second."""
        return max(
            range(MAX_DRAFT_TOKENS + 1),
            key=lambda k: self.tokens_per_second(k, acceptance),
        )

    def speedup(self, acceptance: float) -> float:
        """Tokens a second with the best K over those without drafts."""
        best = self.best_draft_tokens(acceptance)
        return acceptance_length(best, acceptance) / self.relative_cost(best)

    def _growth(self, rows: int) -> float:
        return self.constants.growth(rows, matrix_limit(self.chip))

    def _forward_s(self, num_bytes: float, num_layers: int) -> float:
        bandwidth = self.chip.bandwidth * self.constants.efficiency
        return num_bytes / bandwidth + self.constants.fixed_s(num_layers)


def experts_read(rows: int, active: int, experts: int) -> float:
    """Experts that several rows choose, over those of one.

    Args:
        rows: Rows of a pass.
        active: Experts that each row chooses.
        experts: Experts to choose from.
    """
    share = active / experts
    independent = (1 - (1 - share) ** rows) / share
    return 1 + (1 - EXPERT_DISCOUNT) * (independent - 1)


def acceptance_length(num_draft_tokens: int, acceptance: float) -> float:
    """Tokens that a round of K drafts emits on average, 1 to K + 1.

    Args:
        num_draft_tokens: K.
        acceptance: Probability that a draft is accepted if those before it were.
    """
    return sum(acceptance**i for i in range(num_draft_tokens + 1))


def default_draft_bits(family: Family) -> int:
    """Bits that the converter gives a drafter unless asked."""
    return 8 if family.drafter.has_centroids else 4


def model(
    chip: Chip,
    family: Family,
    *,
    bits: int = 4,
    draft_bits: int | None = None,
    batch_size: int = 1,
    context: int = 0,
    constants: Constants | None = None,
) -> Model:
    """Return the model of a family on a chip.

    Args:
        chip: The chip.
        family: The family.
        bits: Of a target's weight, 16 for bfloat16.
        draft_bits: Of a drafter's weight; None for the converter's choice.
        batch_size: Sequences decoded together.
        context: Tokens in the cache of each.
        constants: Others than those of the chip's generation.
    """
    if draft_bits is None:
        draft_bits = default_draft_bits(family)
    constants = constants or constants_of(chip)
    return Model(chip, family, constants, bits, draft_bits, batch_size, context)


def prior(
    architecture: str | None,
    family: str | None,
    *,
    batch_size: int = 1,
    context: int = 0,
) -> Prior:
    """Return what to expect of a machine before it has run: modelled, not measured.

    Args:
        architecture: MLX's name of the GPU, ``mx.device_info()["architecture"]``. One
            that is no known chip of Apple's gets ``DEFAULT_PRIOR``.
        family: One of ``FAMILIES``; None, or another, for a typical dense one.
        batch_size: Sequences decoded together.
        context: Tokens in the cache of each.
    """
    chip = chip_of(architecture)
    if chip is None:
        return DEFAULT_PRIOR
    shapes = FAMILIES.get(family or "", FAMILIES[TYPICAL_FAMILY])
    modelled = model(chip, shapes, batch_size=batch_size, context=context)
    costs = (modelled.relative_cost(k) for k in range(MAX_DRAFT_TOKENS + 1))
    return Prior(tuple(costs), shapes.acceptance)
