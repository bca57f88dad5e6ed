"""The five families of Gemma 4: their shapes, and the bytes that decoding reads.

Counts are of matrices; norms, scales and scalars are left out (under 0.1 %). A table of
which a token gathers one row, as of per-layer embeddings, is not read by a pass: only
the rows are, which is nothing. The tied embedding is read whole, as the head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

VOCABULARY = 262144
HEAD_DIM = 256
GLOBAL_HEAD_DIM = 512
KV_BYTES = 2  # bfloat16
DRAFTER_LAYERS = 4  # the last one attends to everything, the others to the window
CENTROID_ROWS = 2048 + 32 * 128  # centroids, and the tokens of the 32 best


def bits_per_weight(bits: int) -> float:
    """Bits a weight takes with its share of scale and bias (groups of 64), or 16."""
    return bits + 32 / 64 if bits < 16 else 16.0


@dataclass(frozen=True)
class DrafterShape:
    """A drafter's numbers, named as in its configuration."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    has_centroids: bool


@dataclass(frozen=True)
class Family:
    """A target's numbers, named as in its configuration, and its drafter's.

    Attributes:
        full_every: Every how many layers one attends to the whole context.
        acceptance: Probability that a draft is accepted if those before it were.
    """

    name: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    full_every: int
    num_attention_heads: int
    num_key_value_heads: int
    num_global_key_value_heads: int
    keys_are_values: bool
    sliding_window: int
    num_kv_shared_layers: int
    per_layer_width: int
    has_double_wide_mlp: bool
    num_experts: int
    num_active_experts: int
    expert_width: int
    drafter: DrafterShape
    acceptance: float

    def _is_full(self, layer: int) -> bool:
        return (layer + 1) % self.full_every == 0

    def _attention_weights(self, layer: int) -> int:
        is_full = self._is_full(layer)
        head_dim = GLOBAL_HEAD_DIM if is_full else HEAD_DIM
        weights = 2 * self.num_attention_heads * head_dim  # queries and output
        if layer < self.num_hidden_layers - self.num_kv_shared_layers:
            heads = (
                self.num_global_key_value_heads if is_full else self.num_key_value_heads
            )
            is_one = is_full and self.keys_are_values
            weights += (1 if is_one else 2) * heads * head_dim
        return weights * self.hidden_size

    def _dense_layer_weights(self, layer: int) -> int:
        is_shared = layer >= self.num_hidden_layers - self.num_kv_shared_layers
        width = self.intermediate_size
        if is_shared and self.has_double_wide_mlp:
            width *= 2
        per_layer_inputs = 3 * self.per_layer_width  # gate, projection, model's own
        return self._attention_weights(layer) + self.hidden_size * (
            3 * width + per_layer_inputs + self.num_experts
        )

    @property
    def dense_weights(self) -> int:
        """Weights that every pass reads, whatever the tokens are."""
        layers = range(self.num_hidden_layers)
        head = VOCABULARY * self.hidden_size
        return head + sum(self._dense_layer_weights(layer) for layer in layers)

    @property
    def expert_weights(self) -> int:
        """Weights of the experts that one token chooses, in all layers; 0 if dense."""
        expert = 3 * self.hidden_size * self.expert_width
        return self.num_hidden_layers * self.num_active_experts * expert

    @property
    def draft_weights(self) -> int:
        """Weights that a draft step reads."""
        shape = self.drafter
        heads = (DRAFTER_LAYERS - 1) * HEAD_DIM + GLOBAL_HEAD_DIM
        width = (
            3 * self.hidden_size  # both projections
            + 2 * heads * shape.num_attention_heads
            + 3 * DRAFTER_LAYERS * shape.intermediate_size
            + (CENTROID_ROWS if shape.has_centroids else VOCABULARY)
        )
        return shape.hidden_size * width

    def _kv_bytes(self, num_sliding: int, num_full: int, context: int) -> int:
        seen = min(context, self.sliding_window)
        sliding = num_sliding * self.num_key_value_heads * HEAD_DIM * seen
        heads = self.num_global_key_value_heads
        full = num_full * heads * GLOBAL_HEAD_DIM * context
        return 2 * KV_BYTES * (sliding + full)

    def kv_bytes(self, context: int) -> int:
        """Bytes of keys and values that a pass reads for one sequence.

        A layer that shares another's K/V saves memory, no reading.
        """
        num_full = self.num_hidden_layers // self.full_every
        return self._kv_bytes(self.num_hidden_layers - num_full, num_full, context)

    def draft_kv_bytes(self, context: int) -> int:
        """Bytes of the target's keys and values that a draft step reads."""
        return self._kv_bytes(DRAFTER_LAYERS - 1, 1, context)


# Acceptance on prose; published as accepted / drafted, here the chance per draft that
# gives it. 31B: 0.656 at 3 drafts (mlxcel, M3 Ultra), so 0.80. 12B: 0.49 to 0.54 at 3
# drafts (mlxcel), so 0.70. 26B-A4B: 0.71, 0.61, 0.51 at 1, 2, 3 drafts (oMLX #1909), so
# 0.71. E2B and E4B: no figure states chip, drafts and text; between 0.35 on generic
# prompts (gemma-4-swift-mlx) and 0.66 in code (a user of mlx-vlm) 0.60 is assumed.
FAMILIES = {
    family.name: family
    for family in (
        Family(
            *("e2b", 1536, 6144, 35, 5, 8, 1, 1, False, 512, 20, 256, True, 0, 0, 0),
            drafter=DrafterShape(256, 2048, 4, True),
            acceptance=0.60,
        ),
        Family(
            *("e4b", 2560, 10240, 42, 6, 8, 2, 2, False, 512, 18, 256, False, 0, 0, 0),
            drafter=DrafterShape(256, 2048, 4, True),
            acceptance=0.60,
        ),
        Family(
            *("12b", 3840, 15360, 48, 6, 16, 8, 1, True, 1024, 0, 0, False, 0, 0, 0),
            drafter=DrafterShape(1024, 8192, 16, False),
            acceptance=0.70,
        ),
        Family(
            *("26b-a4b", 2816, 2112, 30, 6, 16, 8, 2, True, 1024, 0, 0, False),
            *(128, 8, 704),
            drafter=DrafterShape(1024, 8192, 16, False),
            acceptance=0.71,
        ),
        Family(
            *("31b", 5376, 21504, 60, 6, 32, 16, 4, True, 1024, 0, 0, False, 0, 0, 0),
            drafter=DrafterShape(1024, 8192, 32, False),
            acceptance=0.80,
        ),
    )
}


def family_of(text_config: Mapping[str, Any]) -> str | None:
    """Tell the family from the numbers of a target's text model, None if it is none.

    Args:
        text_config: Its configuration, by the names that the checkpoint uses.
    """
    for family in FAMILIES.values():
        is_mixture = bool(text_config.get("enable_moe_block"))
        if is_mixture == bool(family.num_experts) and all(
            text_config.get(name) == getattr(family, name)
            for name in ("hidden_size", "intermediate_size", "num_hidden_layers")
        ):
            return family.name
    return None


# The sizes Gemma 4 is published in, and the hidden size of each target.
_HIDDEN_SIZES = {"E2B": 1536, "E4B": 2560, "12B": 3840, "26B-A4B": 2816, "31B": 5376}
_QAT_DRAFTER = "google/gemma-4-{size}-it-qat-q4_0-unquantized-assistant"
# owner: its drafter for instruction-tuned targets. mlx-community has no drafter of
# every size for quantization-aware trained targets, so those take Google's.
_DRAFTERS = {
    "google": "google/gemma-4-{size}-it-assistant",
    "mlx-community": "mlx-community/gemma-4-{size}-it-assistant-bf16",
}


def published_drafter(hidden_size: int) -> str | None:
    """Return the published drafter of the target with this hidden size, if any.

    Args:
        hidden_size: The target's H.
    """
    for size, published_hidden_size in _HIDDEN_SIZES.items():
        if hidden_size == published_hidden_size:
            return _DRAFTERS["google"].format(size=size)
    return None
