"""The kernel of the 64 best tokens, run from its Metal text on the CPU.

Compared                         with                              tolerance
values, ids without a cap        candidates.sorted_best              0
largest logit                    the row's maximum                 0
sum of exponentials              float64                           4e-6 relative
values with a cap                float64 tanh                      2e-6 relative
ids with a cap                   float64 tanh, by value at the id  2e-6 relative

Run: python -m pytest tests/kernels/test_select.py
"""

import sys
from functools import partial

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

if sys.platform == "darwin":
    pytest.skip("MLX runs kernels on Metal itself here", allow_module_level=True)

from mlx_gemma_mtp.kernels import common, select
from mlx_gemma_mtp.sampling import candidates
from tests.metal.lint import lint
from tests.metal.run import run_on_cpu, run_schedules
from tests.metal.text import metal_text
from tests.metal.tsan import run_under_tsan

PAD_ID = 0x7FFFFFFF
MASS_RTOL = 4e-6
CAP_RTOL = 2e-6
DTYPES = [mx.float32, mx.float16, mx.bfloat16]


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch):
    monkeypatch.setattr(common, "launch", run_on_cpu)


def normal(R, M, *, seed=0, scale=6.0):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(R, M)) * scale).astype(np.float32)


def distinct_ids(R, M, *, seed=0, largest=262144):
    """Ids in no order, no two of a row equal."""
    rng = np.random.default_rng(seed)
    rows = [rng.choice(largest, M, replace=False) for _ in range(R)]
    return mx.array(np.stack(rows).astype(np.int32))


def check(logits, token_ids=None):
    """Compare with the plain operations, the mass with float64."""
    values, ids, stats = select.most_likely(logits, token_ids=token_ids)
    R, M = logits.shape
    count = min(64, M)
    want = candidates.sorted_best(
        logits[:, None],
        count,
        token_ids=None if token_ids is None else token_ids[:, None],
    )
    assert (values.shape, values.dtype) == ((R, 64), mx.float32)
    assert (ids.shape, ids.dtype) == ((R, 64), mx.int32)
    assert (stats.shape, stats.dtype) == ((R, 2), mx.float32)
    # By their bits, so that 0 and -0 differ.
    np.testing.assert_array_equal(
        np.array(values[:, :count].view(mx.int32)),
        np.array(want.logits[:, 0].view(mx.int32)),
    )
    np.testing.assert_array_equal(ids[:, :count], want.token_ids[:, 0])
    assert (np.array(values[:, count:]) == -np.inf).all()
    assert (np.array(ids[:, count:]) == PAD_ID).all()
    exact = np.array(logits.astype(mx.float32)).astype(np.float64)
    largest = exact.max(axis=1)
    np.testing.assert_array_equal(stats[:, 0], largest)
    shift = np.where(np.isfinite(largest), largest, 0)
    np.testing.assert_allclose(
        stats[:, 1], np.exp(exact - shift[:, None]).sum(axis=1), rtol=MASS_RTOL
    )


# ---------------------------------------------------------------------------- shapes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("R", "M"), [(1, 8), (3, 4096), (2, 20000)])
def test_types(R, M, dtype):
    check(mx.array(normal(R, M)).astype(dtype))


@pytest.mark.parametrize("M", [1, 5, 7, 63, 64, 65, 257, 8191, 8192, 8193])
def test_sizes(M):
    check(mx.array(normal(2, M)))


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_vocabulary(dtype):
    check(mx.array(normal(9, 262144)).astype(dtype))


def test_largest():
    check(mx.array(normal(1, select.MAX_COLUMNS)))


@pytest.mark.parametrize(
    ("logits", "named"),
    [
        (mx.zeros((64,)), "must be \\[R, M\\]"),
        (mx.zeros((1, 0)), "M from 1 to 1048576"),
        (mx.zeros((1, select.MAX_COLUMNS + 1)), "M from 1 to 1048576"),
        (mx.zeros((1, 64), dtype=mx.int32), "must be floats"),
    ],
)
def test_refused(logits, named):
    with pytest.raises(ValueError, match=named):
        select.most_likely(logits)


# ---------------------------------------------------------------------------- values


@pytest.mark.parametrize("M", [300, 9000])
@pytest.mark.parametrize(
    "values",
    [
        lambda x: np.round(x),
        lambda x: np.zeros_like(x),
        lambda x: np.full_like(x, -np.inf),
        lambda x: np.where(np.arange(x.shape[1]) % 50 == 3, x, -np.inf),
        lambda x: np.where(np.arange(x.shape[1]) < 20, x, -np.inf),
        lambda x: np.sort(x),
        lambda x: -np.sort(-x),
        lambda x: np.where(x > 0, 0.0, -0.0),
        lambda x: x * 1e30,
        # The best are all of one thread, and of one thread each.
        lambda x: x + 100 * (np.arange(x.shape[1]) % 256 == 7),
        lambda x: x + 100 * (np.arange(x.shape[1]) < 256),
    ],
    ids=[
        "ties",
        "equal",
        "nothing",
        "some",
        "few",
        "ascending",
        "descending",
        "zeros",
        "huge",
        "one thread",
        "all threads",
    ],
)
def test_values(values, M):
    check(mx.array(values(normal(2, M)).astype(np.float32)))


@pytest.mark.parametrize("M", [5, 40, 1000, 4096, 17000])
@pytest.mark.parametrize("is_rounded", [False, True])
def test_token_ids(M, is_rounded):
    logits = normal(3, M)
    logits = np.round(logits) if is_rounded else logits
    check(mx.array(logits), distinct_ids(3, M))


def test_rows_need_not_be_contiguous():
    check(mx.array(normal(700, 4)).T)


@given(
    hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 2), st.integers(8, 300)),
        elements=st.one_of(
            st.floats(-30, 30, width=32, allow_subnormal=False),
            st.sampled_from([0.0, -0.0, 1.0, -np.inf]),
        ),
    ),
    st.booleans(),
)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_any_rows(logits, has_ids):
    logits = np.pad(logits, [(0, 0), (0, 300 - logits.shape[1])], mode="wrap")
    ids = distinct_ids(*logits.shape) if has_ids else None
    check_with_harness(mx.array(logits), ids)


def check_with_harness(logits, ids):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "launch", run_on_cpu)
        check(logits, ids)


@pytest.mark.parametrize("M", [300, 9000])
@pytest.mark.parametrize("share", [0.01, 0.5, 1.0])
def test_nan_stays_in_bounds(M, share):
    logits = normal(2, M)
    bits = np.random.default_rng(1).random(logits.shape) < share
    logits = np.where(bits, np.nan, logits).astype(np.float32)
    logits[:, ::2] = np.copysign(logits[:, ::2], -1)
    _, ids, _ = select.most_likely(mx.array(logits))
    assert ((np.array(ids) >= 0) & (np.array(ids) < M)).all()
    assert all(len(set(row)) == 64 for row in np.array(ids))


# ---------------------------------------------------------------------------- cap


@pytest.mark.parametrize("noise_ulps", [0, 2])
@pytest.mark.parametrize("M", [1000, 12000])
def test_cap(monkeypatch, M, noise_ulps):
    monkeypatch.setattr(common, "launch", partial(run_on_cpu, noise_ulps=noise_ulps))
    logits = normal(3, M, scale=20.0)
    values, ids, stats = select.most_likely(mx.array(logits), softcap=30.0)
    exact = 30 * np.tanh(logits.astype(np.float64) / 30)
    want = -np.sort(-exact, axis=1)[:, :64]
    np.testing.assert_allclose(values, want, rtol=CAP_RTOL)
    # Where two tokens are too close to call, either may stand first.
    at_ids = np.take_along_axis(exact, np.array(ids), axis=1)
    np.testing.assert_allclose(at_ids, want, rtol=CAP_RTOL)
    gaps = np.minimum(
        -np.diff(want, axis=1, prepend=np.inf), -np.diff(want, axis=1, append=-np.inf)
    )
    is_clear = gaps > 4 * CAP_RTOL * np.abs(want)
    order = np.argsort(-exact, axis=1, kind="stable")[:, :64]
    np.testing.assert_array_equal(np.array(ids)[is_clear], order[is_clear])
    assert is_clear.mean() > 0.4
    np.testing.assert_allclose(stats[:, 0], exact.max(axis=1), rtol=CAP_RTOL)
    mass = np.exp(exact).sum(axis=1)
    np.testing.assert_allclose(
        np.exp(np.array(stats[:, 0], np.float64)) * np.array(stats[:, 1]),
        mass,
        rtol=30 * CAP_RTOL,
    )


@pytest.mark.parametrize("contract", [False, True])
def test_noise_leaves_the_list(monkeypatch, contract):
    launch = partial(run_on_cpu, noise_ulps=4, contract=contract)
    monkeypatch.setattr(common, "launch", launch)
    check(mx.array(normal(2, 9000)))


# ---------------------------------------------------------------------------- text


@pytest.mark.parametrize(("M", "has_ids"), [(300, False), (300, True), (9000, False)])
def test_schedules(monkeypatch, M, has_ids):
    monkeypatch.setattr(common, "launch", run_schedules)
    logits = mx.array(np.round(normal(2, M)))
    check(logits, distinct_ids(2, M) if has_ids else None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_ids", [False, True])
def test_lint(monkeypatch, dtype, has_ids):
    findings = []

    def launch(kernel, inputs, **options):
        findings.append(lint(metal_text(kernel, inputs, **options)))
        pairs = zip(options["output_shapes"], options["output_dtypes"], strict=True)
        return [mx.zeros(shape, dtype=kind) for shape, kind in pairs]

    monkeypatch.setattr(common, "launch", launch)
    ids = mx.zeros((1, 9000), dtype=mx.int32) if has_ids else None
    select.most_likely(mx.zeros((1, 9000), dtype=dtype), token_ids=ids)
    assert findings == [[], []]


@pytest.mark.tsan
@pytest.mark.parametrize("has_ids", [False, True])
def test_no_races(monkeypatch, has_ids):
    races = []

    def launch(kernel, inputs, **options):
        races.append(run_under_tsan(kernel, inputs, **options))
        return run_on_cpu(kernel, inputs, **options)

    monkeypatch.setattr(common, "launch", launch)
    logits = mx.array(np.round(normal(2, 9000)))
    select.most_likely(logits, token_ids=distinct_ids(2, 9000) if has_ids else None)
    assert races == [[], []]
