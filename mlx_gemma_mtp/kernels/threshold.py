"""What the filters keep of whole rows, and the tokens that equality decides by.

One threadgroup per row reads the row a few times; nothing is sorted and nothing of the
row's size is written. Top-p asks for the lowest logit that still has less than top_p of
the mass above it. The mass above a bound only falls as the bound rises, so the logit is
found by bisection over the bits of floats, seven bounds at a time: every pass takes
three bits. A float of 16 bits has no more than 16 to find, and the share of the mass
that top-p drops says where to begin.

Sums are taken in one order in every pass, and adding nothing instead of something
never raises a rounded sum, so the rounded masses fall as the true ones do, and a row
gives the same bound on every run.
"""

from __future__ import annotations

import mlx.core as mx

from . import common

_THREADS = common.MAX_THREADS
_NUM_STATS = 4
_COARSE = {mx.bfloat16: 16, mx.float16: 13}  # bits that are alike in all their floats

_SOURCE = """
    constexpr uint PROBES = 7u;
    const float NOTHING = as_type<float>(0xFF800000u);
    const uint NO_ID = 0xFFFFFFFFu;
    threadgroup float cells[8];
    threadgroup uint id_cells[8];
    threadgroup float partial[56];
    threadgroup float masses[8];

    uint thread_id = thread_index_in_threadgroup;
    uint lane = thread_index_in_simdgroup;
    uint simdgroup = simdgroup_index_in_threadgroup;
    uint row = threadgroup_position_in_grid.x;
    uint num_rows = logits_shape[1];
    uint V = logits_shape[2];
    uint start = row * V;
    uint batch = row / num_rows;
    float cap = softcap[0];
    float temp = row_floats[batch * 8u];
    float top_p = row_floats[batch * 8u + 1u];
    float min_p = row_floats[batch * 8u + 2u];
    uint k0 = row_words[batch * 8u];
    uint k1 = row_words[batch * 8u + 1u];
    uint mode = row_words[batch * 8u + 2u];
    uint position = row_words[batch * 8u + 4u] + 1u + row % num_rows;
    temp = temp > 0.0f ? temp : 1.0f;

    // The best logit, and the lowest id that has it.
    float best = NOTHING;
    uint best_id = 4u * thread_id;
    for (uint first = 4u * thread_id; first < V; first += 1024u) {
      for (uint id = first; id < first + 4u && id < V; id++) {
        float logit = capped(static_cast<float>(logits[start + id]), cap);
        if (logit > best) {
          best = logit;
          best_id = id;
        }
      }
    }
    float largest;
    uint argmax;
    REDUCE(largest, simd_max, cells, best, NOTHING);
    uint first_best = best == largest ? best_id : NO_ID;
    REDUCE(argmax, simd_min, id_cells, first_best, NO_ID);

    float own_sum = 0.0f;
    for (uint first = 4u * thread_id; first < V; first += 1024u) {
      for (uint id = first; id < first + 4u && id < V; id++) {
        own_sum += exp(capped(static_cast<float>(logits[start + id]), cap) - largest);
      }
    }
    float sum;
    REDUCE(sum, simd_sum, cells, own_sum, 0.0f);

    float lowest = NOTHING;
    if (TOP_P && top_p < 1.0f) {
      // Of less than this even V equals are too little to be what top-p drops; e^-1
      // of it is left to rounding. The bound is above `low` and at most `high`.
      float floor_logit = largest + log((1.0f - top_p) * sum / float(V)) - 1.0f;
      uint low = (order_of(floor_logit) >> COARSE) - 1u;
      uint high = order_of(largest) >> COARSE;
      float inside = top_p * sum;
      while (low + 1u < high) {
        uint stride = (high - low + PROBES) / (PROBES + 1u);
        float above[PROBES];
        for (uint j = 0u; j < PROBES; j++) above[j] = 0.0f;
        for (uint first = 4u * thread_id; first < V; first += 1024u) {
          for (uint id = first; id < first + 4u && id < V; id++) {
            float logit = capped(static_cast<float>(logits[start + id]), cap);
            uint key = order_of(logit) >> COARSE;
            if (key > low + stride) {
              float weight = exp(logit - largest);
              for (uint j = 0u; j < PROBES; j++) {
                above[j] += key > low + stride * (j + 1u) ? weight : 0.0f;
              }
            }
          }
        }
        for (uint j = 0u; j < PROBES; j++) {
          float mass = simd_sum(above[j]);
          if (lane == 0u) partial[j * 8u + simdgroup] = mass;
        }
        BARRIER();
        // A simdgroup for each probe; the last one does its neighbour's work again.
        uint mine = simdgroup < PROBES ? simdgroup : PROBES - 1u;
        float mass = simd_sum(lane < 8u ? partial[mine * 8u + lane] : 0.0f);
        if (lane == 0u && simdgroup < PROBES) masses[simdgroup] = mass;
        BARRIER();
        uint from = low;
        uint next_high = high;
        for (uint j = 0u; j < PROBES; j++) {
          uint probe = from + stride * (j + 1u);
          if (probe < high) {
            if (masses[j] < inside) {
              next_high = probe < next_high ? probe : next_high;
            } else {
              low = probe;
            }
          }
        }
        high = next_high;
      }
      // The bits that were left out are zeros, of negative numbers' orders ones.
      uint order = high << COARSE;
      lowest = value_of((order >> 31) ? order : order | ((1u << COARSE) - 1u));
    }
    if (MIN_P && min_p > 0.0f) {
      float floor_logit = largest + log(min_p);
      lowest = floor_logit > lowest ? floor_logit : lowest;
    }

    // The mass that is kept, and the token of the Gumbel maximum.
    bool is_noisy = NOISE && (mode == 1u || (mode == 2u && num_rows == 1u));
    float own_kept = 0.0f;
    best = NOTHING;
    best_id = 4u * thread_id;
    for (uint first = 4u * thread_id; first < V; first += 1024u) {
      Words words;
      bool has_words = false;
      for (uint id = first; id < first + 4u && id < V; id++) {
        float logit = capped(static_cast<float>(logits[start + id]), cap);
        if (logit >= lowest) {
          float score = (logit - largest) / temp;
          own_kept += exp(score);
          if (is_noisy) {
            if (!has_words) {
              words = philox(first >> 2, position, 0u, 0u, k0, k1);
              has_words = true;
            }
            score += gumbel_of(words, id);
            if (score > best) {
              best = score;
              best_id = id;
            }
          }
        }
      }
    }
    float kept;
    float best_score;
    uint token;
    REDUCE(kept, simd_sum, cells, own_kept, 0.0f);
    REDUCE(best_score, simd_max, cells, best, NOTHING);
    first_best = best == best_score ? best_id : NO_ID;
    REDUCE(token, simd_min, id_cells, first_best, NO_ID);
    if (thread_id == 0u) {
      stats[row * 4u] = largest;
      stats[row * 4u + 1u] = lowest;
      stats[row * 4u + 2u] = kept;
      stats[row * 4u + 3u] = sum;
      tokens[row] = int(is_noisy ? token : argmax);
    }
"""

KERNEL = common.Kernel(
    name="threshold",
    input_names=("logits", "row_floats", "row_words", "softcap"),
    output_names=("stats", "tokens"),
    source=_SOURCE,
)


def threshold(
    logits: mx.array,
    *,
    row_floats: mx.array,
    row_words: mx.array,
    has_top_p: bool,
    has_min_p: bool,
    has_coupled: bool,
    softcap: float = 0.0,
) -> tuple[mx.array, mx.array]:
    """Find what top-p and min-p keep of every row, and choose the rows' tokens.

    Args:
        logits: Before the soft-cap, float32, float16 or bfloat16 [B, K + 1, V], 8
            elements or more.
        row_floats: temp, top_p (2 for none), min_p (0 for none), float32 [B, 8].
        row_words: Low and high word of the seed, mode, top_k (not read), offset,
            uint32 [B, 8].
        has_top_p: Whether some row filters by top-p.
        has_min_p: Whether some row filters by min-p.
        has_coupled: Whether some row is COUPLED.
        softcap: The soft-cap to apply; 0 for none.

    Returns:
        For each row the largest logit, the lowest that is kept (-inf for all of them),
        the sum of exp((logit - largest) / temp) over those kept and that of
        exp(logit - largest) over all, float32 [B, K + 1, 4]; and its token, int32
        [B, K + 1]: the Gumbel maximum of a COUPLED row, and of a BLOCK row where K is
        0, else the argmax.
    """
    B, L, _ = logits.shape
    stats, tokens = common.launch(
        KERNEL,
        [
            logits,
            row_floats,
            row_words,
            mx.full((common.MIN_ELEMENTS,), softcap, dtype=mx.float32),
        ],
        template=[
            ("TOP_P", has_top_p),
            ("MIN_P", has_min_p),
            ("NOISE", has_coupled or L == 1),
            ("COARSE", 0 if softcap else _COARSE.get(logits.dtype, 0)),
        ],
        grid=(B * L * _THREADS, 1, 1),
        threadgroup=(_THREADS, 1, 1),
        output_shapes=[(B, L, _NUM_STATS), (B, L)],
        output_dtypes=[mx.float32, mx.int32],
    )
    return stats, tokens
