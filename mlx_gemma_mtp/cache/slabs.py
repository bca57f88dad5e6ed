"""The target's keys and values: slabs of a fixed shape, one offset for each row.

A full-attention layer has a slab [B, G, capacity, D] with slot = position; a sliding
layer has a ring [B, G, R, D] with slot = position mod R. R is the capacity until that
exceeds what the window needs: a shorter ring has never wrapped, so it grows as a slab
does. A round writes positions offset .. offset + K and commits by moving the offset:
rejected entries lie past it, no mask shows them, and the next round overwrites them. So
nothing is ever trimmed, copied or rolled back, and a key sits in the same slot whatever
K is.

Masks are arithmetic on positions. This file knows nothing of models or of sampling.

Writing in place. MLX lets a write have its slab's buffer where nobody else holds it at
the moment the write is encoded (``array::is_donatable``, ``set_copy_output_data``), and
copies the slab otherwise: right, but a slab is read and written. Three kinds of holders
there are, by the source of MLX 0.32:

- arrays of the host: whoever runs a round takes the state out before;
- readers in the graph, such as draft steps, which read what the target's layer writes
  in the same round: a round's write needs its drafts, so they are encoded before it,
  and each lets go of its inputs once it is encoded (``eval_impl`` detaches it);
- readers that were encoded and have not run: a command buffer keeps its inputs until
  it has completed (``gpu::eval``; on the CPU the task queue does, ``cpu::eval``).
  Encoding runs ahead by at most 10 command buffers of 40 to 50 launches
  (``MAX_ACTIVE_TASKS``), on the CPU by 100 tasks. So a write is in place where more
  than that lies between it and the last reader, also with a round queued ahead.

Where the drafter reads the target's last layers, a whole pass lies between. Where later
layers share keys (E4B, E2B), it is the layers up to the one that writes: some 600
launches of E4B, which is enough, and some 360 of E2B, which may not be. There, modelled
and not measured, the slabs of two layers of 15 are copied in a round. A larger
``MLX_MAX_OPS_PER_BUFFER`` makes the distance shorter for all families.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
from mlx_lm.models.base import create_causal_mask

from ..kernels.common import backend
from ..models.config import FULL, MAX_DRAFT_TOKENS, SLIDING

# Slabs grow in whole blocks, and by at least a quarter: each capacity is a new trace
# of the compiled round and one copy of the slabs.
CAPACITY_BLOCK = 256

# What Metal's fused attention with an array as its mask takes: these sizes of a head,
# so many queries, and so many of them for each head of keys.
_FUSED_HEAD_DIMS = (64, 96, 128, 256)
_MAX_FUSED_QUERIES, _MAX_FUSED_ROWS = 8, 32


@dataclass(frozen=True)
class LayerKV:
    """One layer that owns its keys and values.

    Attributes:
        layer_type: ``"full_attention"`` or ``"sliding_attention"``.
        num_kv_heads: G.
        head_dim: D.
    """

    layer_type: str
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class SlabLayout:
    """The shapes of all slabs of a target.

    Attributes:
        layers: The layers that own K/V, in order.
        window: How many positions, its own included, a sliding query sees.
        dtype: Type of keys and values.
    """

    layers: tuple[LayerKV, ...]
    window: int
    dtype: mx.Dtype

    @property
    def ring(self) -> int:
        """Most slots R of a sliding layer; it has fewer while the capacity is below.

        It depends on the bound of K and never on a round's K: that keeps a key's slot,
        and so the order of every sum, the same for all K.

        window + K_max + 1 is enough to decode; the rest is for look-ahead: when a stop
        lands in round r, round r + 1 has already written, and no key in the window of
        the last emitted token may be lost. A row that has ended stays where round r
        left it, so later rounds write where round r + 1 did.
        """
        return self.window + 2 * MAX_DRAFT_TOKENS + 2

    def num_slots(self, layer_type: str, capacity: int) -> int:
        """Slots of one layer's slab."""
        return capacity if layer_type == FULL else min(self.ring, capacity)

    def capacity(self, slabs: Sequence[mx.array]) -> int:
        """Slots of the full layers among existing slabs."""
        return slabs[2 * self.source(FULL)].shape[2]

    def source(self, layer_type: str) -> int:
        """Index of the layer whose K/V the drafter reads for ``layer_type``."""
        return max(
            i for i, layer in enumerate(self.layers) if layer.layer_type == layer_type
        )

    def num_bytes(self, num_rows: int, capacity: int) -> int:
        """Memory of the slabs of so many rows."""
        slots = sum(
            2
            * layer.num_kv_heads
            * layer.head_dim
            * self.num_slots(layer.layer_type, capacity)
            for layer in self.layers
        )
        return num_rows * slots * self.dtype.size

    def allocate(self, num_rows: int, capacity: int) -> list[mx.array]:
        """Empty slabs: keys and values of each layer in turn, [B, G, slots, D]."""
        slabs = []
        for layer in self.layers:
            slots = self.num_slots(layer.layer_type, capacity)
            shape = (num_rows, layer.num_kv_heads, slots, layer.head_dim)
            slabs += [mx.zeros(shape, dtype=self.dtype) for _ in range(2)]
        return slabs


def next_capacity(needed: int, capacity: int = 0) -> int:
    """The capacity to grow to: whole blocks, at least a quarter more than before."""
    wanted = max(needed, capacity + capacity // 4)
    return -(-wanted // CAPACITY_BLOCK) * CAPACITY_BLOCK


def stepped_capacity(needed: int) -> int:
    """A capacity of few, each half as much again or less: as rows come and go.

    Each pair of a capacity and a number of rows is a trace of the compiled round.
    """
    blocks = 1
    while blocks * CAPACITY_BLOCK < needed:
        # 1, 2, 3, 4, 6, 8, 12, 16, 24, ... blocks
        is_power = blocks & (blocks - 1) == 0
        blocks = blocks * 3 // 2 if is_power and blocks > 1 else blocks * 4 // 3
        blocks = max(blocks, 2)
    return blocks * CAPACITY_BLOCK


def resize(
    slabs: list[mx.array],
    layout: SlabLayout,
    capacity: int,
    *,
    rows: Sequence[int] | None = None,
) -> None:
    """Change how many slots or rows there are, in place of the list, one at a time.

    The list must be the only owner of the arrays: then no more than one old slab
    exists beside its copy.

    Args:
        slabs: Keys and values of each layer in turn; the entries are replaced.
        layout: Their layout.
        capacity: New number of slots of the full layers, more than any row that goes on
            has tokens; what lies beyond is dropped.
        rows: For each new row the old one that it was; None for the same rows.
    """
    index = None if rows is None else mx.array(list(rows), dtype=mx.int32)
    for i in range(len(slabs)):
        slab = slabs[i] if index is None else slabs[i][index]
        num_slots = layout.num_slots(layout.layers[i // 2].layer_type, capacity)
        slab = _with_slots(slab, num_slots)
        if slab is not slabs[i]:
            slabs[i] = slab
            del slab
            mx.eval(slabs[i])  # not lazily: that would hold all old slabs at once


def _with_slots(slab: mx.array, num_slots: int) -> mx.array:
    """The slab cut to so many slots, or with empty ones behind."""
    num_rows, num_heads, slots, head_dim = slab.shape
    if num_slots < slots:
        return mx.contiguous(slab[:, :, :num_slots])
    if num_slots == slots:
        return slab
    shape = (num_rows, num_heads, num_slots - slots, head_dim)
    return mx.concatenate([slab, mx.zeros(shape, slab.dtype)], axis=2)


def take_row(
    slabs: Sequence[mx.array],
    layout: SlabLayout,
    row: int,
    *,
    num_tokens: int,
    first_position: int,
) -> Iterator[PrefillCache]:
    """Copy one row out of the slabs, as ``insert_row`` would take it.

    Args:
        slabs: Keys and values of each layer in turn.
        layout: Their layout.
        row: Which row.
        num_tokens: How many tokens, from position 0 on, the caches stand for; they
            must have been written and, in rings, not overwritten since.
        first_position: The oldest position that the row's rings hold keys for.

    Yields:
        Each layer's cache, copied when it is asked for.
    """
    for i, cache in enumerate(prefill_caches(layout)):
        first = 0
        if layout.layers[i].layer_type == SLIDING:
            first = max(first_position, num_tokens - (layout.window + 1), 0)
        slots = mx.arange(first, num_tokens) % slabs[2 * i].shape[2]
        kept = [slabs[j][row : row + 1][:, :, slots] for j in (2 * i, 2 * i + 1)]
        mx.eval(kept)
        cache.fill(*kept, offset=num_tokens)
        yield cache


def oldest_kept(caches: Sequence[PrefillCache], layout: SlabLayout) -> int:
    """The oldest position that the sliding layers' caches hold keys for."""
    return max(
        (
            cache.oldest
            for cache, layer in zip(caches, layout.layers, strict=True)
            if layer.layer_type == SLIDING
        ),
        default=0,
    )


def insert_row(
    slabs: list[mx.array],
    layout: SlabLayout,
    row: int,
    caches: list[PrefillCache],
) -> None:
    """Move one prefilled request into a row of the slabs, one layer at a time.

    Args:
        slabs: Keys and values of each layer in turn; the entries are replaced.
        layout: Their layout.
        row: Which row to fill.
        caches: The prefilled cache of each layer, batch 1; emptied as it is read, so
            that only one layer is held twice.
    """
    caches.reverse()
    for i in range(len(layout.layers)):
        cache = caches.pop()
        keys, values = cache.keys_and_values()
        positions = mx.arange(cache.offset - keys.shape[2], cache.offset)
        slots = positions % slabs[2 * i].shape[2]
        for j, new in ((2 * i, keys), (2 * i + 1, values)):
            slab = mx.zeros((1, *slabs[j].shape[1:]), dtype=layout.dtype)
            slab = _write(slab, slots[None], new.astype(layout.dtype))
            if slabs[j].shape[0] > 1:
                slabs[j][row : row + 1] = slab
            else:
                slabs[j] = slab
            mx.eval(slabs[j])


def _write(slab: mx.array, slots: mx.array, new: mx.array) -> mx.array:
    """Put keys or values [B, G, L, D] into slots [B, L] of a slab.

    ``put_along_axis`` writes in place when the slab has no other owner, also with a
    round in flight; ``slice_update`` copies the whole slab then.
    """
    index = mx.broadcast_to(slots[:, None, :, None], new.shape)
    return mx.put_along_axis(slab, index, new, axis=2)


class SlabView:
    """One layer's slab as the cache object that mlx-lm's attention expects.

    Args:
        keys: The layer's key slab, [B, G, slots, D].
        values: The layer's value slab.
        offset: Each row's number of committed tokens, int32 [B].
        slots: Where the forward's L tokens are written, int32 [B, L].
    """

    def __init__(
        self, keys: mx.array, values: mx.array, *, offset: mx.array, slots: mx.array
    ) -> None:
        self.keys = keys
        self.values = values
        self.offset = offset
        self._slots = slots

    def update_and_fetch(
        self, keys: mx.array, values: mx.array
    ) -> tuple[mx.array, mx.array]:
        """Write the forward's keys and values, and give the whole slabs."""
        self.keys = _write(self.keys, self._slots, keys.astype(self.keys.dtype))
        self.values = _write(self.values, self._slots, values.astype(self.values.dtype))
        return self.keys, self.values


class PrefillCache:
    """One layer's keys and values while a prompt is read in chunks.

    Args:
        num_kept: How many keys to keep, in temporal order; None for all of them.
    """

    def __init__(self, num_kept: int | None = None) -> None:
        self.num_kept = num_kept
        self._keys: mx.array | None = None
        self._values: mx.array | None = None
        self.offset = 0

    def fill(self, keys: mx.array, values: mx.array, *, offset: int) -> None:
        """Start from keys and values that are there already.

        Args:
            keys: The newest ones, in temporal order, [1, G, S, D].
            values: Theirs.
            offset: Tokens so far, S or more.
        """
        self._keys, self._values, self.offset = keys, values, offset

    @property
    def oldest(self) -> int:
        """The oldest position that keys are held for; 0 where there are none."""
        return 0 if self._keys is None else self.offset - self._keys.shape[2]

    @property
    def state(self) -> list[mx.array]:
        """The arrays to evaluate between chunks."""
        return [a for a in (self._keys, self._values) if a is not None]

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """The kept keys and values, [1, G, S, D] each, the newest last."""
        if self._keys is None or self._values is None:
            raise ValueError("nothing was prefilled")
        return self._keys, self._values

    def update_and_fetch(
        self, keys: mx.array, values: mx.array
    ) -> tuple[mx.array, mx.array]:
        """Append a chunk; give what its queries may see."""
        self.offset += keys.shape[2]
        if self._keys is not None and self._values is not None:
            keys = mx.concatenate([self._keys, keys], axis=2)
            values = mx.concatenate([self._values, values], axis=2)
        self._keys, self._values = self._kept(keys), self._kept(values)
        return keys, values

    def make_mask(
        self, num_tokens: int, *, window_size: int | None = None, **_: object
    ) -> mx.array | str | None:
        """The mask of a chunk, called by mlx-lm before the chunk is appended.

        Returns:
            For a sliding layer bool [L, S] over the kept keys and the chunk; for a
            full one the name of the causal mask, which costs no memory.
        """
        if window_size is None:
            return "causal" if num_tokens > 1 else None
        num_kept = 0 if self._keys is None else self._keys.shape[2]
        return create_causal_mask(num_tokens, num_kept, window_size=window_size)

    def _kept(self, array: mx.array) -> mx.array:
        """The newest entries, [1, G, S, D]."""
        if self.num_kept is None or array.shape[2] <= self.num_kept:
            return array
        # A copy: a plain slice would keep the whole chunk alive.
        return mx.contiguous(array[:, :, -self.num_kept :])


def prefill_caches(layout: SlabLayout) -> list[PrefillCache]:
    """Fresh caches for one request's prompt, one for each layer that owns K/V.

    A sliding layer keeps window + 1 keys, as many as the drafter sees.
    """
    return [
        PrefillCache(layout.window + 1 if layer.layer_type == SLIDING else None)
        for layer in layout.layers
    ]


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


def over_heads(mask: mx.array, keys: mx.array, *, num_heads: int) -> mx.array:
    """A mask as attention over these keys takes it without a copy in every layer.

    By MLX's source (ScaledDotProductAttention::eval_gpu of Metal) the fused kernel for
    few queries copies a mask of several rows unless the stride of a row is that of all
    its heads; one that is broadcast over heads has none for them. Nobody else copies.

    Args:
        mask: What each query sees, bool [B, 1, L, slots].
        keys: The slab, [B, G, slots, D].
        num_heads: Of the queries.

    Returns:
        The mask; where it would be copied [B, num_heads, L, slots], in one piece.
    """
    num_rows, _, num_queries, num_slots = mask.shape
    _, num_kv_heads, _, head_dim = keys.shape
    is_fused = (
        head_dim in _FUSED_HEAD_DIMS
        and num_queries <= _MAX_FUSED_QUERIES
        and num_queries * num_heads <= _MAX_FUSED_ROWS * num_kv_heads
    )
    if num_rows == 1 or not is_fused or backend() != "metal":
        return mask
    shape = (num_rows, num_heads, num_queries, num_slots)
    return mx.contiguous(mx.broadcast_to(mask, shape))


def _ring_positions(ring: int, last: mx.array) -> mx.array:
    """The position each of R ring slots holds when ``last`` [B] is the newest, [B, R].

    Slots that were never written get positions below zero; entries past ``last`` read
    as positions older than any window.
    """
    return last[:, None] - (last[:, None] - mx.arange(ring)) % ring
