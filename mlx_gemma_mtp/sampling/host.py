"""Rows that are decided on the host: logits processors and samplers of a caller's own.

Both have mlx-lm's signatures and may keep state (a grammar does), so they are called
with what plain decoding would give them, once for each token and in order: a verified
row is processed only once the token before it is certain, and a draft stands if it is
the token that is chosen without looking at it.

This file knows nothing of models, caches or rounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..errors import RequestError
from .distribution import choose_tokens
from .graph import sampling_arrays, sampling_graph
from .params import SamplingParams

# mlx-lm's: (tokens [n], logits [1, V]) -> logits [1, V]
LogitsProcessor = Callable[[mx.array, mx.array], mx.array]
# mlx-lm's: (log-probabilities [1, V]) -> token [1]
Sampler = Callable[[mx.array], mx.array]


def without_early_end(
    num_prompt: int, min_tokens: int, ends: Collection[int]
) -> LogitsProcessor:
    """A processor that lets no text end before it has so many tokens.

    Args:
        num_prompt: Tokens of the prompt, those that came in caches included.
        min_tokens: How many tokens.
        ends: The tokens that end a text, at least one.
    """
    banned = mx.array(sorted(ends))

    def processor(tokens: mx.array, logits: mx.array) -> mx.array:
        if tokens.size < num_prompt + min_tokens:
            logits[:, banned] = -math.inf
        return logits

    return processor


@dataclass(frozen=True)
class Judged:
    """What the host decides of a round's row.

    Attributes:
        num_accepted: Length of the accepted prefix of the drafts.
        tokens: The accepted drafts and the token behind them; without that one where
            the row ends at a draft.
        logits: What each of them was chosen from, processed, [1, T, V].
    """

    num_accepted: int
    tokens: list[int]
    logits: mx.array


class HostRow:
    """A row with its history, decided one token after the other.

    Args:
        prompt: The token ids so far.
        processors: Change the logits, one after the other.
        sampler: Chooses; None for the rule of ``sampling``.
        sampling: Greedy, or coupled noise with a seed.
        num_unseen: Tokens before those of ``prompt``, which processors do not see.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        *,
        processors: Sequence[LogitsProcessor],
        sampler: Sampler | None,
        sampling: SamplingParams,
        num_unseen: int = 0,
    ) -> None:
        self._num_unseen = num_unseen
        self._history = mx.array(list(prompt))
        self._processors = processors
        self._sampler = sampler
        self._graph = sampling_graph([sampling])
        self._sampling = sampling_arrays([sampling])

    def judge(
        self,
        logits: mx.array,
        drafts: Sequence[int],
        *,
        is_end: Callable[[int], bool],
    ) -> Judged:
        """Decide a block, up to the first difference or the row's end.

        Args:
            logits: The target's behind the newest token and each draft, [K + 1, V].
            drafts: K token ids.
            is_end: Whether the row ends with a token, asked of one after the other.
                Plain decoding looks no further.

        Raises:
            RequestError: A processor or the sampler returned something else than what
                mlx-lm asks of it, or processors left nothing to choose.
        """
        tokens: list[int] = []
        processed = []
        while True:
            row = self._process(logits[len(tokens), None])
            token = self._choose(row)
            tokens.append(token)
            processed.append(row)
            is_draft = len(tokens) <= len(drafts) and token == drafts[len(tokens) - 1]
            if is_end(token) or not is_draft:
                break
        num_accepted = len(tokens) - (not is_draft)
        return Judged(num_accepted, tokens, mx.stack(processed, axis=1))

    def _process(self, logits: mx.array) -> mx.array:
        """The logits [1, V] after all processors."""
        shape = logits.shape
        # Objects of its own: processors may write into both.
        history = self._history[:]
        for processor in self._processors:
            logits = processor(history, logits)
            _check(logits, shape, "a logits processor must return logits")
        return logits

    def _choose(self, logits: mx.array) -> int:
        """The token behind the history, which it joins."""
        if self._sampler is None:
            position = self._num_unseen + self._history.size
            positions = mx.array([[position]], dtype=mx.int32)
            chosen = choose_tokens(
                logits[None], self._sampling, graph=self._graph, positions=positions
            )[0]
            largest = logits.max()
            mx.eval(chosen, largest)
            _check_choice(largest.item())
        else:
            # As mlx-lm does, in the type that the logits have.
            chosen = self._sampler(logits - mx.logsumexp(logits, keepdims=True))
            _check(chosen, (1,), "a sampler must return one token")
        token = _token_id(chosen, logits.shape[-1])
        # The types that mlx-lm joins here: what processors see has the same one.
        newest = mx.array([token], dtype=mx.uint32)
        self._history = mx.concatenate([self._history, newest])
        # Now, or it would grow into a chain that only this thread can evaluate.
        mx.async_eval(self._history)
        return token


def _check(value: object, shape: tuple[int, ...], what: str) -> None:
    """Raise if a caller's function did not return an array of a shape."""
    if isinstance(value, mx.array) and value.shape == shape:
        return
    got = (
        f"shape {list(value.shape)}"
        if isinstance(value, mx.array)
        else type(value).__name__
    )
    raise RequestError(
        f"{what} as mlx-lm's do: got {got}, expected an mx.array of shape "
        f"{list(shape)}. It is called for one row at a time."
    )


def _check_choice(largest: Any) -> None:
    """Raise if nothing can be drawn from logits, by the largest of them."""
    if not math.isfinite(largest):
        raise RequestError(
            "logits processors must leave a token with a finite logit, and none with "
            f"an infinite one: got {largest} as the largest. Ban tokens by "
            "-inf, but never all of them."
        )


def _token_id(chosen: mx.array, vocab_size: int) -> int:
    """The token id that a sampler returned, as Python's own."""
    token = chosen.item()
    if isinstance(token, int) and 0 <= token < vocab_size:
        return token
    raise RequestError(
        f"a sampler must return a token id: got {token!r}, expected 0 to "
        f"{vocab_size - 1}. mx.argmax and mx.random.categorical return one."
    )
