"""Attention of a Gemma 4 layer over keys and values that stand in slabs.

It takes mlx-lm's module for its weights and sizes, and calls the module's own parts:
whatever a projection is, quantized or with an adapter, it stays. What is ours is where
keys are written, what is attended to, and how.

It knows nothing of layers, of rounds or of whose slabs they are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import mlx.core as mx
from mlx_lm.models import gemma4_text

from ..cache.slabs import write


@dataclass(frozen=True)
class SharedKV:
    """What layers of one type attend to.

    Attributes:
        keys: After norm and rope, [B, G, S, D].
        values: After their norm, [B, G, S, D].
        mask: True where a key may be seen, [B, 1, L, S] or [B, 1, 1, S].
    """

    keys: mx.array
    values: mx.array
    mask: mx.array


def attend(
    attention: gemma4_text.Attention,
    x: mx.array,
    kv: SharedKV,
    *,
    offset: mx.array,
    slots: mx.array | None,
) -> tuple[mx.array, SharedKV]:
    """Attend from a few places of each row.

    Args:
        attention: mlx-lm's module.
        x: Normed hidden states, [B, L, H].
        kv: What is attended to; for a layer that owns its K/V before its own are
            written.
        offset: Position of each row's first query, int32 [B].
        slots: Where the layer writes its keys and values, int32 [B, L]; None for a
            layer that owns none.

    Returns:
        What the layer adds to its input, before any norm, [B, L, H], and what was
        attended to.
    """
    num_rows, num_queries, _ = x.shape
    queries = _heads(attention, attention.q_proj(x))
    queries = _turned(attention, attention.q_norm(queries), offset)
    if slots is not None:
        kv = _written(attention, x, kv, offset=offset, slots=slots)
    found = mx.fast.scaled_dot_product_attention(
        queries, kv.keys, kv.values, scale=attention.scale, mask=kv.mask
    )
    found = found.transpose(0, 2, 1, 3).reshape(num_rows, num_queries, -1)
    return attention.o_proj(found), kv


def _written(
    attention: gemma4_text.Attention,
    x: mx.array,
    kv: SharedKV,
    *,
    offset: mx.array,
    slots: mx.array,
) -> SharedKV:
    """The slabs with the keys and values of the places of x [B, L, H]."""
    keys = values = _heads(attention, attention.k_proj(x))
    if not attention.use_k_eq_v:
        values = _heads(attention, attention.v_proj(x))
    keys = _turned(attention, attention.k_norm(keys), offset)
    values = attention.v_norm(values).transpose(0, 2, 1, 3)
    return replace(
        kv,
        keys=write(kv.keys, slots, keys.astype(kv.keys.dtype)),
        values=write(kv.values, slots, values.astype(kv.values.dtype)),
    )


def _heads(attention: gemma4_text.Attention, projected: mx.array) -> mx.array:
    """A projection by heads, [B, L, heads, D]."""
    return projected.reshape(*projected.shape[:-1], -1, attention.head_dim)


def _turned(
    attention: gemma4_text.Attention, normed: mx.array, offset: mx.array
) -> mx.array:
    """Queries or keys [B, L, heads, D] turned by their positions, [B, heads, L, D]."""
    return attention.rope(normed.transpose(0, 2, 1, 3), offset=offset)
