"""The kernel that norms and turns heads, from its Metal text on the CPU.

Compared                        with                               tolerance
values; numbers not turned      the kernel's sums in numpy         0: every bit
turned numbers                  float64 of float32's angles        norms.Heads.error
plain operations                mlx-lm's own attention             0: every bit
the kernel                      plain operations                   2 last places
rows of any B and L, schedules,
contraction                     each other                         0: every bit

Run: python -m pytest tests/kernels/test_norm_rope.py
     python -m pytest -m slow tests/kernels/test_norm_rope.py    every text and width
"""

import re
import sys
from functools import partial
from itertools import product
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models import gemma4_text

if sys.platform == "darwin":
    pytest.skip("MLX runs kernels on Metal itself here", allow_module_level=True)

from mlx_gemma_mtp.kernels import common, norm_rope
from mlx_gemma_mtp.kernels.norm_rope import QUERIES, SEPARATE, SHARED
from tests.kernels import norm_mistakes as mistakes
from tests.kernels.norms import EPS, Heads
from tests.kernels.products import as_float32, same_bits
from tests.kernels.test_matmul_mistakes import by_name
from tests.metal.lint import lint
from tests.metal.run import MetalError, run_on_cpu, run_schedules
from tests.metal.text import metal_text
from tests.metal.tsan import run_under_tsan

DTYPES = [mx.bfloat16, mx.float16, mx.float32]
DIMS = (32, 64, 96, 128, 256, 512)
KINDS = (QUERIES, SHARED, SEPARATE)
TEXTS = list(product(KINDS, (False, True)))
by_text = pytest.mark.parametrize(("kind", "is_proportional"), TEXTS)


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch):
    monkeypatch.setattr(common, "backend", lambda: "metal")
    monkeypatch.setattr(common, "launch", run_on_cpu)


def differs(case, outputs):
    """Where a case's outputs are not what they must be."""
    turned, exact = outputs[:2], case.exact
    yield from (
        (np.abs(found - want) > case.error(want)).any()
        for found, want in zip(turned, exact[:2], strict=True)
    )
    values = zip(outputs[2:], exact[2:], strict=True)
    yield from (not same_bits(found, want) for found, want in values)


def check(case):
    outputs = case.run()
    assert not any(differs(case, outputs))
    if case.freqs is None:
        return
    # Pairs that do not turn are normed alone.
    still = np.tile(np.isinf(case.freqs), 2)
    for found, want in zip(outputs[:2], case.exact[:2], strict=True):
        assert still.any()
        assert same_bits(found[..., still], want[..., still].astype(np.float32))


# -------------------------------------------------------------------------- bits


@by_text
def test_each_text(kind, is_proportional):
    """Types and widths differ from one to the next."""
    number = TEXTS.index((kind, is_proportional))
    case = Heads.random(
        3, 2, 4, 2, DIMS[number], DTYPES[number % 3],
        kind=kind, is_proportional=is_proportional,
    )  # fmt: skip
    check(case)


@pytest.mark.slow
@by_text
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_text(kind, is_proportional, dtype):
    for D in DIMS:
        options = {"kind": kind, "is_proportional": is_proportional}
        check(Heads.random(2, 5, 8, 1, D, dtype, **options))


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_has_the_bits_that_it_has_alone(kind):
    case = Heads.random(2, 9, 3, 2, 64, kind=kind)
    whole = case.run()
    for batch, L in [(0, 1), (1, 4), (1, 8)]:
        for start in (0, 9 - L):
            part = case.part(batch, slice(start, start + L)).run()
            for found, every in zip(part, whole, strict=True):
                want = every[batch : batch + 1, :, start : start + L]
                assert same_bits(found, np.ascontiguousarray(want))


@pytest.mark.parametrize("kind", KINDS)
def test_schedules(kind, monkeypatch):
    monkeypatch.setattr(common, "launch", run_schedules)
    check(Heads.random(2, 3, 4, 2, 96, kind=kind))


@pytest.mark.parametrize("dtype", DTYPES)
def test_contraction_has_nothing_to_fuse(dtype, monkeypatch):
    case = Heads.random(2, 3, 2, 1, 256, dtype)
    plain = case.run()
    monkeypatch.setattr(common, "launch", partial(run_on_cpu, contract=True))
    assert all(map(same_bits, case.run(), plain))


@pytest.mark.parametrize("noise_ulps", [2, 4])
def test_functions_that_are_not_rounded_well(noise_ulps, monkeypatch):
    """What a GPU's own functions may be off by moves bfloats by one place at most."""
    case = Heads.random(2, 3, 2, 1, 256)
    plain = case.run()
    monkeypatch.setattr(common, "launch", partial(run_on_cpu, noise_ulps=noise_ulps))
    for found, want in zip(case.run(), plain, strict=True):
        most = np.abs(want).max(-1, keepdims=True)
        # Position 1000 in float32: the angle's own error is below a bfloat's place.
        assert (np.abs(found - want) <= 2.0**-7 * most).all()


@given(
    st.sampled_from(KINDS),
    st.integers(1, 4),
    st.integers(1, 9),
    st.integers(1, 5),
    st.integers(1, 3),
)
@settings(max_examples=15, deadline=None, derandomize=True)
def test_any_heads(kind, B, L, Q, G):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "backend", lambda: "metal")
        patch.setattr(common, "launch", run_on_cpu)
        check(Heads.random(B, L, Q, G, 64, kind=kind))


def test_an_offset_that_is_padded():
    case = Heads.random(2, 3, 2, 1, 64)
    arrays, options = case.arguments()
    options["offset"] = common.padded(options["offset"])
    assert options["offset"].size == common.MIN_ELEMENTS
    found = norm_rope.norm_rope(*arrays, **options)
    for array, want in zip(found, case.run(), strict=True):
        assert array is not None
        assert same_bits(as_float32(array), want)


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_a_head_that_is_no_number_leaves_the_others(value):
    case = Heads.random(1, 2, 3, 1, 64)
    q = case.q.copy()
    q[0, 1, 2, 5] = value
    found, want = Heads(**{**vars(case), "q": q}).run(), case.run()
    assert np.isnan(found[0][0, 2, 1]).any()
    found[0][0, 2, 1] = want[0][0, 2, 1]
    assert all(map(same_bits, found, want))


# ------------------------------------------------------------------------- plain


class Recorded:
    """A cache that keeps what it is given."""

    def __init__(self, offset):
        self.offset = offset

    def update_and_fetch(self, keys, values):
        self.given = (keys, values)
        return self.given


def attention_of(layer_type, *, is_shared, dtype):
    """mlx-lm's attention, with random norms."""
    args = gemma4_text.ModelArgs(
        hidden_size=64, num_hidden_layers=2, intermediate_size=64, head_dim=32,
        global_head_dim=64, num_attention_heads=4, num_kv_shared_layers=0,
        num_key_value_heads=2, num_global_key_value_heads=1,
        attention_k_eq_v=is_shared, layer_types=[layer_type] * 2,
    )  # fmt: skip
    attention = gemma4_text.Attention(args, 0)
    attention.set_dtype(dtype)
    for number, norm in enumerate((attention.q_norm, attention.k_norm)):
        noise = mx.random.normal(norm.weight.shape, key=mx.random.key(number))
        norm.weight = (1 + 0.3 * noise).astype(dtype)
    return attention


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("layer_type", "is_shared"),
    [
        ("sliding_attention", False),
        ("full_attention", False),
        ("full_attention", True),
    ],
)
def test_plain_operations_are_those_of_attention(
    layer_type, is_shared, dtype, monkeypatch
):
    monkeypatch.setattr(common, "backend", lambda: "ops")
    attention = attention_of(layer_type, is_shared=is_shared, dtype=dtype)
    assert attention.use_k_eq_v == is_shared
    seen = []

    def attend(queries, keys, values, **_):
        seen.append(queries)
        return queries

    monkeypatch.setattr(gemma4_text, "scaled_dot_product_attention", attend)
    x = mx.random.normal((2, 3, 64), key=mx.random.key(7)).astype(dtype)
    offset = mx.array([1000, 5])
    cache = Recorded(offset)
    attention(x, cache=cache)

    D, G = attention.head_dim, attention.n_kv_heads
    q = attention.q_proj(x).reshape(2, 3, 4, D)
    k = attention.k_proj(x).reshape(2, 3, G, D)
    v = k if is_shared else attention.v_proj(x).reshape(2, 3, G, D)
    turn: dict[str, Any] = {"base": 10000.0}
    if layer_type == "full_attention":
        turn = {"freqs": attention.rope._freqs}
    found = norm_rope.norm_rope(
        q, k, v, q_weight=attention.q_norm.weight,
        k_weight=attention.k_norm.weight, eps=EPS, offset=offset, **turn,
    )  # fmt: skip
    for array, want in zip(found, (*seen, *cache.given), strict=True):
        assert array is not None
        assert (array.shape, array.dtype) == (want.shape, dtype)
        assert mx.array_equal(array, want).item()
    alone = norm_rope.norm_rope(
        q, q_weight=attention.q_norm.weight, eps=EPS,
        offset=common.padded(offset), **turn,
    )  # fmt: skip
    assert mx.array_equal(alone[0], seen[0]).item()
    assert alone[1:] == (None, None)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize("is_proportional", [False, True])
def test_the_kernel_is_near_plain(dtype, is_proportional):
    """MLX rounds sines and cosines on the CPU; on Metal, as the kernel, it does not."""
    case = Heads.random(3, 4, 4, 2, 256, dtype, is_proportional=is_proportional)
    arrays, options = case.arguments()
    plain = norm_rope.plain(*arrays, **options)
    for found, array in zip(case.run(), plain, strict=True):
        assert array is not None
        want = as_float32(array)
        size = np.abs(want).max(-1, keepdims=True)
        assert (np.abs(found - want) <= 2 * mx.finfo(dtype).eps * size).all()


@pytest.mark.parametrize(
    "changed",
    [
        {"q_weight": mx.ones((64,))},
        {"k_weight": mx.ones((64,))},
        {"v": mx.ones((1, 2, 1, 64))},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_arrays_of_other_types_are_left_to_mlx(changed, monkeypatch):
    monkeypatch.setattr(common, "launch", None)
    (q, k, v), options = Heads.random(1, 2, 2, 1, 64).arguments()
    named = {"q": q, "k": k, "v": v, **options, **changed}
    found, want = norm_rope.norm_rope(**named), norm_rope.plain(**named)
    for array, other in zip(found, want, strict=True):
        assert array is not None
        assert other is not None
        assert array.dtype == other.dtype
        assert mx.array_equal(array, other).item()


@pytest.mark.parametrize("D", [16, 48, 544])
def test_heads_that_are_left_to_mlx(D, monkeypatch):
    monkeypatch.setattr(common, "launch", None)
    case = Heads.random(2, 2, 2, 1, D)
    arrays, options = case.arguments()
    plain = norm_rope.plain(*arrays, **options)
    for found, want in zip(case.run(), plain, strict=True):
        assert want is not None
        assert same_bits(found, as_float32(want))


# -------------------------------------------------------------------------- text


def looked_at(case, look):
    """What a function says of a launch."""
    answers = []

    def launch(kernel, inputs, **options):
        answers.append(look(kernel, inputs, **options))
        return run_on_cpu(kernel, inputs, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "launch", launch)
        case.run()
    return answers[0]


@by_text
@pytest.mark.parametrize("dtype", DTYPES)
def test_lint(kind, is_proportional, dtype):
    texts = []

    def launch(kernel, inputs, **launched):
        texts.append(metal_text(kernel, inputs, **launched))
        pairs = zip(launched["output_shapes"], launched["output_dtypes"], strict=True)
        return [mx.zeros(shape, dtype=kind) for shape, kind in pairs]

    case = Heads.random(
        1, 2, 2, 1, 256, dtype, kind=kind, is_proportional=is_proportional
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "launch", launch)
        case.run()
    assert [lint(text) for text in texts] == [[]]


@pytest.mark.tsan
@by_text
def test_no_races(kind, is_proportional):
    options = {"kind": kind, "is_proportional": is_proportional}
    assert looked_at(Heads.random(2, 3, 3, 2, 96, **options), run_under_tsan) == []


def test_kernels_are_all_that_there_are():
    names = {kernel.name for kernel in norm_rope.kernels()}
    assert len(names) == len(TEXTS)
    assert {"norm_rope_queries", "norm_rope_shared_freqs"} <= names


# ---------------------------------------------------------------------- mistakes


def run_with(mistake, launch):
    """The case of the mistakes with one of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            common,
            "launch",
            lambda kernel, *a, **k: launch(mistake.of(kernel), *a, **k),
        )
        return mistakes.HEADS.run()


@by_name(mistakes.ROPE_WRONG, most=6)
def test_numbers_are_wrong(mistake):
    assert any(differs(mistakes.HEADS, run_with(mistake, run_on_cpu)))


@by_name(mistakes.ROPE_STOPPING)
def test_the_launch_stops(mistake):
    with pytest.raises(MetalError, match=mistake.error):
        run_with(mistake, run_schedules)


@pytest.mark.tsan
@by_name(mistakes.ROPE_RACING)
def test_race_is_reported(mistake):
    races = looked_at(
        mistakes.HEADS,
        lambda kernel, inputs, **options: run_under_tsan(
            mistake.of(kernel), inputs, **options
        ),
    )
    assert any(re.search(mistake.error, race) for race in races), races
