"""Caches after some tokens, and the memory that several of them take together.

Full layers hold every token. So caches and longer ones that begin with their tokens
share these layers' arrays, and what the shorter ones cost is their sliding windows.

Knows nothing of which caches are worth keeping.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache, can_trim_prompt_cache

from .beginning import num_common
from .rungs import RUNG

# What ends where, in mlx-lm's words.
ASSISTANT, USER, SYSTEM = "assistant", "user", "system"

_TOKEN = "i"  # four bytes each: to compare two prompts takes no loop in Python
_TOKEN_BYTES = array(_TOKEN).itemsize
# Fewer tokens than these at the end of an array are not worth copying the others:
# mlx-lm's caches grow by 256.
_SPARE = 512


@dataclass(eq=False)
class Entry:
    """The caches of all layers after some tokens.

    Attributes:
        tokens: All that they hold, packed.
        caches: mlx-lm's.
        kind: ``ASSISTANT``, ``USER``, ``SYSTEM`` or ``RUNG``.
        salt: Of whoever may find them.
        used: When a prompt last began with the tokens, in prompts looked for.
    """

    tokens: bytes
    caches: list[Any]
    kind: str
    salt: str | None
    used: int = 0

    @property
    def num_tokens(self) -> int:
        """How many tokens the caches hold."""
        return len(self.tokens) // _TOKEN_BYTES

    @property
    def is_rung(self) -> bool:
        """Whether they end inside a prompt."""
        return self.kind == RUNG

    @property
    def can_be_cut(self) -> bool:
        """Whether they can be cut back to any shorter beginning."""
        return can_trim_prompt_cache(self.caches)

    @property
    def ring_bytes(self) -> int:
        """Memory of the sliding windows."""
        return sum(c.nbytes for c in self.caches if not isinstance(c, KVCache))

    def begins(self, other: Entry) -> bool:
        """Whether another entry's tokens begin with this one's, or are these."""
        return self.salt == other.salt and other.tokens.startswith(self.tokens)

    def num_common(self, tokens: bytes) -> int:
        """How many tokens the caches have in common with the beginning of others."""
        return num_common(self.tokens, tokens) // _TOKEN_BYTES


def packed(tokens: Sequence[int]) -> bytes:
    """Token ids as entries hold them."""
    return array(_TOKEN, tokens).tobytes()


def share_arrays(shorter: list[Any], longer: list[Any]) -> None:
    """Let full layers look at the arrays of a cache that goes on from their tokens."""
    for one, other in zip(shorter, longer, strict=True):
        if isinstance(one, KVCache) and isinstance(other, KVCache):
            one.keys, one.values = other.keys, other.values


def count_bytes(entries: Sequence[Entry]) -> int:
    """Memory of all caches: shared arrays once, and as ``cut_arrays`` leaves them."""
    total = sum(entry.ring_bytes for entry in entries)
    for layer, alike in _sharing(entries):
        cache = alike[0].caches[layer]
        total += cache.nbytes * _length_used(layer, alike) // cache.keys.shape[2]
    return total


def own_bytes(entries: Sequence[Entry]) -> dict[Entry, float]:
    """The memory that each one takes alone: what is there without it is less by that.

    Of arrays that several share, it is the end that only the longest one needs.
    """
    found: dict[Entry, float] = {entry: entry.ring_bytes for entry in entries}
    for layer, alike in _sharing(entries):
        cache = alike[0].caches[layer]
        *rest, longest = sorted(alike, key=lambda entry: entry.num_tokens)
        num_tokens = longest.num_tokens - (rest[-1].num_tokens if rest else 0)
        found[longest] += cache.nbytes * num_tokens / cache.keys.shape[2]
    return found


def cut_arrays(entries: Sequence[Entry]) -> None:
    """Cut the arrays of full layers whose ends no cache needs any more."""
    for layer, alike in _sharing(entries):
        cache, used = alike[0].caches[layer], _length_used(layer, alike)
        if used == cache.keys.shape[2]:
            continue
        arrays = (cache.keys, cache.values)
        keys, values = (mx.contiguous(array[:, :, :used]) for array in arrays)
        mx.eval(keys, values)
        for entry in alike:
            entry.caches[layer].keys, entry.caches[layer].values = keys, values


def _length_used(layer: int, alike: Sequence[Entry]) -> int:
    """How many tokens of a layer's arrays that entries share are to stay."""
    used = max(entry.num_tokens for entry in alike)
    length = int(alike[0].caches[layer].keys.shape[2])
    return used if length - used >= _SPARE else length


def _sharing(entries: Sequence[Entry]) -> Iterator[tuple[int, list[Entry]]]:
    """Full layers, and the entries that look at the same arrays there, together."""
    groups: dict[tuple[int, int], list[Entry]] = {}
    for entry in entries:
        for layer, cache in enumerate(entry.caches):
            if isinstance(cache, KVCache) and cache.keys is not None:
                groups.setdefault((layer, id(cache.keys)), []).append(entry)
    for (layer, _), alike in groups.items():
        yield layer, alike
