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

    def find(
        self, prompt: Sequence[int], *, salt: str | None = None
    ) -> tuple[list[Any] | None, int]:
        """The caches of the longest beginning of a prompt that is known.

        Args:
            prompt: Token ids; the last one is never taken from a cache, because the
                model has to read something.
            salt: Only what was kept with the same one is known.

        Returns:
            Copies of mlx-lm's caches, or None, and how many tokens they hold.
        """
        start = _key(prompt[:-1], salt)
        caches, rest = self._caches.fetch_nearest_cache(_MODEL, start)
        num_cached = len(start) - len(rest) - (salt is not None)
        return (caches, num_cached) if self.is_worth(num_cached) else (None, 0)

    @staticmethod
    def is_worth(num_tokens: int) -> bool:
        """Whether caches of so many tokens are worth their place."""
        return num_tokens >= MIN_TOKENS

    def keep(
        self,
        tokens: Sequence[int],
        caches: list[Any],
        *,
        kind: str,
        salt: str | None = None,
    ) -> None:
        """Keep the caches of some tokens.

        Args:
            tokens: All that they hold.
            caches: mlx-lm's.
            kind: ``"system"``, ``"user"`` or ``"assistant"``; the last one goes first
                when room is needed.
            salt: Who asks with another one, or with none, does not find them.
        """
        key = _key(tokens, salt)
        self._caches.insert_cache(_MODEL, key, caches, cache_type=kind)


def _key(tokens: Sequence[int], salt: str | None) -> list[Any]:
    """The place of some tokens among all.

    The salt stands where a first token would: mlx-lm never forgets the name of a model.
    """
    return list(tokens) if salt is None else [salt, *tokens]
