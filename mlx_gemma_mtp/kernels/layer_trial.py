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

from . import add_norm, norm_rope, route
from .common import MIN_ELEMENTS
from .matmul import DENSE, MAX_ROWS, Form
from .matmul_fused import Matrix, gate_by, gate_up, gather_gate_up, qkv
from .ways import ADD_NORM, EXPERTS, GATE_UP, MATRIX_WAYS, NORM_ROPE, QKV, ROUTE

# How far a number may be off, in units in the last place of the largest: the order of
# a sum may change its last bit, and each rounding behind it one more. Of float32, which
# sums are of themselves, thousands of terms change several.
_MOST_UNITS, _MOST_UNITS_OF_FLOAT32 = 4, 32
_EPS = 1e-6
_ROWS = 3
_WIDTH, _NUM_OUTPUTS = 1536, 67  # of matrices
_NUM_EXPERTS = 3  # of which each row chooses some more than once

_Pair = tuple[mx.array, mx.array]  # of a kernel, and of MLX's operations


@dataclass(frozen=True)
class Mixture:
    """What a mixture of experts has.

    Attributes:
        num_experts: E.
        num_chosen: Of them, for each row.
        form: How their gates and values are stored; None where no kernel multiplies.
    """

    num_experts: int
    num_chosen: int
    form: Form | None = None


@dataclass(frozen=True)
class LayerSizes:
    """What the layers of a pair have.

    Attributes:
        widths: H of the target and of the drafter, with the type of their norms.
        head_dims: D of all layers, with the same.
        structure: A text that differs for pairs of other arrays.
        mixtures: Of experts, where layers have them.
    """

    widths: tuple[tuple[int, mx.Dtype], ...] = ()
    head_dims: tuple[tuple[int, mx.Dtype], ...] = ()
    structure: str = ""
    mixtures: tuple[Mixture, ...] = ()


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
    most = _MOST_UNITS_OF_FLOAT32 if own.dtype == mx.float32 else _MOST_UNITS
    unit = mx.finfo(own.dtype).eps * mx.abs(truth.astype(mx.float32)).max()
    own, truth = own.astype(mx.float32), truth.astype(mx.float32)
    return bool((mx.abs(own - truth).max() <= most * unit).item())


def _rows_of(seed: int, dtype: mx.Dtype, width: int) -> tuple[mx.array, mx.array]:
    """Two times some rows of a layer."""
    first, second = (_random(seed + i, dtype, _ROWS, width) for i in range(2))
    return first, second


def _random(seed: int, dtype: mx.Dtype, *shape: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


def _sums(sizes: LayerSizes) -> Iterator[_Pair]:
    """Of ``add_norm``: with and without all that it may have."""
    for width, dtype in sizes.widths:
        arrays = (*_rows_of(0, dtype, width), _random(3, dtype, width))
        weights = [_random(i, dtype, width) for i in range(4, 7)]
        choices: list[tuple[str, Any]] = [
            ("scale", mx.full((MIN_ELEMENTS,), 0.5, dtype)),
            ("next_weight", weights[0]),
        ]
        for has in product((False, True), repeat=len(choices)):
            options = dict(compress(choices, has))
            for own_branches, branches in _branches(sizes, dtype, width):
                own = add_norm.add_norm(
                    *arrays, eps=_EPS, branches=own_branches, **options
                )
                truth = add_norm.plain(*arrays, eps=_EPS, branches=branches, **options)
                yield from _both(own, truth)
        if sizes.mixtures:
            options = {"eps": _EPS, "next_weights": weights, "root": width**-0.5}
            sums = add_norm.add_norms(*arrays, **options)
            yield from _both(sums, add_norm.plain_norms(*arrays, **options))


def _branches(
    sizes: LayerSizes, dtype: mx.Dtype, width: int
) -> Iterator[tuple[add_norm.Branches | None, add_norm.Branches | None]]:
    """Branches that layers may have; the same with experts summed in float32."""
    yield None, None
    weights = [_random(i, dtype, width) for i in (7, 8)]
    other, _ = _rows_of(9, dtype, width)
    branches = add_norm.Branches(weights[0], other, weights[1])
    if sizes.mixtures:
        yield branches, branches
    for count in dict.fromkeys(mixture.num_chosen for mixture in sizes.mixtures):
        given = _random(11, dtype, _ROWS, count, width)
        shares = mx.softmax(_random(12, dtype, _ROWS, count), axis=-1)
        parts = (mx.expand_dims(shares, -1) * given).astype(mx.float32)
        yield (
            branches._replace(other=given, shares=shares),
            branches._replace(other=parts.sum(-2).astype(dtype)),
        )


def _routes(sizes: LayerSizes) -> Iterator[_Pair]:
    """Of ``route``, over scores of which no two are equal."""
    for mixture, dtype in product(sizes.mixtures, {d: None for _, d in sizes.widths}):
        count = mixture.num_experts
        places = mx.argsort(_random(0, mx.float32, _ROWS, count), axis=-1)
        scores = (places * (8 / count) - 4).astype(dtype)
        scales = _random(1, dtype, count)
        num_chosen = mixture.num_chosen
        own = route.route(scores, scales, num_chosen=num_chosen)
        exact = scores.astype(mx.float32), scales.astype(mx.float32)
        truth = route.plain(*exact, num_chosen=num_chosen)
        yield from zip(_by_number(*own), _by_number(*truth), strict=True)


def _by_number(experts: mx.array, shares: mx.array) -> tuple[mx.array, mx.array]:
    """Experts in ascending order, and their shares."""
    order = mx.argsort(experts, axis=-1)
    experts, shares = (mx.take_along_axis(a, order, axis=-1) for a in (experts, shares))
    return experts.astype(mx.float32), shares


def _gathered(sizes: LayerSizes) -> Iterator[_Pair]:
    """Of ``gather_gate_up``: rows that choose the same expert, and others."""
    for mixture in sizes.mixtures:
        if (form := mixture.form) is None:
            continue
        x, numbers = _rows(form)[:_ROWS], range(_NUM_EXPERTS)
        gates = [_Matrix.random(number, form) for number in numbers]
        ups = [_Matrix.random(number + _NUM_EXPERTS, form) for number in numbers]
        experts = mx.arange(_ROWS * mixture.num_chosen, dtype=mx.uint32)
        experts = experts.reshape(_ROWS, -1) % _NUM_EXPERTS
        own = gather_gate_up(x, _stacked(gates), _stacked(ups), experts, form=form)
        every = [
            nn.gelu_approx(gate.product(x)) * up.product(x)
            for gate, up in zip(gates, ups, strict=True)
        ]
        yield own, mx.stack(every, axis=1)[mx.arange(_ROWS)[:, None], experts]


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


def _stacked(matrices: list[_Matrix]) -> Matrix:
    """Those of experts as one."""
    arrays = zip(*(matrix.arrays for matrix in matrices), strict=True)
    return tuple(mx.stack(list(parts)) for parts in arrays)


_PRODUCTS: dict[str, Callable[[Form], Iterator[_Pair]]] = {
    GATE_UP: _gates,
    QKV: _projections,
}
_PAIRS: dict[str, Callable[[LayerSizes], Iterator[_Pair]]] = {
    ADD_NORM: _sums,
    NORM_ROPE: _heads,
    ROUTE: _routes,
    EXPERTS: _gathered,
}
