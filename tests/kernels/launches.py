"""Launches of the package's kernels that are counted (tests/metal/count.py).

Each function runs a kernel on an example of the sizes that it is given, and returns
what the launches did. ``change`` makes another text of the kernel's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_gemma_mtp.kernels import common
from mlx_gemma_mtp.kernels.common import LIST, Kernel
from mlx_gemma_mtp.kernels.decide import decide
from mlx_gemma_mtp.kernels.judge import judge
from mlx_gemma_mtp.kernels.matmul import CHUNK, Form, default_columns, multiply
from mlx_gemma_mtp.kernels.propose import propose
from mlx_gemma_mtp.kernels.resample import resample
from mlx_gemma_mtp.kernels.select import most_likely
from mlx_gemma_mtp.kernels.threshold import threshold
from tests.metal.count import LINE_BYTES, Counts, count_on_cpu
from tests.metal.run import run_on_cpu, to_numpy

LANES, SIMDGROUPS = 32, 4  # of a simdgroup; of a threadgroup of the matmul
OFF = 2**31 - 1  # top_k
Change = Callable[[str], str]


def replacing(old: str, new: str) -> Change:
    """A change of the first place where the text has something."""

    def change(source: str) -> str:
        assert old in source
        return source.replace(old, new, 1)

    return change


class CountedLaunches:
    """Stands in for ``common.launch``; keeps what was counted of each launch.

    Args:
        has_words: Count logic of words too.
        is_checked: Whether each launch must give the bits of one that is not counted.
        change: What becomes of a kernel's source before it runs.
    """

    def __init__(
        self, *, has_words: bool, is_checked: bool, change: Change | None
    ) -> None:
        self.counts: list[Counts] = []
        self._has_words = has_words
        self._is_checked = is_checked
        self._change = change

    def __call__(
        self, kernel: Kernel, inputs: list[mx.array], **options: Any
    ) -> list[mx.array]:
        """Run a kernel as ``common.launch`` would."""
        if self._change:
            kernel = replace(kernel, source=self._change(kernel.source))
        counts = count_on_cpu(kernel, inputs, has_words=self._has_words, **options)
        if self._is_checked:
            plain = run_on_cpu(kernel, inputs, **options)
            for counted, want in zip(counts.outputs, plain, strict=True):
                assert to_numpy(counted).tobytes() == to_numpy(want).tobytes()
        self.counts.append(counts)
        return counts.outputs


def counted(
    function: Callable[..., Any],
    *arguments: Any,
    has_words: bool = False,
    is_checked: bool = True,
    change: Change | None = None,
    **settings: Any,
) -> list[Counts]:
    """Call a function of a kernel; what its launches did."""
    launches = CountedLaunches(
        has_words=has_words, is_checked=is_checked, change=change
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "launch", launches)
        function(*arguments, **settings)
    return launches.counts


# ---------------------------------------------------------------------- examples


def rows_of(modes: Sequence[int], *, top_p: float = 2.0) -> dict[str, Any]:
    """row_floats and row_words of rows in these modes."""
    B = len(modes)
    floats = np.zeros((B, common.ROW_FLOATS), np.float32)
    floats[:, :2] = (1.0, top_p)
    words = np.zeros((B, common.ROW_WORDS), np.uint32)
    words[:, 0] = np.arange(B) + 7
    words[:, 2] = modes
    words[:, 3] = OFF
    words[:, 4] = 100
    return {"row_floats": mx.array(floats), "row_words": mx.array(words)}


def distinct(*shape: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    """Numbers in no order, of which no two are equal; of 16 bits many are."""
    size = int(np.prod(shape))
    places = np.random.default_rng(0).permutation(size).reshape(shape)
    return mx.array((places / size * 16 - 8).astype(np.float32)).astype(dtype)


def lists(*shape: int, seed: int = 0) -> tuple[mx.array, mx.array]:
    """Lists [..., 64] of scores, descending, and ids below 1000."""
    rng = np.random.default_rng(seed)
    scores = -np.sort(rng.exponential(size=(*shape, LIST)))
    ids = [rng.choice(1000, LIST, replace=False) for _ in range(int(np.prod(shape)))]
    return (
        mx.array(scores.astype(np.float32)),
        mx.array(np.reshape(ids, (*shape, LIST)).astype(np.int32)),
    )


def stats_of_lists(*shape: int) -> mx.array:
    """Largest logit and mass [..., 2]."""
    return mx.full((*shape, 2), 2.0)


def stats_of_rows(B: int, L: int) -> mx.array:
    """What threshold gives [B, L, 4], of rows of which everything is kept."""
    return mx.array(np.tile(np.array([8, -np.inf, 9, 9], np.float32), (B, L, 1)))


# ----------------------------------------------------------------------- kernels


def run_select(
    logits: mx.array, token_ids: mx.array | None = None, **how: Any
) -> list[Counts]:
    """The launch on blocks, and that which merges them where there are several."""
    return counted(most_likely, logits, token_ids=token_ids, **how)


def run_propose(modes: Sequence[int]) -> Counts:
    B = len(modes)
    (counts,) = counted(propose, *lists(B), stats_of_lists(B), **rows_of(modes), step=1)
    return counts


def run_decide(modes: Sequence[int], K: int) -> Counts:
    B, L = len(modes), K + 1
    scores, ids = lists(B, K, seed=1)
    arrays = (*lists(B, L), stats_of_lists(B, L), ids[..., 0], scores, ids)
    (counts,) = counted(decide, *arrays, **rows_of(modes))
    return counts


def run_threshold(
    L: int,
    V: int,
    *,
    dtype: mx.Dtype = mx.bfloat16,
    top_p: float = 2.0,
    change: Change | None = None,
) -> Counts:
    """Of L rows."""
    (counts,) = counted(
        threshold,
        distinct(1, L, V, dtype=dtype),
        **rows_of([common.COUPLED], top_p=top_p),
        has_top_p=top_p < 1,
        has_min_p=False,
        has_coupled=True,
        change=change,
    )
    return counts


def run_judge(
    modes: Sequence[int], K: int, V: int, *, change: Change | None = None
) -> Counts:
    B = len(modes)
    scores, ids = lists(B, K)
    tokens = mx.zeros((B, K + 1), dtype=mx.int32)
    stats = stats_of_rows(B, K + 1)
    arrays = (distinct(B, K + 1, V), stats, tokens, ids[..., 0], scores, ids)
    (counts,) = counted(judge, *arrays, **rows_of(modes), change=change)
    return counts


def run_resample(
    modes: Sequence[int],
    accepted: Sequence[int],
    K: int,
    V: int,
    *,
    change: Change | None = None,
) -> Counts:
    """Of rows of which so many drafts stand."""
    B = len(modes)
    scores, ids = lists(B, K)
    report = np.zeros((B, K + 2), np.int32)
    report[:, 0] = accepted
    logits = distinct(B, K + 1, V, dtype=mx.bfloat16)
    arrays = (logits, stats_of_rows(B, K + 1), scores, ids)
    (counts,) = counted(
        resample,
        mx.array(report),
        mx.ones((B,)),
        *arrays,
        **rows_of(modes),
        change=change,
    )
    return counts


@dataclass(frozen=True)
class Product:
    """A product of M rows by a matrix [N, K], R outputs to a simdgroup."""

    form: Form
    M: int
    R: int
    N: int
    K: int

    @classmethod
    def ragged(cls, form: Form, M: int, R: int | None = None, K: int = 1536) -> Product:
        """Of three whole threadgroups and a simdgroup that lacks an output."""
        R = R or default_columns(M)
        return cls(form, M, R, (3 * SIMDGROUPS + 1) * R - 1, K)

    def run(self, *, is_checked: bool = True, change: Change | None = None) -> Counts:
        """What a launch of it does."""
        bits, group_size, dtype = self.form.bits, self.form.group_size, self.form.dtype
        mx.random.seed(0)
        x = mx.random.normal((self.M, self.K)).astype(dtype)
        matrix = mx.random.normal((self.N, self.K)).astype(dtype)
        arrays: tuple[mx.array, ...] = (matrix,)
        if group_size:
            arrays = mx.quantize(matrix, group_size=group_size, bits=bits)
        (counts,) = counted(
            multiply,
            x,
            *arrays,
            form=self.form,
            num_columns=self.R,
            has_words=True,
            is_checked=is_checked,
            change=change,
        )
        return counts

    @property
    def num_simdgroups(self) -> int:
        """Those that have an output."""
        return -(-self.N // self.R)

    @property
    def num_columns(self) -> int:
        """Outputs that are computed; the last simdgroup repeats some."""
        return self.num_simdgroups * self.R

    @property
    def num_chunks(self) -> int:
        """Of a row, each a lane's step."""
        return self.K // CHUNK

    @cached_property
    def lines_of_weights(self) -> np.ndarray:
        """Lines of 128 bytes that each load of a simdgroup touches: [output, step]."""
        width = self.form.bits  # bytes of a chunk
        starts = np.arange(0, self.num_chunks, LANES)
        ends = np.minimum(starts + LANES, self.num_chunks)
        # The last simdgroup has the last R outputs.
        bases = np.minimum(np.arange(self.num_simdgroups) * self.R, self.N - self.R)
        outputs = (bases[:, None] + np.arange(self.R)).reshape(-1, 1)
        first = (outputs * self.num_chunks + starts) * width // LINE_BYTES
        last = ((outputs * self.num_chunks + ends) * width - 1) // LINE_BYTES
        return last - first + 1
