"""Attention of a Gemma 4 layer over keys and values that stand in slabs.

It takes mlx-lm's module for its weights and sizes, and calls the module's own parts:
whatever a projection is, quantized or with an adapter, it stays. What is ours is where
keys are written, what is attended to, and how.

Queries of all heads that share a head of keys may stand packed in the rows of one
product: K and V are then read once for each head of theirs. MLX's own unfused attention
does that only where there is one such head. Where a fused kernel takes few queries at a
time only, they may be split.

Equal bytes for every number of queries are a matter of the kernels that run. So packed
rows go through products of one number of rows, the last of them filled.

It knows nothing of layers, of rounds or of whose slabs they are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import gemma4_text
from mlx_lm.models.rope_utils import ProportionalRoPE

from ..cache.masks import FUSED_HEAD_DIMS, fused_queries
from ..cache.slabs import write
from ..kernels.common import gpu
from ..kernels.norm_rope import norm_rope
from ..kernels.ways import NORM_ROPE, PACKED, SPLIT, STOCK_WAYS, Ways

_PIECE = 32  # rows of a packed product: what a tile of Metal's has at least


# Of queries, keys and values; None for what there is not.
_Turned = tuple[mx.array, mx.array | None, mx.array | None]


@dataclass(frozen=True)
class SharedKV:
    """What layers of one type attend to.

    Attributes:
        keys: After norm and rope, [B, G, S, D].
        values: After their norm, [B, G, S, D].
        mask: True where a key may be seen, [B, 1, L, S] or [B, 1, 1, S].
        heads: Of G those that queries see; None for all of them.
    """

    keys: mx.array
    values: mx.array
    mask: mx.array
    heads: range | None = None

    @property
    def seen(self) -> SharedKV:
        """What queries see of it."""
        if self.heads is None:
            return self
        own = slice(self.heads.start, self.heads.stop)
        return SharedKV(self.keys[:, own], self.values[:, own], self.mask)


class JoinedProjections(gemma4_text.Attention):
    """mlx-lm's attention whose projections somebody can compute together."""

    def project(self, x: mx.array) -> list[mx.array] | None:
        """Queries, keys and, unless they are the keys, values of x [B, L, H].

        Each is [B, L, outputs]. None where they are to be computed one by one.
        """
        raise NotImplementedError


def attend(
    attention: gemma4_text.Attention,
    x: mx.array,
    kv: SharedKV,
    *,
    offset: mx.array,
    slots: mx.array | None,
    ways: Ways = STOCK_WAYS,
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
        ways: What was chosen on this machine.

    Returns:
        What the layer adds to its input, before any norm, [B, L, H], and what was
        attended to.
    """
    queries, keys, values = _projected(attention, x, has_kv=slots is not None)
    turn = _turned
    if NORM_ROPE in ways and _is_known(attention):
        turn = _turned_by_kernel
    queries, keys, values = turn(attention, queries, keys, values, offset)
    if slots is not None and keys is not None and values is not None:
        kv = replace(
            kv,
            keys=write(kv.keys, slots, keys.astype(kv.keys.dtype)),
            values=write(kv.values, slots, values.astype(kv.values.dtype)),
        )
    found = _attended(queries, kv.seen, attention.scale, ways)
    found = found.transpose(0, 2, 1, 3).reshape(*x.shape[:-1], -1)
    return attention.o_proj(found), kv


def _projected(
    attention: gemma4_text.Attention, x: mx.array, *, has_kv: bool
) -> _Turned:
    """Queries, and keys and values where there are any, [B, L, heads, D]."""
    found = None
    if has_kv and isinstance(attention, JoinedProjections):
        found = attention.project(x)
    if found is None:
        found = [attention.q_proj(x)]
        found += [attention.k_proj(x)] if has_kv else []
        found += [attention.v_proj(x)] if has_kv and not attention.use_k_eq_v else []
    queries, *others = (_heads(attention, each) for each in found)
    return queries, *((others[0], others[-1]) if others else (None, None))


def _turned(
    attention: gemma4_text.Attention,
    queries: mx.array,
    keys: mx.array | None,
    values: mx.array | None,
    offset: mx.array,
) -> _Turned:
    """Queries and keys normed and turned by their positions, and values normed.

    Each is [B, L, heads, D], and comes out [B, heads, L, D].
    """

    def turned(normed: mx.array) -> mx.array:
        return attention.rope(normed.transpose(0, 2, 1, 3), offset=offset)

    queries = turned(attention.q_norm(queries))
    if keys is None or values is None:
        return queries, None, None
    keys = turned(attention.k_norm(keys))
    return queries, keys, attention.v_norm(values).transpose(0, 2, 1, 3)


def _turned_by_kernel(
    attention: gemma4_text.Attention,
    queries: mx.array,
    keys: mx.array | None,
    values: mx.array | None,
    offset: mx.array,
) -> _Turned:
    """The same in one launch."""
    rope = attention.rope
    is_of_base = type(rope) is nn.RoPE
    return norm_rope(
        queries,
        keys,
        values,
        q_weight=attention.q_norm.weight,
        k_weight=None if keys is None else attention.k_norm.weight,
        eps=attention.q_norm.eps,
        offset=offset,
        base=rope.base if is_of_base else None,
        freqs=None if is_of_base else rope._freqs,
    )


def _is_known(attention: gemma4_text.Attention) -> bool:
    """Whether norms and rotation are those that the kernel computes."""
    rope = attention.rope
    kinds = {
        "q_norm": nn.RMSNorm,
        "k_norm": nn.RMSNorm,
        "v_norm": gemma4_text.RMSNormNoScale,
    }
    norms = {name: attention[name] for name in kinds if name in attention}
    if any(type(norm) is not kinds[name] for name, norm in norms.items()):
        return False
    if len({norm.eps for norm in norms.values()}) > 1:
        return False
    if type(rope) is nn.RoPE:
        is_plain = rope.scale == 1.0
    else:
        is_plain = type(rope) is ProportionalRoPE
    return is_plain and rope.dims == attention.head_dim and not rope.traditional


def _heads(attention: gemma4_text.Attention, projected: mx.array) -> mx.array:
    """A projection by heads, [B, L, heads, D]."""
    return projected.reshape(*projected.shape[:-1], -1, attention.head_dim)


def _attended(queries: mx.array, kv: SharedKV, scale: float, ways: Ways) -> mx.array:
    """What queries [B, heads, L, D] find, of the same shape."""
    num_heads, num_queries, head_dim = queries.shape[1:]
    shared_by = num_heads // kv.keys.shape[1]
    if shared_by > 1 and _is_packed(head_dim, ways):
        return packed(queries, kv, scale)
    most = num_queries
    if SPLIT in ways and head_dim in FUSED_HEAD_DIMS:
        most = fused_queries(shared_by)
    pieces = [
        mx.fast.scaled_dot_product_attention(
            queries[:, :, i : i + most],
            kv.keys,
            kv.values,
            scale=scale,
            mask=kv.mask if kv.mask.shape[2] == 1 else kv.mask[:, :, i : i + most],
        )
        for i in range(0, num_queries, most)
    ]
    return pieces[0] if len(pieces) == 1 else mx.concatenate(pieces, axis=2)


def _is_packed(head_dim: int, ways: Ways) -> bool:
    """Whether heads are packed: always on the CPU, which has no fused attention."""
    where = gpu()
    is_fused = where is not None and head_dim in FUSED_HEAD_DIMS
    return not is_fused and (where is None or PACKED in ways)


def packed(queries: mx.array, kv: SharedKV, scale: float) -> mx.array:
    """Attention with all queries of a head of keys in the rows of one product."""
    num_rows, _, num_queries, head_dim = queries.shape
    groups = kv.keys.shape[1]
    rows = queries.reshape(num_rows, groups, -1, head_dim)  # [B, G, heads / G * L, D]
    if scale != 1:
        rows = rows * scale
    repeats = rows.shape[2] // num_queries
    mask = mx.tile(kv.mask, (1, 1, repeats if kv.mask.shape[2] > 1 else 1, 1))
    if gpu() is None:  # products there give a row the same bytes beside any others
        return _product(rows, kv, mask).reshape(queries.shape)
    found = []
    for i in range(0, rows.shape[2], _PIECE):
        piece, seen = rows[:, :, i : i + _PIECE], mask
        if mask.shape[2] > 1:
            seen = _filled(mask[:, :, i : i + _PIECE])
        found.append(_product(_filled(piece), kv, seen)[:, :, : piece.shape[2]])
    return mx.concatenate(found, axis=2).reshape(queries.shape)


def _filled(rows: mx.array) -> mx.array:
    """Rows on the last axis but one, the last one repeated until there are enough."""
    missing = _PIECE - rows.shape[2]
    if not missing:
        return rows
    return mx.concatenate([rows, mx.repeat(rows[:, :, -1:], missing, axis=2)], axis=2)


def _product(rows: mx.array, kv: SharedKV, mask: mx.array) -> mx.array:
    """Attention of rows [B, G, n, D] over their keys."""
    scores = rows @ kv.keys.swapaxes(-1, -2)
    scores = mx.where(mask, scores, mx.finfo(scores.dtype).min)
    return mx.softmax(scores, axis=-1, precise=True) @ kv.values
