"""Prompts on their way into caches, a chunk at a time, one or several in a forward.

It knows what a target gives for a chunk: nothing of rows, rounds or of when to read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import mlx.core as mx

from ..cache.prompt import PrefillCache, joined, parted, prefill_caches
from ..cache.slabs import SlabLayout
from ..models.target import Prefilled

DEFAULT_PREFILL_STEP_SIZE = 2048


class Reader(Protocol):
    """What reading a prompt asks of a target; see target.py for the shapes."""

    layout: SlabLayout

    def prefill(
        self, tokens: mx.array, caches: list[PrefillCache], sizes: Sequence[int]
    ) -> Prefilled:
        """Read a chunk of each of some prompts into caches."""


class Prefill:
    """Reads one prompt.

    Args:
        target: Reads.
        prompt: At least one token id.
        caches: What the prompt follows, one for each layer that owns K/V; they are
            filled further. None: the prompt begins the text.
        stops: Numbers of the prompt's tokens after which a chunk must end.

    Attributes:
        caches: The caches of what was read so far.
        num_read: The prompt's tokens that were read so far.
    """

    def __init__(
        self,
        target: Reader,
        prompt: list[int] | mx.array,
        *,
        caches: list[PrefillCache] | None = None,
        stops: Sequence[int] = (),
    ) -> None:
        self.caches = prefill_caches(target.layout) if caches is None else caches
        self.num_read = 0
        self._target = target
        self._prompt = mx.array(prompt, dtype=mx.int32)
        self._stops = sorted({*stops, self._prompt.size})
        self._filled: Prefilled | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt."""
        return self._prompt.size

    @property
    def is_done(self) -> bool:
        """Whether the prompt was read to its end."""
        return self.num_read == self.num_tokens

    @property
    def is_stopped(self) -> bool:
        """Whether what was read ends at one of the stops, the prompt's end included."""
        return self.num_read in self._stops

    @property
    def places(self) -> list[tuple[int, int]]:
        """Of each layer's cache the oldest position it holds, and the next one.

        Prompts with the same ones can be read on in one forward.
        """
        return [(cache.oldest, cache.offset) for cache in self.caches]

    @property
    def filled(self) -> Prefilled:
        """What reading the whole prompt gives."""
        assert self._filled is not None
        return self._filled

    def next_size(self, most: int) -> int:
        """Tokens of the next chunk, at most so many: up to the next stop."""
        stop = next(s for s in self._stops if s > self.num_read)
        return min(most, stop - self.num_read)

    def next_chunk(self, most: int) -> mx.array:
        """The tokens of the next chunk, int32 [L], at most so many."""
        return self._prompt[self.num_read : self.num_read + self.next_size(most)]

    def add(self, filled: Prefilled, size: int) -> None:
        """Note that the next chunk was read.

        Args:
            filled: What that gave, of this prompt alone.
            size: Its tokens.
        """
        self.caches = filled.caches
        self.num_read += size
        if self.is_done:
            self._filled = filled

    def read(self, most: int) -> None:
        """Read the next chunk.

        Args:
            most: Most tokens in it, 1 or more.
        """
        read_together(self._target, [self], most)


def read_together(target: Reader, prefills: Sequence[Prefill], most: int) -> None:
    """Read the next chunk of some prompts in one forward, padded on the right.

    Args:
        target: Reads.
        prefills: The prompts. Where there are several, what was read of each must look
            alike (``Prefill.places``). Where an exception ends this, several are left
            as they were; the caches of one alone may be filled in part.
        most: Most tokens of a chunk, 1 or more.
    """
    chunks = [prefill.next_chunk(most) for prefill in prefills]
    sizes = [chunk.size for chunk in chunks]
    longest = max(sizes)
    tokens = mx.stack([mx.pad(chunk, (0, longest - chunk.size)) for chunk in chunks])
    rows = [prefill.caches for prefill in prefills]
    whole = joined(rows)
    filled = target.prefill(tokens, whole, sizes)
    rows = parted(whole, rows, sizes)
    # A read per chunk bounds the graph's memory; the prompt is not a round.
    mx.eval(filled.hidden, [cache.state for row in rows for cache in row])
    left = (prefill.num_tokens - prefill.num_read for prefill in prefills)
    if any(size == rest for size, rest in zip(sizes, left, strict=True)):
        mx.eval(filled.logits)  # of earlier chunks nobody wants them
    for i, prefill in enumerate(prefills):
        row = slice(i, i + 1)
        own = Prefilled(filled.logits[row], filled.hidden[row], rows[i])
        prefill.add(own, sizes[i])
    mx.clear_cache()


def read_prompt(
    target: Reader,
    prompt: list[int] | mx.array,
    *,
    step_size: int = DEFAULT_PREFILL_STEP_SIZE,
) -> Prefilled:
    """Read a whole prompt at once, a chunk of at most ``step_size`` at a time."""
    prefill = Prefill(target, prompt)
    while not prefill.is_done:
        prefill.read(step_size)
    return prefill.filled


def read_on(target: Reader, prompt_cache: Sequence[Any], tokens: Sequence[int]) -> None:
    """Read a few tokens into mlx-lm's cache objects, which grow as mlx-lm's do."""
    ids = mx.array([list(tokens)], dtype=mx.int32)
    target.prefill(ids, list(prompt_cache), [len(tokens)])
    for cache in prompt_cache:  # one by one: each grows by a copy
        mx.eval(cache.keys, cache.values)
