"""Products of random matrices on this machine: are they right, and what do they take?

Products are timed in chains, in one evaluation each: the numbers that one gives are
gathered into what the next one takes, so that none overlaps with another. What a chain
without products takes is known and taken off. Copies of the matrix take turns, more
than the chip's caches hold, as the matrices of a model do. Only evaluations count, not
the time in which Python makes a graph.

A matrix repeats some random rows, so that what a product must give is known at once
for matrices of any size.

This file knows nothing of what is chosen.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from functools import partial
from itertools import cycle

import mlx.core as mx

from ..kernels import layer_trial, matmul
from ..kernels.layer_trial import NO_LAYERS, LayerSizes
from ..kernels.matmul import DENSE, MAX_ROWS, Form
from .choices import Choices, Shape

COPY_BYTES = 256_000_000  # more than three times what caches of M1 to M5 hold
_BAND = 251  # rows that repeat; a prime, so that no tile of a kernel hides behind it
_CHAIN_S = 5e-3  # at least, or its edges would count
_MAX_CHAIN = 4096  # products
_EMPTY_LENGTH, _EMPTY_S = 64, 0.05  # of a chain without products, and its time
_LEAST_S = 1e-9
# A sum may be off by so much of MLX's own error, and by a unit in the last place.
_MOST_ERROR = 1.05


class Products:
    """Products by MLX and by the kernel, of one shape after another.

    Args:
        copy_bytes: Bytes of the copies of a matrix, together, at least.
    """

    def __init__(self, copy_bytes: int = COPY_BYTES) -> None:
        self._copy_bytes = copy_bytes
        self._matrix: _Matrix | None = None
        self._rows: mx.array | None = None  # what the kernel gave for most rows
        self._lengths: dict[tuple[int, int | None], int] = {}
        self._empty_s: dict[int, float] = {}

    def prepare(self, shape: Shape) -> None:
        """Make a matrix of a shape, and what MLX gives for it; the one before goes.

        What MLX raises here, where memory ends, is no fault of the kernel.
        """
        self._of(shape)

    def is_right(self, shape: Shape, num_rows: int, columns: int) -> bool:
        """Whether the kernel's numbers are right, and those of other M and R.

        Its largest error and the root of its mean square are compared with those of
        MLX, against float32 of the same weights.

        Raises:
            Exception: What MLX raises where the kernel does not run.
        """
        matrix = self._of(shape)
        own = _product(matrix.inputs[:num_rows], matrix.copies[0], shape, columns)
        mx.eval(own)
        if not self._is_same(own):
            return False
        errors = _errors(own, matrix.truth[:num_rows])
        most = matrix.most_errors[num_rows - 1]
        return all(error <= limit for error, limit in zip(errors, most, strict=True))

    def _is_same(self, own: mx.array) -> bool:
        """Whether rows have the bits that they had beside others."""
        known = own if self._rows is None else self._rows
        shared = min(len(own), len(known))
        self._rows = own if len(own) > len(known) else known
        first, second = (y[:shared].view(mx.uint16) for y in (own, known))
        return bool(mx.array_equal(first, second).item())

    def product_s(
        self, shape: Shape, num_rows: int, columns: int | None, window_s: float
    ) -> float:
        """What a product takes, seconds, by those of about so many seconds.

        Args:
            shape: Of the matrix.
            num_rows: M.
            columns: R; None for MLX's own.
            window_s: How long, seconds.

        Raises:
            Exception: What MLX raises where the kernel does not run.
        """
        matrix = self._of(shape)
        if num_rows not in self._empty_s:
            chain = partial(matrix.chain, matrix.no_product, num_rows)
            mx.eval(chain(_EMPTY_LENGTH))
            empty_s = min(_EMPTY_S, window_s)
            self._empty_s[num_rows] = _window(chain, _EMPTY_LENGTH, empty_s)
        product = partial(_product, shape=shape, columns=columns)
        chain = partial(matrix.chain, product, num_rows)
        if (num_rows, columns) not in self._lengths:
            self._lengths[num_rows, columns] = _length(chain)
        found = _window(chain, self._lengths[num_rows, columns], window_s)
        return max(found - self._empty_s[num_rows], _LEAST_S)

    def _of(self, shape: Shape) -> _Matrix:
        """The matrix of a shape; the one before goes."""
        if self._matrix is None or self._matrix.shape != shape:
            self._matrix = self._rows = None
            self._lengths.clear()
            self._empty_s.clear()
            mx.clear_cache()
            self._matrix = _Matrix(shape, self._copy_bytes)
        return self._matrix


class Bench(Products):
    """This machine, as the tuner takes one.

    Args:
        run_pass: Runs one pass of a target with some choices and so many rows, over a
            long text or not.
        disturbed: Says why timings are not to be relied on now; empty where they are.
        copy_bytes: As for ``Products``.
        sizes: Of the layers of the pair.
    """

    def __init__(
        self,
        run_pass: Callable[[Choices, int, bool], None],
        disturbed: Callable[[], str],
        copy_bytes: int = COPY_BYTES,
        *,
        sizes: LayerSizes = NO_LAYERS,
    ) -> None:
        super().__init__(copy_bytes)
        self._sizes = sizes
        self._run_pass = run_pass
        self.disturbed = disturbed

    def is_right_way(self, way: str, forms: Iterable[Form]) -> bool:
        """Whether the kernels of a way to run layers are right, for such matrices."""
        return layer_trial.is_right(way, self._sizes, forms)

    def clock(self) -> float:
        """Seconds since some moment."""
        return time.perf_counter()

    def pass_s(
        self,
        choices: Choices,
        num_rows: int,
        window_s: float,
        *,
        is_long: bool = False,
    ) -> float:
        """What a pass takes, seconds, by those of so many seconds, or one."""
        start, count = time.perf_counter(), 0
        while True:
            self._run_pass(choices, num_rows, is_long)
            count += 1
            passed = time.perf_counter() - start
            if passed >= window_s:
                return passed / count


class _Matrix:
    """Random copies of a matrix, and what multiplies them.

    Args:
        shape: Its shape.
        copy_bytes: Of all copies, at least.

    Attributes:
        shape: The same.
        inputs: [9, K] random numbers of unit size, of the form's type.
        copies: The arrays of each copy, as ``multiply`` takes them.
        truth: [9, N] float32, what the first copy gives for the inputs.
        most_errors: For M = 1 to 9, the largest error that is right, and the largest
            root of the mean square: MLX's own, and a little more.
    """

    def __init__(self, shape: Shape, copy_bytes: int) -> None:
        self.shape = shape
        num_copies = max(1, math.ceil(copy_bytes / shape.num_bytes))
        size = (MAX_ROWS, shape.num_inputs)
        self.inputs = mx.random.normal(size, key=mx.random.key(1)).astype(
            shape.form.dtype
        )
        band, exact = _band(shape)
        arrays = [filled(array, num_copies * shape.num_outputs) for array in band]
        starts = range(0, num_copies * shape.num_outputs, shape.num_outputs)
        self.copies = [
            tuple(array[start : start + shape.num_outputs] for array in arrays)
            for start in starts
        ]
        # On the processor: a GPU's products of float32 may be shorter than that.
        few = mx.matmul(self.inputs.astype(mx.float32), exact.T, stream=mx.cpu)
        self.truth = few[:, mx.arange(shape.num_outputs) % _BAND]
        self._gathered = mx.arange(shape.num_inputs) % shape.num_outputs
        mx.eval(self.inputs, self.copies, self.truth, self._gathered)
        self._turn = cycle(self.copies)
        self.most_errors = [self._most_errors(m) for m in range(1, MAX_ROWS + 1)]

    def _most_errors(self, num_rows: int) -> list[float]:
        """The errors that M rows may have."""
        truth = self.truth[:num_rows]
        stock = _product(self.inputs[:num_rows], self.copies[0], self.shape, None)
        unit = mx.finfo(self.shape.form.dtype).eps
        errors = (_errors(y, truth) for y in (stock, mx.zeros_like(stock)))
        return [
            _MOST_ERROR * of_stock + unit * size
            for of_stock, size in zip(*errors, strict=True)
        ]

    def chain(
        self,
        product: Callable[[mx.array, tuple[mx.array, ...]], mx.array],
        num_rows: int,
        length: int,
    ) -> mx.array:
        """So many products, each of what the one before has given; not evaluated."""
        x = self.inputs[:num_rows]
        for _ in range(length):
            y = product(x, next(self._turn))
            x = mx.take(y, self._gathered, axis=1)
        return x

    def no_product(self, x: mx.array, copy: tuple[mx.array, ...]) -> mx.array:
        """What has the shape of a product and takes no time."""
        return mx.broadcast_to(x[:, :1], (len(x), self.shape.num_outputs))


def filled(band: mx.array, num_rows: int) -> mx.array:
    """A matrix of repetitions of a band: random numbers for all would take long.

    Nothing of its size is made beside it: heads have gigabytes.
    """
    matrix = mx.take(band, mx.arange(num_rows) % len(band), axis=0)
    mx.eval(matrix)
    return matrix


def _band(shape: Shape) -> tuple[list[mx.array], mx.array]:
    """The arrays of some random rows of a matrix, and their weights in float32.

    They turn inputs of unit size into outputs of unit size.
    """
    form, width = shape.form, shape.num_inputs
    keys = mx.random.split(mx.random.key(0), 3)
    if form.bits == DENSE:
        weight = mx.random.normal((_BAND, width), key=keys[0]) / math.sqrt(width)
        weight = weight.astype(form.dtype)
        return [weight], weight.astype(mx.float32)
    # Keys are random words, two each.
    num_words = width * form.bits // 32
    words = mx.random.split(keys[0], _BAND * num_words).flatten()[: _BAND * num_words]
    groups = (_BAND, width // form.group_size)
    highest = 2**form.bits - 1
    step = 0.99 * math.sqrt(12 / (highest * (highest + 2) * width))
    scales = step * mx.random.uniform(0.8, 1.2, groups, key=keys[1])
    middle = mx.random.uniform(0.45, 0.55, groups, key=keys[2]) * highest
    scales, biases = (a.astype(form.dtype) for a in (scales, -scales * middle))
    weight = words.reshape(_BAND, num_words)
    exact = mx.dequantize(
        weight,
        scales.astype(mx.float32),
        biases.astype(mx.float32),
        group_size=form.group_size,
        bits=form.bits,
        stream=mx.cpu,
    )
    return [weight, scales, biases], exact


def _product(
    x: mx.array, copy: tuple[mx.array, ...], shape: Shape, columns: int | None
) -> mx.array:
    """Rows times a matrix, by the kernel, or by MLX where there is no R."""
    form = shape.form
    if columns is not None:
        return matmul.multiply(x, *copy, form=form, num_columns=columns)
    if form.bits == DENSE:
        return x @ copy[0].T
    weight, scales, biases = copy
    return mx.quantized_matmul(
        x, weight, scales, biases, group_size=form.group_size, bits=form.bits
    )


def _errors(y: mx.array, truth: mx.array) -> tuple[float, float]:
    """The largest error, and the root of the mean square."""
    off = mx.abs(y.astype(mx.float32) - truth)
    worst, mean = off.max().item(), mx.sqrt(mx.mean(off * off)).item()
    assert isinstance(worst, float)
    assert isinstance(mean, float)
    return worst, mean


def _length(chain: Callable[[int], mx.array]) -> int:
    """How many products make a chain that is long enough."""
    length = 1
    mx.eval(chain(length))  # what is built once is built here
    while length < _MAX_CHAIN and _window(chain, length, 0.0) * length < _CHAIN_S:
        length *= 2
    return length


def _window(chain: Callable[[int], mx.array], length: int, window_s: float) -> float:
    """Seconds of one product, by evaluations for about so many seconds, or one."""
    begun, taken, count = time.perf_counter(), 0.0, 0
    while True:
        x = chain(length)
        start = time.perf_counter()
        mx.eval(x)
        end = time.perf_counter()
        taken += end - start
        count += length
        if end - begun >= window_s:
            return taken / count
