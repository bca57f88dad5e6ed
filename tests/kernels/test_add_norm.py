"""The kernel of a residual sum and the norms around it, from its Metal text on the CPU.

Compared                        with                                  tolerance
every option, type and H        the kernel's sums in numpy            0: every bit
the same                        float64                               roundings, below
plain operations                mlx-lm's own layer                    0: every bit
the kernel                      plain operations                      a last place, rare
M = 1 to 9, schedules,
contraction                     each other                            0: every bit

Run: python -m pytest tests/kernels/test_add_norm.py
     python -m pytest -m slow tests/kernels/test_add_norm.py    every text, every width
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

from mlx_gemma_mtp.kernels import add_norm, common
from mlx_gemma_mtp.kernels.add_norm import Branches
from tests.kernels import norm_mistakes as mistakes
from tests.kernels.norms import EPS, Sum
from tests.kernels.products import as_float32, same_bits
from tests.kernels.test_matmul_mistakes import by_name
from tests.metal.lint import lint
from tests.metal.run import MetalError, run_on_cpu, run_schedules
from tests.metal.text import metal_text
from tests.metal.tsan import run_under_tsan

DTYPES = [mx.bfloat16, mx.float16, mx.float32]
WIDTHS = (64, 256, 1024, 1536, 2560, 2816, 3840, 5376, add_norm.MAX_WIDTH)
NAMES = ("is_scaled", "is_normed", "has_branches")
OPTIONS: list[dict[str, Any]] = [
    dict(zip(NAMES, v, strict=True)) for v in product((False, True), repeat=3)
]
ALL = OPTIONS[-1]
# As a mixture has them: behind attention, and at the end of a layer.
THRICE: dict[str, Any] = {"is_scaled": False, "is_normed": True, "is_thrice": True}
EXPERTS: dict[str, Any] = {**ALL, "has_experts": True}
OPTIONS += [THRICE, EXPERTS]
OTHERS = [{**each, "has_experts": True} for each in OPTIONS[1:7:2]]
by_options = pytest.mark.parametrize(
    "options", OPTIONS, ids=lambda o: " ".join(n for n in o if o[n]) or "none"
)


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch):
    monkeypatch.setattr(common, "backend", lambda: "metal")
    monkeypatch.setattr(common, "launch", run_on_cpu)


def units(dtype):
    """A unit in the last place of numbers near 1."""
    return mx.finfo(dtype).eps


def check(case):
    """Every bit, and how near the numbers are."""
    outputs = case.run()
    assert len(outputs) == len(case.bits)
    for found, bits, exact in zip(outputs, case.bits, case.exact, strict=True):
        assert same_bits(found, bits)
        # A few roundings of the row's largest numbers.
        most = np.abs(exact).max(axis=-1, keepdims=True)
        assert (np.abs(found - exact) <= 6 * units(case.dtype) * most).all()


# -------------------------------------------------------------------------- bits


@by_options
def test_bits(options):
    """A text of each: types and widths differ from one to the next."""
    number = OPTIONS.index(options)
    case = Sum.random(
        3, WIDTHS[3 * number % len(WIDTHS)], DTYPES[number % 3], **options
    )
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("options", [*OPTIONS, *OTHERS], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_of_every_text(options, dtype):
    for H in WIDTHS:
        check(Sum.random(2, H, dtype, **options))


def test_rows_have_the_bits_of_one_row():
    case = Sum.random(9, 1536, **EXPERTS)
    one = [case.rows(slice(m, m + 1)).run() for m in range(9)]
    for M in range(1, 10):
        for found, *rows in zip(case.rows(slice(M)).run(), *one[:M], strict=True):
            assert same_bits(found, np.concatenate(rows))


def test_schedules(monkeypatch):
    monkeypatch.setattr(common, "launch", run_schedules)
    check(Sum.random(2, 1536, **EXPERTS))
    check(Sum.random(2, 1536, **THRICE))


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_contraction_has_nothing_to_fuse(dtype, monkeypatch):
    """Between a product and a sum a number is rounded, of float32 alone it is not."""
    monkeypatch.setattr(common, "launch", partial(run_on_cpu, contract=True))
    check(Sum.random(2, 1536, dtype, **EXPERTS))


@given(
    st.sampled_from([EXPERTS, OPTIONS[2]]),
    st.integers(1, 5),
    st.sampled_from([8, 1028]),
    st.integers(-20, 20),
)
@settings(max_examples=12, deadline=None, derandomize=True)
def test_any_rows(options, M, H, power):
    case = Sum.random(M, H, mx.bfloat16, **options)
    factor = np.float32(2.0**power)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "backend", lambda: "metal")
        patch.setattr(common, "launch", run_on_cpu)
        check(Sum(**{**vars(case), "y": case.y * factor}))


def test_leading_dimensions_and_a_scale_that_is_padded():
    case = Sum.random(6, 64)
    arrays, options = case.arguments()
    residual, y = (a.reshape(2, 3, 64) for a in arrays[:2])
    options["scale"] = common.padded(options["scale"])
    found = add_norm.add_norm(residual, y, arrays[2], **options)
    for array, bits in zip(found, case.bits, strict=True):
        assert array is not None
        assert (array.shape, array.dtype) == ((2, 3, 64), mx.bfloat16)
        assert same_bits(as_float32(array).reshape(6, 64), bits)


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_a_row_that_is_no_number_leaves_the_others(value):
    case = Sum.random(3, 256, is_scaled=False)
    y = case.y.copy()
    y[1, 5] = value
    for found, bits in zip(Sum(**{**vars(case), "y": y}).run(), case.bits, strict=True):
        assert np.isnan(found[1]).any()
        assert same_bits(found[[0, 2]], bits[[0, 2]])


# ------------------------------------------------------------------------- plain


class Fixed:
    """A part of a layer that gives what is said, whatever it takes."""

    def __init__(self, *given):
        self.given, self.taken = given, []

    def __call__(self, x, *args, **kwargs):
        self.taken.append(x)
        return self.given if len(self.given) > 1 else self.given[0]


def layer_of(dtype, **settings):
    """A layer of mlx-lm with random norms."""
    args = gemma4_text.ModelArgs(
        hidden_size=64, num_hidden_layers=2, intermediate_size=64, head_dim=32,
        global_head_dim=32, num_attention_heads=2, num_kv_shared_layers=0,
        vocab_size=32, vocab_size_per_layer_input=32, **settings,
    )  # fmt: skip
    layer = gemma4_text.DecoderLayer(args, 0)
    norms = {n: m for n, m in layer.named_modules() if n.endswith(("norm", "_1", "_2"))}
    for number, norm in enumerate(norms[n] for n in sorted(norms)):
        key = mx.random.key(number)
        norm.weight = (1 + 0.3 * mx.random.normal((64,), key=key)).astype(dtype)
    layer.layer_scalar = mx.array([0.73]).astype(dtype)
    return layer


def random_rows(dtype, number):
    return mx.random.normal((2, 3, 64), key=mx.random.key(number)).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_operations_are_those_of_a_layer(dtype, monkeypatch):
    monkeypatch.setattr(common, "backend", lambda: "ops")
    layer = layer_of(dtype, hidden_size_per_layer_input=0)
    x, attended, fed = (random_rows(dtype, i) for i in range(3))
    layer.self_attn, layer.mlp = Fixed(attended, None, None), Fixed(fed)
    want, *_ = layer(x)
    h, normed = add_norm.add_norm(
        x, attended, layer.post_attention_layernorm.weight, eps=EPS,
        next_weight=layer.pre_feedforward_layernorm.weight,
    )  # fmt: skip
    (taken,) = layer.mlp.taken
    assert normed is not None
    assert mx.array_equal(normed, taken).item()
    out, none = add_norm.add_norm(
        h, fed, layer.post_feedforward_layernorm.weight, eps=EPS,
        scale=layer.layer_scalar,
    )  # fmt: skip
    assert none is None
    assert (out.dtype, mx.array_equal(out, want).item()) == (dtype, True)
    padded = common.padded(layer.layer_scalar)
    weight = layer.post_feedforward_layernorm.weight
    again, _ = add_norm.add_norm(h, fed, weight, eps=EPS, scale=padded)
    assert mx.array_equal(again, want).item()


def test_plain_operations_are_those_of_a_mixture(monkeypatch):
    monkeypatch.setattr(common, "backend", lambda: "ops")
    layer = layer_of(
        mx.bfloat16, hidden_size_per_layer_input=0, enable_moe_block=True,
        num_experts=2, top_k_experts=1, moe_intermediate_size=32,
    )  # fmt: skip
    x, attended, dense, chosen = (random_rows(mx.bfloat16, i) for i in range(4))
    layer.self_attn, layer.mlp = Fixed(attended, None, None), Fixed(dense)
    layer.router, layer.experts = Fixed(None, None), Fixed(chosen)
    want, *_ = layer(x)
    weight = layer.post_attention_layernorm.weight
    h, first, second, routed = add_norm.add_norms(
        x, attended, weight, eps=EPS, root=64**-0.5,
        next_weights=(
            layer.pre_feedforward_layernorm.weight,
            layer.pre_feedforward_layernorm_2.weight,
            mx.ones((64,), dtype=mx.bfloat16) * 1.25,
        ),
    )  # fmt: skip
    assert mx.array_equal(layer.mlp.taken[0], first)
    assert mx.array_equal(layer.experts.taken[0], second)
    assert mx.array_equal(layer.router.taken[0], h)
    router: Any = gemma4_text.Router(layer.config)
    router.scale, router.proj = mx.full((64,), 1.25, mx.bfloat16), Fixed(chosen)
    router(h)
    assert mx.array_equal(router.proj.taken[0], routed)
    out, _ = add_norm.add_norm(
        h, dense, layer.post_feedforward_layernorm.weight, eps=EPS,
        scale=layer.layer_scalar,
        branches=Branches(
            layer.post_feedforward_layernorm_1.weight, chosen,
            layer.post_feedforward_layernorm_2.weight,
        ),
    )  # fmt: skip
    assert mx.array_equal(out, want).item()


def test_plain_operations_are_those_of_experts(monkeypatch):
    monkeypatch.setattr(common, "backend", lambda: "ops")
    layer = layer_of(
        mx.bfloat16, hidden_size_per_layer_input=0, enable_moe_block=True,
        num_experts=4, top_k_experts=3, moe_intermediate_size=32,
    )  # fmt: skip
    given = mx.random.normal((2, 3, 3, 64), key=mx.random.key(1)).astype(mx.bfloat16)
    shares = mx.random.normal((2, 3, 3), key=mx.random.key(2)).astype(mx.bfloat16)
    layer.experts.switch_glu = Fixed(given)
    x, y = random_rows(mx.bfloat16, 0), random_rows(mx.bfloat16, 1)
    weight = mx.ones((64,), dtype=mx.bfloat16)
    found, want = (
        add_norm.add_norm(
            x, y, weight, eps=EPS, branches=Branches(weight, other, weight, of_experts)
        )[0]
        for other, of_experts in (
            (given, shares), (layer.experts(x, None, shares), None)
        )
    )  # fmt: skip
    assert mx.array_equal(found, want)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize("options", [EXPERTS, THRICE], ids=["end", "thrice"])
def test_the_kernel_differs_from_plain_by_a_sum(options, dtype):
    """A sum in another order may move a number by one place, seldom."""
    case = Sum.random(5, 2816, dtype, **options)
    for found, want in zip(case.run(), case.plain, strict=True):
        differs = found != want
        assert differs.mean() < 0.02
        most = np.abs(want).max(axis=-1, keepdims=True)
        assert (np.abs(found - want) <= 2 * units(dtype) * most).all()


@pytest.mark.parametrize(
    "changed",
    [
        {"scale": mx.array([0.5])},
        {"next_weight": mx.ones((64,))},
        {"weight": mx.ones((64,))},
        {"residual": mx.ones((1, 64), dtype=mx.bfloat16)},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_arrays_of_other_types_are_left_to_mlx(changed):
    case = Sum.random(3, 64)
    (residual, y, weight), options = case.arguments()
    named = {"residual": residual, "y": y, "weight": weight, **options, **changed}
    found, want = add_norm.add_norm(**named), add_norm.plain(**named)
    for array, other in zip(found, want, strict=True):
        assert array is not None
        assert other is not None
        assert array.dtype == other.dtype
        assert mx.array_equal(array, other).item()


@pytest.mark.parametrize("H", [4, 66, add_norm.MAX_WIDTH + 4])
def test_widths_that_are_left_to_mlx(H, monkeypatch):
    monkeypatch.setattr(common, "launch", None)
    for options in (EXPERTS, THRICE):
        case = Sum.random(2, H, **options)
        assert all(map(same_bits, case.run(), case.plain))


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


@by_options
@pytest.mark.parametrize("dtype", DTYPES)
def test_lint(options, dtype):
    texts = []

    def launch(kernel, inputs, **launched):
        texts.append(metal_text(kernel, inputs, **launched))
        pairs = zip(launched["output_shapes"], launched["output_dtypes"], strict=True)
        return [mx.zeros(shape, dtype=kind) for shape, kind in pairs]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "launch", launch)
        Sum.random(2, 1536, dtype, **options).run()
    assert [lint(text) for text in texts] == [[]]


@pytest.mark.tsan
@by_options
def test_no_races(options):
    assert looked_at(Sum.random(2, 1100, **options), run_under_tsan) == []


def test_kernels_are_all_that_there_are():
    names = {kernel.name for kernel in add_norm.kernels()}
    assert len(names) == len(OPTIONS) + len(OTHERS)
    assert {"add_norm", "add_norm_normed_thrice", "add_norm_normed"} <= names
    assert "add_norm_scaled_normed_branches_experts" in names


# ---------------------------------------------------------------------- mistakes


def run_with(mistake, launch, case=mistakes.ADDED):
    """The case of the mistakes with one of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            common,
            "launch",
            lambda kernel, *a, **k: launch(mistake.of(kernel), *a, **k),
        )
        return case.run()


@by_name(mistakes.ADD_WRONG, most=6)
def test_bits_are_wrong(mistake):
    found = run_with(mistake, run_on_cpu)
    assert not all(map(same_bits, found, mistakes.ADDED.bits))


@by_name(mistakes.EXPERTS_WRONG, most=2)
def test_bits_of_experts_are_wrong(mistake):
    found = run_with(mistake, run_on_cpu, mistakes.OF_EXPERTS)
    assert not all(map(same_bits, found, mistakes.OF_EXPERTS.bits))


@by_name(mistakes.THRICE_WRONG, most=2)
def test_bits_of_three_norms_are_wrong(mistake):
    found = run_with(mistake, run_on_cpu, mistakes.THRICE)
    assert not all(map(same_bits, found, mistakes.THRICE.bits))


@by_name(mistakes.ADD_STOPPING)
def test_the_launch_stops(mistake):
    with pytest.raises(MetalError, match=mistake.error):
        run_with(mistake, run_schedules)


@pytest.mark.tsan
@by_name(mistakes.ADD_RACING)
def test_race_is_reported(mistake):
    races = looked_at(
        mistakes.ADDED,
        lambda kernel, inputs, **options: run_under_tsan(
            mistake.of(kernel), inputs, **options
        ),
    )
    assert any(re.search(mistake.error, race) for race in races), races
