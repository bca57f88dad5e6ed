"""What the weights of several rows cost over those of one: of MLX, and of the kernel.

MLX's growth was fitted to published figures; `scripts/roofline.py` fits it again. That
of the package's own kernel for few rows is computed: while the GPU reads a weight, its
lanes can issue so many instructions, and M rows need so many. Where they need more than
there are, arithmetic takes longer than reading. Neither was measured.

What M rows need is S(M) = 5 + 2.25 M instructions for each weight, cautiously: so many
make the growth that is published of a kernel of the same kind (llama.cpp, pull request
29110, on an M4 Pro). How many a lane issues while it is not waiting is assumed.

Knows nothing of families, nor of who decides which of the two multiplies.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from ..constants import MAX_DRAFT_TOKENS
from .chips import Chip

MAX_KERNEL_ROWS = MAX_DRAFT_TOKENS + 1  # more rows are always MLX's
_MATRIX_TILE = 32  # rows that the matrix kernel multiplies at the cost of one
_SHARPNESS = 3  # of the bend between reading weights and arithmetic on rows

# Share of a GPU's instruction slots that the kernel can use, by generation: assumed.
_USABLE = {13: 0.70, 14: 0.70, 15: 0.80, 16: 0.80, 17: 0.95}


def bits_per_weight(bits: int) -> float:
    """Bits a weight takes with its share of scale and bias (groups of 64), or 16."""
    return bits + 32 / 64 if bits < 16 else 16.0


def cautious_slots(rows: int) -> float:
    """Instructions for each weight that the kernel needs for so many rows."""
    return 5 + 2.25 * rows


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

    def growth(self, rows: int, chip: Chip, bits: int = 4) -> float:
        """Cost of a pass's weights for several rows over that for one, at least 1.

        MLX switches to its matrix kernel where that costs the same, so the cost then
        stays for a tile and grows by the tile.

        Args:
            rows: Rows of the pass, 1 or more.
            chip: The chip.
            bits: Of a weight; all are alike here.
        """
        tiles, limit = 1.0, matrix_limit(chip)
        if rows >= limit:
            rows, tiles = limit, float(math.ceil(rows / _MATRIX_TILE))
        bent = bend(rows / self.balance) / bend(1 / self.balance)
        return tiles * (bent + self.reread * (rows - 1))

    def fixed_s(self, num_layers: int) -> float:
        """Time of a forward that does not depend on bytes."""
        return num_layers * self.layer_s


@dataclass(frozen=True)
class WithKernel(Constants):
    """The same where the package's kernel multiplies up to 9 rows.

    One row is taken to cost what MLX's costs. 8 bits and dense weights take longer to
    read, so that a GPU has more slots for each; they are taken to need as many.

    Attributes:
        slots: Instructions for each weight that so many rows need.
    """

    slots: Callable[[int], float] = cautious_slots

    def growth(self, rows: int, chip: Chip, bits: int = 4) -> float:
        """Cost of a pass's weights for several rows over that for one, at least 1.

        Args:
            rows: Rows of the pass, 1 or more; those past 9 are MLX's.
            chip: The chip.
            bits: Of a weight.
        """
        available = slots_per_weight(chip, bits, self.efficiency)
        few = min(rows, MAX_KERNEL_ROWS)
        grown = bend(self.slots(few) / available) / bend(self.slots(1) / available)
        return grown if few == rows else max(grown, super().growth(rows, chip, bits))


def slots_per_weight(chip: Chip, bits: int, efficiency: float) -> float:
    """Instructions that a kernel can issue while the GPU reads a weight.

    Args:
        chip: The chip.
        bits: Of a weight.
        efficiency: Share of the published bandwidth that is reached.
    """
    weight_s = bits_per_weight(bits) / 8 / (chip.bandwidth * efficiency)
    return _USABLE[chip.generation] * chip.slots_per_s * weight_s


def bend(load: float) -> float:
    """The larger of reading (1) and arithmetic (load), rounded off."""
    return float((1 + load**_SHARPNESS) ** (1 / _SHARPNESS))


# Before M3, MLX reads affine weights again for every row; since, once for up to 5 rows.
BEFORE_M3 = Constants(efficiency=0.55, layer_s=0.29e-3, reread=0.88)
M3_M4 = Constants(efficiency=0.90, layer_s=0.136e-3, balance=3.1)
M5 = Constants(efficiency=0.90, layer_s=0.136e-3, balance=3.8)


def constants_of(chip: Chip) -> Constants:
    """Return the constants of the chip's GPU generation."""
    if chip.generation < 15:
        return BEFORE_M3
    return M3_M4 if chip.generation < 17 else M5


def with_kernel(
    constants: Constants, slots: Callable[[int], float] = cautious_slots
) -> WithKernel:
    """The constants where the kernel multiplies up to 9 rows.

    Args:
        constants: Those where MLX does.
        slots: Instructions for each weight that so many rows need.
    """
    return WithKernel(**vars(constants), slots=slots)


def matrix_limit(chip: Chip) -> int:
    """Rows from which MLX multiplies large quantized matrices by its matrix kernel."""
    if chip.is_ultra:
        return 12
    return 6 if chip.generation < 15 else 13
