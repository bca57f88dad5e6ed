"""Caches of prompts and answers, kept for requests that begin alike.

mlx-lm's ``LRUPromptCache`` keeps and finds them; here is decided which are worth it.
Belongs to the engine's thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlx_lm.models.cache import LRUPromptCache

# Reading fewer tokens takes about a round; a kept cache of them would push out a
# longer one.
MIN_TOKENS = 64
_MODEL = "served"  # one model, so any word will do


class KeptCaches:
    """What is kept.

    Args:
        max_size: Most prompts.
        max_bytes: Most memory.
    """

    def __init__(self, *, max_size: int, max_bytes: int) -> None:
        self._caches = LRUPromptCache(max_size=max_size, max_bytes=max_bytes)

    @property
    def num_bytes(self) -> int:
        """Memory in use."""
        return int(self._caches.nbytes)

    def __len__(self) -> int:
        return len(self._caches)

    def find(self, prompt: Sequence[int]) -> tuple[list[Any] | None, int]:
        """The caches of the longest beginning of a prompt that is known.

        Args:
            prompt: Token ids; the last one is never taken from a cache, because the
                model has to read something.

        Returns:
            Copies of mlx-lm's caches, or None, and how many tokens they hold.
        """
        start = list(prompt[:-1])
        caches, rest = self._caches.fetch_nearest_cache(_MODEL, start)
        num_cached = len(start) - len(rest)
        return (caches, num_cached) if num_cached >= MIN_TOKENS else (None, 0)

    def keep(self, tokens: Sequence[int], caches: list[Any], *, kind: str) -> None:
        """Keep the caches of some tokens.

        Args:
            tokens: All that they hold.
            caches: mlx-lm's.
            kind: ``"system"``, ``"user"`` or ``"assistant"``; the last one goes first
                when room is needed.
        """
        if len(tokens) >= MIN_TOKENS:
            self._caches.insert_cache(_MODEL, list(tokens), caches, cache_type=kind)
