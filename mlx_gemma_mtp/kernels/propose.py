"""One draft of every row from its list of most likely tokens.

One simdgroup per row, two neighbouring entries of the list per lane, so that sums over
what stands before an entry are one prefix sum of the simdgroup. The filters act as in
``distribution``: top-p (the entry that crosses it stays, and with it its equals), min-p
and top-k, all before the temperature.

Prefix sums of a simdgroup are rounded in an order of their own, so they need not grow
from entry to entry. The draw therefore looks only at entries with a weight, and takes
the largest of their sums as the whole: then one of them always exceeds it times the
uniform number, and no entry that a filter dropped is ever drawn.
"""

from __future__ import annotations

import mlx.core as mx

from . import common

_SOURCE = r"""
  const uint LIST = 64u;
  const uint PAD_ID = 0x7FFFFFFFu;
  const uint COUPLED = 1u;
  const uint BLOCK = 2u;
  const uint SHARED = 0u;    // streams of noise
  const uint PROPOSAL = 1u;
  const float LARGEST = as_type<float>(0x7F800000u);  // infinity

  uint row = threadgroup_position_in_grid.x;
  uint lane = thread_index_in_simdgroup;
  float temp = row_floats[row * 8u];
  float top_p = row_floats[row * 8u + 1u];
  float min_p = row_floats[row * 8u + 2u];
  uint seed_low = row_words[row * 8u];
  uint seed_high = row_words[row * 8u + 1u];
  uint mode = row_words[row * 8u + 2u];
  uint top_k = row_words[row * 8u + 3u];
  uint offset = row_words[row * 8u + 4u];
  uint position = offset + step[0];

  uint rank0 = 2u * lane;
  uint rank1 = rank0 + 1u;
  float value0 = values[row * LIST + rank0];
  float value1 = values[row * LIST + rank1];
  uint id0 = uint(ids[row * LIST + rank0]);
  uint id1 = uint(ids[row * LIST + rank1]);
  float best = values[row * LIST];
  float log_mass = stats[row * 2u] + log(stats[row * 2u + 1u]);

  // Top-p: the lowest value that some entry before the crossing has.
  bool is_kept0 = id0 != PAD_ID;
  bool is_kept1 = id1 != PAD_ID;
  float prob0 = is_kept0 ? exp(value0 - log_mass) : 0.0f;
  float prob1 = is_kept1 ? exp(value1 - log_mass) : 0.0f;
  float above0 = simd_prefix_exclusive_sum(prob0 + prob1);
  float above1 = above0 + prob0;
  float inside0 = (is_kept0 && above0 < top_p) ? value0 : LARGEST;
  float inside1 = (is_kept1 && above1 < top_p) ? value1 : LARGEST;
  float lowest = simd_min(inside0 < inside1 ? inside0 : inside1);
  is_kept0 = is_kept0 && value0 >= lowest;
  is_kept1 = is_kept1 && value1 >= lowest;

  // Min-p and top-k.
  float floor_value = min_p > 0.0f ? best + log(min_p) : -LARGEST;
  is_kept0 = is_kept0 && value0 >= floor_value && rank0 < top_k;
  is_kept1 = is_kept1 && value1 >= floor_value && rank1 < top_k;

  // Relative to the best, so that a tiny temperature neither rounds nor overflows.
  float scale = temp > 0.0f ? temp : 1.0f;
  float score0 = is_kept0 ? (value0 - best) / scale : -LARGEST;
  float score1 = is_kept1 ? (value1 - best) / scale : -LARGEST;
  scores[row * LIST + rank0] = score0;
  scores[row * LIST + rank1] = score1;

  // The Gumbel maximum under the noise that target and drafter share.
  float noisy0 = score0;
  float noisy1 = score1;
  if (mode == COUPLED) {
    noisy0 += gumbel_at(id0, position, SHARED, 0u, seed_low, seed_high);
    noisy1 += gumbel_at(id1, position, SHARED, 0u, seed_low, seed_high);
  }
  float noisiest = simd_max(noisy0 > noisy1 ? noisy0 : noisy1);
  uint coupled = simd_min(
      noisy0 == noisiest ? rank0 : (noisy1 == noisiest ? rank1 : LIST));

  // The draw: the first entry at which the sum of weights exceeds a part of the whole.
  float weight0 = is_kept0 ? exp(score0) : 0.0f;
  float weight1 = is_kept1 ? exp(score1) : 0.0f;
  float sum0 = simd_prefix_exclusive_sum(weight0 + weight1) + weight0;
  float sum1 = sum0 + weight1;
  sum0 = weight0 > 0.0f ? sum0 : 0.0f;
  sum1 = weight1 > 0.0f ? sum1 : 0.0f;
  float whole = simd_max(sum0 > sum1 ? sum0 : sum1);
  float part =
      whole * uniform_at(position, PROPOSAL, offset, seed_low, seed_high);
  uint drawn = simd_min(sum0 > part ? rank0 : (sum1 > part ? rank1 : LIST));

  if (lane == 0u) {
    uint rank = mode == COUPLED ? coupled : (mode == BLOCK ? drawn : 0u);
    // Where a NaN left nothing to choose: the first.
    tokens[row] = ids[row * LIST + (rank < LIST ? rank : 0u)];
  }
"""

KERNEL = common.Kernel(
    name="propose",
    input_names=("values", "ids", "stats", "row_floats", "row_words", "step"),
    output_names=("tokens", "scores"),
    source=_SOURCE,
)


def propose(
    values: mx.array,
    ids: mx.array,
    stats: mx.array,
    *,
    row_floats: mx.array,
    row_words: mx.array,
    step: int,
) -> tuple[mx.array, mx.array]:
    """Choose the draft of one step.

    Args:
        values: The drafter's best logits, descending, float32 [B, 64].
        ids: Their tokens, int32 [B, 64]; 0x7fffffff where the list is shorter.
        stats: Largest logit of the whole row and sum of ``exp(logit - largest)``,
            float32 [B, 2].
        row_floats: Temperature, top-p (off: 2), min-p (off: 0) and room, float32
            [B, 8].
        row_words: Seed (low, high word), mode (``common.GREEDY``, ``COUPLED`` or
            ``BLOCK``), top-k (off: 2**31 - 1), the newest token's position and room,
            uint32 [B, 8].
        step: Number of the draft step, 1 to K.

    Returns:
        The drafts, int32 [B, 1], and the scores of the list as in
        ``distribution.Distribution``, float32 [B, 1, 64].
    """
    B = values.shape[0]
    tokens, scores = common.launch(
        KERNEL,
        [
            values,
            ids,
            common.padded(stats),
            row_floats,
            row_words,
            mx.full((common.MIN_ELEMENTS,), step, mx.uint32),
        ],
        template=[],
        grid=(B * 32, 1, 1),
        threadgroup=(32, 1, 1),
        output_shapes=[(B, 1), (B, 1, common.LIST)],
        output_dtypes=[mx.int32, mx.float32],
    )
    return tokens, scores
