"""What decoding gives its caller: tokens of rows, and how far prompts were read.

It knows nothing of how they came about.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from ..sampling.logprobs import TokenLogprobs
from .sequence import Row


@dataclass(frozen=True)
class Emission:
    """What one round, or the prefill, emitted for one row.

    Attributes:
        row: The row.
        place: Its index in ``logits``.
        tokens: The emitted tokens, at least one unless there is an error, cut at the
            end of the request.
        num_from_draft: How many of them, from the first on, the drafter proposed.
        finish_reason: ``"stop"`` at an end-of-sequence token or a stop sequence,
            ``"length"`` when the budget is used up, ``"error"``, else None.
        logits: The target's logits of the whole round: those behind ``tokens[i]`` are
            ``logits[place, i]``. Whole, because a slice made here would belong to the
            stream of the rounds, and its reader would wait for the one in flight.
            Of a row that the host decides they are the processed ones.
            [B, K + 1, V]
        logprobs: One entry per token; empty where the row does not ask.
        prompt_cache: mlx-lm's caches of the row, which hold its prompt and all its
            tokens; with the last emission of a request that keeps its cache.
        error: What a processor or sampler of the row raised.
    """

    row: Row
    place: int
    tokens: list[int]
    num_from_draft: int
    finish_reason: str | None
    logits: mx.array
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_cache: list[Any] | None = None
    error: Exception | None = None

    def check(self) -> None:
        """Raise what a function of the row's own has raised."""
        if self.error is not None:
            raise self.error


@dataclass(frozen=True)
class Progress:
    """How far a prompt has been read.

    Attributes:
        row: Whose prompt.
        num_read: Its tokens that were read so far.
        num_tokens: All of them.
        is_paused: Whether reading has come to one of the request's pauses: until the
            next step the row's caches are those of this place.
    """

    row: Row
    num_read: int
    num_tokens: int
    is_paused: bool


@dataclass(frozen=True)
class Step:
    """What one step has done: at most a round and a chunk of prompts.

    Attributes:
        emissions: What rows have emitted, in order.
        progress: How far prompts have been read.
        num_read: Tokens of prompts that were read.
    """

    emissions: list[Emission] = field(default_factory=list)
    progress: list[Progress] = field(default_factory=list)
    num_read: int = 0
