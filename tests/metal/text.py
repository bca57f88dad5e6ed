"""The Metal text that MLX generates, printed by MLX itself, also without Metal.

MLX prints a kernel's text while it exports a graph that calls the kernel, in every
build. So the harness compiles what a Mac would compile, not an imitation of it.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import mlx
import mlx.core as mx


class Kernel(Protocol):
    """What the harness needs to know of a kernel."""

    @property
    def name(self) -> str: ...
    @property
    def source(self) -> str: ...
    @property
    def header(self) -> str: ...
    @property
    def input_names(self) -> tuple[str, ...]: ...
    @property
    def output_names(self) -> tuple[str, ...]: ...


Template = Sequence[tuple[str, mx.Dtype | int | bool]]

# MLX puts these before every kernel. It has complex.h too, whose overloads on address
# spaces only Metal's compiler can tell apart: shim/types.hpp stands in for it.
MLX_HEADERS = ("bf16.h", "defines.h", "utils.h")

_stdout_lock = threading.Lock()
_texts: dict[object, str] = {}  # what was printed, by all that it depends on


def metal_text(
    kernel: Kernel,
    inputs: list[mx.array],
    *,
    template: Template,
    grid: tuple[int, int, int],
    threadgroup: tuple[int, int, int],
    output_shapes: Sequence[tuple[int, ...]],
    output_dtypes: Sequence[mx.Dtype],
) -> str:
    """The text of a kernel for these inputs, as Metal's compiler gets it.

    MLX's own headers (``mlx_headers``) stand before it on a Mac.
    """
    names = (tuple(kernel.input_names), tuple(kernel.output_names))
    key = (
        *(kernel.name, kernel.source, kernel.header, *names),
        *(tuple((array.shape, array.dtype) for array in inputs), tuple(template)),
        *(grid, threadgroup, tuple(map(tuple, output_shapes)), tuple(output_dtypes)),
    )
    if key not in _texts:
        _texts[key] = _printed_text(
            kernel,
            inputs,
            template=template,
            grid=grid,
            threadgroup=threadgroup,
            output_shapes=output_shapes,
            output_dtypes=output_dtypes,
        )
    return _texts[key]


def _printed_text(
    kernel: Kernel, inputs: list[mx.array], *, template: Template, **sizes: Any
) -> str:
    """What MLX prints of a kernel."""
    call: Any = mx.fast.metal_kernel(
        name=kernel.name,
        input_names=list(kernel.input_names),
        output_names=list(kernel.output_names),
        source=kernel.source,
        header=kernel.header,
    )

    def launch(*arrays: mx.array) -> list[mx.array]:
        return call(
            inputs=list(arrays),
            template=list(template),
            verbose=True,
            **sizes,
        )

    printed = _printed_by_export(launch, inputs)
    return printed.split("```\n", 1)[1].rsplit("\n```", 1)[0]


def _printed_by_export(function: Callable[..., object], arrays: list[mx.array]) -> str:
    """What the export prints: from C++, so the file descriptor is redirected."""
    with tempfile.TemporaryDirectory() as folder, _stdout_lock:
        printed = Path(folder, "stdout")
        sys.stdout.flush()
        stdout = os.dup(1)
        try:
            with printed.open("wb") as file:
                os.dup2(file.fileno(), 1)
            mx.export_function(str(Path(folder, "graph.mlxfn")), function, *arrays)
        finally:
            os.dup2(stdout, 1)
            os.close(stdout)
        return printed.read_text(encoding="utf-8")


@cache
def mlx_headers() -> str:
    """The text of MLX's headers, without their includes of each other."""
    folder = Path(next(iter(mlx.__path__)), "include/mlx/backend/metal/kernels")
    parts = []
    for name in MLX_HEADERS:
        text = (folder / name).read_text(encoding="utf-8")
        text = re.sub(r'(?m)^#(include ".*"|pragma once)$', "", text)
        parts.append(f'#line 1 "{name}"\n{text}')
    return "\n".join(parts)
