"""Keys and values of one sequence: read in from a prompt, in and out of slabs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy

import mlx.core as mx
from mlx_lm.models.base import create_causal_mask

from ..constants import SLIDING
from .slabs import SlabLayout, write


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
            slab = write(slab, slots[None], new.astype(layout.dtype))
            if slabs[j].shape[0] > 1:
                slabs[j][row : row + 1] = slab
            else:
                slabs[j] = slab
            mx.eval(slabs[j])


def joined(rows: Sequence[list[PrefillCache]]) -> list[PrefillCache]:
    """One cache a layer for a chunk of several prompts; a single one's own.

    Args:
        rows: The caches of each prompt, which hold the same positions. They stay as
            they are where there are several.
    """
    if len(rows) == 1:
        return rows[0]
    return [_stacked(caches) for caches in zip(*rows, strict=True)]


def _stacked(caches: Sequence[PrefillCache]) -> PrefillCache:
    """A layer's caches as one that keeps all, because the newest may be padding."""
    stacked = PrefillCache()
    if caches[0].offset:
        keys, values = (
            mx.concatenate(list(arrays))
            for arrays in zip(
                *(cache.keys_and_values() for cache in caches), strict=True
            )
        )
        stacked.fill(keys, values, offset=caches[0].offset)
    return stacked


def parted(
    whole: Sequence[PrefillCache],
    rows: Sequence[list[PrefillCache]],
    sizes: Sequence[int],
) -> list[list[PrefillCache]]:
    """Each prompt's own caches after a chunk of several, without padding.

    Args:
        whole: What ``joined`` gave, and the chunk behind it.
        rows: What it was given.
        sizes: Tokens of each prompt's chunk.
    """
    if len(rows) == 1:
        return [rows[0]]
    return [
        [
            cache.followed_by(layer, row, size)
            for layer, cache in zip(whole, caches, strict=True)
        ]
        for row, (caches, size) in enumerate(zip(rows, sizes, strict=True))
    ]


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

    def followed_by(self, whole: PrefillCache, row: int, size: int) -> PrefillCache:
        """What this one holds and the first tokens behind it in a row of another.

        Args:
            whole: The other one, which begins with the same positions.
            row: Which row of it.
            size: How many tokens.
        """
        begin = self.offset - self.oldest
        chunk = [a[row : row + 1, :, begin : begin + size] for a in whole.state]
        made = copy(self)
        # Copies: slices would keep all rows alive.
        made.update_and_fetch(*map(mx.contiguous, chunk))
        return made

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
