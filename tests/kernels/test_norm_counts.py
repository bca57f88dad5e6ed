"""What the kernels of norms read, write and issue, as formulas of the sizes.

Every number of a row and of a head is read once and written once.

Run: python -m pytest tests/kernels/test_norm_counts.py
     python -m pytest -m slow tests/kernels/test_norm_counts.py    other options
"""

import sys
from itertools import product

import mlx.core as mx
import pytest

if sys.platform == "darwin":
    pytest.skip("MLX runs kernels on Metal itself here", allow_module_level=True)

from mlx_gemma_mtp.kernels import common
from mlx_gemma_mtp.kernels.add_norm import add_norm
from mlx_gemma_mtp.kernels.norm_rope import QUERIES, SEPARATE, SHARED, norm_rope
from tests.kernels.launches import LANES, counted, replacing
from tests.kernels.norms import NUM_EXPERTS, Heads, Sum
from tests.kernels.test_counts import (
    check_calls,
    check_loads,
    check_outputs_written_once,
)

THREADS = common.MAX_THREADS


@pytest.fixture(autouse=True)
def _on_metal(monkeypatch):
    monkeypatch.setattr(common, "backend", lambda: "metal")


def run(function, case, *, change=None):
    """What the one launch of a case does."""
    arrays, options = case.arguments()
    is_checked = change is None
    (counts,) = counted(
        function, *arrays, **options, change=change, is_checked=is_checked
    )
    return counts


# ------------------------------------------------------------------------ add_norm

M, H = 3, 1536
NAMES = ("is_scaled", "is_normed", "has_branches")
ALL = dict.fromkeys(NAMES, True)
EXPERTS = {**ALL, "has_experts": True}
THRICE = {"is_scaled": False, "is_normed": True, "is_thrice": True}


def check_sum(
    counts,
    *,
    is_scaled,
    is_normed,
    has_branches=False,
    has_experts=False,
    is_thrice=False,
):
    width = 2
    rows = ["residual", "y"] + ["other"] * (has_branches and not has_experts)
    weights = ["weight"] + ["y_weight", "other_weight"] * has_branches
    weights += ["next_weight"] * is_normed
    weights += ["next_weight1", "next_weight2"] * is_thrice
    for name in rows:
        check_loads(counts, name, M * H, unique=M * H, width=width)
    for name in weights:
        check_loads(counts, name, M * H, unique=H, width=width)
    if is_scaled:
        check_loads(counts, "scale", M * THREADS, unique=1, width=width)
    if has_experts:
        given = M * NUM_EXPERTS
        check_loads(counts, "other", given * H, unique=given * H, width=width)
        check_loads(counts, "shares", given * THREADS, unique=given, width=width)
    outputs = ["h"] + ["normed"] * is_normed + ["normed1", "normed2"] * is_thrice
    check_outputs_written_once(counts, *outputs)
    # Four numbers that stand beside each other: a simdgroup asks for whole lines.
    assert counts.loads["y"].most_lines == 2
    num_means = 1 + is_normed + 2 * has_branches
    check_calls(counts, threadgroup_barrier=2 * num_means, simd_sum=2 * num_means)
    # Squares; of threads that have no numbers too.
    pieces = -(-H // (4 * THREADS))
    assert counts.operations["fma"] == 4 * pieces * num_means * M * THREADS
    assert counts.operations["from_integer"] == num_means * M * THREADS  # H
    assert counts.operations["function"] == num_means * M * THREADS


@pytest.mark.parametrize(
    "options",
    [
        # The others read what these read.
        pytest.param(options, marks=[pytest.mark.slow] * any(options))
        for options in product((False, True), repeat=3)
    ],
)
def test_add_norm(options):
    check_add_norm(dict(zip(NAMES, options, strict=True)))


@pytest.mark.parametrize("options", [EXPERTS, THRICE], ids=["end", "thrice"])
def test_add_norm_of_a_mixture(options):
    check_add_norm(options)


def check_add_norm(options):
    case = Sum.random(M, H, mx.bfloat16, **options)
    check_sum(run(case.function, case), **options)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param(
            "float(residual[start + at])",
            "float(residual[start + at]) + 0.0f * float(residual[start + at])",
            id="the residual twice",
        ),
        pytest.param("  own = 0.0f;", "  BARRIER();\n  own = 0.0f;", id="a barrier"),
        pytest.param(
            "h[start + at] =", "h[start + at] = T(0);\nh[start + at] =", id="h twice"
        ),
        pytest.param("uint(i);", "uint(i / 2 * 2);", id="half of the numbers"),
    ],
)
def test_mistakes_of_add_norm_are_seen(old, new):
    case = Sum.random(M, H, mx.bfloat16, **ALL)
    counts = run(add_norm, case, change=replacing(old, new))
    with pytest.raises(AssertionError):
        check_sum(counts, **ALL)


# ----------------------------------------------------------------------- norm_rope

B, L, Q, G, D = 2, 3, 4, 2, 256


def check_heads(counts, kind, *, is_proportional):
    width, rows = 2, B * L
    queries, keys = rows * Q * D, rows * G * D
    check_loads(counts, "q", queries, unique=queries, width=width)
    check_loads(counts, "q_weight", queries, unique=D, width=width)
    if kind != QUERIES:
        check_loads(counts, "k", keys, unique=keys, width=width)
        check_loads(counts, "k_weight", keys, unique=D, width=width)
    if kind == SEPARATE:
        check_loads(counts, "v", keys, unique=keys, width=width)
    heads = rows * {QUERIES: Q, SHARED: Q + G, SEPARATE: Q + 2 * G}[kind]
    check_loads(counts, "offset", heads * LANES, unique=B)
    turned = (rows * Q + (0 if kind == QUERIES else rows * G)) * D // 2  # pairs
    if is_proportional:
        check_loads(counts, "freqs", turned, unique=D // 2)
    outputs = ["q_out"] if kind == QUERIES else ["q_out", "k_out", "v_out"]
    check_outputs_written_once(counts, *outputs)
    assert counts.calls == {"simd_sum": heads * LANES}  # and no barrier
    operations = counts.operations
    assert operations["fma"] == heads * D + 2 * turned
    roots = heads * LANES
    of_base = 0 if is_proportional else turned  # exp2
    assert operations["function"] == roots + 2 * turned + of_base


@pytest.mark.parametrize(
    ("kind", "is_proportional"),
    [
        (QUERIES, True),
        (SHARED, True),
        (SEPARATE, False),
        pytest.param(SEPARATE, True, marks=pytest.mark.slow),
    ],
)
def test_norm_rope(kind, is_proportional):
    options = {"kind": kind, "is_proportional": is_proportional}
    counts = run(norm_rope, Heads.random(B, L, Q, G, D, mx.bfloat16, **options))
    check_heads(counts, **options)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param(
            "sum = fma(low[i]",
            "sum += is_inside ? 0.0f * float(x[pair]) : 0.0f;\n    sum = fma(low[i]",
            id="a head twice",
        ),
        pytest.param("continue;\n    }", "}", id="values that are turned too"),
        pytest.param("float position", "BARRIER();\n  float position", id="a barrier"),
        pytest.param(
            "float s = TURN_SIN(angle);",
            "float s = TURN_SIN(angle) + 0.0f * TURN_SIN(angle);",
            id="a sine twice",
        ),
        pytest.param(
            "float b = float(T(high[i] * float((is_query ? q_weight[pair + HALF]",
            "float b = float(T(high[i] * float((is_query ? q_weight[pair]",
            id="half a weight",
        ),
    ],
)
def test_mistakes_of_norm_rope_are_seen(old, new):
    case = Heads.random(B, L, Q, G, D, mx.bfloat16)
    counts = run(norm_rope, case, change=replacing(old, new))
    with pytest.raises(AssertionError):
        check_heads(counts, SEPARATE, is_proportional=False)
