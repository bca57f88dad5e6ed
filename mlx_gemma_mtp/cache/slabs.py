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
and not measured, the slabs of two layers of 15 are copied in a round. Larger command
buffers make the distance shorter for all families: see engine/command_buffers.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from ..constants import FULL, MAX_DRAFT_TOKENS
from ..kernels.common import gpu

# Slabs grow in whole blocks, and by at least a quarter: each capacity is a new trace
# of the compiled round and one copy of the slabs.
CAPACITY_BLOCK = 256
_AHEAD, _AHEAD_ON_GPU = 256, 1024


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


def slots_ahead() -> int:
    """How many slots a sequence is given at first, beyond those that it fills.

    Every round reads them, and where they end its rounds are traced anew. On a CPU the
    first costs more, measured for the embedded pair; on a GPU the second, modelled.
    """
    return _AHEAD if gpu() is None else _AHEAD_ON_GPU


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


def write(slab: mx.array, slots: mx.array, new: mx.array) -> mx.array:
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
        self.keys = write(self.keys, self._slots, keys.astype(self.keys.dtype))
        self.values = write(self.values, self._slots, values.astype(self.values.dtype))
        return self.keys, self.values
