"""Mistakes to seed into the texts of the kernels of norms, by what finds them."""

from __future__ import annotations

from dataclasses import replace

from tests.kernels.matmul_mistakes import Mistake
from tests.kernels.norms import Heads, Sum

# ------------------------------------------------------------------------ add_norm

_RANDOM = Sum.random(3, 1100, has_branches=True)
# So small that eps counts.
ADDED = replace(_RANDOM, y=_RANDOM.y * 2.0**-10)

ADD_WRONG = (
    Mistake("the root of the sum, not of the mean", "total / float(H)", "total"),
    Mistake("eps left out", "float(H) + eps", "float(H)"),
    Mistake("a row's first piece twice", "1024u * uint(p)", "0u * uint(p)"),
    Mistake("pieces that overlap", "1024u * uint(p)", "1020u * uint(p)"),
    Mistake("one number of a piece four times", "first + uint(i)", "first"),
    Mistake(
        "squares of the numbers before the last ones",
        "fma(values[k], values[k], own)",
        "fma(rests[k], rests[k], own)",
    ),
    Mistake("a sum that goes on", "  own = 0.0f;\n", ""),
    Mistake(
        "the first branch's root for both",
        "fma(others[k], others[k], own)",
        "fma(values[k], values[k], own)",
    ),
    Mistake("the last norm of the norm", "values[k] = sum;", ""),
    Mistake("the last norm's weight again", "weights[k] = float(next_weight[at]);", ""),
    Mistake(
        "the weight before the rounding",
        "float(T(values[k] * inverse))",
        "(values[k] * inverse)",
    ),
    Mistake(
        "a scale that is added",
        "sum = float(T(sum * scale_value));",
        "sum = float(T(sum + scale_value));",
    ),
    Mistake(
        "a sum that is not rounded before the scale",
        "float sum = float(T(",
        "float sum = float((",
    ),
    Mistake("the residual's first row", "residual[start + at]", "residual[at]"),
)

OF_EXPERTS = Sum.random(2, 64, has_branches=True, has_experts=True)
THRICE = Sum.random(2, 64, is_scaled=False, is_thrice=True)

EXPERTS_WRONG = (
    Mistake(
        "the first row's experts",
        "threadgroup_position_in_grid.x * uint(EX",
        "0u * uint(EX",
    ),
    Mistake("the first row's shares", "shares[e]", "shares[e - first_expert]"),
    Mistake(
        "an expert too few",
        "e < first_expert + uint(EXPERTS)",
        "e + 1u < first_expert + uint(EXPERTS)",
    ),
    Mistake(
        "one expert for all",
        "other[e * uint(H) + at]",
        "other[first_expert * uint(H) + at]",
    ),
    Mistake("the last expert alone", "others[k] += float(T(", "others[k] = float(T("),
    Mistake(
        "products that are not rounded",
        "others[k] += float(T(share",
        "others[k] += ((share",
    ),
    Mistake("a sum that is not rounded", "others[k] = float(T(others[k]));", ""),
)

THRICE_WRONG = (
    Mistake(
        "a weight without its root",
        "float(next_weight2[at]) * root",
        "float(next_weight2[at])",
    ),
    Mistake(
        "the second norm's weight again",
        "float(next_weight2[at])",
        "float(next_weight1[at])",
    ),
    Mistake(
        "a root of float32",
        "float root = float(T(as_type<float>(ROOT)))",
        "float root = as_type<float>(ROOT)",
    ),
    Mistake(
        "a weight that is not rounded",
        "weights[k] = float(T(float(next_weight2[at]) * root))",
        "weights[k] = float(next_weight2[at]) * root",
    ),
    Mistake("the first weight again", "weights[k] = float(next_weight1[at]);", ""),
)

ADD_STOPPING = (
    Mistake(
        "a piece past the end",
        "if (first < uint(H))",
        "if (true)",
        r"memory fault: buffer '\w+' at byte \d+",
    ),
    Mistake(
        "threads without numbers return",
        "float own = 0.0f;",
        "if (4u * thread_id >= uint(H)) return;\nfloat own = 0.0f;".replace("4u", "5u"),
        r"divergent",
    ),
)

_REDUCED = """\
{
  float folded = simd_sum(own);
  if (lane == 0u) cells[simdgroup] = folded;
  %s
  total = simd_sum(lane < 8u ? cells[lane] : 0.0f);
  }"""

ADD_RACING = tuple(
    Mistake(
        name,
        "REDUCE(total, simd_sum, cells, own, 0.0f);",
        _REDUCED % barrier,
        r"write at line \d+ `if \(lane == 0u\) cells\[simdgroup\]",
    )
    for name, barrier in (
        ("cells read before they are written", ""),
        ("cells written before all have read them", "BARRIER();"),
    )
)

# ----------------------------------------------------------------------- norm_rope

HEADS = Heads.random(2, 3, 3, 2, 96)

ROPE_WRONG = (
    Mistake("the root of the sum, not of the mean", "/ float(D) +", "+"),
    Mistake("pairs of neighbours", "pair + HALF", "pair + 1u"),
    Mistake("pairs that a lane has twice", "lane * uint(PAIRS)", "lane"),
    Mistake("high numbers left out of the mean", "fma(high[i], high[i], sum)", "sum"),
    Mistake("turned the other way", "-(b * s)", "(b * s)"),
    Mistake("sine and cosine exchanged", "TURN_COS(angle)", "TURN_SIN(angle)"),
    Mistake("the low weight for both", "q_weight[pair + HALF]", "q_weight[pair]"),
    Mistake("keys with the weight of queries", "k_weight[pair]", "q_weight[pair]"),
    Mistake("every row at the first one's position", "offset[batch]", "offset[0]"),
    Mistake("a row at one position", "offset[batch]) + place", "offset[batch])"),
    Mistake("positions from one", ") + place)", ") + place + 1u)"),
    Mistake("rows before heads", "(batch * Q + head) * L + place", "row * Q + head"),
    Mistake("one head of keys", "(head - Q) % G", "0u"),
    Mistake("values that are turned", "if (is_value)", "if (false)"),
    Mistake("frequencies of all dims", "/ float(HALF)) *", "/ float(D)) *"),
    Mistake("frequencies that rise", "exp2(-(", "exp2(("),
    Mistake("a weight on values", "T(low[i])", "T(low[i] * float(k_weight[pair]))"),
    Mistake(
        "the weight before the rounding",
        "low[i] = float(T(low[i] * inverse))",
        "low[i] = low[i] * inverse",
    ),
)

ROPE_STOPPING = (
    Mistake(
        "lanes without pairs return",
        "float low[PAIRS];",
        "if (lane * uint(PAIRS) >= HALF) return;\n  float low[PAIRS];",
        r"divergent simd_sum",
    ),
    Mistake(
        "simdgroups without a head",
        "if (task >= uint(q_shape[0]) * L * heads) return;",
        "",
        r"memory fault: buffer '\w+' at byte \d+|written up to 16 bytes past its end",
    ),
    Mistake(
        "values after those of the others",
        "own = is_query ? 0u : (head - Q) % G",
        "own = is_query ? 0u : head - Q",
        r"memory fault: buffer '\w+' at byte \d+|written up to 16 bytes past its end",
    ),
)

ROPE_RACING = (
    Mistake(
        "lanes that have the pairs of others",
        "if (pair >= HALF) continue;",
        "pair = pair % HALF;",
        r"write at line \d+",
    ),
)
