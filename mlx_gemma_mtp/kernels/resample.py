"""The token behind the accepted drafts, drawn from a whole row of the vocabulary.

One threadgroup per row of the batch reads the one row of logits that counts, once. The
draw is an argmax of log(weight) + noise, the weight being what the target's probability
exceeds the drafter's by. Only the drafter's candidates have a probability to subtract:
32768 bits in threadgroup memory, keyed by the low bits of the ids, say of nearly every
other token that it is none of them, and the list itself decides the rest.
"""

from __future__ import annotations

import mlx.core as mx

from . import common

_THREADS = common.MAX_THREADS

_SOURCE = """
    const float NOTHING = as_type<float>(0xFF800000u);
    const uint NO_ID = 0x7FFFFFFFu;
    threadgroup float cells[8];
    threadgroup uint id_cells[8];
    threadgroup uint ids[64];
    threadgroup float owed[64];
    threadgroup uint seen[1024];

    uint thread_id = thread_index_in_threadgroup;
    uint lane = thread_index_in_simdgroup;
    uint simdgroup = simdgroup_index_in_threadgroup;
    uint batch = threadgroup_position_in_grid.x;
    uint num_rows = logits_shape[1];
    uint V = logits_shape[2];
    uint K = num_rows - 1u;
    float cap = softcap[0];
    float temp = row_floats[batch * 8u];
    uint k0 = row_words[batch * 8u];
    uint k1 = row_words[batch * 8u + 1u];
    bool is_block = row_words[batch * 8u + 2u] == 2u;
    uint offset = row_words[batch * 8u + 4u];
    temp = temp > 0.0f ? temp : 1.0f;
    uint num_accepted = uint(judged[batch * (K + 2u)]);
    uint row = batch * num_rows + num_accepted;
    float largest = stats[row * 4u];
    float lowest = stats[row * 4u + 1u];
    float kept = stats[row * 4u + 2u];
    float share = reach[batch];

    // The drafter's candidates of this step; where all drafts stand there is none.
    bool is_owed = num_accepted < K && thread_id < 64u;
    float weight = 0.0f;
    uint own_id = NO_ID;
    if (is_owed) {
      uint at = (batch * K + num_accepted) * 64u + thread_id;
      weight = exp(draft_scores[at]);
      own_id = uint(draft_ids[at]);
    }
    float whole;
    REDUCE(whole, simd_sum, cells, weight, 0.0f);
    if (thread_id < 64u) {
      ids[thread_id] = own_id;
      owed[thread_id] = is_owed ? weight / whole : 0.0f;
    }
    BARRIER();
    // Each thread sets the bits of four words: no two write the same.
    for (uint at = thread_id; at < 1024u; at += 256u) {
      uint word = 0u;
      for (uint j = 0u; j < 64u; j++) {
        uint id = ids[j];
        bool is_here = id != NO_ID && ((id >> 5) & 1023u) == at;
        word |= is_here ? 1u << (id & 31u) : 0u;
      }
      seen[at] = word;
    }
    BARRIER();

    // The best token of the difference, and of the target alone, which decides where
    // rounding leaves no difference.
    float best = NOTHING;
    float best_alone = NOTHING;
    uint best_id = 4u * thread_id;
    uint best_id_alone = 4u * thread_id;
    uint end = is_block ? V : 0u;
    for (uint first = 4u * thread_id; first < end; first += 1024u) {
      Words words;
      bool has_words = false;
      uint bits_seen = seen[(first >> 5) & 1023u] >> (first & 31u);
      for (uint id = first; id < first + 4u && id < end; id++) {
        float logit = capped(static_cast<float>(logits[row * V + id]), cap);
        float p = logit >= lowest ? exp((logit - largest) / temp) / kept : 0.0f;
        if (p > 0.0f) {
          if (!has_words) {
            words = philox(first >> 2, offset, 3u, offset, k0, k1);
            has_words = true;
          }
          float noise = gumbel_of(words, id);
          float q = 0.0f;
          if ((bits_seen >> (id & 3u)) & 1u) {
            for (uint j = 0u; j < 64u; j++) q = ids[j] == id ? owed[j] : q;
          }
          float difference = share * p - q;
          float score = difference > 0.0f ? log(difference) + noise : NOTHING;
          if (score > best) {
            best = score;
            best_id = id;
          }
          float score_alone = log(p) + noise;
          if (score_alone > best_alone) {
            best_alone = score_alone;
            best_id_alone = id;
          }
        }
      }
    }
    float best_score;
    float best_score_alone;
    uint token;
    uint token_alone;
    REDUCE(best_score, simd_max, cells, best, NOTHING);
    REDUCE(best_score_alone, simd_max, cells, best_alone, NOTHING);
    best_id = best == best_score ? best_id : NO_ID;
    best_id_alone = best_alone == best_score_alone ? best_id_alone : NO_ID;
    REDUCE(token, simd_min, id_cells, best_id, NO_ID);
    REDUCE(token_alone, simd_min, id_cells, best_id_alone, NO_ID);
    token = best_score > NOTHING ? token : token_alone;
    for (uint i = thread_id; i < K + 2u; i += 256u) {
      int value = judged[batch * (K + 2u) + i];
      if (is_block && i > num_accepted) value = int(token);
      report[batch * (K + 2u) + i] = value;
    }
"""

KERNEL = common.Kernel(
    name="resample",
    input_names=(
        "judged",
        "reach",
        "logits",
        "stats",
        "draft_scores",
        "draft_ids",
        "row_floats",
        "row_words",
        "softcap",
    ),
    output_names=("report",),
    source=_SOURCE,
)


def resample(
    report: mx.array,
    reach: mx.array,
    logits: mx.array,
    stats: mx.array,
    draft_scores: mx.array,
    draft_ids: mx.array,
    *,
    row_floats: mx.array,
    row_words: mx.array,
    softcap: float = 0.0,
) -> mx.array:
    """Draw the token behind the accepted drafts of BLOCK rows.

    Args:
        report: From ``judge``, int32 [B, K + 2], K at least 1.
        reach: From ``judge``, float32 [B].
        logits: Before the soft-cap, [B, K + 1, V].
        stats: From ``threshold``, float32 [B, K + 1, 4].
        draft_scores: As in ``judge``, float32 [B, K, 64].
        draft_ids: As in ``judge``, int32 [B, K, 64].
        row_floats: As in ``threshold``, float32 [B, 8].
        row_words: As in ``threshold``, uint32 [B, 8].
        softcap: The soft-cap to apply; 0 for none.

    Returns:
        The report with the tokens that were missing, int32 [B, K + 2]; other rows are
        as they were.
    """
    (result,) = common.launch(
        KERNEL,
        [
            common.padded(report),
            common.padded(reach),
            logits,
            common.padded(stats),
            draft_scores,
            draft_ids,
            row_floats,
            row_words,
            mx.full((common.MIN_ELEMENTS,), softcap, dtype=mx.float32),
        ],
        template=[],
        grid=(report.shape[0] * _THREADS, 1, 1),
        threadgroup=(_THREADS, 1, 1),
        output_shapes=[report.shape],
        output_dtypes=[mx.int32],
    )
    return result
