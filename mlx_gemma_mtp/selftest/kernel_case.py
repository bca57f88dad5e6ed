"""Random rows for kernels: what rounds may meet, ties and dropped tokens among it."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..sampling.acceptance import Draft, accept_block
from ..sampling.acceptance import Verdict as AcceptVerdict
from ..sampling.decision import joined, propose
from ..sampling.distribution import Distribution
from ..sampling.graph import (
    SamplingArrays,
    SamplingGraph,
    sampling_arrays,
    sampling_graph,
)
from ..sampling.params import SamplingParams

_MAX_CANDIDATES = 4096  # of a drafter's centroid head
_TIE_STEP = 0.5
_LOWEST = -20.0
_ERRORS = (0.3, 1.0, 2.0)  # deviations of the drafter's logits from the target's
_DROPPED = 0.3  # share of the tokens that a row with dropped ones has at -inf

# One row of every rule. With a top-k rows are decided by lists, without by thresholds.
_LISTED = (
    {"temp": 0.0},
    {"temp": 1.0, "top_p": 0.95, "top_k": 64},
    {"temp": 0.8, "top_k": 20, "min_p": 0.02, "reproducible": False},
    {"temp": 1.3, "top_p": 0.9, "top_k": 64, "reproducible": False},
)
_WHOLE = (
    {"temp": 0.0},
    {"temp": 1.0, "top_p": 0.9},
    {"temp": 0.7, "min_p": 0.05, "reproducible": False},
    {"temp": 1.2, "top_p": 0.95, "min_p": 0.01, "reproducible": False},
)


@dataclass(frozen=True)
class Shape:
    """The shape of a decision.

    Attributes:
        num_drafts: K.
        vocab_size: V.
        dtype: Type of logits.
        num_copies: Rows of every rule.
    """

    num_drafts: int
    vocab_size: int
    dtype: mx.Dtype
    num_copies: int = 1

    @property
    def size(self) -> int:
        """Logits of the target, in rows of one rule."""
        return (self.num_drafts + 1) * self.vocab_size * self.num_copies

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("mlx.core.")
        return f"{self.num_drafts + 1}x{self.vocab_size} {dtype}"


SHAPES = (
    Shape(4, 262144, mx.bfloat16),
    Shape(2, 1000, mx.float32, 8),
    Shape(0, 9000, mx.bfloat16, 4),
    Shape(1, 5, mx.float32, 8),
    Shape(8, 64, mx.float16, 8),
    Shape(3, 8192, mx.float16, 4),
    Shape(4, 9000, mx.float32, 4),
    Shape(8, 32768, mx.bfloat16, 2),
    Shape(4, 262144, mx.float32),
    Shape(4, 262144, mx.float16),
)


@dataclass(frozen=True)
class Case:
    """One decision.

    Attributes:
        logits: The target's, [B, K + 1, V].
        drafted: The drafter's, [B, K, M].
        token_ids: Its candidates, int32 [B, K, M]; None where M is V.
        params: Each row's settings.
        offset: Each row's place, int32 [B].
    """

    logits: mx.array
    drafted: mx.array
    token_ids: mx.array | None
    params: tuple[SamplingParams, ...]
    offset: mx.array

    @property
    def graph(self) -> SamplingGraph:
        """The graph that serves all rows."""
        return sampling_graph(self.params)

    @property
    def sampling(self) -> SamplingArrays:
        """The rows' numbers."""
        return sampling_arrays(self.params)

    @property
    def num_drafts(self) -> int:
        """K."""
        return self.logits.shape[1] - 1

    def step(self, i: int) -> tuple[mx.array, mx.array | None]:
        """The drafter's logits of step i + 1 and its candidates, [B, 1, M]."""
        ids = self.token_ids
        return self.drafted[:, i : i + 1], None if ids is None else ids[:, i : i + 1]

    def draft(self) -> Draft:
        """The block that plain operations propose."""
        if not self.num_drafts:
            return Draft(mx.zeros((len(self.params), 0), dtype=mx.int32), None)
        steps = []
        for i in range(self.num_drafts):
            logits, ids = self.step(i)
            steps.append(
                propose(
                    logits,
                    self.sampling,
                    graph=self.graph,
                    offset=self.offset,
                    step=i + 1,
                    token_ids=ids,
                    verification=plainly,
                )
            )
        return joined(steps)


def plainly(draft: Draft, target: Distribution, coins: mx.array) -> AcceptVerdict:
    """Block verification by plain operations, whatever kernels there are."""
    return accept_block(draft, target, coins)


def make_case(shape: Shape, turn: int, *, is_listed: bool) -> Case:
    """A case of every rule; in four turns every rule meets every kind of row.

    Args:
        shape: Its shape.
        turn: The number of the case; the same one gives the same case.
        is_listed: Whether rows have a top-k.
    """
    chance = np.random.default_rng(1000 * turn + shape.vocab_size + is_listed)
    settings = (_LISTED if is_listed else _WHOLE) * shape.num_copies
    logits = np.stack(
        [_rows_of_kind(chance, shape, (turn + i) % 4) for i in range(len(settings))]
    )
    # A drafter that is nearly right, or is not; nothing drops tokens of its own.
    judged = np.maximum(logits[:, : shape.num_drafts], np.float32(_LOWEST))
    error = chance.normal(size=judged.shape).astype(np.float32)
    for i in range(len(settings)):
        error[i] *= _ERRORS[(turn + i) % len(_ERRORS)]
    drafted = judged + error
    ids = None
    if turn % 2 and shape.num_drafts:
        drafted, ids = _some_candidates(chance, drafted)
    params = tuple(
        SamplingParams(**one, seed=int(chance.integers(2**63)))  # type: ignore[arg-type]
        for one in settings
    )
    return Case(
        mx.array(logits).astype(shape.dtype),
        mx.array(drafted).astype(shape.dtype),
        None if ids is None else mx.array(ids),
        params,
        mx.array(chance.integers(5, 100000, len(settings)).astype(np.int32)),
    )


def _rows_of_kind(chance: np.random.Generator, shape: Shape, kind: int) -> np.ndarray:
    """Logits [K + 1, V]: with ties where the kind is odd, with -inf from kind 2 on."""
    size = (shape.num_drafts + 1, shape.vocab_size)
    logits = (3 * chance.normal(size=size)).astype(np.float32)
    if kind % 2:
        logits = np.round(logits / _TIE_STEP) * np.float32(_TIE_STEP)
        # The best of all has an equal beside it, and one anywhere.
        best = logits.argmax(axis=-1)
        others = [best ^ 1, chance.integers(shape.vocab_size, size=len(best))]
        for other in others:
            other = np.minimum(other, shape.vocab_size - 1)
            logits[np.arange(len(best)), other] = logits.max(axis=-1)
    if kind >= 2:
        is_dropped = chance.random(size) < _DROPPED
        is_dropped[:, chance.integers(shape.vocab_size)] = False
        logits[is_dropped] = -np.inf
    return logits


def _some_candidates(
    chance: np.random.Generator, logits: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The logits of some tokens in no order [B, K, M], and their ids."""
    num_rows, num_drafts, vocab_size = logits.shape
    count = min(_MAX_CANDIDATES, max(vocab_size // 2, 1))
    chosen = [
        chance.permutation(vocab_size)[:count] for _ in range(num_rows * num_drafts)
    ]
    ids = np.stack(chosen).reshape(num_rows, num_drafts, count).astype(np.int32)
    return np.take_along_axis(logits, ids, axis=-1), ids
