"""Whether the kernels of a way to run layers are right on this machine.

Each text that the layers of a pair may take is run over a few rows, in the pair's sizes
and type, and compared with MLX's operations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, compress, product
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from . import add_norm, norm_rope
from .common import MIN_ELEMENTS
from .matmul import DENSE, MAX_ROWS, Form
from .matmul_fused import Matrix, gate_by, gate_up, qkv
from .ways import ADD_NORM, GATE_UP, MATRIX_WAYS, NORM_ROPE, QKV

# How far a number may be off, in units in the last place of the largest: the order of
# a sum may change its last bit, and each rounding behind it one more.
_MOST_UNITS = 4
_EPS = 1e-6
_ROWS = 3
_WIDTH, _NUM_OUTPUTS = 1536, 67  # of matrices

_Pair = tuple[mx.array, mx.array]  # of a kernel, and of MLX's operations


@dataclass(frozen=True)
class LayerSizes:
    """What the layers of a pair have.

    Attributes:
        widths: H of the target and of the drafter, with the type of their norms.
        head_dims: D of all layers, with the same.
        structure: A text that differs for pairs of other arrays.
    """

    widths: tuple[tuple[int, mx.Dtype], ...] = ()
    head_dims: tuple[tuple[int, mx.Dtype], ...] = ()
    structure: str = ""


NO_LAYERS = LayerSizes()


def is_right(way: str, sizes: LayerSizes, forms: Iterable[Form] = ()) -> bool:
    """Whether the kernels of a way give what MLX's operations give.

    Ways without kernels are right.

    Args:
        way: The way.
        sizes: Of the layers that it runs.
        forms: Of the matrices that it multiplies, if it does.

    Raises:
        Exception: What MLX raises where one does not run.
    """
    pairs: Iterable[_Pair] = ()
    if way in MATRIX_WAYS:
        pairs = chain.from_iterable(_PRODUCTS[way](form) for form in forms)
    elif way in _PAIRS:
        pairs = _PAIRS[way](sizes)
    return all(_is_near(own, truth) for own, truth in pairs)


def _is_near(own: mx.array, truth: mx.array) -> bool:
    unit = mx.finfo(own.dtype).eps * mx.abs(truth.astype(mx.float32)).max()
    own, truth = own.astype(mx.float32), truth.astype(mx.float32)
    return bool((mx.abs(own - truth).max() <= _MOST_UNITS * unit).item())


def _random(seed: int, dtype: mx.Dtype, *shape: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


def _sums(sizes: LayerSizes) -> Iterator[_Pair]:
    """Of ``add_norm``: with and without all that it may have."""
    for width, dtype in sizes.widths:
        residual, y, other = (_random(i, dtype, _ROWS, width) for i in range(3))
        weights = [_random(i, dtype, width) for i in range(3, 7)]
        choices: list[tuple[str, Any]] = [
            ("scale", mx.full((MIN_ELEMENTS,), 0.5, dtype)),
            ("next_weight", weights[1]),
            ("branches", add_norm.Branches(weights[2], other, weights[3])),
        ]
        for has in product((False, True), repeat=len(choices)):
            options = dict(compress(choices, has))
            arrays = (residual, y, weights[0])
            own = add_norm.add_norm(*arrays, eps=_EPS, **options)
            yield from _both(own, add_norm.plain(*arrays, eps=_EPS, **options))


def _heads(sizes: LayerSizes) -> Iterator[_Pair]:
    """Of ``norm_rope``: queries alone, with keys, with keys that are values."""
    offset = mx.array([1000, 7], dtype=mx.int32)
    for head_dim, dtype in sizes.head_dims:
        q = _random(0, dtype, 2, _ROWS, 8, head_dim)
        k, v = (_random(i, dtype, 2, _ROWS, 4, head_dim) for i in (1, 2))
        q_weight, k_weight = (_random(i, dtype, head_dim) for i in (3, 4))
        freqs = mx.exp(mx.arange(head_dim // 2) / 16)
        turns: list[dict[str, Any]] = [{"base": 10000.0}, {"freqs": freqs}]
        for heads, turn in product(((q, k, v), (q, k, k), (q, None, None)), turns):
            options: dict[str, Any] = {
                "q_weight": q_weight,
                "k_weight": None if heads[1] is None else k_weight,
                "eps": _EPS,
                "offset": offset,
                **turn,
            }
            own = norm_rope.norm_rope(*heads, **options)
            yield from _both(own, norm_rope.plain(*heads, **options))


def _both(
    own: Iterable[mx.array | None], truth: Iterable[mx.array | None]
) -> Iterator[_Pair]:
    """What both have given, pair by pair."""
    for a, b in zip(own, truth, strict=True):
        if a is not None and b is not None:
            yield a, b


def _gates(form: Form) -> Iterator[_Pair]:
    """Of ``gate_up`` and ``gate_by``: every number of rows."""
    x, (gate, up) = _rows(form), [_Matrix.random(i, form) for i in range(2)]
    for num_rows in range(1, MAX_ROWS + 1):
        rows = x[:num_rows]
        own = gate_up(rows, gate.arrays, up.arrays, form=form)
        values = up.product(rows)
        truth = nn.gelu_approx(gate.product(rows)) * values
        yield own, truth
        yield gate_by(rows, gate.arrays, values, form=form), truth


def _projections(form: Form) -> Iterator[_Pair]:
    """Of ``qkv``: every number of rows, two and three matrices."""
    x, matrices = _rows(form), [_Matrix.random(i, form) for i in range(3)]
    for num_rows in range(1, MAX_ROWS + 1):
        for used in (matrices, matrices[:2]):
            rows = x[:num_rows]
            own = qkv(rows, [matrix.arrays for matrix in used], form=form)
            for found, matrix in zip(own, used, strict=True):
                yield found, matrix.product(rows)


def _rows(form: Form) -> mx.array:
    return mx.random.normal((MAX_ROWS, _WIDTH), key=mx.random.key(9)).astype(form.dtype)


class _Matrix(NamedTuple):
    """A random matrix as kernels take it, and as MLX multiplies by it."""

    arrays: Matrix
    form: Form

    @classmethod
    def random(cls, seed: int, form: Form) -> _Matrix:
        """Outputs that end inside a simdgroup's; of unit size for inputs of it."""
        weight = mx.random.normal((_NUM_OUTPUTS, _WIDTH), key=mx.random.key(seed))
        weight = (weight / math.sqrt(_WIDTH)).astype(form.dtype)
        if form.bits == DENSE:
            return cls((weight,), form)
        arrays = mx.quantize(weight, group_size=form.group_size, bits=form.bits)
        return cls(tuple(arrays), form)

    def product(self, x: mx.array) -> mx.array:
        """Of float32, in the form's type."""
        weight = self.arrays[0]
        if self.form.bits != DENSE:
            weight, scales, biases = self.arrays
            size, bits = self.form.group_size, self.form.bits
            weight = mx.dequantize(weight, scales, biases, group_size=size, bits=bits)
        found = x.astype(mx.float32) @ weight.astype(mx.float32).T
        return found.astype(self.form.dtype)


_PRODUCTS: dict[str, Callable[[Form], Iterator[_Pair]]] = {
    GATE_UP: _gates,
    QKV: _projections,
}
_PAIRS: dict[str, Callable[[LayerSizes], Iterator[_Pair]]] = {
    ADD_NORM: _sums,
    NORM_ROPE: _heads,
}
