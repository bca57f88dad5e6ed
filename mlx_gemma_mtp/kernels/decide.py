"""What of a draft block stands, and the token behind it: one launch for all rows.

A threadgroup decides a row of the batch, and each of its simdgroups one row of the
verify block (two where there are nine), whose list of 64 best tokens it holds in
registers, two to a lane:

1. filters and temperature, as in distribution.py, and the list's probabilities;
2. by block (acceptance.accept_block): a compare of every target token with every token
   that the drafter proposed, which gives p(x) and q(x) of the draft, and for each of
   the target's tokens what the drafter offers of it;
3. the chance that the prefix up to here stands, and the token that would follow it:
   the best under the noise of that token's place;
4. behind a barrier, every thread finds the length of the prefix and writes one token
   of the report.

A token that is drawn behind a prefix depends on that prefix's row alone, so every
simdgroup draws its own before anybody knows where the block ends. Of the products
P_1 .. P_K each simdgroup multiplies what it needs itself.
"""

from __future__ import annotations

import mlx.core as mx

from . import common
from .common import BLOCK, GREEDY, LIST, ROW_FLOATS, ROW_WORDS, Kernel

MAX_DRAFT_TOKENS = 8

_SOURCE = r"""
    constexpr uint NUM_PROPOSED = HAS_BLOCK ? K * LIST : 1;
    threadgroup float proposed[NUM_PROPOSED];  // probabilities of the drafter's lists
    threadgroup int proposed_ids[NUM_PROPOSED];
    threadgroup float ratios[K + 1];  // p(x) / q(x) of every draft
    threadgroup int tokens[K + 1];
    // Entry i is by equality whether draft i + 1 is right, by block whether the first i
    // drafts stand.
    threadgroup int stands[K + 1];

    const float minus_infinity = as_type<float>(0xFF800000u);
    const float tiny = 1e-30f;  // keeps a quotient of zeros from being no number
    uint batch = threadgroup_position_in_grid.x;
    uint first = thread_index_in_simdgroup * 2;  // this lane's tokens: first, first + 1

    uint setting = batch * ROW_FLOATS;
    float temp = row_floats[setting];
    float top_p = row_floats[setting + 1];
    float min_p = row_floats[setting + 2];
    uint word = batch * ROW_WORDS;
    uint seed0 = row_words[word];
    uint seed1 = row_words[word + 1];
    uint mode = row_words[word + 2];
    uint top_k = row_words[word + 3];
    uint offset = row_words[word + 4];
    bool is_block = HAS_BLOCK && mode == BLOCK_MODE;

    // What each row of this simdgroup leaves for behind the barriers.
    float score0s[TURNS];
    float score1s[TURNS];
    float p0s[TURNS];
    float p1s[TURNS];
    float owed0s[TURNS];  // the drafter's probabilities of this lane's tokens
    float owed1s[TURNS];

    for (uint turn = 0; turn < TURNS; turn++) {
        uint row = simdgroup_index_in_threadgroup + turn * SIMDGROUPS;
        if (row > K) break;
        uint list = (batch * (K + 1) + row) * LIST;
        // Filters. The mass above a token is that of the lanes before, and its
        // neighbour's.
        float value0 = values[list + first];
        float value1 = values[list + first + 1];
        float best = simd_max(value0);
        uint stat = (batch * (K + 1) + row) * 2;
        float log_mass = stats[stat] + log(stats[stat + 1]);
        float mass0 = exp(value0 - log_mass);
        float mass1 = exp(value1 - log_mass);
        float above0 = simd_prefix_exclusive_sum(mass0 + mass1);
        float above1 = above0 + mass0;
        float inside = above1 < top_p ? value1 : (above0 < top_p ? value0 : best);
        float least = simd_min(inside);  // the token that crosses top_p, and its equals
        float floor_of_row = min_p > 0.0f ? best + log(min_p) : minus_infinity;
        bool keeps0 = value0 > minus_infinity && value0 >= least
            && value0 >= floor_of_row && first < top_k;
        bool keeps1 = value1 > minus_infinity && value1 >= least
            && value1 >= floor_of_row && first + 1 < top_k;
        float divisor = temp > 0.0f ? temp : 1.0f;
        float score0 = keeps0 ? (value0 - best) / divisor : minus_infinity;
        float score1 = keeps1 ? (value1 - best) / divisor : minus_infinity;
        float p0 = 0.0f;
        float p1 = 0.0f;
        if (is_block) {
            p0 = exp(score0);
            p1 = exp(score1);
            float total = simd_sum(p0 + p1);
            p0 = p0 / total;
            p1 = p1 / total;
        }
        if (HAS_BLOCK && row < K) {  // row K judges no draft
            uint from = (batch * K + row) * LIST + first;
            uint to = row * LIST + first;
            float q0 = exp(draft_scores[from]);
            float q1 = exp(draft_scores[from + 1]);
            float q_total = simd_sum(q0 + q1);
            proposed[to] = q0 / q_total;
            proposed[to + 1] = q1 / q_total;
            proposed_ids[to] = draft_ids[from];
            proposed_ids[to + 1] = draft_ids[from + 1];
        }
        score0s[turn] = score0;
        score1s[turn] = score1;
        p0s[turn] = p0;
        p1s[turn] = p1;
    }
    BARRIER();
    for (uint turn = 0; turn < TURNS; turn++) {
        uint row = simdgroup_index_in_threadgroup + turn * SIMDGROUPS;
        owed0s[turn] = 0.0f;
        owed1s[turn] = 0.0f;
        if (!HAS_BLOCK || !is_block || row >= K) break;
        uint list = (batch * (K + 1) + row) * LIST;
        int id0 = ids[list + first];
        int id1 = ids[list + first + 1];
        int draft = draft_tokens[batch * K + row];
        float q = 0.0f;
        bool is_proposed = false;
        for (uint i = row * LIST; i < (row + 1) * LIST; i++) {
            int id = proposed_ids[i];
            float mass = proposed[i];
            owed0s[turn] += id == id0 ? mass : 0.0f;
            owed1s[turn] += id == id1 ? mass : 0.0f;
            q += id == draft ? mass : 0.0f;
            is_proposed = is_proposed || id == draft;
        }
        float p = simd_sum((id0 == draft ? p0s[turn] : 0.0f)
                           + (id1 == draft ? p1s[turn] : 0.0f));
        if (thread_index_in_simdgroup == 0) {
            ratios[row] = is_proposed ? p / (q > tiny ? q : tiny) : 0.0f;
        }
    }
    BARRIER();

    // What of a row's tokens is to be drawn from, and whether its prefix stands.
    for (uint turn = 0; turn < TURNS; turn++) {
        uint row = simdgroup_index_in_threadgroup + turn * SIMDGROUPS;
        if (row > K) break;
        uint list = (batch * (K + 1) + row) * LIST;
        int id0 = ids[list + first];
        int id1 = ids[list + first + 1];
        float weight0 = score0s[turn];  // logarithms
        float weight1 = score1s[turn];
        uint place = offset + 1 + row;
        uint stream = 0;  // numbers of the streams as in noise.py
        uint start = 0;
        bool is_won = false;
        if (HAS_BLOCK && is_block) {
            float reach = 1.0f;
            for (uint i = 0; i < row; i++) {
                float longer = reach * ratios[i];
                reach = longer < 1.0f ? longer : 1.0f;
            }
            float p0 = p0s[turn];
            float p1 = p1s[turn];
            float owed0 = owed0s[turn];
            float owed1 = owed1s[turn];
            float share0 = reach * p0;
            float share1 = reach * p1;
            float overlap = simd_sum((share0 < owed0 ? share0 : owed0)
                                     + (share1 < owed1 ? share1 : owed1));
            // Rounding can take it below zero where both distributions agree.
            float missing = reach > overlap ? reach - overlap : 0.0f;
            float whole = missing + 1.0f - reach;
            float chance = row < K ? missing / (whole > tiny ? whole : tiny) : reach;
            float coin = 1.0f;
            if (row > 0) {
                coin = INJECT ? coins[batch * K + row - 1]
                              : uniform_at(offset + row, 2, offset, seed0, seed1);
            }
            is_won = row > 0 && coin < chance;

            float left0 = share0 > owed0 ? share0 - owed0 : 0.0f;
            float left1 = share1 > owed1 ? share1 - owed1 : 0.0f;
            // Empty only where both distributions are the same and rounding says
            // otherwise.
            bool is_empty = simd_sum(left0 + left1) <= 0.0f;
            left0 = is_empty ? p0 : left0;
            left1 = is_empty ? p1 : left1;
            weight0 = left0 > 0.0f ? log(left0) : minus_infinity;
            weight1 = left1 > 0.0f ? log(left1) : minus_infinity;
            place = offset;
            stream = 3;
            start = offset;
        }
        float noisy0 =
            weight0 + gumbel_at(uint(id0), place, stream, start, seed0, seed1);
        float noisy1 =
            weight1 + gumbel_at(uint(id1), place, stream, start, seed0, seed1);
        float highest = simd_max(noisy0 > noisy1 ? noisy0 : noisy1);
        uint candidate =
            noisy0 == highest ? first : (noisy1 == highest ? first + 1 : LIST);
        uint chosen = simd_min(candidate);  // of equals the first
        chosen = mode == GREEDY_MODE || chosen == LIST ? 0 : chosen;
        if (thread_index_in_simdgroup == 0) {
            int token = ids[list + chosen];
            tokens[row] = token;
            if (!is_block && row < K) is_won = token == draft_tokens[batch * K + row];
            stands[row] = is_won ? 1 : 0;
        }
    }
    BARRIER();

    // By block the last prefix that is won counts, by equality the first that is lost.
    uint num_accepted = 0;
    if (is_block) {
        for (uint i = 1; i <= K; i++) {
            num_accepted = stands[i] ? i : num_accepted;
        }
    } else {
        while (num_accepted < K && stands[num_accepted]) num_accepted++;
    }
    uint entry = thread_index_in_threadgroup;
    if (entry < K + 2) {
        int word_of_report = int(num_accepted);
        if (entry > 0) {
            word_of_report = entry <= num_accepted ? draft_tokens[batch * K + entry - 1]
                                                   : tokens[num_accepted];
        }
        report[batch * (K + 2) + entry] = word_of_report;
    }
"""

KERNEL = Kernel(
    name="decide",
    input_names=(
        "values",
        "ids",
        "stats",
        "draft_tokens",
        "draft_scores",
        "draft_ids",
        "row_floats",
        "row_words",
        "coins",
    ),
    output_names=("report",),
    source=_SOURCE,
)


def decide(
    values: mx.array,
    ids: mx.array,
    stats: mx.array,
    draft_tokens: mx.array,
    draft_scores: mx.array | None,
    draft_ids: mx.array | None,
    *,
    row_floats: mx.array,
    row_words: mx.array,
    coins: mx.array | None = None,
) -> mx.array:
    """Decide every row by its mode.

    A list that has fewer tokens ends in scores of -inf under the id 0x7FFFFFFF.

    Args:
        values: The target's best scores of every row, after any soft-cap, descending,
            of equals the lowest id first, float32 [B, K + 1, 64], K <= 8.
        ids: Their token ids, int32 [B, K + 1, 64].
        stats: Of the whole row the highest score, and the sum of exp(score - highest),
            float32 [B, K + 1, 2].
        draft_tokens: The proposals, int32 [B, K].
        draft_scores: ``sampling.Distribution.scores`` of what they were drawn from,
            float32 [B, K, 64]; None where no row is decided by block. Without it, or
            without drafts, such a row is decided as a coupled one.
        draft_ids: The token ids of those, int32 [B, K, 64]; None with draft_scores.
        row_floats: temp, top_p (off: 2), min_p (off: 0), and room, float32 [B, 8].
        row_words: Low and high word of the seed, mode, top_k (off: 2**31 - 1), the
            newest token's position, and room, uint32 [B, 8].
        coins: What decides blocks instead of random numbers, float32 [B, K]; for
            tests.

    Returns:
        The number of accepted drafts, then these and the token behind them, which
        fills the rest, int32 [B, K + 2].
    """
    B, num_rows, _ = values.shape
    K = num_rows - 1
    if K > MAX_DRAFT_TOKENS:
        raise ValueError(f"K must be at most {MAX_DRAFT_TOKENS}: got {K}")
    has_block = K > 0 and draft_scores is not None and draft_ids is not None
    num_simdgroups = min(num_rows, common.MAX_THREADS // 32)
    nothing = mx.zeros((common.MIN_ELEMENTS,))
    if not has_block or draft_scores is None or draft_ids is None:
        draft_scores, draft_ids = nothing, nothing.astype(mx.int32)
    (report,) = common.launch(
        KERNEL,
        [
            values,
            ids,
            common.padded(stats),
            common.padded(draft_tokens),
            draft_scores,
            draft_ids,
            row_floats,
            row_words,
            nothing if coins is None else common.padded(coins),
        ],
        template=[
            ("K", K),
            ("HAS_BLOCK", has_block),
            ("INJECT", coins is not None),
            ("LIST", LIST),
            ("SIMDGROUPS", num_simdgroups),
            ("TURNS", -(-num_rows // num_simdgroups)),
            ("ROW_FLOATS", ROW_FLOATS),
            ("ROW_WORDS", ROW_WORDS),
            ("GREEDY_MODE", GREEDY),
            ("BLOCK_MODE", BLOCK),
        ],
        grid=(32 * num_simdgroups * B, 1, 1),
        threadgroup=(32 * num_simdgroups, 1, 1),
        output_shapes=[(B, K + 2)],
        output_dtypes=[mx.int32],
    )
    return report
