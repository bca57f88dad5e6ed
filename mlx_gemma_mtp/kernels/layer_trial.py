"""Whether the kernels of a way to run layers are right on this machine.

Each is run over a few rows of published sizes and compared with MLX's operations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx

from . import add_norm, norm_rope
from .ways import ADD_NORM, NORM_ROPE

# How far a number may be off, in units in the last place of the largest: the order of
# a sum may change its last bit, and each rounding behind it one more.
_MOST_UNITS = 4
_EPS = 1e-6
_ROWS = 3
_WIDTH, _HEAD_DIMS = 1536, (256, 512)
_DTYPE = mx.bfloat16

_Pair = tuple[mx.array, mx.array]  # of a kernel, and of MLX's operations


def is_right(way: str) -> bool:
    """Whether the kernels of a way give what MLX's operations give.

    Ways without kernels are right.

    Raises:
        Exception: What MLX raises where one does not run.
    """
    pairs = _PAIRS.get(way)
    return pairs is None or all(_is_near(own, truth) for own, truth in pairs())


def _is_near(own: mx.array, truth: mx.array) -> bool:
    own, truth = own.astype(mx.float32), truth.astype(mx.float32)
    unit = mx.finfo(_DTYPE).eps * mx.abs(truth).max()
    return bool((mx.abs(own - truth).max() <= _MOST_UNITS * unit).item())


def _random(seed: int, *shape: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(_DTYPE)


def _sums() -> Iterator[_Pair]:
    """Of ``add_norm``: with all it may have, and with nothing."""
    rows = [_random(i, _ROWS, _WIDTH) for i in range(3)]
    weights = [_random(i, _WIDTH) for i in range(3, 7)]
    whole: dict[str, Any] = {
        "scale": mx.array([0.5], dtype=_DTYPE),
        "next_weight": weights[1],
        "branches": add_norm.Branches(weights[2], rows[2], weights[3]),
    }
    each: list[dict[str, Any]] = [{}, {"next_weight": weights[1]}, whole]
    for options in each:
        arrays = (*rows[:2], weights[0])
        own = add_norm.add_norm(*arrays, eps=_EPS, **options)
        truth = add_norm.plain(*arrays, eps=_EPS, **options)
        for a, b in zip(own, truth, strict=True):
            if a is not None and b is not None:
                yield a, b


def _heads() -> Iterator[_Pair]:
    """Of ``norm_rope``: queries alone, with keys, with keys that are values."""
    offset = mx.array([1000, 7], dtype=mx.int32)
    for head_dim in _HEAD_DIMS:
        q, k, v = (_random(i, 2, _ROWS, 8 >> i, head_dim) for i in (0, 1, 1))
        weights = {"q_weight": _random(3, head_dim), "k_weight": _random(4, head_dim)}
        freqs = mx.exp(mx.arange(head_dim // 2) / 16)
        for heads in ((q, k, v), (q, k, k), (q, None, None)):
            given = (
                weights if heads[1] is not None else {"q_weight": weights["q_weight"]}
            )
            for turn in ({"base": 10000.0}, {"freqs": freqs}):
                options: dict[str, Any] = {
                    "eps": _EPS,
                    "offset": offset,
                    **given,
                    **turn,
                }
                own = norm_rope.norm_rope(*heads, **options)
                truth = norm_rope.plain(*heads, **options)
                for a, b in zip(own, truth, strict=True):
                    if a is not None and b is not None:
                        yield a, b


_PAIRS: dict[str, Callable[[], Iterator[_Pair]]] = {
    ADD_NORM: _sums,
    NORM_ROPE: _heads,
}
