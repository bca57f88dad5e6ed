"""How fast decoding should be on an Apple chip: a model of it, not a measurement.

A pass of the target over M rows (K + 1 for each of B sequences to verify) takes

    (dense bytes * c(M) + expert bytes * U(M) + B * K/V bytes) / reached bandwidth
    + layers * layer_s

and a draft step the same with the drafter's bytes, B rows and 4 layers. A round is a
pass and K steps. c(M) is what M rows cost over one, U(M) the experts that M rows choose
over those of one. `Constants` holds what was fitted to published figures;
`scripts/roofline.py` prints how far the model is from them.

Bytes are counted of matrices; norms, scales and scalars are left out (under 0.1 %). A
table of which a token gathers one row, as of per-layer embeddings, is not read by a
pass: only the rows are, which is nothing. The tied embedding is read whole, as head.
Bandwidths are those that Apple publishes for the full GPU of each chip (M3 Max with 40
GPU cores, M4 Max and M5 Max with 40).

Not in the model: attention whose cost grows with rows (heads of 512 in long contexts),
heat, and time that the host takes.

K = num_draft_tokens, 0 to 8, never counts the bonus token. Times are in seconds.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..constants import FULL, MAX_DRAFT_TOKENS, SLIDING
from ..models.families import (
    DRAFTER_LAYERS,
    FAMILIES,
    GLOBAL_HEAD_DIM,
    HEAD_DIM,
    NUM_CENTROIDS,
    VOCAB_SIZE,
    Family,
)
from .controller import DEFAULT_PRIOR, Prior

TYPICAL_FAMILY = "12b"
# Share of the new experts under independent routing that rows have in common: assumed.
EXPERT_DISCOUNT = 0.25
_MATRIX_TILE = 32  # rows that the matrix kernel multiplies at the cost of one
_SHARPNESS = 3  # of the bend between reading weights and arithmetic on rows
_KV_BYTES = 2  # bfloat16
_ROWS_OF_CENTROID_HEAD = NUM_CENTROIDS + 32 * 128  # and the tokens of the 32 best

_ARCHITECTURE = re.compile(r"applegpu_g(\d+)([a-z])")


@dataclass(frozen=True)
class Chip:
    """One chip.

    Attributes:
        name: As Apple writes it, such as "M3 Ultra".
        generation: Of the GPU: 13 is M1, 14 M2, 15 M3, 16 M4, 17 M5.
        bandwidth: Of the memory, bytes a second.
    """

    name: str
    generation: int
    bandwidth: float

    @property
    def is_ultra(self) -> bool:
        """Whether two dies make one chip: MLX has limits of its own for them."""
        return self.name.endswith("Ultra")


CHIPS = {
    name: Chip(name, generation, gigabytes * 1e9)
    for name, generation, gigabytes in (
        ("M1", 13, 68.3),
        ("M1 Pro", 13, 200.0),
        ("M1 Max", 13, 400.0),
        ("M1 Ultra", 13, 800.0),
        ("M2", 14, 100.0),
        ("M2 Pro", 14, 200.0),
        ("M2 Max", 14, 400.0),
        ("M2 Ultra", 14, 800.0),
        ("M3", 15, 100.0),
        ("M3 Pro", 15, 150.0),
        ("M3 Max", 15, 400.0),
        ("M3 Ultra", 15, 819.0),
        ("M4", 16, 120.0),
        ("M4 Pro", 16, 273.0),
        ("M4 Max", 16, 546.0),
        ("M5", 17, 153.6),
        ("M5 Pro", 17, 307.0),
        ("M5 Max", 17, 614.0),
    )
}

# The letter that ends MLX's name of a GPU; a generation without an Ultra gets its Max.
_SIZES = {"p": "", "g": "", "s": " Max", "d": " Ultra"}


def chip_of(architecture: str | None) -> Chip | None:
    """Return the chip that an architecture is of, None if it is of no known one.

    Several chips share a name (g: base and Pro); the one returned stands for them.

    Args:
        architecture: ``mx.device_info()["architecture"]``, such as "applegpu_g15s".
    """
    match = _ARCHITECTURE.fullmatch(architecture or "")
    if match is None or match[2] not in _SIZES:
        return None
    model = f"M{int(match[1]) - 12}"
    chip = CHIPS.get(model + _SIZES[match[2]])
    return chip or CHIPS.get(f"{model} Max")


def bits_per_weight(bits: int) -> float:
    """Bits a weight takes with its share of scale and bias (groups of 64), or 16."""
    return bits + 32 / 64 if bits < 16 else 16.0


def dense_weights(family: Family) -> int:
    """Weights that every pass reads, whatever the tokens are."""
    text = family.target_text
    num_layers = text["num_hidden_layers"]
    num_own = num_layers - text["num_kv_shared_layers"]
    width = VOCAB_SIZE  # the head
    # Gate and projection of per-layer inputs, and the model's own projection.
    width += num_layers * (3 * text["hidden_size_per_layer_input"])
    width += num_layers * text["num_experts"]  # the router
    for layer, layer_type in enumerate(family.layer_types):
        is_shared = layer >= num_own
        times = 2 if is_shared and text["use_double_wide_mlp"] else 1
        width += 3 * times * text["intermediate_size"]
        width += _attention_width(family, layer_type, has_kv=not is_shared)
    return int(width * text["hidden_size"])


def _attention_width(family: Family, layer_type: str, *, has_kv: bool) -> int:
    """Rows of a layer's attention, each as wide as the hidden state."""
    text, is_full = family.target_text, layer_type == FULL
    head_dim = GLOBAL_HEAD_DIM if is_full else HEAD_DIM
    width = 2 * text["num_attention_heads"] * head_dim  # queries and output
    if has_kv:
        is_one = is_full and text["attention_k_eq_v"]
        width += (1 if is_one else 2) * _kv_heads(family, layer_type) * head_dim
    return int(width)


def _kv_heads(family: Family, layer_type: str) -> int:
    text = family.target_text
    heads = text["num_key_value_heads"]
    if layer_type == FULL:
        heads = text["num_global_key_value_heads"] or heads
    return int(heads)


def expert_weights(family: Family) -> int:
    """Weights of the experts that one token chooses, in all layers; 0 if dense."""
    text = family.target_text
    expert = 3 * text["hidden_size"] * text["moe_intermediate_size"]
    return int(text["num_hidden_layers"] * text["top_k_experts"] * expert)


def draft_weights(family: Family) -> int:
    """Weights that a draft step reads."""
    text = family.drafter_text
    heads = (len(DRAFTER_LAYERS) - 1) * HEAD_DIM + GLOBAL_HEAD_DIM
    width = (
        3 * family.target_text["hidden_size"]  # both projections
        + 2 * heads * text["num_attention_heads"]
        + 3 * len(DRAFTER_LAYERS) * text["intermediate_size"]
        + (_ROWS_OF_CENTROID_HEAD if family.has_centroid_head else VOCAB_SIZE)
    )
    return int(text["hidden_size"] * width)


def kv_bytes(family: Family, context: int) -> int:
    """Bytes of keys and values that a pass reads for one sequence.

    A layer that shares another's K/V saves memory, no reading.
    """
    return _kv_bytes(family, family.layer_types, context)


def draft_kv_bytes(family: Family, context: int) -> int:
    """Bytes of the target's keys and values that a draft step reads."""
    return _kv_bytes(family, DRAFTER_LAYERS, context)


def _kv_bytes(family: Family, layer_types: Sequence[str], context: int) -> int:
    num_full = layer_types.count(FULL)
    seen = min(context, family.target_text["sliding_window"])
    sliding = len(layer_types) - num_full
    sliding *= _kv_heads(family, SLIDING) * HEAD_DIM * seen
    full = num_full * _kv_heads(family, FULL) * GLOBAL_HEAD_DIM * context
    return int(2 * _KV_BYTES * (sliding + full))


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
        weights = dense_weights(family) * self._growth(rows)
        text = family.target_text
        if text["num_experts"]:
            union = experts_read(rows, text["top_k_experts"], text["num_experts"])
            weights += expert_weights(family) * union
        num_bytes = weights * bits_per_weight(self.bits) / 8
        num_bytes += self.batch_size * kv_bytes(family, self.context)
        return self._forward_s(num_bytes, len(family.layer_types))

    def step_s(self) -> float:
        """Time of one draft step."""
        weights = draft_weights(self.family) * self._growth(self.batch_size)
        num_bytes = weights * bits_per_weight(self.draft_bits) / 8
        num_bytes += self.batch_size * draft_kv_bytes(self.family, self.context)
        return self._forward_s(num_bytes, len(DRAFTER_LAYERS))

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
    return 8 if family.has_centroid_head else 4


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
