"""Launches of the package's kernels that are counted, to be put in the place of
``common.launch``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx

from mlx_gemma_mtp.kernels.common import Kernel
from tests.metal.count import Counts, count_on_cpu
from tests.metal.run import run_on_cpu, to_numpy


class CountedLaunches:
    """Stands in for ``common.launch``; keeps what was counted of each launch.

    Args:
        has_words: Count logic of words too.
        is_checked: Whether each launch must give the bits of one that is not counted.
        change: What becomes of a kernel's source before it runs.
    """

    def __init__(
        self,
        *,
        has_words: bool = False,
        is_checked: bool = True,
        change: Callable[[str], str] | None = None,
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
