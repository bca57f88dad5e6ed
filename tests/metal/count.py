"""Counts what a kernel loads, stores and computes, in a run on the CPU.

In a counting build (shim/counting.hpp) pointers to buffers and floats are types that
count; the results are the same bits. What a kernel reads and issues is what a Mac's GPU
would, so a test can assert it. It is not time: registers, occupancy and waiting for
memory stay unseen.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from tests.metal.build import COUNTS_FLAGS, WORDS_FLAGS
from tests.metal.launch import Launch, MetalError, load
from tests.metal.run import make_launch, quote_lines, to_mlx
from tests.metal.text import Kernel

LINE_BYTES = 128  # of the GPU's cache
_TEXT_BYTES = 1 << 16


@dataclass(frozen=True)
class Accesses:
    """The loads of one buffer, or its stores.

    Attributes:
        by_width: Executions by lanes, by the bytes that one transfers.
        unique_bytes: Bytes that were transferred at least once.
        instructions: Executions by simdgroups: the k-th of a place in the text by each
            lane are one.
        lines: Lines of 128 bytes that these touch, summed up.
        most_lines: Of one of them.
    """

    by_width: Mapping[int, int]
    unique_bytes: int
    instructions: int
    lines: int
    most_lines: int

    @property
    def count(self) -> int:
        """Executions by lanes."""
        return sum(self.by_width.values())

    @property
    def num_bytes(self) -> int:
        """Bytes that lanes asked for; the same byte counts each time."""
        return sum(width * count for width, count in self.by_width.items())

    @classmethod
    def of(cls, found: dict[str, Any]) -> Accesses:
        """From JSON of the runtime; widths that do not occur are left out."""
        widths = {int(w): count for w, count in found.pop("by_width").items() if count}
        return cls(widths, **found)


@dataclass(frozen=True)
class Counts:
    """What a launch did.

    Attributes:
        outputs: Its results.
        sizes: Bytes of each buffer.
        loads: Of each buffer.
        stores: Of each buffer.
        operations: Executions by lanes: ``fma``, ``add`` (and subtract), ``multiply``,
            ``divide``, ``compare``, ``function`` (exp, log ...), ``from_integer`` and
            ``from_short`` (half or bfloat) to float, ``to_integer``, ``to_short``; with
            words also ``logic``, ``shift`` and ``pack`` (two halves into a float).
        calls: Executions by lanes of barriers and simd functions, by name.
        num_threads: Threads of the grid.
    """

    outputs: list[mx.array]
    sizes: Mapping[str, int]
    loads: Mapping[str, Accesses]
    stores: Mapping[str, Accesses]
    operations: Mapping[str, int]
    calls: Mapping[str, int]
    num_threads: int


def count_on_cpu(
    kernel: Kernel,
    inputs: list[mx.array],
    *,
    seed: int = 1,
    has_words: bool = False,
    **options: Any,
) -> Counts:
    """Run a kernel and count what it does.

    Args:
        kernel: As for ``run_on_cpu``.
        inputs: As for ``run_on_cpu``.
        seed: Chooses the order in which threads run.
        has_words: Count the logic and shifts of ``uint`` too. A text that chooses
            between a ``uint`` and a literal by ``?:`` does not compile with it.
        **options: As for ``run_on_cpu``: template, grid, threadgroup, output_shapes and
            output_dtypes.

    Raises:
        MetalError: The kernel does not compile, or its run fails.
    """
    flags = WORDS_FLAGS if has_words else COUNTS_FLAGS
    launch, text = make_launch(kernel, inputs, **options, counts=flags)
    try:
        found = _counted_run(launch, seed)
    except MetalError as error:
        raise MetalError(quote_lines(str(error), text)) from None
    named = dict(
        zip((b.name for b in launch.buffers), found.pop("buffers"), strict=True)
    )
    arrays = {buffer.name: buffer.array for buffer in launch.buffers}
    dtypes = options["output_dtypes"]
    calls = found["calls"]
    return Counts(
        [
            to_mlx(arrays[name], dtype)
            for name, dtype in zip(kernel.output_names, dtypes, strict=True)
        ],
        {name: array.nbytes for name, array in arrays.items()},
        {name: Accesses.of(found["loads"]) for name, found in named.items()},
        {name: Accesses.of(found["stores"]) for name, found in named.items()},
        found["operations"],
        {name: count for name, count in calls.items() if name != "return"},
        calls["return"],
    )


def _counted_run(launch: Launch, seed: int) -> dict[str, Any]:
    """Run it; what the runtime has counted."""
    library = load(launch.library)
    sizes = [buffer.array.nbytes for buffer in launch.buffers]
    library.shim_start_counts((ctypes.c_size_t * len(sizes))(*sizes), len(sizes))
    launch.run(seed=seed)
    text = ctypes.create_string_buffer(_TEXT_BYTES)
    assert library.shim_counts(text, ctypes.c_size_t(_TEXT_BYTES))
    return dict(json.loads(text.value))
