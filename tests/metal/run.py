"""Runs the kernels of ``mx.fast.metal_kernel`` on the CPU, where there is no Metal.

The text comes from MLX (text.py), is compiled as C++ (build.py) against a small
imitation of Metal's library (shim/), and runs with one fiber per thread
(shim/runtime.cpp). What Metal leaves undefined raises a MetalError or leaves a NaN
behind; lint.py finds what g++ cannot see, tsan.py finds races. What only a Mac can
tell: whether Apple's compiler takes the text, how fast it runs, and the last bits of
exp and the like.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import mlx.core as mx
import numpy as np

from tests.metal.build import compile_kernel
from tests.metal.launch import Buffer, Launch, MetalError
from tests.metal.text import Kernel, Template, metal_text

__all__ = ["Kernel", "MetalError", "ScheduleError", "run_on_cpu", "run_schedules"]

NUMPY_DTYPES = {
    mx.float32: np.float32,
    mx.float16: np.float16,
    mx.bfloat16: np.uint16,  # numpy has no bfloat16: its bits
    mx.int32: np.int32,
    mx.uint32: np.uint32,
    mx.uint8: np.uint8,
    mx.bool_: np.bool_,
}


def run_on_cpu(
    kernel: Kernel,
    inputs: list[mx.array],
    *,
    template: Template,
    grid: tuple[int, int, int],
    threadgroup: tuple[int, int, int],
    output_shapes: Sequence[tuple[int, ...]],
    output_dtypes: Sequence[mx.Dtype],
    seed: int = 1,
    noise_ulps: int = 0,
    contract: bool = False,
) -> list[mx.array]:
    """Run a kernel as a call of ``mx.fast.metal_kernel`` would.

    Args:
        kernel: Its name, source, header and the names of its arrays.
        inputs: One array per input name.
        template: Names and values of the template's parameters.
        grid: Threads in x, y and z, as for ``mx.fast.metal_kernel``.
        threadgroup: Threads of one threadgroup.
        output_shapes: One shape per output name.
        output_dtypes: One dtype per output name.
        seed: Chooses the order in which threads run.
        noise_ulps: How far exp, log, tanh ... may be off, in units of the last place.
        contract: Fuse multiplications and additions, as Metal's compiler may.

    Returns:
        The outputs. Where the kernel writes nothing every byte is 0xFF.

    Raises:
        MetalError: The kernel does not compile, or does what a GPU does not define.
    """
    launch, text = make_launch(
        kernel,
        inputs,
        template=template,
        grid=grid,
        threadgroup=threadgroup,
        output_shapes=output_shapes,
        output_dtypes=output_dtypes,
        contract=contract,
    )
    try:
        launch.run(seed=seed, noise_ulps=noise_ulps)
    except MetalError as error:
        raise MetalError(quote_lines(str(error), text)) from None
    arrays = {buffer.name: buffer.array for buffer in launch.buffers}
    return [
        to_mlx(arrays[name], dtype)
        for name, dtype in zip(kernel.output_names, output_dtypes, strict=True)
    ]


class ScheduleError(MetalError):
    """The outputs of a kernel depend on the order in which its threads run."""


def run_schedules(
    kernel: Kernel,
    inputs: list[mx.array],
    *,
    seeds: Iterable[int] = range(1, 9),
    **launch,
) -> list[mx.array]:
    """Run a kernel once per seed, with the arguments of ``run_on_cpu``.

    Raises:
        ScheduleError: Two runs differ in a byte of their outputs.
        MetalError: A run fails.
    """
    first_seed, *other_seeds = seeds
    first = run_on_cpu(kernel, inputs, **launch, seed=first_seed)
    for seed in other_seeds:
        outputs = run_on_cpu(kernel, inputs, **launch, seed=seed)
        for name, a, b in zip(kernel.output_names, first, outputs, strict=True):
            if to_numpy(a).tobytes() != to_numpy(b).tobytes():
                raise ScheduleError(
                    f"output {name!r} must not depend on the order of threads: "
                    f"seeds {first_seed} and {seed} differ"
                )
    return first


def make_launch(
    kernel: Kernel,
    inputs: list[mx.array],
    *,
    template: Template,
    grid: tuple[int, int, int],
    threadgroup: tuple[int, int, int],
    output_shapes: Sequence[tuple[int, ...]],
    output_dtypes: Sequence[mx.Dtype],
    contract: bool = False,
    tsan: bool = False,
    counts: tuple[str, ...] = (),
) -> tuple[Launch, str]:
    """A compiled kernel with its arrays, and its Metal text."""
    text = metal_text(
        kernel,
        inputs,
        template=template,
        grid=grid,
        threadgroup=threadgroup,
        output_shapes=output_shapes,
        output_dtypes=output_dtypes,
    )
    library = compile_kernel(text, contract=contract, tsan=tsan, counts=counts)
    named_inputs = dict(zip(kernel.input_names, inputs, strict=True))
    shapes = dict(zip(kernel.output_names, output_shapes, strict=True))
    dtypes = dict(zip(kernel.output_names, output_dtypes, strict=True))
    buffers = []
    for name in library.buffer_names:
        if name in shapes:
            array: np.ndarray = np.empty(shapes[name], NUMPY_DTYPES[dtypes[name]])
        elif name in named_inputs:
            array = to_numpy(named_inputs[name])
        else:
            array = _metadata(name, named_inputs)
        buffers.append(Buffer(name, array, is_output=name in shapes))
    return Launch(library.path, buffers, grid, threadgroup), text


def quote_lines(message: str, text: str) -> str:
    """Put the lines of a kernel's text where a message has only their numbers."""
    lines = text.split("\n")

    def quoted(match: re.Match[str]) -> str:
        number = int(match[1])
        return f"line {number} `{lines[number - 1].strip()}`"

    return re.sub(r"\bkernel:(\d+)(?!\d|:\d+: )", quoted, message)


def _metadata(name: str, inputs: dict[str, mx.array]) -> np.ndarray:
    """The array that MLX passes for ``x_shape``, ``x_strides`` or ``x_ndim``."""
    array_name, _, kind = name.rpartition("_")
    shape = inputs[array_name].shape
    if kind == "shape":
        return np.array(shape, np.int32)
    if kind == "ndim":
        return np.array(len(shape), np.int32)
    strides = [int(np.prod(shape[i + 1 :])) for i in range(len(shape))]
    return np.array(strides, np.int64)


def to_numpy(array: mx.array) -> np.ndarray:
    """The bytes of an array in row order; bfloat16 as its bits."""
    if array.dtype == mx.bfloat16:
        array = mx.contiguous(array).view(mx.uint16)
    return np.ascontiguousarray(np.array(array))


def to_mlx(array: np.ndarray, dtype: mx.Dtype) -> mx.array:
    result = mx.array(array)
    return result.view(mx.bfloat16) if dtype == mx.bfloat16 else result
