"""Which experts a row takes and with which shares, from its scores, in one launch.

What stands between the router's matrix and the experts is five launches of MLX's: the
choice, the scores of the chosen, their softmax, their scales, and a product. A
simdgroup has a row. It takes the best score that is left, as often as a row has
experts; of equal scores the lowest expert comes first, and a score that is no number
comes before all others. MLX leaves open which of equal scores it takes, so where the
last of the chosen equals the first of the others, either may stand here.

The softmax is of float32 and rounded to the scores' type once, and so is its product
with the scale. What is added up depends on the row alone: a row has the same bits
whatever the number of rows.

This file knows nothing of layers.
"""

from __future__ import annotations

import mlx.core as mx

from . import common
from .common import Kernel

MAX_EXPERTS = 256  # E: more would not fit in registers
_LANES = 32
_DTYPES = (mx.float32, mx.float16, mx.bfloat16)


def route(
    scores: mx.array, scales: mx.array, *, num_chosen: int
) -> tuple[mx.array, mx.array]:
    """Choose experts and say what each one's result counts.

    Where there are no kernels, or none for the arrays, MLX's operations do it.

    Args:
        scores: [..., E], of each expert.
        scales: [E], what the share of each expert is multiplied by.
        num_chosen: Experts of a row, E at most.

    Returns:
        Experts uint32 [..., num_chosen], in no order to rely on, and their shares
        [..., num_chosen] of the scores' type.
    """
    if common.backend() == "ops" or not _are_known(scores, scales, num_chosen):
        return plain(scores, scales, num_chosen=num_chosen)
    num_experts = scores.shape[-1]
    shape = (*scores.shape[:-1], num_chosen)
    experts, shares = common.launch(
        KERNEL,
        [common.padded(scores), common.padded(scales)],
        template=[
            ("T", scores.dtype),
            ("E", num_experts),
            ("CHOSEN", num_chosen),
            ("PIECES", -(-num_experts // _LANES)),
        ],
        grid=(scores.size // num_experts * _LANES, 1, 1),
        threadgroup=(_LANES, 1, 1),
        output_shapes=[shape, shape],
        output_dtypes=[mx.uint32, scores.dtype],
    )
    return experts, shares


def plain(
    scores: mx.array, scales: mx.array, *, num_chosen: int
) -> tuple[mx.array, mx.array]:
    """The same by MLX's operations, bit by bit as mlx-lm's Gemma 4 router has it."""
    experts = mx.argpartition(scores, kth=-num_chosen, axis=-1)[..., -num_chosen:]
    chosen = mx.take_along_axis(scores, experts, axis=-1)
    return experts, mx.softmax(chosen, axis=-1) * scales[experts]


def _are_known(scores: mx.array, scales: mx.array, num_chosen: int) -> bool:
    """Whether the kernel takes them: one type, not too many experts."""
    return (
        scores.dtype in _DTYPES
        and scales.dtype == scores.dtype
        and num_chosen <= min(_LANES, scores.shape[-1])
        and scores.shape[-1] <= MAX_EXPERTS
        and scores.size > 0
    )


_SOURCE = """\
  // E: experts. CHOSEN: of them that a row takes. PIECES: experts of a lane.
  uint lane = thread_index_in_simdgroup;
  uint row = threadgroup_position_in_grid.x;
  uint orders[PIECES];
  #pragma unroll
  for (int i = 0; i < PIECES; i++) {
    uint expert = lane + 32u * uint(i);
    orders[i] = 0u;  // less than that of any score
    if (expert < uint(E)) {
      float score = float(scores[row * uint(E) + expert]);
      orders[i] = order_of(score == 0.0f ? 0.0f : score);
      if (isnan(score)) orders[i] = 0xFFFFFFFFu;
    }
  }

  float largest = 0.0f;
  float own = 0.0f;  // lane t has what was chosen as number t
  uint own_expert = 0u;
  for (uint t = 0u; t < uint(CHOSEN); t++) {
    uint most = 0u;
    uint expert = uint(E);
    #pragma unroll
    for (int i = 0; i < PIECES; i++) {
      if (orders[i] > most) {
        most = orders[i];
        expert = lane + 32u * uint(i);
      }
    }
    uint best = simd_max(most);
    uint chosen = simd_min(most == best ? expert : uint(E));
    if (t == 0u) largest = value_of(best);
    if (lane == t) {
      own = value_of(best);
      own_expert = chosen;
    }
    #pragma unroll
    for (int i = 0; i < PIECES; i++) {
      if (lane + 32u * uint(i) == chosen) orders[i] = 0u;
    }
  }

  bool has_one = lane < uint(CHOSEN);
  float part = has_one ? exp(own - largest) : 0.0f;
  float share = float(T(part / simd_sum(part)));
  if (has_one) {
    uint at = row * uint(CHOSEN) + lane;
    experts[at] = own_expert;
    shares[at] = T(share * float(scales[own_expert]));
  }
"""

KERNEL = Kernel(
    name="route",
    input_names=("scores", "scales"),
    output_names=("experts", "shares"),
    source=_SOURCE,
)
