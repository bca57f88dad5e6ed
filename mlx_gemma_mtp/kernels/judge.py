"""How many drafts of a block stand, where the target's rows are whole vocabularies.

One simdgroup per row of the batch. By equality it compares tokens; by block it needs
the target's probabilities at the drafter's candidates alone, at most 64 of each step:
two for each lane, gathered from the logits (see ``acceptance.accept_block``). The token
behind the prefix of a row that is judged by block is for ``resample`` to draw.
"""

from __future__ import annotations

import mlx.core as mx

from . import common

_THREADS = 32

_SOURCE = """
    uint lane = thread_index_in_simdgroup;
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

    uint num_accepted = 0u;
    float accepted_reach = 1.0f;
    float running = 1.0f;  // P_i
    bool is_prefix = true;
    for (uint i = 0u; i < K; i++) {
      uint row = batch * num_rows + i;
      uint step = batch * K + i;
      int draft = draft_tokens[step];
      is_prefix = is_prefix && draft == tokens[row];
      if (!is_block) {
        num_accepted += is_prefix ? 1u : 0u;
      }
      // What both say of this step's candidates; equality makes no use of it.
      float largest = stats[row * 4u];
      float lowest = stats[row * 4u + 1u];
      float kept = stats[row * 4u + 2u];
      uint id_a = uint(draft_ids[step * 64u + lane]);
      uint id_b = uint(draft_ids[step * 64u + 32u + lane]);
      float q_a = exp(draft_scores[step * 64u + lane]);
      float q_b = exp(draft_scores[step * 64u + 32u + lane]);
      float weight = simd_sum(q_a + q_b);
      q_a = q_a / weight;
      q_b = q_b / weight;
      float p_a = 0.0f;
      float p_b = 0.0f;
      if (is_block && id_a < V) {
        float logit = capped(static_cast<float>(logits[row * V + id_a]), cap);
        p_a = logit >= lowest ? exp((logit - largest) / temp) / kept : 0.0f;
      }
      if (is_block && id_b < V) {
        float logit = capped(static_cast<float>(logits[row * V + id_b]), cap);
        p_b = logit >= lowest ? exp((logit - largest) / temp) / kept : 0.0f;
      }
      float both_a = running * p_a < q_a ? running * p_a : q_a;
      float both_b = running * p_b < q_b ? running * p_b : q_b;
      float missing = running - simd_sum(both_a + both_b);
      missing = missing > 0.0f ? missing : 0.0f;
      float scale = missing + 1.0f - running;
      float chance = missing / (scale > 1e-30f ? scale : 1e-30f);
      if (is_block && i > 0u) {
        float coin = INJECT ? coins[step - 1u]
                            : uniform_at(offset + i, 2u, offset, k0, k1);
        if (coin < chance) {
          num_accepted = i;
          accepted_reach = running;
        }
      }
      bool is_a = int(id_a) == draft;
      bool is_b = int(id_b) == draft;
      float p = simd_sum((is_a ? p_a : 0.0f) + (is_b ? p_b : 0.0f));
      float q = simd_sum((is_a ? q_a : 0.0f) + (is_b ? q_b : 0.0f));
      running = running * (p / (q > 1e-30f ? q : 1e-30f));
      running = running < 1.0f ? running : 1.0f;
    }
    if (is_block) {
      float coin = INJECT ? coins[batch * K + K - 1u]
                          : uniform_at(offset + K, 2u, offset, k0, k1);
      if (coin < running) {
        num_accepted = K;
        accepted_reach = running;
      }
    }
    int next_token = is_block ? -1 : tokens[batch * num_rows + num_accepted];
    for (uint i = lane; i <= K; i += 32u) {
      int token = next_token;
      if (i < num_accepted) token = draft_tokens[batch * K + i];
      report[batch * (K + 2u) + 1u + i] = token;
    }
    if (lane == 0u) {
      report[batch * (K + 2u)] = int(num_accepted);
      reach[batch] = accepted_reach;
    }
"""

KERNEL = common.Kernel(
    name="judge",
    input_names=(
        "logits",
        "stats",
        "tokens",
        "draft_tokens",
        "draft_scores",
        "draft_ids",
        "row_floats",
        "row_words",
        "softcap",
        "coins",
    ),
    output_names=("report", "reach"),
    source=_SOURCE,
)


def judge(
    logits: mx.array,
    stats: mx.array,
    tokens: mx.array,
    draft_tokens: mx.array,
    draft_scores: mx.array,
    draft_ids: mx.array,
    *,
    row_floats: mx.array,
    row_words: mx.array,
    softcap: float = 0.0,
    coins: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """Decide how many drafts of each row stand.

    Args:
        logits: Before the soft-cap, [B, K + 1, V].
        stats: From ``threshold``, float32 [B, K + 1, 4].
        tokens: From ``threshold``, int32 [B, K + 1].
        draft_tokens: int32 [B, K].
        draft_scores: Logarithms of weights of the drafter's candidates, -inf for what
            it drops, float32 [B, K, 64].
        draft_ids: The candidates' ids; 0x7fffffff, with score -inf, where there are
            fewer, int32 [B, K, 64].
        row_floats: As in ``threshold``, float32 [B, 8].
        row_words: As in ``threshold``, uint32 [B, 8].
        softcap: The soft-cap to apply; 0 for none.
        coins: Uniform numbers for BLOCK rows in place of the seed's, float32 [B, K].

    Returns:
        The number of accepted drafts, the drafts and the token behind them (as
        ``rounds.Report`` has it, -1 in BLOCK rows), int32 [B, K + 2]; and with what
        weight the target's probabilities enter the token behind, float32 [B].
    """
    B, K = draft_tokens.shape
    if K == 0:
        return mx.concatenate([mx.zeros_like(tokens), tokens], axis=1), mx.ones((B,))
    report, reach = common.launch(
        KERNEL,
        [
            logits,
            common.padded(stats),
            common.padded(tokens),
            common.padded(draft_tokens),
            draft_scores,
            draft_ids,
            row_floats,
            row_words,
            mx.full((common.MIN_ELEMENTS,), softcap, dtype=mx.float32),
            mx.zeros((common.MIN_ELEMENTS,)) if coins is None else common.padded(coins),
        ],
        template=[("INJECT", coins is not None)],
        grid=(B * _THREADS, 1, 1),
        threadgroup=(_THREADS, 1, 1),
        output_shapes=[(B, K + 2), (B,)],
        output_dtypes=[mx.int32, mx.float32],
    )
    return report, reach
