"""Which slots a round writes, and which each of its rows sees."""

from __future__ import annotations

import mlx.core as mx

from ..constants import FULL, SLIDING
from ..kernels.common import gpu
from .slabs import SlabLayout

# What Metal's fused attention with an array as its mask takes: these sizes of a head,
# so many queries, and so many of them for each head of keys.
FUSED_HEAD_DIMS = (64, 96, 128, 256)
MAX_FUSED_QUERIES, MAX_FUSED_ROWS = 8, 32


def verify_slots(
    layout: SlabLayout, *, offset: mx.array, num_tokens: int, capacity: int
) -> dict[str, mx.array]:
    """Where a verify block's tokens are written, by layer type, int32 [B, L].

    Args:
        layout: The slabs' layout.
        offset: Position of each row's first token, int32 [B].
        num_tokens: Tokens L of the block.
        capacity: Slots of the full layers; an empty row beyond them wraps.
    """
    positions = offset[:, None] + mx.arange(num_tokens)
    return {
        kind: positions % layout.num_slots(kind, capacity) for kind in (FULL, SLIDING)
    }


def verify_masks(
    layout: SlabLayout,
    *,
    offset: mx.array,
    first_position: mx.array,
    num_tokens: int,
    capacity: int,
) -> dict[str, mx.array]:
    """What the queries of a verify block see of each type of slab.

    Args:
        layout: The slabs' layout.
        offset: Position of each row's first query, int32 [B].
        first_position: The oldest position that each row's rings hold keys for, int32
            [B].
        num_tokens: Queries L; they are written before attention.
        capacity: Slots of the full layers.

    Returns:
        Layer type to bool mask, [B, 1, L, slots].
    """
    queries = (offset[:, None] + mx.arange(num_tokens))[:, None, :, None]
    oldest = first_position[:, None, None, None]
    full = mx.arange(capacity)  # [slots]
    ring = layout.num_slots(SLIDING, capacity)
    sliding = _ring_positions(ring, offset + (num_tokens - 1))[:, None, None, :]
    return {
        FULL: full <= queries,
        SLIDING: (sliding <= queries)
        & (sliding > queries - layout.window)
        & (sliding >= oldest),
    }


def draft_masks(
    layout: SlabLayout,
    *,
    offset: mx.array,
    first_position: mx.array,
    capacity: int,
) -> dict[str, mx.array]:
    """What the drafter's single query sees: committed keys only.

    Its sliding layers see the last window + 1 of them, one more than the target's.
    Source: transformers 5.22.2, create_bidirectional_sliding_window_mask as the
    assistant calls it.

    Args:
        layout: The slabs' layout.
        offset: Each row's number of committed tokens, int32 [B].
        first_position: The oldest position that each row's rings hold keys for, int32
            [B].
        capacity: Slots of the full layers.

    Returns:
        Layer type to bool mask, [B, 1, 1, slots].
    """
    end = offset[:, None, None, None]
    oldest = first_position[:, None, None, None]
    full = mx.arange(capacity)
    ring = layout.num_slots(SLIDING, capacity)
    sliding = _ring_positions(ring, offset - 1)[:, None, None, :]
    return {
        FULL: full < end,
        SLIDING: (sliding >= end - (layout.window + 1)) & (sliding >= oldest),
    }


def fused_queries(shared_by: int) -> int:
    """Most queries that fused attention takes where so many heads share one of keys."""
    return max(1, min(MAX_FUSED_QUERIES, MAX_FUSED_ROWS // shared_by))


def over_heads(
    mask: mx.array, keys: mx.array, *, num_heads: int, is_split: bool = False
) -> mx.array:
    """A mask as attention over these keys takes it without a copy in every layer.

    By MLX's source (ScaledDotProductAttention::eval_gpu of Metal) the fused kernel for
    few queries copies a mask of several rows unless the stride of a row is that of all
    its heads; one that is broadcast over heads has none for them. Nobody else copies.

    Args:
        mask: What each query sees, bool [B, 1, L, slots].
        keys: The slab, [B, G, slots, D].
        num_heads: Of the queries.
        is_split: Whether as many queries attend at a time as the fused kernel takes.

    Returns:
        The mask; where it would be copied [B, num_heads, L, slots], in one piece.
    """
    num_rows, _, num_queries, num_slots = mask.shape
    _, num_kv_heads, _, head_dim = keys.shape
    if is_split:
        num_queries = min(num_queries, fused_queries(num_heads // num_kv_heads))
    is_fused = (
        head_dim in FUSED_HEAD_DIMS
        and num_queries <= MAX_FUSED_QUERIES
        and num_queries * num_heads <= MAX_FUSED_ROWS * num_kv_heads
    )
    if num_rows == 1 or not is_fused or gpu() != "metal":
        return mask
    shape = (num_rows, num_heads, mask.shape[2], num_slots)
    return mx.contiguous(mx.broadcast_to(mask, shape))


def _ring_positions(ring: int, last: mx.array) -> mx.array:
    """The position each of R ring slots holds when ``last`` [B] is the newest, [B, R].

    Slots that were never written get positions below zero; entries past ``last`` read
    as positions older than any window.
    """
    return last[:, None] - (last[:, None] - mx.arange(ring)) % ring
