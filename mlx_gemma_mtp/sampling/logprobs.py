"""Log-probabilities of chosen tokens, and of the most likely ones beside them.

They are the target's own, of the whole vocabulary, before temperature and filters. A
few numbers for each token leave the graph, never a row of the vocabulary's size.

This file knows nothing of models, caches or rounds.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import mlx.core as mx

from .candidates import most_likely
from .graph import SamplingGraph


@dataclass(frozen=True)
class TokenLogprobs:
    """What the host is told of one token.

    Attributes:
        token: The token's own log-probability.
        top: The most likely tokens with theirs, best first, of equal ones the lowest
            id first.
    """

    token: float
    top: list[tuple[int, float]]


@dataclass(frozen=True)
class Logprobs:
    """The same for every token of a block, on the device.

    Attributes:
        values: The token's own, then those of the N best, float32 [B, L, 1 + N].
        token_ids: The N best tokens, int32 [B, L, N]; None where N is 0.
    """

    values: mx.array
    token_ids: mx.array | None = None

    @property
    def named(self) -> dict[str, mx.array]:
        """All arrays by name."""
        return {name: a for name, a in vars(self).items() if a is not None}

    def listed(self) -> list[list[TokenLogprobs]]:
        """Read it: for each row one entry per token."""
        values = cast(list[list[list[float]]], self.values.tolist())
        if self.token_ids is None:
            return [[TokenLogprobs(own, []) for (own,) in row] for row in values]
        token_ids = cast(list[list[list[int]]], self.token_ids.tolist())
        return [
            [
                TokenLogprobs(own, list(zip(ids, best, strict=True)))
                for (own, *best), ids in zip(row, row_ids, strict=True)
            ]
            for row, row_ids in zip(values, token_ids, strict=True)
        ]


def log_probabilities(
    logits: mx.array, tokens: mx.array, *, num_logprobs: int
) -> Logprobs:
    """Log-probabilities of a block's tokens.

    Args:
        logits: What the tokens were chosen from, [B, L, V].
        tokens: The tokens, [B, L].
        num_logprobs: How many of the best tokens to list; at most V are.
    """
    logits = logits.astype(mx.float32)
    own = mx.take_along_axis(logits, tokens[..., None], axis=-1)
    count = min(num_logprobs, logits.shape[-1])
    if not count:
        return Logprobs(own - mx.logsumexp(logits, axis=-1, keepdims=True))
    best = most_likely(logits, count)
    values = mx.concatenate([own, best.logits], axis=-1) - best.log_mass
    return Logprobs(values, best.token_ids)


def whole_logprobs(logits: mx.array, row: int, index: int) -> mx.array:
    """Log-probabilities of the whole vocabulary behind one token, [V].

    They have a stream of their own: on the stream of the round in flight the reader
    would wait for that round. They are begun here, so that any thread may read them.

    Args:
        logits: Of a round, [B, K + 1, V].
        row: Which row of them.
        index: Which token of the row.
    """
    with mx.stream(_reading_stream()):
        chosen = logits[row, index]
        logprobs = chosen - mx.logsumexp(chosen, keepdims=True)
        mx.async_eval(logprobs)
        return logprobs


@cache
def _reading_stream() -> Any:
    """A stream for what readers ask for beside the rounds."""
    return mx.new_thread_local_stream(mx.default_device())


def reported_logprobs(
    graph: SamplingGraph, logits: mx.array, tokens: mx.array
) -> Logprobs | None:
    """What a report says of a block; None where no row of the graph's asks.

    Args:
        graph: Of the rows.
        logits: What the tokens were chosen from, [B, L, V].
        tokens: The tokens, [B, L].
    """
    if graph.num_logprobs is None or not graph.has_graph:
        return None
    return log_probabilities(logits, tokens, num_logprobs=graph.num_logprobs)
