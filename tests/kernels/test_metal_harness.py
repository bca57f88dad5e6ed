"""The harness for Metal kernels: right on a right kernel, and it sees mistakes.

Run: python -m pytest tests/test_metal_harness.py
"""

import importlib.util
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

if sys.platform == "darwin":
    pytest.skip("MLX runs kernels on Metal itself here", allow_module_level=True)

from tests.metal import launch as metal_launch
from tests.metal import mistakes
from tests.metal.build import compile_kernel
from tests.metal.lint import lint
from tests.metal.run import MetalError, ScheduleError, run_on_cpu, run_schedules
from tests.metal.text import metal_text
from tests.metal.toy import TOY, arguments, example_logits, expected

NAMES = [m.name for m in (*mistakes.STOPPING, *mistakes.WRONG)]
# Largest error of a probability, of which the largest is 1: a few roundings.
TOLERANCE = {mx.float32: 1e-6, mx.float16: 5e-4, mx.bfloat16: 4e-3}


def numpy(array):
    return np.array(array.astype(mx.float32))


def by_name(cases):
    return pytest.mark.parametrize("mistake", cases, ids=[m.name for m in cases])


@pytest.fixture(scope="module", autouse=True)
def _compiled():
    """Compile every kernel of this file on all cores before the first test needs it."""
    inputs, options = arguments(mx.array(example_logits()))
    cases = [*mistakes.STOPPING, *mistakes.WRONG]
    texts = [metal_text(case.kernel, inputs, **options) for case in cases]
    with ThreadPoolExecutor() as pool:
        list(pool.map(compile_kernel, texts))


class Small:
    """A kernel whose body is given, with one input ``x`` and one output ``y``."""

    name = "small"
    header = ""
    input_names = ("x",)
    output_names = ("y",)

    def __init__(self, source):
        # MLX passes an attribute only if the source names it.
        self.source = f"uint i = thread_position_in_grid.x;\n{source}"


def run_small(source, x, *, dtype=mx.uint32, size=32, **options):
    """What ``size`` threads of one threadgroup write to ``y``, one element each."""
    (y,) = run_on_cpu(
        Small(source),
        [mx.array(x)],
        template=[],
        grid=(size, 1, 1),
        threadgroup=(size, 1, 1),
        output_shapes=[(size,)],
        output_dtypes=[dtype],
        **options,
    )
    return np.array(y) if dtype != mx.bfloat16 else numpy(y)


# ----------------------------------------------------------------- a right kernel


@pytest.mark.parametrize("num_threads", [32, 200, 256, 1024])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_toy_against_float64(dtype, num_threads):
    logits = mx.array(example_logits()).astype(dtype)
    inputs, options = arguments(logits, num_threads=num_threads)
    outputs = run_schedules(TOY, inputs, **options, seeds=range(1, 5))
    probs, argmax, logsumexp = expected(numpy(logits))
    assert [y.dtype for y in outputs] == options["output_dtypes"]
    np.testing.assert_allclose(numpy(outputs[0]), probs, rtol=0, atol=TOLERANCE[dtype])
    np.testing.assert_array_equal(outputs[1], argmax)
    np.testing.assert_allclose(outputs[2], logsumexp, rtol=1e-6)


def test_inputs_need_not_be_contiguous():
    logits = mx.array(example_logits(B=4)).T
    inputs, options = arguments(logits, num_threads=32)
    _, argmax, _ = run_on_cpu(TOY, inputs, **options)
    np.testing.assert_array_equal(argmax, expected(np.array(logits))[1])


def test_noise_and_contraction_change_little_but_something():
    inputs, options = arguments(mx.array(example_logits()))
    probs = [
        np.array(run_on_cpu(TOY, inputs, **options, **changed)[0])
        for changed in ({}, {"noise_ulps": 4}, {"contract": True})
    ]
    np.testing.assert_allclose(probs[1], probs[0], rtol=3e-6)
    np.testing.assert_allclose(probs[2], probs[0], rtol=3e-6)
    assert (probs[1] != probs[0]).any()
    assert (probs[2] != probs[0]).any()


def test_row_of_the_real_vocabulary():
    logits = mx.array(example_logits(B=2, V=262144))
    inputs, options = arguments(logits, num_threads=1024)
    _, argmax, logsumexp = run_on_cpu(TOY, inputs, **options)
    np.testing.assert_array_equal(argmax, expected(np.array(logits))[1])
    np.testing.assert_allclose(logsumexp, expected(np.array(logits))[2], rtol=1e-6)


# ------------------------------------------------------------------ Metal's library

LANE = np.arange(32)
ODD = (LANE * 2654435761 + 12345).astype(np.uint32)  # 32 numbers with mixed bits


FUNCTIONS: list[tuple[str, Any]] = [
    ("simd_sum(x[i])", np.full(32, ODD.sum(dtype=np.uint32))),
    ("simd_max(x[i])", np.full(32, ODD.max())),
    ("simd_min(x[i])", np.full(32, ODD.min())),
    ("simd_and(x[i] | 5u)", np.full(32, np.bitwise_and.reduce(ODD | 5))),
    ("simd_or(x[i])", np.full(32, np.bitwise_or.reduce(ODD))),
    ("simd_xor(x[i])", np.full(32, np.bitwise_xor.reduce(ODD))),
    ("simd_prefix_inclusive_sum(i)", LANE.cumsum()),
    ("simd_prefix_exclusive_sum(i)", LANE.cumsum() - LANE),
    ("simd_shuffle(x[i], (i * 5) % 32)", ODD[LANE * 5 % 32]),
    ("simd_shuffle_xor(x[i], 3)", ODD[LANE ^ 3]),
    ("simd_shuffle_down(x[i], 4)", [*ODD[4:], *[0xFFFFFFFF] * 4]),
    ("simd_shuffle_up(x[i], 4)", [*[0xFFFFFFFF] * 4, *ODD[:-4]]),
    ("simd_shuffle_and_fill_up(x[i], 7u, 2)", [7, 7, *ODD[:-2]]),
    ("simd_shuffle_rotate_down(x[i], 3)", np.roll(ODD, -3)),
    ("simd_shuffle_rotate_up(x[i], 3)", np.roll(ODD, 3)),
    ("simd_broadcast(x[i], 9)", np.full(32, ODD[9])),
    ("simd_broadcast_first(x[i])", np.full(32, ODD[0])),
    ("uint(uint64_t(simd_ballot(i % 2 == 0)))", np.full(32, 0x55555555)),
    ("simd_any(i == 31)", np.ones(32)),
    ("simd_all(i < 31)", np.zeros(32)),
    ("simd_is_first()", LANE == 0),
    ("mulhi(x[i], x[31 - i])", ODD.astype(np.uint64) * ODD[::-1] >> np.uint64(32)),
    ("as_type<uint>(float(i))", LANE.astype(np.float32).view(np.uint32)),
    ("popcount(i)", [int(n).bit_count() for n in LANE]),
    ("clz(i)", [32 - int(n).bit_length() for n in LANE]),
    ("ctz(i)", [32, *[(int(n) & -int(n)).bit_length() - 1 for n in LANE[1:]]]),
    ("rotate(1u, i)", 1 << LANE),
    ("clamp(i, 3u, 9u)", LANE.clip(3, 9)),
    ("select(1u, 2u, i > 4)", np.where(LANE > 4, 2, 1)),
    ("uint(isnan(i ? 1.0f : NAN)) + 2 * isinf(INFINITY)", 2 + (LANE == 0)),
    ("(uint4(i) + uint4(1, 2, 3, 4) * 2u).z", LANE + 6),
    ("uint(dot(float4(i), float4(1, 2, 3, 4)))", LANE * 10),
    ("uint(max(float2(i), float2(3)).y)", np.maximum(LANE, 3)),
    ("uint(precise::exp2(float(i % 8)) + fast::sqrt(4.0f))", 2 ** (LANE % 8) + 2),
    ("sizeof(1.0)", np.full(32, 4)),
    ("as_type<ushort>(bfloat(3.14159f))", np.full(32, 0x4049)),
    ("uint(float(bfloat(256.0f) + bfloat(1.0f)))", np.full(32, 256)),
    ("uint(log1p(0.0f))", np.zeros(32)),  # of MLX's own headers
]


@pytest.fixture(scope="module")
def results():
    """What each of the functions gives, all of them in one kernel: one to compile."""
    lines = [f"y[{32 * n} + i] = {code};" for n, (code, _) in enumerate(FUNCTIONS)]
    (y,) = run_on_cpu(
        Small("\n".join(lines)),
        [mx.array(ODD)],
        template=[],
        grid=(32, 1, 1),
        threadgroup=(32, 1, 1),
        output_shapes=[(len(FUNCTIONS), 32)],
        output_dtypes=[mx.uint32],
    )
    return dict(zip((code for code, _ in FUNCTIONS), np.array(y), strict=True))


@pytest.mark.parametrize(("expression", "want"), FUNCTIONS)
def test_functions(results, expression, want):
    np.testing.assert_array_equal(
        results[expression], np.asarray(want).astype(np.uint32)
    )


@pytest.mark.parametrize(
    "call", ["metal::log1p(x[i])", "erf(x[i])", "expm1(x[i])", 'printf("")']
)
def test_what_metal_does_not_have_does_not_compile(call):
    with pytest.raises(MetalError, match=r"kernel:\d+:\d+: error: "):
        run_small(f"y[i] = {call};", np.ones(32, np.float32), dtype=mx.float32)


def test_atomics_of_a_threadgroup():
    source = """
    threadgroup atomic_uint total;
    if (i == 0) atomic_store_explicit(&total, 0u, memory_order_relaxed);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    atomic_fetch_add_explicit(&total, x[i], memory_order_relaxed);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    y[i] = atomic_load_explicit(&total, memory_order_relaxed);
    """
    np.testing.assert_array_equal(run_small(source, ODD), ODD.sum(dtype=np.uint32))


@pytest.mark.parametrize(
    "dtype",
    [mx.float32, mx.float16, mx.bfloat16, mx.int32, mx.uint32, mx.uint8, mx.bool_],
)
def test_dtypes_pass_unchanged(dtype):
    x = mx.array([0, 1, 1, 0, 1, 0, 0, 1, 1]).astype(dtype)
    np.testing.assert_array_equal(
        run_small("y[i] = x[i];", x, dtype=dtype, size=9), [0, 1, 1, 0, 1, 0, 0, 1, 1]
    )


@pytest.mark.parametrize("x", [3, [3], [3] * 7, [[3] * 4] * 3])
def test_address_space_and_shape_follow_the_size_of_an_input(x):
    x = mx.array(x, mx.uint32)
    value = "x" if x.ndim == 0 else "x[0] + x_ndim + x_shape[0] + x_strides[0]"
    want = 3 if x.ndim == 0 else 3 + x.ndim + x.shape[0] + (4 if x.ndim == 2 else 1)
    np.testing.assert_array_equal(run_small(f"y[i] = {value};", x, size=1), want)


def test_what_nobody_writes_is_poison():
    y = run_small("if (i % 2) y[i] = x[i];", ODD, dtype=mx.float32)
    np.testing.assert_array_equal(np.isnan(y), LANE % 2 == 0)


def test_last_threadgroup_may_be_smaller():
    source = "y[i] = threads_per_threadgroup.x + 100 * threadgroup_position_in_grid.x;"
    (y,) = run_on_cpu(
        Small(source),
        [mx.zeros(8)],
        template=[],
        grid=(70, 1, 1),
        threadgroup=(32, 1, 1),
        output_shapes=[(70,)],
        output_dtypes=[mx.uint32],
    )
    np.testing.assert_array_equal(y, [32] * 32 + [132] * 32 + [206] * 6)


# ----------------------------------------------------------------------- mistakes


def test_names_of_mistakes_are_unique():
    assert len(NAMES) == len(set(NAMES)) >= 18


@by_name(mistakes.STOPPING)
def test_mistake_stops_the_launch(mistake):
    inputs, options = arguments(mx.array(example_logits()))
    with pytest.raises(MetalError, match=mistake.error):
        run_schedules(mistake.kernel, inputs, **options)


def is_wrong(kernel):
    """Whether outputs of the toy are wrong, or depend on the schedule."""
    logits = example_logits()
    inputs, options = arguments(mx.array(logits))
    try:
        outputs = run_schedules(kernel, inputs, **options)
    except ScheduleError:
        return True
    pairs = zip(outputs, expected(logits), strict=True)
    return not all(np.allclose(y, want, rtol=1e-5, atol=1e-6) for y, want in pairs)


def test_toy_is_not_wrong():
    assert not is_wrong(TOY)


@by_name(mistakes.WRONG)
def test_mistake_gives_wrong_outputs(mistake):
    assert is_wrong(mistake.kernel)


def test_loop_without_end_stops(monkeypatch):
    monkeypatch.setattr(metal_launch, "TIME_LIMIT_S", 1)
    inputs, options = arguments(mx.array(example_logits()))
    with pytest.raises(MetalError, match=mistakes.SPIN.error):
        run_on_cpu(mistakes.SPIN.kernel, inputs, **options)


def test_storage_that_is_not_understood_is_named():
    source = "threadgroup float a[4], b[4];\ny[i] = x[i];"
    with pytest.raises(MetalError, match=r"one array at a time.*float a\[4\], b"):
        run_small(source, ODD)


# --------------------------------------------------------------------------- lint


def toy_text(kernel, dtype=mx.bfloat16):
    inputs, options = arguments(mx.array(example_logits()).astype(dtype))
    return metal_text(kernel, inputs, **options)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_lint_has_nothing_to_say_of_the_toy(dtype):
    assert lint(toy_text(TOY, dtype)) == []


@by_name(mistakes.REFUSED_BY_METAL)
def test_lint_finds(mistake):
    findings = lint(toy_text(mistake.kernel))
    assert any(re.search(mistake.error, finding) for finding in findings), findings


def test_lint_finds_what_is_not_ascii():
    (finding,) = lint(
        toy_text(TOY.but("Second pass.", "Second pass \N{EM DASH} last."))
    )
    assert finding.endswith("must be ASCII: got '\N{EM DASH}'")


def test_lint_allows_bfloat_to_become_float():
    kernel = TOY.but(
        "static_cast<float>(row_logits[i]) * scale", "row_logits[i] * scale"
    )
    assert lint(toy_text(kernel)) == []


def test_lint_checks_helpers_in_the_header():
    helper = "METAL_FUNC float first(const device float* p) { return p[0]; }\n"
    good = replace(TOY, header=helper).but(
        "argmax[row] =", "first(logsumexp); argmax[row] ="
    )
    assert lint(toy_text(good)) == []
    bad = replace(good, header=helper.replace("device", "threadgroup"))
    assert any("no matching function" in finding for finding in lint(toy_text(bad)))


# ---------------------------------------------------------- kernels of others


class OnCpu:
    """Stands in for ``mx.fast.metal_kernel``: the kernel it makes runs here."""

    def __init__(self, *, name, input_names, output_names, source, header="", **_):
        self.name = name
        self.input_names = tuple(input_names)
        self.output_names = tuple(output_names)
        self.source = source
        self.header = header

    def __call__(self, *, inputs, template=(), **options):
        inputs = [mx.array(x) for x in inputs]
        return run_on_cpu(self, inputs, template=template, **options)


@pytest.fixture
def mlx_lm_kernel(monkeypatch):
    """Gives functions of ``mlx_lm.kernels`` whose kernels run here, unchanged."""
    pytest.importorskip("mlx_lm.kernels", reason="mlx-lm has kernels since 0.32")

    def load(module_name, function_name):
        spec = importlib.util.find_spec(f"mlx_lm.kernels.{module_name}")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        with monkeypatch.context() as patched:
            patched.setattr(mx.fast, "metal_kernel", OnCpu)
            spec.loader.exec_module(module)
        return getattr(module, function_name)

    return load


def test_expert_routing_of_mlx_lm(mlx_lm_kernel):
    mx.random.seed(0)
    route = mlx_lm_kernel("expert_routing", "expert_routing")
    logits, bias = mx.random.normal((7, 128)), mx.random.normal((128,)) * 0.1
    options = {"multiplier": 1.5, "score_eps": 1e-6, "route_scale": 2.0}
    experts, weights = route(logits, bias, top_k=8, **options)
    scores = mx.sigmoid(logits * 1.5)
    want = mx.argsort(-(scores + bias), axis=-1)[:, :8]
    picked = mx.take_along_axis(scores, want, axis=-1)
    want_weights = picked / (picked.sum(axis=-1, keepdims=True) + 1e-6) * 2.0
    np.testing.assert_array_equal(experts, want)
    np.testing.assert_allclose(weights, want_weights, rtol=1e-6)


def test_rms_norm_sigmoid_gate_of_mlx_lm(mlx_lm_kernel):
    mx.random.seed(0)
    norm_gate = mlx_lm_kernel("rms_norm_sigmoid_gate", "rms_norm_sigmoid_gate")
    B, N, L, D = 1, 4, 5, 64
    x, gate = mx.random.normal((B, N, L, D)), mx.random.normal((B, L, N * D))
    normed = mx.fast.rms_norm(x, None, 1e-6).transpose(0, 2, 1, 3)
    want = normed.reshape(B, L, N * D) * mx.sigmoid(gate)
    np.testing.assert_allclose(norm_gate(x, gate, eps=1e-6), want, atol=2e-6)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_norm_add_of_mlx_lm(mlx_lm_kernel, dtype):
    mx.random.seed(0)
    norm_add = mlx_lm_kernel("norm_add_norm", "norm_add_norm")
    branch = mx.random.normal((3, 1536)).astype(dtype)
    weight = mx.random.normal((1536,)).astype(dtype)
    stream, alpha, beta = (mx.random.normal(s) for s in ((3, 1536), (1536,), (1536,)))
    options = {"alpha": alpha, "beta": beta, "post_weight": weight, "post_eps": 1e-6}
    got = norm_add(branch, stream, **options, next_norm=None)[0]
    normed = mx.fast.rms_norm((weight * branch), None, 1e-6)
    want = alpha * stream + beta * normed.astype(mx.float32)
    np.testing.assert_allclose(got, want, atol=1e-5 if dtype == mx.float32 else 5e-2)
