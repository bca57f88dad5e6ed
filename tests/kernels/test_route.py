"""The kernel of the choice of experts, from its Metal text on the CPU.

Compared                    with                                  tolerance
experts, ties among them    numpy's stable sort                   0: every number
shares                      softmax of float64                    two roundings
plain operations            mlx-lm's own router                   0: every bit
the kernel's scores         those that plain operations choose    0: every bit
rows, schedules             each other                            0: every bit

Run: python -m pytest tests/kernels/test_route.py
     python -m pytest -m slow tests/kernels/test_route.py    all mistakes
"""

import sys
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models import gemma4_text

if sys.platform == "darwin":
    pytest.skip("MLX runs kernels on Metal itself here", allow_module_level=True)

from mlx_gemma_mtp.kernels import common, route
from tests.kernels.launches import LANES, counted, replacing
from tests.kernels.matmul_mistakes import Mistake
from tests.kernels.norms import normal
from tests.kernels.products import as_float32, same_bits
from tests.kernels.test_counts import check_loads, check_outputs_written_once
from tests.kernels.test_matmul_mistakes import by_name
from tests.metal.lint import lint
from tests.metal.run import MetalError, run_on_cpu, run_schedules
from tests.metal.text import metal_text
from tests.metal.tsan import run_under_tsan

DTYPES = [mx.bfloat16, mx.float16, mx.float32]
E, CHOSEN = 128, 8  # as the published mixture has


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch):
    monkeypatch.setattr(common, "backend", lambda: "metal")
    monkeypatch.setattr(common, "launch", run_on_cpu)


def run(scores, scales, num_chosen=CHOSEN, dtype=mx.bfloat16):
    """Experts and shares; scores and scales are numbers that the type has."""
    arrays = (mx.array(a).astype(dtype) for a in (scores, scales))
    experts, shares = route.route(*arrays, num_chosen=num_chosen)
    assert (experts.dtype, shares.dtype) == (mx.uint32, dtype)
    return np.array(experts), as_float32(shares)


def best(scores, num_chosen):
    """The best first, of equal ones the lowest number."""
    return np.argsort(-scores, axis=-1, kind="stable")[..., :num_chosen]


def check(scores, scales, num_chosen=CHOSEN, dtype=mx.bfloat16):
    experts, shares = run(scores, scales, num_chosen, dtype)
    assert np.array_equal(experts, best(scores, num_chosen))
    chosen = np.take_along_axis(scores, experts, axis=-1).astype(np.float64)
    parts = np.exp(chosen - chosen.max(axis=-1, keepdims=True))
    exact = parts / parts.sum(axis=-1, keepdims=True) * scales[experts]
    # Of the softmax, and of its product; float32 has roundings of its own.
    units = (2 if dtype != mx.float32 else 20) * mx.finfo(dtype).eps
    tiny = {mx.float16: 2.0**-24}.get(dtype, 0.0)
    assert (np.abs(shares - exact) <= units * np.abs(exact) + tiny).all()


# -------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_of_every_type(dtype):
    scales = normal(dtype, E, seed=2, middle=1.0)
    check(2 * normal(dtype, 5, E, seed=1), scales, dtype=dtype)


@pytest.mark.parametrize(("num_experts", "num_chosen"), [(4, 4), (16, 4), (33, 1)])
def test_other_sizes(num_experts, num_chosen):
    scores = normal(mx.bfloat16, 3, num_experts, seed=1)
    check(scores, normal(mx.bfloat16, num_experts, seed=2), num_chosen)


@given(st.lists(st.integers(-2, 2), min_size=E, max_size=E), st.integers(0, 3))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_ties(numbers, power):
    """The lowest numbers; the scores are those that MLX chooses."""
    scores = np.array([numbers, numbers[::-1]], np.float32) * 2.0**power
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "backend", lambda: "metal")
        patch.setattr(common, "launch", run_on_cpu)
        check(scores, np.ones(E, np.float32))
    experts, _ = route.plain(mx.array(scores), mx.ones((E,)), num_chosen=CHOSEN)
    by_mlx = np.sort(np.take_along_axis(scores, np.array(experts), axis=-1))
    own = np.take_along_axis(scores, best(scores, CHOSEN), axis=-1)
    assert np.array_equal(by_mlx, own[:, ::-1])


def test_zeros_of_both_signs_are_equal():
    scores = np.full((1, E), -1, np.float32)
    scores[0, [3, 70]], scores[0, [2, 40]] = 0.0, -0.0
    experts, shares = run(scores, np.ones(E, np.float32), 3)
    assert experts.tolist() == [[2, 3, 40]]
    assert len(set(shares[0])) == 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_no_number_leaves_the_others(value):
    """And chooses experts that there are, each once."""
    scores, scales = normal(mx.bfloat16, 3, E, seed=1), np.ones(E, np.float32)
    want = run(scores, scales)
    for places in ([7], range(E)):
        broken = scores.copy()
        broken[1, places] = value
        experts, shares = run(broken, scales)
        assert len(set(experts[1])) == CHOSEN
        assert experts[1].max() < E
        is_number = value == -np.inf and len(places) == 1
        assert np.isfinite(shares[1]).all() == is_number
        for a, b in zip((experts, shares), want, strict=True):
            assert np.array_equal(a[[0, 2]], b[[0, 2]])


def test_rows_have_the_bits_of_one_row():
    scores, scales = normal(mx.bfloat16, 9, E, seed=1), normal(mx.bfloat16, E, seed=2)
    experts, shares = run(scores, scales)
    for m in range(9):
        own, own_shares = run(scores[m : m + 1], scales)
        assert np.array_equal(own, experts[m : m + 1])
        assert same_bits(own_shares, shares[m : m + 1])


def test_schedules(monkeypatch):
    monkeypatch.setattr(common, "launch", run_schedules)
    check(normal(mx.bfloat16, 3, E, seed=1), normal(mx.bfloat16, E, seed=2))


# ---------------------------------------------------------------------------- plain


@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_operations_are_those_of_a_router(dtype, monkeypatch):
    monkeypatch.setattr(common, "backend", lambda: "ops")
    router: Any = gemma4_text.Router(
        gemma4_text.ModelArgs(hidden_size=64, num_experts=E, top_k_experts=CHOSEN)
    )
    router.per_expert_scale = mx.array(normal(dtype, E, seed=2)).astype(dtype)
    scores = mx.array(normal(dtype, 6, E, seed=1)).astype(dtype).reshape(2, 3, E)
    router.proj = lambda _: scores
    want = router(mx.zeros((2, 3, 64), dtype=dtype))
    found = route.route(scores, router.per_expert_scale, num_chosen=CHOSEN)
    for array, other in zip(found, want, strict=True):
        assert array.dtype == other.dtype
        assert mx.array_equal(array, other)


@pytest.mark.parametrize(
    ("scores", "scales", "num_chosen"),
    [
        (mx.ones((1, E)), mx.ones((E,), dtype=mx.float16), CHOSEN),
        (mx.ones((1, 257)), mx.ones((257,)), CHOSEN),
        (mx.ones((1, 64)), mx.ones((64,)), 33),
        (mx.ones((0, E)), mx.ones((E,)), CHOSEN),
    ],
    ids=["types", "too many experts", "too many chosen", "no rows"],
)
def test_what_is_left_to_mlx(scores, scales, num_chosen, monkeypatch):
    monkeypatch.setattr(common, "launch", None)
    found = route.route(scores, scales, num_chosen=num_chosen)
    for array, want in zip(
        found, route.plain(scores, scales, num_chosen=num_chosen), strict=True
    ):
        assert array.shape == want.shape == (len(scores), num_chosen)
        assert mx.array_equal(array, want)


# ----------------------------------------------------------------------------- text


def looked_at(look, monkeypatch, dtype=mx.bfloat16):
    """What a function says of a launch."""
    answers = []

    def launch(kernel, inputs, **options):
        answers.append(look(kernel, inputs, **options))
        return run_on_cpu(kernel, inputs, **options)

    monkeypatch.setattr(common, "launch", launch)
    run(normal(dtype, 3, E, seed=1), np.ones(E, np.float32), dtype=dtype)
    return answers[0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_lint(dtype, monkeypatch):
    text = looked_at(metal_text, monkeypatch, dtype)
    assert lint(text) == []


@pytest.mark.tsan
def test_no_races(monkeypatch):
    assert looked_at(run_under_tsan, monkeypatch) == []


def check_counts(counts, num_rows):
    """Every score once, of scales those of the chosen."""
    check_loads(counts, "scores", num_rows * E, unique=num_rows * E, width=2)
    assert counts.loads["scales"].by_width == {2: num_rows * CHOSEN}
    check_outputs_written_once(counts, "experts", "shares")
    folds = num_rows * LANES * CHOSEN
    assert counts.calls == {
        "simd_max": folds,
        "simd_min": folds,
        "simd_sum": num_rows * LANES,
    }
    assert counts.operations["function"] == num_rows * CHOSEN  # exponentials


def count(change=None):
    scores = mx.array(normal(mx.bfloat16, 3, E, seed=1)).astype(mx.bfloat16)
    scales = mx.ones((E,), dtype=mx.bfloat16)
    (counts,) = counted(
        route.route,
        scores,
        scales,
        num_chosen=CHOSEN,
        change=change,
        is_checked=change is None,
    )
    return counts


def test_counts():
    check_counts(count(), 3)


def test_a_score_that_is_read_twice_is_seen():
    old = "float(scores[row * uint(E) + expert])"
    with pytest.raises(AssertionError):
        check_counts(count(replacing(old, f"{old} + 0.0f * {old}")), 3)


# ------------------------------------------------------------------------- mistakes

WRONG = (
    Mistake("the last of equal scores", "orders[i] > most", "orders[i] >= most"),
    Mistake("the highest of equal numbers", "simd_min(most", "simd_max(most"),
    Mistake(
        "an expert that is chosen again",
        "if (lane + 32u * uint(i) == chosen) orders[i] = 0u;",
        ";",
    ),
    Mistake("the best of the lane alone", "simd_max(most)", "most"),
    Mistake(
        "the first 32 experts", "lane + 32u * uint(i);\n    orders", "lane;\n    orders"
    ),
    Mistake(
        "the first row's scores", "scores[row * uint(E) + expert]", "scores[expert]"
    ),
    Mistake(
        "scores sorted as bits",
        "order_of(score == 0.0f ? 0.0f : score)",
        "as_type<uint>(score)",
    ),
    Mistake("the sum of exponentials left out", "part / simd_sum(part)", "part"),
    Mistake(
        "exponentials of all lanes",
        "has_one ? exp(own - largest) : 0.0f",
        "exp(own - largest)",
    ),
    Mistake(
        "a score of the next row", "if (expert < uint(E))", "if (expert < uint(E) + 1u)"
    ),
    Mistake("scales by place", "scales[own_expert]", "scales[lane]"),
    Mistake("zeros by their sign", "score == 0.0f ? 0.0f : score", "score"),
)
STOPPING = (
    Mistake(
        "more shares than there are",
        "bool has_one = lane < uint(CHOSEN);",
        "bool has_one = true;",
        r"written up to|memory fault",
    ),
    Mistake(
        "lanes without a share return",
        "  float part =",
        "  if (!has_one) return;\n  float part =",
        r"divergent simd_sum",
    ),
)


def mistaken(mistake, launch, monkeypatch, num_experts):
    """Ties, negative scores and scales that differ, with a mistake in the text."""
    monkeypatch.setattr(
        common, "launch", lambda kernel, *a, **k: launch(mistake.of(kernel), *a, **k)
    )
    scores = np.round(2 * normal(mx.bfloat16, 3, num_experts, seed=1)) - 4
    scores[0, [9, 41, 50]], scores[0, 8] = 0.0, -0.0
    scales = normal(mx.bfloat16, num_experts, seed=2, middle=1.0)
    check(scores, scales, 6)


def test_there_is_nothing_to_see_without_a_mistake(monkeypatch):
    mistaken(Mistake("none", "uint lane", "uint  lane"), run_on_cpu, monkeypatch, 66)


@by_name(WRONG, most=4)
def test_numbers_are_wrong(mistake, monkeypatch):
    with pytest.raises(AssertionError):
        mistaken(mistake, run_on_cpu, monkeypatch, 66)


@by_name(STOPPING)
def test_the_launch_stops(mistake, monkeypatch):
    with pytest.raises(MetalError, match=mistake.error):
        mistaken(mistake, run_schedules, monkeypatch, 66)
