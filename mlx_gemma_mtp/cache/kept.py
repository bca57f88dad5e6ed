"""Caches of prompts and answers, kept for prompts that begin alike.

A cache serves a prompt that begins with its tokens. One that has them all inside the
sliding window can also be cut back to a shorter beginning; past the window the keys
that would be needed again are gone. So caches are kept at several places of a
conversation. Full layers hold every token: a cache and a longer one that begins with
its tokens share their arrays, and what the shorter one costs is its sliding windows.

Knows nothing of who asks, nor of threads: it belongs to the one that decodes.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlx_lm.models.cache import KVCache, can_trim_prompt_cache, trim_prompt_cache

from .beginning import num_common

# What ends where, in the order in which caches go where there are as many of either.
_KINDS = ("assistant", "user", "system")


@dataclass(frozen=True)
class _Entry:
    """The caches of all layers after some tokens.

    Attributes:
        tokens: All that they hold.
        caches: mlx-lm's.
        kind: One of ``_KINDS``.
        salt: Of whoever may find them.
    """

    tokens: list[int]
    caches: list[Any]
    kind: str
    salt: str | None

    def num_usable(self, prompt: Sequence[int]) -> int:
        """How many tokens at the prompt's beginning need not be read again.

        One token at least is left: what follows is predicted from it.
        """
        common = min(num_common(self.tokens, prompt), len(prompt) - 1)
        if common == len(self.tokens) or can_trim_prompt_cache(self.caches):
            return common
        return 0


class KeptCaches:
    """What is kept, the newest last.

    Args:
        max_size: Most prompts.
        max_bytes: Most memory, shared arrays counted once.
        min_tokens: Fewer tokens than these are not worth their place.
        num_sure: So many of the newest stay, whatever memory they take.
    """

    def __init__(
        self, *, max_size: int, max_bytes: int, min_tokens: int = 1, num_sure: int = 0
    ) -> None:
        self._max_size = max_size
        self._max_bytes = max_bytes
        self._min_tokens = min_tokens
        self._num_sure = num_sure
        self._entries: list[_Entry] = []
        self._num_bytes = 0

    @property
    def num_bytes(self) -> int:
        """Memory in use."""
        return self._num_bytes

    def __len__(self) -> int:
        return len(self._entries)

    def is_worth(self, num_tokens: int) -> bool:
        """Whether caches of so many tokens are worth their place."""
        return num_tokens >= self._min_tokens

    def find(
        self, prompt: Sequence[int], *, salt: str | None = None
    ) -> tuple[list[Any] | None, int]:
        """The caches that save a prompt the most reading.

        Args:
            prompt: Token ids; the last one is never taken from a cache, because the
                model has to read something.
            salt: Only what was kept with the same one is known.

        Returns:
            Copies of mlx-lm's caches, the caller's to write to, and how many tokens
            they hold; None and 0 where nothing was kept that serves.
        """
        known = [entry for entry in self._entries if entry.salt == salt]
        best = max(known, key=lambda entry: entry.num_usable(prompt), default=None)
        num_tokens = 0 if best is None else best.num_usable(prompt)
        if best is None or not num_tokens or not self.is_worth(num_tokens):
            return None, 0
        caches = copy.deepcopy(best.caches)  # arrays are copied when written to
        if num_tokens < len(best.tokens):
            trim_prompt_cache(caches, len(best.tokens) - num_tokens)
        return caches, num_tokens

    def keep(
        self,
        tokens: Sequence[int],
        caches: list[Any],
        *,
        kind: str = "assistant",
        salt: str | None = None,
    ) -> None:
        """Keep the caches of some tokens.

        Args:
            tokens: All that they hold.
            caches: mlx-lm's. Nobody else may write to them from here on.
            kind: ``"system"``, ``"user"`` or ``"assistant"``; the last one goes first
                when room is needed.
            salt: Who asks with another one, or with none, does not find them.
        """
        new = _Entry(list(tokens), caches, kind, salt)
        can_be_cut = can_trim_prompt_cache(caches)
        kept = []
        for entry in self._entries:
            common = num_common(entry.tokens, new.tokens) if entry.salt == salt else -1
            if common == len(entry.tokens):
                if can_be_cut or common == len(new.tokens):
                    continue  # the new one serves in its place
                _share_arrays(entry.caches, caches)
            elif common == len(new.tokens):
                _share_arrays(caches, entry.caches)
            kept.append(entry)
        self._entries = [*kept, new]
        self._make_room()

    def clear(self) -> None:
        """Forget all caches."""
        self._entries.clear()
        self._num_bytes = 0

    def _make_room(self) -> None:
        """Let caches go until the others are few and small enough."""
        self._num_bytes = self._count_bytes()
        while len(self._entries) > self._num_sure and (
            len(self._entries) > self._max_size or self._num_bytes > self._max_bytes
        ):
            self._entries.remove(self._next_to_go())
            self._num_bytes = self._count_bytes()

    def _next_to_go(self) -> _Entry:
        """The oldest of a kind, as mlx-lm's ``LRUPromptCache`` chooses it.

        An answer's, unless more end with a question; one of these, unless more end
        with the instructions.
        """
        old = self._entries[: len(self._entries) - self._num_sure]
        counts = Counter(entry.kind for entry in old)
        kind, *rest = _KINDS
        for other in rest:
            if counts[kind] and counts[kind] >= counts[other]:
                break
            kind = other
        return next(entry for entry in old if entry.kind == kind)

    def _count_bytes(self) -> int:
        """Memory of all caches, shared arrays counted once."""
        shared: dict[int, int] = {}
        own = 0
        for entry in self._entries:
            for cache in entry.caches:
                if isinstance(cache, KVCache):
                    for array in (cache.keys, cache.values):
                        if array is not None:
                            shared[id(array)] = array.nbytes
                else:
                    own += cache.nbytes
        return own + sum(shared.values())


def _share_arrays(shorter: list[Any], longer: list[Any]) -> None:
    """Let full layers look at the arrays of a cache that goes on from their tokens."""
    for one, other in zip(shorter, longer, strict=True):
        if isinstance(one, KVCache) and isinstance(other, KVCache):
            one.keys, one.values = other.keys, other.values
