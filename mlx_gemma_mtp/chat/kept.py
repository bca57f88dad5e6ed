"""The K/V caches of the turns before, and which of them a new prompt can go on from.

A cache serves a prompt that begins with its tokens. One that has them all inside the
sliding window can also be cut back to a shorter beginning; past the window the keys
that would be needed again are gone. So caches are kept at several places of a
conversation: where a turn's answer begins, and where it ends.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from mlx_lm.models.cache import KVCache, can_trim_prompt_cache, trim_prompt_cache

from ..generation.encoding import num_common

MAX_BYTES = 2 * 10**9  # beside the newest two, which are always kept
MAX_ENTRIES = 16
_ALWAYS = 2


@dataclass(frozen=True)
class _Entry:
    """The caches of all layers after these tokens."""

    tokens: list[int]
    caches: list[Any]

    def num_usable(self, prompt: list[int]) -> int:
        """How many tokens at the prompt's beginning need not be read again.

        One token at least is left: what follows is predicted from it.
        """
        common = min(num_common(self.tokens, prompt), len(prompt) - 1)
        if common == len(self.tokens) or can_trim_prompt_cache(self.caches):
            return common
        return 0


class KeptCaches:
    """Caches of one conversation, the newest last.

    Full layers hold every token, and a later cache of the same conversation holds those
    of an earlier one too: they share the arrays. What an earlier one costs is its
    sliding windows.

    Args:
        max_bytes: Memory of all caches above which old ones go, down to two.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._entries: list[_Entry] = []

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        """Memory of all caches, shared arrays counted once, bytes."""
        arrays = {
            id(array): array.nbytes
            for entry in self._entries
            for cache in entry.caches
            for array in (cache.keys, cache.values)
        }
        return sum(arrays.values())

    def take(self, prompt: list[int]) -> tuple[list[Any] | None, int]:
        """Find what saves most reading.

        Args:
            prompt: Token ids, at least one.

        Returns:
            Caches of the prompt's first tokens and their number; they are the caller's
            to write to. None and 0 where nothing was kept that serves.
        """
        best = max(
            self._entries, key=lambda entry: entry.num_usable(prompt), default=None
        )
        num_tokens = 0 if best is None else best.num_usable(prompt)
        if best is None or not num_tokens:
            return None, 0
        caches = copy.deepcopy(best.caches)  # arrays are copied when written to
        trim_prompt_cache(caches, len(best.tokens) - num_tokens)
        return caches, num_tokens

    def keep(self, tokens: list[int], caches: list[Any]) -> None:
        """Keep caches for later turns.

        Args:
            tokens: The tokens they hold.
            caches: Nobody else may write to them from here on.
        """
        can_be_cut = can_trim_prompt_cache(caches)
        kept = []
        for entry in self._entries:
            if tokens[: len(entry.tokens)] != entry.tokens:
                kept.append(entry)
            elif len(entry.tokens) < len(tokens) and not can_be_cut:
                _share_arrays(entry.caches, caches)
                kept.append(entry)
        self._entries = [*kept, _Entry(tokens, caches)][-MAX_ENTRIES:]
        while len(self._entries) > _ALWAYS and self.nbytes > self._max_bytes:
            del self._entries[0]

    def clear(self) -> None:
        """Forget all caches."""
        self._entries.clear()


def _share_arrays(earlier: list[Any], later: list[Any]) -> None:
    """Let an earlier cache's full layers look at a later one's arrays.

    The later one was made by reading on from the earlier one, so it begins with the
    same keys and values.
    """
    for one, other in zip(earlier, later, strict=True):
        if isinstance(one, KVCache) and isinstance(other, KVCache):
            one.keys, one.values = other.keys, other.values
