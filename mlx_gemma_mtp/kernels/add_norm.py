"""A residual sum with the norms before and after it, in one launch.

h = residual + rms_norm(y) * weight, and rms_norm(h) * next_weight beside it: what
stands between two matrices of a layer, five launches of MLX's. A threadgroup has a row.
It loads the row once and keeps it in registers, each thread fours that stand beside
each other, and knows the mean square after one reduction. In a mixture of experts the
sum may have three norms behind it, and what is added may be the sum of two branches,
one of them what a row's experts give, each times its share.

Numbers are rounded to the row's type where MLX's own operations round them: the norm,
its product with the weight, the sum, the product with the scale, an expert's product
with its share. So only the order in which squares and experts are added differs, and
that depends on H and the row's experts alone: a row has the same bits whatever the
number of rows. (Of float32, which is not rounded there, a compiler may fuse the product
and the sum.)

This file knows nothing of layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import product
from typing import NamedTuple

import mlx.core as mx

from . import common
from .common import Kernel

MAX_WIDTH = 6144  # H: more would not fit in registers
_THREADS = common.MAX_THREADS
_FOUR = 4  # numbers of a piece
_NORMS_OF_MIXTURE = 3  # of a sum: the dense part's, the experts', the router's
_DTYPES = (mx.float32, mx.float16, mx.bfloat16)


class Branches(NamedTuple):
    """What is added and normed before ``y`` is: rms_norm(y) * weight + the other's.

    Attributes:
        y_weight: [H], of the first branch, which is ``y``.
        other: [..., H], the second branch; with ``shares`` [..., N, H].
        other_weight: [H].
        shares: [..., N], of N experts, of which the second branch is the sum of each
            times its share; None for a branch that is there.
    """

    y_weight: mx.array
    other: mx.array
    other_weight: mx.array
    shares: mx.array | None = None


def add_norm(
    residual: mx.array,
    y: mx.array,
    weight: mx.array,
    *,
    eps: float,
    scale: mx.array | None = None,
    next_weight: mx.array | None = None,
    branches: Branches | None = None,
) -> tuple[mx.array, mx.array | None]:
    """Add the norm of ``y`` to the residual; and the norm of the sum.

    Where there are no kernels, or none for the arrays, MLX's operations give it.

    Args:
        residual: [..., H].
        y: [..., H].
        weight: [H], of the norm of ``y``.
        eps: What is added to mean squares.
        scale: One number, times which the sum is taken; None for none. If it is
            ``common.padded`` once, no launch pads it.
        next_weight: [H], of the norm of the sum; None for no such norm.
        branches: A second branch; ``y`` then becomes the sum of both branches' norms.
            None for none.

    Returns:
        The sum [..., H], and its norm [..., H] or None.
    """
    next_weights = [] if next_weight is None else [next_weight]
    arrays = _Arrays.of(residual, y, weight, scale, next_weights, branches)
    if common.backend() == "ops" or not arrays.are_known:
        return plain(
            residual,
            y,
            weight,
            eps=eps,
            scale=scale,
            next_weight=next_weight,
            branches=branches,
        )
    h, *normed = _launched(arrays, len(next_weights), eps)
    return h, normed[0] if normed else None


def add_norms(
    residual: mx.array,
    y: mx.array,
    weight: mx.array,
    *,
    eps: float,
    next_weights: Sequence[mx.array],
    root: float,
) -> list[mx.array]:
    """The same with three norms of the sum, as a mixture of experts has them.

    Args:
        residual: [..., H].
        y: [..., H].
        weight: [H], of the norm of ``y``.
        eps: What is added to mean squares.
        next_weights: [H] each, of three norms of the sum.
        root: What the last of them is multiplied by.

    Returns:
        The sum and its norms, [..., H] each.
    """
    arrays = _Arrays.of(residual, y, weight, None, next_weights, None)
    if common.backend() == "ops" or not arrays.are_known:
        return plain_norms(
            residual, y, weight, eps=eps, next_weights=next_weights, root=root
        )
    return _launched(arrays, len(next_weights), eps, root=root)


def _launched(
    arrays: _Arrays, num_norms: int, eps: float, *, root: float = 1.0
) -> list[mx.array]:
    """The sum, and its norms."""
    residual = arrays.rows[0]
    width, dtype = residual.shape[-1], residual.dtype
    has_branches = len(arrays.rows) + len(arrays.shares) > 2
    num_experts = arrays.shares[0].shape[-1] if arrays.shares else 0
    template: list[tuple[str, mx.Dtype | int | bool]] = [
        ("T", dtype),
        ("H", width),
        ("PIECES", -(-width // (_FOUR * _THREADS))),
        ("EPS", common.bits_of(eps)),
    ]
    template += [("EXPERTS", num_experts)] if num_experts else []
    template += [("ROOT", common.bits_of(root))] if num_norms > 1 else []
    return common.launch(
        kernel(bool(arrays.scales), num_norms, has_branches, bool(num_experts)),
        [
            *arrays.rows,
            *arrays.experts,
            *arrays.weights,
            *(common.padded(s) for s in (*arrays.shares, *arrays.scales)),
        ],
        template=template,
        grid=(residual.size // width * _THREADS, 1, 1),
        threadgroup=(_THREADS, 1, 1),
        output_shapes=[residual.shape] * (1 + num_norms),
        output_dtypes=[dtype] * (1 + num_norms),
    )


def plain(
    residual: mx.array,
    y: mx.array,
    weight: mx.array,
    *,
    eps: float,
    scale: mx.array | None = None,
    next_weight: mx.array | None = None,
    branches: Branches | None = None,
) -> tuple[mx.array, mx.array | None]:
    """The same by MLX's operations, bit by bit as mlx-lm's Gemma 4 layer has it."""
    norm = mx.fast.rms_norm
    if branches is not None:
        other, shares = branches.other, branches.shares
        if shares is not None:
            other = (mx.expand_dims(shares, -1) * other).sum(-2)
        other = norm(other, branches.other_weight, eps)
        y = norm(y, branches.y_weight, eps) + other
    h = residual + norm(y, weight, eps)
    if scale is not None:
        h = h * (scale if scale.size == 1 else scale[:1])
    return h, None if next_weight is None else norm(h, next_weight, eps)


def plain_norms(
    residual: mx.array,
    y: mx.array,
    weight: mx.array,
    *,
    eps: float,
    next_weights: Sequence[mx.array],
    root: float,
) -> list[mx.array]:
    """The same by MLX's operations, bit by bit as mlx-lm's layer and router have it."""
    h, _ = plain(residual, y, weight, eps=eps)
    *others, last = next_weights
    return [h, *(mx.fast.rms_norm(h, w, eps) for w in (*others, last * root))]


class _Arrays(NamedTuple):
    """The arrays of a call; what there is not is empty.

    Attributes:
        rows: [..., H].
        weights: [H].
        scales: Of one number.
        experts: Rows [..., N, H].
        shares: [..., N].
    """

    rows: list[mx.array]
    weights: list[mx.array]
    scales: list[mx.array]
    experts: list[mx.array]
    shares: list[mx.array]

    @classmethod
    def of(
        cls,
        residual: mx.array,
        y: mx.array,
        weight: mx.array,
        scale: mx.array | None,
        next_weights: Sequence[mx.array],
        branches: Branches | None,
    ) -> _Arrays:
        """In the order of the kernel's inputs."""
        found = cls([residual, y], [weight], [] if scale is None else [scale], [], [])
        if branches is not None:
            found.weights.extend([branches.y_weight, branches.other_weight])
            if branches.shares is None:
                found.rows.append(branches.other)
            else:
                found.experts.append(branches.other)
                found.shares.append(branches.shares)
        found.weights.extend(next_weights)
        return found

    @property
    def are_known(self) -> bool:
        """Whether the kernel takes them: one shape, one type, a width of fours."""
        first = self.rows[0]
        width = first.shape[-1]
        return (
            first.dtype in _DTYPES
            and all(a.dtype == first.dtype for part in self for a in part)
            and all(row.shape == first.shape for row in self.rows)
            and all(
                rows.shape == (*share.shape, width)
                for rows, share in zip(self.experts, self.shares, strict=True)
            )
            and 2 * _FOUR <= width <= MAX_WIDTH
            and width % _FOUR == 0
            and first.size > 0
        )


@cache
def kernel(
    is_scaled: bool, num_norms: int, has_branches: bool, has_experts: bool = False
) -> Kernel:
    """The kernel of a sum: with a scale, of two branches.

    Args:
        is_scaled: Whether it is multiplied by a scale.
        num_norms: How many norms are behind it, 0, 1 or 3.
        has_branches: Whether what is added is the sum of two branches.
        has_experts: Whether the second one is the sum of experts.
    """
    words = {
        "scaled": is_scaled,
        "normed": num_norms > 0,
        "thrice": num_norms > 1,
        "branches": has_branches,
        "experts": has_experts,
    }
    inputs = ["residual", "y"]
    inputs += ["other"] if has_branches else []
    inputs += ["weight"]
    inputs += ["y_weight", "other_weight"] if has_branches else []
    inputs += [f"next_weight{i or ''}" for i in range(num_norms)]
    inputs += ["shares"] if has_experts else []
    inputs += ["scale"] if is_scaled else []
    return Kernel(
        name="_".join(["add_norm", *(word for word, is_so in words.items() if is_so)]),
        input_names=tuple(inputs),
        output_names=("h", *(f"normed{i or ''}" for i in range(num_norms))),
        source=_source(is_scaled, num_norms, has_branches, has_experts),
    )


def kernels() -> list[Kernel]:
    """All of them."""
    ends = product((False, True), (0, 1), ((False, False), (True, False), (True, True)))
    found = [kernel(is_scaled, count, *branches) for is_scaled, count, branches in ends]
    return [*found, kernel(False, _NORMS_OF_MIXTURE, False)]


def _source(
    is_scaled: bool, num_norms: int, has_branches: bool, has_experts: bool
) -> str:
    """The body.

    ``values`` is the row that is normed next, and ``weights`` its weight. What comes
    from memory is asked for before a reduction waits.
    """
    parts = [
        _START,
        "float scale_value = float(scale[0]);\n" if is_scaled else "",
        _each("rests[k] = float(residual[start + at]);"),
        _branches(has_experts)
        if has_branches
        else _loads("values", "y", "weights", "weight"),
        _mean_square("values"),
        _each(
            f"float sum = float(T(rests[k] + {_NORM}));",
            *(["sum = float(T(sum * scale_value));"] if is_scaled else []),
            "h[start + at] = T(sum);",
            *(["values[k] = sum;"] if num_norms else []),
            *(["weights[k] = float(next_weight[at]);"] if num_norms else []),
        ),
    ]
    if num_norms:
        parts += [_mean_square("values"), _each(f"normed[start + at] = T({_NORM});")]
    if num_norms > 1:
        parts += [
            _each(
                "weights[k] = float(next_weight1[at]);",
                f"normed1[start + at] = T({_NORM});",
                "weights[k] = float(T(float(next_weight2[at]) * root));",
                f"normed2[start + at] = T({_NORM});",
            )
        ]
        parts.insert(1, "float root = float(T(as_type<float>(ROOT)));\n")
    return "".join(f"  {line}\n" for part in parts for line in part.splitlines())


_START = """\
// H: numbers of a row. PIECES: of four of them, that a thread has. EPS: bits.
threadgroup float cells[8];
uint thread_id = thread_index_in_threadgroup;
uint lane = thread_index_in_simdgroup;
uint simdgroup = simdgroup_index_in_threadgroup;
uint start = threadgroup_position_in_grid.x * uint(H);
float eps = as_type<float>(EPS);
float own = 0.0f;
float total = 0.0f;
float inverse = 0.0f;
float values[4 * PIECES];
float rests[4 * PIECES];
float weights[4 * PIECES];
#pragma unroll
for (int k = 0; k < 4 * PIECES; k++) values[k] = 0.0f;
"""

# A number of the row over the root of its mean square, times its weight.
_NORM = "float(T(float(T(values[k] * inverse)) * weights[k]))"


def _branches(has_experts: bool) -> str:
    """Both branches' norms, and their sum as the row that is normed next."""
    return "".join(
        [
            _loads("values", "y", "weights", "y_weight"),
            "float others[4 * PIECES];\n",
            "#pragma unroll\n",
            "for (int k = 0; k < 4 * PIECES; k++) others[k] = 0.0f;\n",
            _EXPERTS if has_experts else _each("others[k] = float(other[start + at]);"),
            _mean_square("values"),
            _each(f"values[k] = {_NORM};", "weights[k] = float(other_weight[at]);"),
            _mean_square("others"),
            _each(
                f"float norm = {_NORM.replace('values', 'others')};",
                "values[k] = float(T(values[k] + norm));",
                "weights[k] = float(weight[at]);",
            ),
        ]
    )


def _loads(values: str, row: str, weights: str, weight: str) -> str:
    """A row and its weight into registers."""
    return _each(
        f"{values}[k] = float({row}[start + at]);",
        f"{weights}[k] = float({weight}[at]);",
    )


def _mean_square(values: str) -> str:
    """One over the root of a row's mean square, in every thread."""
    return f"""\
own = 0.0f;
#pragma unroll
for (int k = 0; k < 4 * PIECES; k++) own = fma({values}[k], {values}[k], own);
REDUCE(total, simd_sum, cells, own, 0.0f);
inverse = rsqrt(total / float(H) + eps);
"""


def _each(*statements: str) -> str:
    """Statements for each number k of this thread, which is column ``at`` of the row.

    A piece is within the row or behind it, so that its loads may become one.
    """
    body = "".join(f"      {statement}\n" for statement in statements)
    return f"""\
#pragma unroll
for (int p = 0; p < PIECES; p++) {{
  uint first = {_FOUR * _THREADS}u * uint(p) + {_FOUR}u * thread_id;
  if (first < uint(H)) {{
    #pragma unroll
    for (int i = 0; i < {_FOUR}; i++) {{
      uint at = first + uint(i);
      int k = {_FOUR} * p + i;
{body}    }}
  }}
}}
"""


# What experts give, each times its share.
_EXPERTS = f"""\
uint first_expert = threadgroup_position_in_grid.x * uint(EXPERTS);
for (uint e = first_expert; e < first_expert + uint(EXPERTS); e++) {{
  float share = float(shares[e]);
{_each("others[k] += float(T(share * float(other[e * uint(H) + at])));")}}}
{_each("others[k] = float(T(others[k]));")}"""
