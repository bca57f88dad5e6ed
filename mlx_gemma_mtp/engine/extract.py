"""A sequence's keys and values as mlx-lm's prompt cache.

It knows what is read and what is decoded: nothing of when.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from ..cache.mlx_lm_cache import make_prompt_cache, update_prompt_cache
from ..cache.prompt import PrefillCache
from ..errors import RequestError
from .batch import Batch
from .prefill import Reader, read_on
from .results import SequenceOutput
from .sequence import TokenSequence


def filled(
    target: Reader,
    caches: Iterable[PrefillCache],
    missing: Sequence[int] = (),
    *,
    into: Sequence[Any] | None = None,
) -> list[Any]:
    """mlx-lm's cache objects that hold what caches hold, and tokens behind it.

    Args:
        target: Whose they are.
        caches: Each layer's; made one by one, they are never held all at once.
        missing: Tokens that no round has written.
        into: The objects; None for new ones.
    """
    made = make_prompt_cache(target.layout) if into is None else list(into)
    update_prompt_cache(target.layout, made, caches)
    if missing:
        read_on(target, made, missing)
    return made


def extracted(
    target: Reader,
    batch: Batch,
    sequence: TokenSequence,
    *,
    num_written: int,
    num_emitted: int | None = None,
    into: Sequence[Any] | None = None,
) -> list[Any]:
    """mlx-lm's cache objects of a sequence that has a seat.

    Args:
        target: Whose they are.
        batch: Where it sits.
        sequence: The sequence.
        num_written: How many of its tokens have keys and values there.
        num_emitted: How many of its tokens the cache shall hold after the prompt; None
            for all.
        into: The objects; None for new ones.

    Raises:
        RequestError: It has no seat, or the round that it was in has failed.
    """
    tokens = sequence.emitted if num_emitted is None else sequence.emitted[:num_emitted]
    start = sequence.num_cached + len(sequence.request.prompt)
    num_tokens = min(start + len(tokens), num_written)
    caches = batch.extract(sequence, num_tokens)
    if caches is None:
        raise RequestError(
            "the caches of a row must be taken while it has its seat: got one "
            "that has left. Set keeps_cache in its request."
        )
    return filled(target, caches, tokens[num_tokens - start :], into=into)


def with_cache(output: SequenceOutput, make: Callable[[], list[Any]]) -> SequenceOutput:
    """What a sequence emits, at its end with its caches where it keeps them.

    Where they cannot be made, it ends with that error, and no other sequence does.
    """
    is_end = output.finish_reason not in (None, "error")
    if not (is_end and output.sequence.request.keeps_cache):
        return output
    try:
        return replace(output, prompt_cache=make())
    except Exception as error:  # noqa: BLE001 (whatever MLX raises: others go on)
        output.sequence.finish_reason = "error"
        return replace(output, finish_reason="error", error=error)
