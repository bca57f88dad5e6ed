"""What the kernels of norms must give: bit by bit, or in float64.

The sums of squares are added up here as the kernels' texts say, thread by thread. It
uses neither MLX's operations nor any code of the package.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_gemma_mtp.kernels import add_norm, norm_rope
from tests.kernels.products import as_float32, fma, rounded

EPS = 1e-6
THREADS, LANES, PIECE = 256, 32, 4
NUM_EXPERTS, ROOT = 8, 2816**-0.5  # of a mixture; what the router's weight is taken by


def tree(values: np.ndarray) -> np.ndarray:
    """The sum over the last axis, [..., 32], as a simdgroup adds."""
    while values.shape[-1] > 1:
        half = values.shape[-1] // 2
        values = values[..., :half] + values[..., half:]
    return values[..., 0]


def inverse_root(squares: np.ndarray, width: int) -> np.ndarray:
    """One over the root of a mean square, [..., 1], as the harness rounds it."""
    mean = squares / np.float32(width) + np.float32(EPS)
    return (np.float32(1) / np.sqrt(mean))[..., None]


def normal(dtype: mx.Dtype, *shape: int, seed: int, middle: float = 0.0) -> np.ndarray:
    """Numbers that the type has, as float32."""
    numbers = np.random.default_rng(seed).normal(middle, 1.0, shape)
    return as_float32(mx.array(numbers.astype(np.float32)).astype(dtype))


# ------------------------------------------------------------------------ add_norm


@dataclass(frozen=True)
class Sum:
    """The arrays of a residual sum, float32 numbers that the type has.

    Attributes:
        dtype: Their type.
        residual: [M, H].
        y: [M, H].
        weight: [H].
        scale: A number; None for none.
        next_weight: [H], or None.
        branches: Weight of the first branch [H], the other [M, H], and its weight [H];
            None for none.
        shares: [M, N], where the other is the sum of experts' rows [M, N, H]; or None.
        more_weights: [H] each, of two more norms; the last is taken times ROOT.
    """

    dtype: mx.Dtype
    residual: np.ndarray
    y: np.ndarray
    weight: np.ndarray
    scale: float | None = None
    next_weight: np.ndarray | None = None
    branches: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
    shares: np.ndarray | None = None
    more_weights: tuple[np.ndarray, np.ndarray] | None = None

    @classmethod
    def random(
        cls,
        M: int,
        H: int,
        dtype: mx.Dtype = mx.bfloat16,
        *,
        is_scaled: bool = True,
        is_normed: bool = True,
        has_branches: bool = False,
        has_experts: bool = False,
        is_thrice: bool = False,
    ) -> Sum:
        """Of rows whose sizes differ by powers of two."""
        sizes = np.exp2(np.arange(M, dtype=np.float32) % 5)[:, None]
        weights = [normal(dtype, H, seed=10 + i, middle=1.0) for i in range(6)]
        count = [NUM_EXPERTS] if has_experts else []
        other = normal(dtype, M, *count, H, seed=3)
        return cls(
            dtype,
            normal(dtype, M, H, seed=1),
            normal(dtype, M, H, seed=2) * sizes,
            weights[0],
            0.890625 if is_scaled else None,
            weights[1] if is_normed else None,
            (weights[2], other, weights[3]) if has_branches else None,
            normal(dtype, M, NUM_EXPERTS, seed=4) if has_experts else None,
            (weights[4], weights[5]) if is_thrice else None,
        )

    def arguments(self) -> tuple[list[mx.array], dict[str, Any]]:
        """What ``add_norm`` and its plain twin take."""
        options: dict[str, Any] = {"eps": EPS}
        if self.scale is not None:
            options["scale"] = self._array(np.array([self.scale], np.float32))
        if self.next_weight is not None:
            options["next_weight"] = self._array(self.next_weight)
        if self.branches is not None:
            arrays = map(self._array, self.branches)
            shares = None if self.shares is None else self._array(self.shares)
            options["branches"] = add_norm.Branches(*arrays)._replace(shares=shares)
        if self.more_weights is not None:
            weights = options.pop("next_weight"), *map(self._array, self.more_weights)
            options |= {"next_weights": weights, "root": ROOT}
        return [self._array(a) for a in (self.residual, self.y, self.weight)], options

    def _array(self, values: np.ndarray) -> mx.array:
        return mx.array(values).astype(self.dtype)

    def run(self) -> list[np.ndarray]:
        """What the kernel gives: the sum, and its norm if there is one."""
        arrays, options = self.arguments()
        return [
            as_float32(a) for a in self.function(*arrays, **options) if a is not None
        ]

    @property
    def function(self) -> Callable[..., Any]:
        """That which is tested."""
        return add_norm.add_norms if self.more_weights else add_norm.add_norm

    @property
    def plain(self) -> list[np.ndarray]:
        """What its twin of MLX's operations gives."""
        arrays, options = self.arguments()
        plain: Any = add_norm.plain_norms if self.more_weights else add_norm.plain
        return [as_float32(a) for a in plain(*arrays, **options) if a is not None]

    def rows(self, chosen: slice) -> Sum:
        """Of some rows alone."""
        branches = self.branches
        if branches is not None:
            branches = (branches[0], branches[1][chosen], branches[2])
        return replace(
            self,
            residual=self.residual[chosen],
            y=self.y[chosen],
            branches=branches,
            shares=None if self.shares is None else self.shares[chosen],
        )

    @property
    def bits(self) -> list[np.ndarray]:
        """The same, bit by bit."""
        y = self.y
        if self.branches is not None:
            y_weight, other, other_weight = self.branches
            if self.shares is not None:
                parts = self._rounded(self.shares[..., None] * other)
                total = np.zeros_like(self.residual)
                for e in range(parts.shape[1]):
                    total = total + parts[:, e]
                other = self._rounded(total)
            y = self._rounded(self._norm(y, y_weight) + self._norm(other, other_weight))
        h = self._rounded(self.residual + self._norm(y, self.weight))
        if self.scale is not None:
            h = self._rounded(h * np.float32(self.scale))
        weights = [] if self.next_weight is None else [self.next_weight]
        if self.more_weights is not None:
            root = self._rounded(np.array(ROOT, np.float32))
            weights += [
                self.more_weights[0],
                self._rounded(self.more_weights[1] * root),
            ]
        return [h, *(self._norm(h, weight) for weight in weights)]

    def _rounded(self, values: np.ndarray) -> np.ndarray:
        return rounded(values, self.dtype)

    def _norm(self, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        inverse = inverse_root(_squares_of_threads(x), x.shape[-1])
        return self._rounded(self._rounded(x * inverse) * weight)

    @property
    def exact(self) -> list[np.ndarray]:
        """In float64, without any rounding."""

        def norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
            x = x.astype(np.float64)
            return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS) * weight

        y = self.y
        if self.branches is not None:
            y_weight, other, other_weight = self.branches
            if self.shares is not None:
                other = np.einsum("me,meh->mh", *map(np.float64, (self.shares, other)))
            y = norm(y, y_weight) + norm(other, other_weight)
        h = (self.residual + norm(y, self.weight)) * (self.scale or 1.0)
        weights = [] if self.next_weight is None else [self.next_weight]
        if self.more_weights is not None:
            weights += [self.more_weights[0], self.more_weights[1] * ROOT]
        return [h, *(norm(h, weight) for weight in weights)]


def _squares_of_threads(x: np.ndarray) -> np.ndarray:
    """[M]: a thread adds up its fours, a simdgroup its threads, and then the cells."""
    M, H = x.shape
    piece = THREADS * PIECE
    padded = np.pad(x, [(0, 0), (0, -H % piece)]).reshape(M, -1, THREADS, PIECE)
    own = np.zeros((M, THREADS), np.float32)
    for p in range(padded.shape[1]):
        for i in range(PIECE):
            number = padded[:, p, :, i]
            own = fma(number, number, own)
    cells = tree(own.reshape(M, -1, LANES))
    return tree(np.pad(cells, [(0, 0), (0, LANES - cells.shape[1])]))


# ----------------------------------------------------------------------- norm_rope


@dataclass(frozen=True)
class Heads:
    """The arrays of queries, keys and values, float32 numbers that the type has.

    Attributes:
        dtype: Their type.
        q: [B, L, Hq, D].
        k: [B, L, G, D], or None.
        v: [B, L, G, D], or None: keys are values.
        q_weight: [D].
        k_weight: [D].
        offset: [B].
        base: Of the rotation, or None.
        freqs: [D / 2], or None.
    """

    dtype: mx.Dtype
    q: np.ndarray
    k: np.ndarray | None
    v: np.ndarray | None
    q_weight: np.ndarray
    k_weight: np.ndarray
    offset: np.ndarray
    base: float | None
    freqs: np.ndarray | None

    @classmethod
    def random(
        cls,
        B: int,
        L: int,
        Q: int,
        G: int,
        D: int,
        dtype: mx.Dtype = mx.bfloat16,
        *,
        kind: str = norm_rope.SEPARATE,
        is_proportional: bool = False,
    ) -> Heads:
        """Of rows that begin at different positions."""
        freqs = None
        if is_proportional:
            freqs = np.full(D // 2, np.inf, np.float32)
            turning = D // 8
            freqs[:turning] = 1e6 ** (np.arange(turning) * 2 / D)
        return cls(
            dtype,
            normal(dtype, B, L, Q, D, seed=1) * 4,
            None if kind == norm_rope.QUERIES else normal(dtype, B, L, G, D, seed=2),
            normal(dtype, B, L, G, D, seed=3) if kind == norm_rope.SEPARATE else None,
            normal(dtype, D, seed=4, middle=1.0),
            normal(dtype, D, seed=5, middle=1.0),
            np.array([1000, 0, 7, 131071, 5][:B], np.int32),
            None if is_proportional else 1e4,
            freqs,
        )

    def arguments(self) -> tuple[list[mx.array], dict[str, Any]]:
        """What ``norm_rope`` and its plain twin take."""
        options: dict[str, Any] = {
            "q_weight": self._array(self.q_weight),
            "eps": EPS,
            "offset": mx.array(self.offset),
            "base": self.base,
            "freqs": None if self.freqs is None else mx.array(self.freqs),
        }
        arrays = [self._array(self.q)]
        if self.k is not None:
            keys = self._array(self.k)
            arrays += [keys, keys if self.v is None else self._array(self.v)]
            options["k_weight"] = self._array(self.k_weight)
        return arrays, options

    def _array(self, values: np.ndarray) -> mx.array:
        return mx.array(values).astype(self.dtype)

    def run(self) -> list[np.ndarray]:
        """What the kernel gives: queries, and keys and values where there are some."""
        arrays, options = self.arguments()
        return [
            as_float32(a)
            for a in norm_rope.norm_rope(*arrays, **options)
            if a is not None
        ]

    def part(self, batch: int, places: slice) -> Heads:
        """One row of the batch, and of it some tokens."""
        rows = slice(batch, batch + 1)

        def cut(x: np.ndarray | None) -> np.ndarray | None:
            return None if x is None else x[rows, places]

        return replace(
            self,
            q=self.q[rows, places],
            k=cut(self.k),
            v=cut(self.v),
            offset=self.offset[rows] + places.start,
        )

    @property
    def exact(self) -> list[np.ndarray]:
        """Float64 of the same frequencies; norms are rounded to the type."""
        turned = [self._turned(self._normed(self.q, self.q_weight))]
        if self.k is None:
            return turned
        values = self.k if self.v is None else self.v
        keys = self._turned(self._normed(self.k, self.k_weight))
        return [*turned, keys, self._normed(values, None)]

    def _normed(self, x: np.ndarray, weight: np.ndarray | None) -> np.ndarray:
        """[B, heads, L, D], bit by bit as the kernel has it."""
        D = x.shape[-1]
        x = x.transpose(0, 2, 1, 3)
        normed = rounded(x * inverse_root(_squares_of_lanes(x), D), self.dtype)
        return normed if weight is None else rounded(normed * weight, self.dtype)

    @property
    def angles(self) -> np.ndarray:
        """[B, 1, L, D / 2]: float32 frequencies and angles, as the kernel rounds."""
        L, D = self.q.shape[1], self.q.shape[-1]
        positions = (self.offset[:, None] + np.arange(L)).astype(np.float32)
        if self.freqs is not None:
            frequencies = np.float32(1) / self.freqs
        else:
            assert self.base is not None
            share = np.arange(D // 2, dtype=np.float32) / np.float32(D // 2)
            exponents = -share * np.float32(np.log2(self.base))
            frequencies = np.exp2(exponents.astype(np.float64)).astype(np.float32)
        return (positions[..., None] * frequencies)[:, None]

    def _turned(self, x: np.ndarray) -> np.ndarray:
        angles = self.angles.astype(np.float64)
        c, s = np.cos(angles), np.sin(angles)
        low, high = np.split(x.astype(np.float64), 2, axis=-1)
        return np.concatenate([low * c - high * s, low * s + high * c], axis=-1)

    def error(self, turned: np.ndarray) -> np.ndarray:
        """How far a turned number may be off: the type's rounding, and the angle's."""
        unit = {mx.bfloat16: 2.0**-8, mx.float16: 2.0**-11, mx.float32: 2.0**-23}
        low, high = np.split(np.abs(turned), 2, axis=-1)
        size = np.tile(np.hypot(low, high), 2)
        angle = np.tile(np.abs(self.angles.astype(np.float64)), 2)
        return np.abs(turned) * unit[self.dtype] + size * (2.0**-22 + angle * 2.0**-22)


def _squares_of_lanes(x: np.ndarray) -> np.ndarray:
    """[...]: a lane adds up its pairs, a simdgroup its lanes."""
    half = x.shape[-1] // 2
    pairs = -(-half // LANES)
    low, high = (
        np.pad(part, [*[(0, 0)] * (x.ndim - 1), (0, pairs * LANES - half)]).reshape(
            *x.shape[:-1], LANES, pairs
        )
        for part in np.split(x, 2, axis=-1)
    )
    own = np.zeros(low.shape[:-1], np.float32)
    for i in range(pairs):
        own = fma(low[..., i], low[..., i], own)
        own = fma(high[..., i], high[..., i], own)
    return tree(own)
