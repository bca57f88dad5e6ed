"""Caches of prompts and answers, kept for prompts that begin alike.

A cache serves a prompt that begins with its tokens. One that has them all inside the
sliding window can also be cut back to a shorter beginning; past the window the keys
that would be needed again are gone. So caches are kept at several places of a
conversation: where instructions, questions and answers end, and at rungs inside long
prompts. One budget of memory holds for all. A folder may have more.

Knows nothing of who asks, nor of threads: it belongs to the one that decodes.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mlx_lm.models.cache import trim_prompt_cache

from .entries import (
    ASSISTANT,
    SYSTEM,
    USER,
    Entry,
    count_bytes,
    cut_arrays,
    packed,
    share_arrays,
)
from .rungs import RUNG
from .worth import next_rung_to_go

if TYPE_CHECKING:
    from .prompt_folder import PromptFolder

# What ends where, in the order in which caches go where there are as many of either.
_KINDS = (ASSISTANT, USER, SYSTEM)
# Where memory is short, rungs have so much of it: what is there only for them.
_RUNGS_SHARE = 0.5


class KeptCaches:
    """What is kept, the newest last.

    Args:
        max_size: Most places, rungs not counted.
        max_bytes: Most memory, shared arrays counted once.
        min_tokens: Fewer tokens than these are not worth their place.
        num_sure: So many of the newest stay, whatever memory they take; no rungs.
        folder: Where what is kept is also written, and looked for; None for nowhere.
    """

    def __init__(
        self,
        *,
        max_size: int,
        max_bytes: int,
        min_tokens: int = 1,
        num_sure: int = 0,
        folder: PromptFolder | None = None,
    ) -> None:
        self._max_size = max_size
        self._max_bytes = max_bytes
        self._min_tokens = min_tokens
        self._num_sure = num_sure
        self._folder = folder
        self._entries: list[Entry] = []
        self._num_bytes = 0
        self._num_looked_for = 0

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
        self._num_looked_for += 1
        tokens = packed(prompt[:-1])
        best, num_tokens = self._best(tokens, salt)
        if self._folder is not None:
            found = self._folder.find(tokens, salt=salt, beyond=num_tokens)
            if found is not None:
                held, end = copy.deepcopy(found[0]), found[1]
                self.keep(prompt[:end], held, kind=RUNG, salt=salt)
                return found
        if best is None or not self.is_worth(num_tokens):
            return None, 0
        caches = copy.deepcopy(best.caches)  # arrays are copied when written to
        if num_tokens < best.num_tokens:
            trim_prompt_cache(caches, best.num_tokens - num_tokens)
        return caches, num_tokens

    def _best(self, tokens: bytes, salt: str | None) -> tuple[Entry | None, int]:
        """What in memory saves the most reading, and how many tokens it saves."""
        best, num_tokens = None, 0
        for entry in self._entries:
            if entry.salt != salt:
                continue
            common = entry.num_common(tokens)
            is_whole = common == entry.num_tokens
            if is_whole:
                entry.used = self._num_looked_for
            if common > num_tokens and (is_whole or entry.can_be_cut):
                best, num_tokens = entry, common
        return best, num_tokens

    def keep(
        self,
        tokens: Sequence[int],
        caches: list[Any],
        *,
        kind: str = ASSISTANT,
        salt: str | None = None,
    ) -> None:
        """Keep the caches of some tokens.

        Args:
            tokens: All that they hold.
            caches: mlx-lm's. Nobody else may write to them from here on.
            kind: ``"system"``, ``"user"``, ``"assistant"`` or ``"rung"``; of the first
                three the last one goes first when room is needed.
            salt: Who asks with another one, or with none, does not find them.
        """
        new = Entry(packed(tokens), caches, kind, salt, self._num_looked_for)
        longer = next((entry for entry in self._entries if new.begins(entry)), None)
        if longer is not None:
            share_arrays(caches, longer.caches)
        can_be_cut = new.can_be_cut
        for entry in [entry for entry in self._entries if entry.begins(new)]:
            is_equal = new.begins(entry)
            if is_equal and new.is_rung:
                new.kind = entry.kind
            if is_equal or can_be_cut:
                self._entries.remove(entry)  # the new one serves in its place
            else:
                share_arrays(entry.caches, caches)
        self._entries.append(new)
        self._make_room()
        if self._folder is not None and not new.is_rung:
            begin = {*(entry for entry in self._entries if entry.begins(new)), new}
            self._folder.offer(sorted(begin, key=lambda entry: entry.num_tokens))

    def close(self, timeout_s: float) -> None:
        """Write what waits to be written, but not for longer than this."""
        if self._folder is not None:
            self._folder.close(timeout_s)

    def clear(self) -> None:
        """Forget all caches but those in the folder."""
        self._entries.clear()
        self._num_bytes = 0

    def _make_room(self) -> None:
        """Let caches go until the others are few and small enough."""
        self._num_bytes = count_bytes(self._entries)
        while (entry := self._next_to_go()) is not None:
            self._entries.remove(entry)
            self._num_bytes = count_bytes(self._entries)
        cut_arrays(self._entries)

    def _next_to_go(self) -> Entry | None:
        """What goes next; None where there is room."""
        ends = [entry for entry in self._entries if not entry.is_rung]
        has_rungs = len(ends) < len(self._entries)
        num_sure = max(self._num_sure, 1 if has_rungs else 0)
        old = ends[: max(len(ends) - num_sure, 0)]
        if old and len(ends) > self._max_size:
            return _next_end_to_go(old)
        if self._num_bytes <= self._max_bytes:
            return None
        rungs_bytes = self._num_bytes - count_bytes(ends)
        if has_rungs and (not old or rungs_bytes > _RUNGS_SHARE * self._max_bytes):
            return next_rung_to_go(self._entries, self._num_looked_for)
        return _next_end_to_go(old) if old else None


def _next_end_to_go(old: Sequence[Entry]) -> Entry:
    """The oldest of a kind, as mlx-lm's ``LRUPromptCache`` chooses it.

    An answer's, unless more end with a question; one of these, unless more end with the
    instructions.
    """
    counts = Counter(entry.kind for entry in old)
    kind, *rest = _KINDS
    for other in rest:
        if counts[kind] and counts[kind] >= counts[other]:
            break
        kind = other
    return next(entry for entry in old if entry.kind == kind)
