"""What a pass of a family reads: weights by their number, keys and values by bytes.

Weights are those of matrices; norms, scales and scalars are left out (under 0.1 %). A
table of which a token gathers one row, as of per-layer embeddings, is not read by a
pass: only the rows are, which is nothing. The tied embedding is read whole, as head.

Of several machines that share a target these are the weights of the one that has most
of them: the others wait for it. Groups of 64 weights are taken to stay together.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from ..constants import FULL, SLIDING
from ..models.families import (
    DRAFTER_LAYERS,
    GLOBAL_HEAD_DIM,
    HEAD_DIM,
    NUM_CENTROIDS,
    VOCAB_SIZE,
    Family,
)
from ..models.splits import heads, split

_KV_BYTES = 2  # bfloat16
_GROUP = 64
_ROWS_OF_CENTROID_HEAD = NUM_CENTROIDS + 32 * 128  # and the tokens of the 32 best


@cache
def dense_weights(family: Family, size: int = 1) -> int:
    """Weights that every pass reads, whatever the tokens are.

    Args:
        family: The family.
        size: Number of machines that share it.
    """
    text = family.target_text
    num_layers = text["num_hidden_layers"]
    num_own = num_layers - text["num_kv_shared_layers"]
    own = family.layer_types[:num_own]
    width = _widest(VOCAB_SIZE, size, 1)  # the head
    # Gate and projection of per-layer inputs, and the model's own projection.
    width += num_layers * (3 * text["hidden_size_per_layer_input"])
    width += num_layers * text["num_experts"]  # the router
    for layer, layer_type in enumerate(family.layer_types):
        is_shared = layer >= num_own
        times = 2 if is_shared and text["use_double_wide_mlp"] else 1
        width += 3 * _widest(times * text["intermediate_size"], size)
        num_heads, seen = heads_of(family, layer_type, size)
        if layer_type not in own[layer + 1 :]:  # the drafter reads it: it is whole
            seen = num_kv_heads(family, layer_type)
        width += _attention_width(
            family, layer_type, num_heads, 0 if is_shared else seen
        )
    return int(width * text["hidden_size"])


def _attention_width(family: Family, layer_type: str, num_heads: int, kv: int) -> int:
    """Rows of a layer's attention, each as wide as the hidden state."""
    is_full = layer_type == FULL
    head_dim = GLOBAL_HEAD_DIM if is_full else HEAD_DIM
    is_one = is_full and family.target_text["attention_k_eq_v"]
    # Queries and output, keys, and values that are not the keys.
    return (2 * num_heads + (1 if is_one else 2) * kv) * head_dim


def _widest(width: int, size: int, unit: int = _GROUP) -> int:
    """The part of the first rank, which has most."""
    return len(split(width, size, unit)[0])


@cache
def num_kv_heads(family: Family, layer_type: str) -> int:
    """Heads of keys in a layer of a type."""
    text = family.target_text
    found = text["num_key_value_heads"]
    if layer_type == FULL:
        found = text["num_global_key_value_heads"] or found
    return int(found)


@cache
def heads_of(family: Family, layer_type: str, size: int) -> tuple[int, int]:
    """Heads of queries of a rank, and the heads of keys that they read.

    Args:
        family: The family.
        layer_type: Which layers.
        size: Number of machines that share it.
    """
    num_heads = family.target_text["num_attention_heads"]
    own = heads(num_heads, num_kv_heads(family, layer_type), 0, size)
    return len(own.queries), len(own.kv)


@cache
def expert_weights(family: Family, size: int = 1) -> int:
    """Weights of the experts that one token chooses, in all layers; 0 if dense."""
    text = family.target_text
    if not text["num_experts"]:
        return 0
    expert = 3 * text["hidden_size"] * _widest(text["moe_intermediate_size"], size)
    return int(text["num_hidden_layers"] * text["top_k_experts"] * expert)


@cache
def draft_weights(family: Family) -> int:
    """Weights that a draft step reads."""
    text = family.drafter_text
    num_columns = (len(DRAFTER_LAYERS) - 1) * HEAD_DIM + GLOBAL_HEAD_DIM
    width = (
        3 * family.target_text["hidden_size"]  # both projections
        + 2 * num_columns * text["num_attention_heads"]
        + 3 * len(DRAFTER_LAYERS) * text["intermediate_size"]
        + (_ROWS_OF_CENTROID_HEAD if family.has_centroid_head else VOCAB_SIZE)
    )
    return int(text["hidden_size"] * width)


def sliding_bytes(family: Family, layer_types: Sequence[str], context: int) -> int:
    """Bytes of a sequence's keys and values in sliding layers.

    A layer that shares another's K/V saves memory, no reading.
    """
    seen = min(context, family.target_text["sliding_window"])
    width = layer_types.count(SLIDING) * num_kv_heads(family, SLIDING) * HEAD_DIM
    return int(2 * _KV_BYTES * width * seen)


def key_bytes(family: Family, layer_types: Sequence[str]) -> int:
    """Bytes of one token's keys and values in full layers."""
    width = layer_types.count(FULL) * num_kv_heads(family, FULL) * GLOBAL_HEAD_DIM
    return 2 * _KV_BYTES * width
