"""What a few rows times a matrix must be: in float64, and bit by bit.

The weights are unpacked here from their words, and the kernel's sums are added up here
as its docstring says, one lane beside the other. Neither uses MLX, nor any code of the
package.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import mlx.core as mx
import numpy as np

from mlx_gemma_mtp.kernels.matmul import DENSE, Form, multiply

FORMS = [
    Form(bits, size, dtype)
    for dtype in (mx.bfloat16, mx.float16)
    for bits, size in ((DENSE, 0), *((b, s) for b in (4, 8) for s in (32, 64, 128)))
]
LANES = 32
SMALLEST = np.float32(2.0**-126)  # of what no GPU flushes to zero

# Places of a chunk in the order in which its weights are added up.
PLACES = {
    4: (0, 4, 1, 5, 2, 6, 3, 7),
    8: (0, 2, 1, 3, 4, 6, 5, 7),
    DENSE: (0, 1, 2, 3, 4, 5, 6, 7),
}


@dataclass(frozen=True)
class Product:
    """Rows and a matrix, as numbers that the form's type has.

    Attributes:
        form: How they are stored.
        x: [M, K] float32.
        weight: [N, words] uint32; float32 [N, K] of a dense matrix.
        scales: [N, groups] float32, no group of a dense matrix.
        biases: [N, groups] float32.
    """

    form: Form
    x: np.ndarray
    weight: np.ndarray
    scales: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    biases: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))

    def run(self, *, num_rows: int | None = None, **options) -> np.ndarray:
        """What the kernel gives for the first rows: float32 [M, N]."""
        x = self.x if num_rows is None else self.x[:num_rows]
        return as_float32(
            multiply(self._array(x), *self.matrix, form=self.form, **options)
        )

    @property
    def matrix(self) -> list[mx.array]:
        """The arrays of the matrix, as MLX has them."""
        if self.form.bits == DENSE:
            return [self._array(self.weight)]
        return [
            mx.array(self.weight),
            self._array(self.scales),
            self._array(self.biases),
        ]

    def _array(self, values: np.ndarray) -> mx.array:
        return mx.array(values).astype(self.form.dtype)

    @cached_property
    def quants(self) -> np.ndarray:
        """[N, K]: the whole numbers that the words hold, the lowest bits first."""
        bits = self.form.bits
        shifts = np.arange(0, 32, bits, dtype=np.uint32)
        parts = self.weight[:, :, None] >> shifts & np.uint32(2**bits - 1)
        return parts.reshape(self.weight.shape[0], -1)

    def _by_weight(self, values: np.ndarray) -> np.ndarray:
        """Scales or biases, one for every weight."""
        return np.repeat(values, self.form.group_size, axis=1)

    @property
    def exact_weights(self) -> np.ndarray:
        """[N, K] float64."""
        if self.form.bits == DENSE:
            return self.weight.astype(np.float64)
        scales, biases = map(self._by_weight, (self.scales, self.biases))
        return scales.astype(np.float64) * self.quants + biases

    @property
    def exact(self) -> np.ndarray:
        """[M, N] float64: the product."""
        return self.x.astype(np.float64) @ self.exact_weights.T

    @property
    def error(self) -> np.ndarray:
        """[M, N]: how far rounding may take a result from ``exact``.

        The last rounding is the type's; a sum is of K / 32 terms and five more.
        """
        unit = 2.0**-11 if self.form.dtype == mx.float16 else 2.0**-8
        sizes = np.abs(self.x.astype(np.float64)) @ np.abs(self.exact_weights).T
        error = sizes * (self.x.shape[1] / LANES + 5) * 2.0**-24
        if self.form.bits != DENSE:
            scales = np.abs(self._by_weight(self.scales)).astype(np.float64)
            error += np.abs(self.x) @ scales.T * 2.0**-14
        return error + np.abs(self.exact) * unit

    @property
    def weights(self) -> np.ndarray:
        """[N, K] float32: as the kernel has them, bit by bit."""
        if self.form.bits == DENSE:
            return flushed(self.weight)
        scales, biases = map(self._by_weight, (self.scales, self.biases))
        # Four bits that stand four higher in a half are beside 64.
        is_high = (np.arange(self.quants.shape[1]) % 2 == 1) & (self.form.bits == 4)
        beside = np.where(is_high, 64, 1024).astype(np.float32)
        return fma(self.quants + beside, scales, fma(-beside, scales, biases))

    @property
    def bits(self) -> np.ndarray:
        """[M, N] float32: what the kernel must give, bit by bit."""
        num_rows, num_inputs = self.x.shape
        num_chunks = num_inputs // 8
        x = self.x.reshape(num_rows, 1, num_chunks, 8)
        w = self.weights.reshape(1, -1, num_chunks, 8)
        sums = np.zeros((num_rows, w.shape[1], LANES), np.float32)
        for first in range(0, num_chunks, LANES):
            end = min(first + LANES, num_chunks)
            own = sums[..., : end - first]
            for place in PLACES[self.form.bits]:
                own[:] = fma(w[..., first:end, place], x[..., first:end, place], own)
        lanes = np.arange(LANES)
        for step in (16, 8, 4, 2, 1):
            with np.errstate(all="ignore"):
                sums = flushed(sums + sums[..., lanes ^ step])
        return rounded(sums[..., 0], self.form.dtype)

    def but(self, **changed) -> Product:
        """The same with other numbers."""
        return replace(self, **changed)


def random_product(
    form: Form, num_rows: int, num_outputs: int, num_inputs: int, seed: int = 0
) -> Product:
    """Rows and a matrix of random numbers, scales of both signs among them.

    The second half of a row takes back what the first one adds, for four outputs of
    eight: what is left of their product is all rounding, and shows in which order it
    was. What the halves leave over does not count there.
    """
    rng = np.random.default_rng(seed)
    unit = max(form.group_size, 8)
    half = num_inputs // (2 * unit) * unit
    x = rng.normal(size=(num_rows, num_inputs))
    x[:, half : 2 * half] = -x[:, :half]
    x = _of_type(x, form)
    if form.bits == DENSE:
        w = rng.normal(size=(num_outputs, num_inputs)) / 20
        return Product(form, x, _of_type(_mirrored(w, half), form))
    shape = (num_outputs, num_inputs * form.bits // 32)
    words = rng.integers(0, 2**32, shape, dtype=np.uint32)
    groups = (num_outputs, num_inputs // form.group_size)
    scales, biases = rng.normal(size=(2, *groups))
    num_groups = half // form.group_size
    return Product(
        form,
        x,
        _mirrored(words, half * form.bits // 32),
        _of_type(_mirrored(scales / 2**form.bits, num_groups), form),
        _of_type(_mirrored(biases / 2, num_groups), form),
    )


def _mirrored(values: np.ndarray, half: int) -> np.ndarray:
    """With the same in both halves of four rows of eight, and nothing after them."""
    rows = np.arange(len(values)) % 8 < 4
    values[rows, half : 2 * half] = values[rows, :half]
    values[rows, 2 * half :] = 0
    return values


def _of_type(values: np.ndarray, form: Form) -> np.ndarray:
    return as_float32(mx.array(values.astype(np.float32)).astype(form.dtype))


def as_float32(array: mx.array) -> np.ndarray:
    """Its numbers."""
    return np.array(array.astype(mx.float32))


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether float32 arrays are equal, zeros by their sign; a NaN is a NaN."""
    return bool(np.all((a.view(np.uint32) == b.view(np.uint32)) | (a != a) & (b != b)))


def rounded(values: np.ndarray, dtype: mx.Dtype) -> np.ndarray:
    """Float32 as a type, and back."""
    if dtype == mx.float32:
        return values
    if dtype == mx.float16:
        with np.errstate(all="ignore"):
            return values.astype(np.float16).astype(np.float32)
    bits = np.ascontiguousarray(values).view(np.uint32)
    bits = (bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)
    return np.where(np.isnan(values), np.float32(np.nan), bits.view(np.float32))


def flushed(values: np.ndarray) -> np.ndarray:
    """Without subnormal numbers, as a GPU takes and gives them."""
    zero = np.copysign(np.float32(0), values)
    return np.where(np.abs(values) < SMALLEST, zero, values)


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c of float32, rounded once.

    The product is exact in float64. The sum is made odd where it is not exact, toward
    what it lost: rounding that to float32 gives what rounding the exact sum gives
    (Boldo and Melquiond 2008).
    """
    with np.errstate(all="ignore"):
        a, b, c = (
            flushed(np.asarray(v, np.float32)).astype(np.float64) for v in (a, b, c)
        )
        product = a * b
        total = product + c
        part = total - product
        lost = (product - (total - part)) + (c - part)
        is_even = total.view(np.int64) % 2 == 0
        neighbour = np.nextafter(total, np.copysign(np.inf, lost))
        is_inexact = np.isfinite(total) & (lost != 0) & is_even
        return flushed(np.where(is_inexact, neighbour, total).astype(np.float32))
