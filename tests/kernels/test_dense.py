"""Kernels that decide rounds on whole rows, against exact and plain operations.

Run: python -m pytest tests/test_kernels_dense.py
"""

import itertools
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

if sys.platform == "darwin":
    pytest.skip("MLX runs kernels on Metal itself here", allow_module_level=True)

from mlx_gemma_mtp.engine.state import Report
from mlx_gemma_mtp.kernels import common
from mlx_gemma_mtp.kernels.judge import KERNEL as JUDGE
from mlx_gemma_mtp.kernels.judge import judge
from mlx_gemma_mtp.kernels.resample import KERNEL as RESAMPLE
from mlx_gemma_mtp.kernels.resample import resample
from mlx_gemma_mtp.kernels.threshold import KERNEL as THRESHOLD
from mlx_gemma_mtp.kernels.threshold import threshold
from mlx_gemma_mtp.sampling.acceptance import Draft, accept_block
from mlx_gemma_mtp.sampling.decision import decide, joined, propose
from mlx_gemma_mtp.sampling.distribution import choose_tokens
from mlx_gemma_mtp.sampling.graph import sampling_arrays, sampling_graph
from mlx_gemma_mtp.sampling.noise import (
    COIN,
    RESIDUAL,
    Stream,
    gumbel_noise,
    uniform_noise,
)
from mlx_gemma_mtp.sampling.params import SamplingParams
from tests.metal.build import compile_kernel
from tests.metal.lint import lint
from tests.metal.run import run_on_cpu, run_schedules
from tests.metal.text import metal_text

# What rounding may decide. A case closer than this is not compared; few are.
MASS = 3e-6  # between top_p and a mass, of which the whole is 1
FLOOR = 4e-6  # between min-p's floor and a logit
SCORE = 2e-5  # between the best two of an argmax under noise
WEIGHT = 2e-6  # of a probability, where another is subtracted from it
COIN_GAP = 3e-6  # between a coin and its chance, times what rounding is magnified by
SUM = 2e-5  # of a sum, relative
MAX_CLOSE = 0.05  # share of the cases that are too close

PAD_ID = 0x7FFFFFFF
NONE: dict[str, Any] = {}
TOP_P, MIN_P = {"top_p": 0.9}, {"min_p": 0.05}
BOTH = {"top_p": 0.8, "min_p": 0.02}
FILTERS = {"none": NONE, "top_p": TOP_P, "min_p": MIN_P, "both": BOTH}


@pytest.fixture(scope="module", autouse=True)
def _on_cpu():
    """Launches run the kernels' Metal text on the CPU; all of it is compiled first."""
    dtypes = [mx.float32, mx.bfloat16]
    cases = [
        *itertools.product([THRESHOLD], [*dtypes, mx.float16], [0.0], [(True,) * 3]),
        (THRESHOLD, mx.bfloat16, 8.0, (True,) * 3),
        *itertools.product([JUDGE], dtypes, [0.0], [(False,)]),
        (JUDGE, mx.float32, 0.0, (True,)),
        *itertools.product([RESAMPLE], dtypes, [0.0], [()]),
    ]
    texts = [_text(*case) for case in cases]
    with ThreadPoolExecutor() as pool:
        list(pool.map(compile_kernel, texts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "launch", run_on_cpu)
        yield


def _text(kernel, dtype, softcap, flags):
    """The Metal text of a kernel as its function would launch it."""
    B, K, V = 1, 1, 8
    taken = []

    def launch(kernel, inputs, **options):
        taken.append(metal_text(kernel, inputs, **options))
        return [
            mx.zeros(shape, dtype=dtype)
            for shape, dtype in zip(
                options["output_shapes"], options["output_dtypes"], strict=True
            )
        ]

    logits = mx.zeros((B, K + 1, V), dtype=dtype)
    rows = {
        "row_floats": mx.zeros((B, 8)),
        "row_words": mx.zeros((B, 8), dtype=mx.uint32),
        "softcap": softcap,
    }
    stats, ids = mx.zeros((B, K + 1, 4)), mx.zeros((B, K, 64), dtype=mx.int32)
    tokens, scores = mx.zeros((B, K + 1), dtype=mx.int32), mx.zeros((B, K, 64))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "launch", launch)
        if kernel is THRESHOLD:
            names = ("has_top_p", "has_min_p", "has_coupled")
            threshold(logits, **rows, **dict(zip(names, flags, strict=True)))
        elif kernel is JUDGE:
            coins = mx.zeros((B, K)) if flags[0] else None
            judge(
                logits, stats, tokens, tokens[:, :K], scores, ids, **rows, coins=coins
            )
        else:
            report = mx.zeros((B, K + 2), dtype=mx.int32)
            resample(report, mx.ones((B,)), logits, stats, scores, ids, **rows)
    return taken[0]


# ------------------------------------------------------------------ exact reference


@dataclass
class Row:
    """One row of logits in float64 with what the filters keep of it."""

    logits: np.ndarray
    lowest: float
    is_kept: np.ndarray
    is_close: bool
    stats: np.ndarray
    scores: np.ndarray  # (l - largest) / temp, -inf where dropped
    probs: np.ndarray


def exact_row(logits, params):
    """The filters by their definition, in float64, on float32 logits."""
    x = logits.astype(np.float64)
    largest = x.max()
    weights = np.exp(x - largest)
    probs = weights / weights.sum()
    lowest, is_close = -np.inf, False
    if 0 < params.top_p < 1:
        values, inverse = np.unique(x, return_inverse=True)
        mass = np.bincount(inverse.reshape(-1), probs)
        above = np.append(np.cumsum(mass[::-1])[::-1][1:], 0.0)
        top_p = float(np.float32(params.top_p))
        lowest = values[above < top_p].min()
        is_close |= np.abs(above - top_p).min() < MASS
    if params.min_p > 0:
        floor = largest + np.log(np.float64(np.float32(params.min_p)))
        is_close |= np.abs(x - floor).min() < FLOOR * max(1, abs(largest))
        lowest = max(lowest, floor)
    is_kept = x >= lowest
    temp = np.float64(np.float32(params.temp)) if params.temp > 0 else 1.0
    scores = np.where(is_kept, (x - largest) / temp, -np.inf)
    kept = np.exp(scores)
    stats = np.array([largest, lowest, kept.sum(), weights.sum()])
    return Row(x, lowest, is_kept, is_close, stats, scores, kept / kept.sum())


def exact_argmax(scores, error):
    """The best, lowest index first, and whether another is as good within ``error``."""
    best = int(np.argmax(scores))
    rivals = scores + error
    rivals[best] = -np.inf
    is_equal = scores == scores[best]
    gap = scores[best] - (error if np.isscalar(error) else error[best])
    return best, bool((rivals[~is_equal] > gap).any())


def floats(array):
    return np.array(array.astype(mx.float32))


def packed(params, offset):
    """``row_floats`` and ``row_words`` of rows."""
    rows, words = np.zeros((len(params), 8), np.float32), []
    for row, p in zip(rows, params, strict=True):
        row[:3] = p.temp, p.top_p if 0 < p.top_p < 1 else 2.0, p.min_p
        mode = common.COUPLED if p.reproducible else common.BLOCK
        mode = mode if p.temp > 0 else common.GREEDY
        seed = int(p.seed or 0)
        words.append([seed & 0xFFFFFFFF, seed >> 32, mode, 0])
    settings = np.array(words, np.uint32)
    tail = np.zeros((len(params), 4), np.uint32)
    tail[:, 0] = offset
    return {
        "row_floats": mx.array(rows),
        "row_words": mx.array(np.concatenate([settings, tail], axis=1)),
    }


def flags_of(params):
    return {
        "has_top_p": any(0 < p.top_p < 1 for p in params),
        "has_min_p": any(p.min_p > 0 for p in params),
        "has_coupled": any(p.temp > 0 and p.reproducible for p in params),
    }


ALL: dict[str, Any] = {"has_top_p": True, "has_min_p": True, "has_coupled": True}


class Close:
    """Counts the comparisons, and those too close to call."""

    def __init__(self):
        self.num_cases = self.num_close = 0

    def __call__(self, is_close):
        self.num_cases += 1
        self.num_close += bool(is_close)
        return bool(is_close)

    def check(self):
        assert self.num_close <= max(2, MAX_CLOSE * self.num_cases)


def check_threshold(logits, params, offset, *, softcap=0.0, flags=None, close=None):
    """Compare every row of a launch with its definition; returns the outputs."""
    stats, tokens = threshold(
        logits, **packed(params, offset), **(flags or ALL), softcap=softcap
    )
    plain = logits.astype(mx.float32)
    if softcap:
        plain = softcap * mx.tanh(plain / softcap)
    B, L, V = plain.shape
    close = close or Close()
    rows, graph = sampling_arrays(params), sampling_graph(params)
    positions = mx.array(offset)[:, None] + mx.arange(1, L + 1)
    want_tokens = np.array(choose_tokens(plain, rows, graph=graph, positions=positions))
    every_id = mx.broadcast_to(mx.arange(V), plain.shape)
    noise = np.array(gumbel_noise(rows.seed, positions, every_id), np.float64)
    for b, i in np.ndindex(B, L):
        p, got = params[b], np.array(stats[b, i], np.float64)
        row = exact_row(floats(plain[b, i]), p)
        if softcap:
            row.is_close |= _is_near_tie(row)
        rtol = SUM if not softcap else 5 * SUM
        np.testing.assert_allclose(got[0], row.stats[0], rtol=1e-6)
        np.testing.assert_allclose(got[3], row.stats[3], rtol=rtol)
        token = int(np.array(tokens[b, i]))
        if p.temp <= 0:
            if softcap:
                assert floats(plain[b, i])[token] >= row.stats[0] * (1 - 1e-6)
            else:
                assert token == want_tokens[b, i] == np.argmax(row.logits)
        if close(row.is_close):
            continue
        if 0 < p.top_p < 1 and p.min_p == 0 and not softcap:
            assert got[1] == row.lowest
        np.testing.assert_allclose(got[1], row.lowest, rtol=1e-6, atol=1e-6)
        temp = p.temp if p.temp > 0 else 1.0
        np.testing.assert_allclose(got[2], row.stats[2], rtol=rtol / min(temp, 1.0))
        if p.temp > 0 and (p.reproducible or L == 1):
            best, is_tie = exact_argmax(row.scores + noise[b, i], SCORE / temp)
            if not close(is_tie):
                assert token == best == want_tokens[b, i]
    return stats, tokens


def _is_near_tie(row):
    """Whether the lowest kept logit has a neighbour that tanh may not tell from it."""
    gap = np.abs(row.logits - row.lowest)
    return bool(((gap > 0) & (gap < 1e-5)).any())


# ------------------------------------------------------------------------ threshold


def mixed_params(rng, count, **filters):
    """Rows of all modes in turn."""
    params = []
    for i in range(count):
        kind = (i + int(rng.integers(3))) % 3
        params.append(
            SamplingParams(
                temp=0.0 if kind == 0 else float(rng.choice([0.3, 0.7, 1.0, 1.5])),
                seed=int(rng.integers(2**63)),
                reproducible=kind != 1,
                **filters,
            )
        )
    return params


def random_logits(rng, shape, dtype, *, spread=3.0):
    """Logits with a few good tokens, ties, and tokens that are ruled out."""
    x = rng.normal(0, spread, shape)
    x = np.where(rng.random(shape) < 0.2, np.round(x), x)
    x = np.where(rng.random(shape) < 0.05, -np.inf, x)
    x[..., 0] = rng.normal(0, 1, shape[:-1])  # one at least is finite
    return mx.array(x.astype(np.float32)).astype(dtype)


@pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_threshold(dtype, filters):
    rng, close = np.random.default_rng(1), Close()
    for V, B, L in ((8, 3, 2), (131, 1, 3), (2500, 3, 1)):
        params = mixed_params(rng, B, **filters)
        logits = random_logits(rng, (B, L, V), dtype)
        check_threshold(logits, params, rng.integers(0, 9999, B), close=close)
    close.check()


def test_threshold_under_a_softcap():
    rng, close = np.random.default_rng(2), Close()
    for spread in (1.0, 12.0):
        params = mixed_params(rng, 3, **BOTH)
        logits = random_logits(rng, (3, 2, 300), mx.bfloat16, spread=spread)
        check_threshold(logits, params, [3, 4, 5], softcap=8.0, close=close)
    close.check()


@pytest.mark.parametrize("filters", [NONE, TOP_P, MIN_P])
def test_threshold_without_what_no_row_asks(filters):
    params = [
        SamplingParams(temp=0.7, seed=9, reproducible=False, **filters),
        SamplingParams(**filters),
    ]
    logits = random_logits(np.random.default_rng(3), (2, 2, 50), mx.float32)
    check_threshold(logits, params, [7, 8], flags=flags_of(params))


def test_equals_of_the_token_that_crosses_stay():
    x = np.full((1, 4, 40), -30.0, np.float32)
    x[0, 0, [3, 9, 20]] = 1.0  # three thirds: the second crosses a half
    x[0, 1] = 2.0  # all alike
    x[0, 2, [5, 6]] = [0.0, -0.0]  # one number, two patterns of bits
    x[0, 3, 0] = 5.0  # all of the mass
    params = [SamplingParams(temp=1.0, top_p=0.5, seed=1)]
    stats, _ = threshold(mx.array(x), **packed(params, [0]), **ALL)
    assert np.array(stats)[0, :, 1].tolist() == [1.0, 2.0, 0.0, 5.0]
    np.testing.assert_allclose(np.array(stats)[0, :, 2], [3, 40, 2, 1], rtol=1e-6)


def test_a_mass_of_exactly_top_p_is_enough():
    x = np.full((1, 1, 8), -np.inf, np.float32)
    x[..., :3] = 0.0, -np.log(2.0), -np.log(2.0)
    params = [SamplingParams(temp=1.0, top_p=0.5, seed=1)]
    stats, _ = threshold(mx.array(x), **packed(params, [0]), **ALL)
    assert np.array(stats).tolist() == [[[0.0, 0.0, 1.0, 2.0]]]


@pytest.mark.parametrize("top_p", [1e-6, 0.999, 0.99999])
def test_extreme_top_p(top_p):
    logits = random_logits(np.random.default_rng(4), (1, 1, 999), mx.float32, spread=9)
    check_threshold(logits, [SamplingParams(temp=1.0, top_p=top_p, seed=2)], [1])


def test_min_p_of_one_keeps_the_best():
    logits = random_logits(np.random.default_rng(5), (1, 1, 64), mx.float32)
    stats, _ = threshold(
        logits, **packed([SamplingParams(temp=0.5, min_p=1.0, seed=2)], [1]), **ALL
    )
    assert stats[0, 0, 0] == stats[0, 0, 1]


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_threshold_of_any_row(data):
    V = data.draw(st.integers(8, 60))
    number = st.one_of(
        st.just(-np.inf), st.integers(-4, 4), st.floats(-40, 40, width=32)
    )
    x = data.draw(st.lists(number, min_size=V, max_size=V))
    x[data.draw(st.integers(0, V - 1))] = 1.5
    params = SamplingParams(
        temp=data.draw(st.sampled_from([0.0, 0.2, 1.0])),
        top_p=data.draw(st.sampled_from([1.0, 0.1, 0.5, 0.97])),
        min_p=data.draw(st.sampled_from([0.0, 0.3])),
        seed=data.draw(st.integers(0, 2**64 - 1)),
    )
    offset = data.draw(st.integers(0, 2**20))
    check_threshold(mx.array([[x]], dtype=mx.float32), [params], [offset])


# ---------------------------------------------------------------- judge and resample


@dataclass
class Block:
    """A round to decide: logits, drafts, and what they were drawn from."""

    logits: mx.array
    params: list[SamplingParams]
    offset: np.ndarray
    draft: Draft
    scores: mx.array
    ids: mx.array

    @property
    def rows(self):
        return packed(self.params, self.offset)

    def graph(self):
        return sampling_graph(self.params)


def random_block(rng, B, K, V, dtype, params, *, noise=0.7):
    """A block whose drafter is like the target, as far as ``noise`` lets it."""
    logits = random_logits(rng, (B, K + 1, V), dtype)
    offset = rng.integers(0, 99999, B)
    rows, graph = sampling_arrays(params), sampling_graph(params)
    likeness = floats(logits[:, :K]) + rng.normal(0, noise, (B, K, V))
    drafts = [
        propose(
            mx.array(likeness[:, i - 1 : i].astype(np.float32)),
            rows,
            graph=graph,
            offset=mx.array(offset),
            step=i,
            token_ids=None,
        )
        for i in range(1, K + 1)
    ]
    draft = joined(drafts)
    scores = np.full((B, K, 64), -np.inf, np.float32)
    ids = np.full((B, K, 64), PAD_ID, np.int32)
    if draft.source is not None:
        count = draft.source.token_ids.shape[-1]
        scores[..., :count] = np.array(draft.source.scores)
        ids[..., :count] = np.array(draft.source.token_ids)
    return Block(logits, params, offset, draft, mx.array(scores), mx.array(ids))


def exact_stats(block):
    """What ``threshold`` finds by the definition: rows, and its array."""
    B, L, _ = block.logits.shape
    rows = [
        [exact_row(floats(block.logits[b, i]), block.params[b]) for i in range(L)]
        for b in range(B)
    ]
    stats = np.array([[row.stats for row in line] for line in rows], np.float32)
    return rows, mx.array(stats)


def equality_tokens(block):
    L = block.logits.shape[1]
    positions = mx.array(block.offset)[:, None] + mx.arange(1, L + 1)
    return choose_tokens(
        block.logits,
        sampling_arrays(block.params),
        graph=block.graph(),
        positions=positions,
    )


def exact_verdict(rows, drafts, q_rows, ids, coins):
    """num_accepted, P_num_accepted and whether rounding might say otherwise."""
    K = len(drafts)
    reach, n, accepted, is_close = 1.0, 0, 1.0, False
    for i in range(K + 1):
        if i:
            if i < K:
                valid = ids[i] != PAD_ID
                p = rows[i].probs[ids[i][valid]]
                missing = max(reach - np.minimum(reach * p, q_rows[i][valid]).sum(), 0)
                scale = max(missing + 1 - reach, 1e-30)
                chance, error = missing / scale, COIN_GAP / scale
            else:
                chance, error = reach, COIN_GAP
            is_close |= abs(coins[i - 1] - chance) < error
            if coins[i - 1] < chance:
                n, accepted = i, reach
        if i < K:
            q = q_rows[i][ids[i] == drafts[i]].sum()
            reach = min(1.0, reach * rows[i].probs[drafts[i]] / max(q, 1e-30))
    return n, accepted, is_close


def exact_token(block, b, rows, q_rows, n, reach):
    """The token behind n accepted drafts and whether rounding might say otherwise."""
    V = block.logits.shape[2]
    probs, owed = rows[n].probs, np.zeros(V)
    if n < len(q_rows):
        ids = np.array(block.ids)[b, n]
        owed[ids[ids != PAD_ID]] = q_rows[n][ids != PAD_ID]
    weights = np.maximum(reach * probs - owed, 0)
    if weights.sum() < 100 * WEIGHT:
        return None, True
    offset = mx.array(block.offset[b : b + 1])
    numbers = gumbel_noise(
        sampling_arrays(block.params).seed[b : b + 1],
        offset[:, None],
        mx.arange(V)[None, None],
        Stream(RESIDUAL, offset),
    )
    noise = np.array(numbers[0, 0], np.float64)
    # What rounding does to a weight, and to its logarithm.
    error = WEIGHT * np.maximum(reach * probs, owed)
    with np.errstate(divide="ignore"):
        low = np.log(np.maximum(weights - error, 0)) + noise - SCORE
        high = np.log(np.maximum(weights + error, 0)) + noise + SCORE
    best = int(np.argmax(np.log(np.maximum(weights, 1e-300)) + noise))
    return best, bool((np.delete(high, best) > low[best]).any())


def decided(block, stats, tokens, *, coins=None, softcap=0.0):
    """What the two launches report."""
    options = {**block.rows, "softcap": softcap}
    report, reach = judge(
        block.logits,
        stats,
        tokens,
        block.draft.tokens,
        block.scores,
        block.ids,
        **options,
        coins=coins,
    )
    final = resample(
        report, reach, block.logits, stats, block.scores, block.ids, **options
    )
    return np.array(report), np.array(reach), np.array(final)


def check_block(block, stats, tokens, rows, close):
    """Compare a decided block with its definition and with plain operations."""
    judged, reach, final = decided(block, stats, tokens)
    offset = mx.array(block.offset)
    accepted = decide(
        block.draft,
        block.logits.astype(mx.float32),
        sampling_arrays(block.params),
        graph=block.graph(),
        offset=offset,
        verification=accept_block,
    )
    want = np.array(
        Report.of(block.draft.tokens, accepted, block.logits, block.graph()).tokens
    )
    K = block.draft.tokens.shape[1]
    positions = offset[:, None] + mx.arange(1, K + 1)
    seeds = sampling_arrays(block.params).seed
    coins = np.array(uniform_noise(seeds, positions, Stream(COIN, offset)), np.float64)
    scores, ids = np.array(block.scores, np.float64), np.array(block.ids)
    drafts = np.array(block.draft.tokens)
    counts = []
    for b, p in enumerate(block.params):
        if p.temp <= 0 or p.reproducible:
            if not close(any(row.is_close for row in rows[b]) and p.temp > 0):
                np.testing.assert_array_equal(final[b], want[b])
            np.testing.assert_array_equal(judged[b], final[b])
            assert reach[b] == 1
            continue
        weights = np.exp(scores[b])
        q_rows = weights / weights.sum(axis=-1, keepdims=True)
        n, exact_reach, is_close = exact_verdict(
            rows[b], drafts[b], q_rows, ids[b], coins[b]
        )
        if close(is_close or any(row.is_close for row in rows[b])):
            continue
        counts.append(n)
        assert judged[b, 0] == n == want[b, 0]
        np.testing.assert_array_equal(judged[b, 1 : n + 1], drafts[b, :n])
        assert (judged[b, n + 1 :] == -1).all()
        np.testing.assert_allclose(reach[b], exact_reach, rtol=1e-4)
        token, is_close = exact_token(block, b, rows[b], q_rows, n, exact_reach)
        np.testing.assert_array_equal(final[b, : n + 1], judged[b, : n + 1])
        if not close(is_close):
            assert (final[b, n + 1 :] == token).all()
            np.testing.assert_array_equal(final[b], want[b])
    return counts


@pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_blocks(dtype, filters):
    rng, close, counts = np.random.default_rng(6), Close(), []
    for i in range(8):
        B, K, V = int(rng.integers(1, 4)), i + 1, int(rng.choice([8, 70, 900]))
        params = mixed_params(rng, B, **filters)
        block = random_block(rng, B, K, V, dtype, params)
        rows, stats = exact_stats(block)
        counts += check_block(block, stats, equality_tokens(block), rows, close)
    assert counts
    close.check()


def test_every_number_of_drafts_is_accepted():
    rng, close, counts = np.random.default_rng(7), Close(), []
    for i in range(16):
        params = [
            SamplingParams(temp=1.0, seed=100 * i + b, reproducible=False)
            for b in range(3)
        ]
        block = random_block(rng, 3, 4, 60, mx.float32, params)
        rows, stats = exact_stats(block)
        counts += check_block(block, stats, equality_tokens(block), rows, close)
    assert set(counts) == {0, 1, 2, 3, 4}
    close.check()


@pytest.mark.parametrize("noise_ulps", [0, 4])
def test_a_whole_round(noise_ulps, monkeypatch):
    monkeypatch.setattr(common, "launch", partial(run_on_cpu, noise_ulps=noise_ulps))
    rng, close = np.random.default_rng(8), Close()
    for K, V in ((1, 9), (3, 1100)):
        params = mixed_params(rng, 3, **BOTH)
        block = random_block(rng, 3, K, V, mx.float32, params)
        stats, tokens = check_threshold(block.logits, params, block.offset)
        check_block(block, stats, tokens, exact_stats(block)[0], close)
    close.check()


@pytest.mark.parametrize("reproducible", [False, True])
def test_rows_of_the_real_vocabulary(reproducible):
    rng, close = np.random.default_rng(9), Close()
    params = [SamplingParams(temp=1.0, top_p=0.95, seed=5, reproducible=reproducible)]
    block = random_block(rng, 1, 4, 262144, mx.bfloat16, params)
    stats, tokens = check_threshold(block.logits, params, block.offset, close=close)
    check_block(block, stats, tokens, exact_stats(block)[0], close)
    assert close.num_close <= 2


def test_a_softcap_is_applied_everywhere():
    rng = np.random.default_rng(10)
    params = mixed_params(rng, 3, **BOTH)
    block = random_block(rng, 3, 2, 200, mx.float32, params)
    capped = Block(
        5.0 * mx.tanh(block.logits / 5.0),
        params,
        block.offset,
        block.draft,
        block.scores,
        block.ids,
    )
    stats, tokens = exact_stats(capped)[1], equality_tokens(capped)
    got = decided(block, stats, tokens, softcap=5.0)
    for a, b in zip(got, decided(capped, stats, tokens), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


# ----------------------------------------------------------------------------- edges

BLOCK_ROW = SamplingParams(temp=1.0, seed=3, reproducible=False)


def small_block(logits, drafts, candidates):
    """A block of one row; ``candidates`` are ids with scores for each step."""
    logits = np.array(logits, np.float32)[None]
    scores = np.full((1, len(drafts), 64), -np.inf, np.float32)
    ids = np.full((1, len(drafts), 64), PAD_ID, np.int32)
    for i, step in enumerate(candidates):
        for j, (token, score) in enumerate(step.items()):
            ids[0, i, j], scores[0, i, j] = token, score
    draft = Draft(mx.array([drafts], dtype=mx.int32), None)
    block = Block(
        mx.array(logits),
        [BLOCK_ROW],
        np.array([11]),
        draft,
        mx.array(scores),
        mx.array(ids),
    )
    return block, exact_stats(block)[1], mx.zeros((1, len(logits[0])), dtype=mx.int32)


def two(V=8):
    """A row in which tokens 0 and 1 share all of the mass."""
    return [0.0, 0.0, *[-np.inf] * (V - 2)]


@pytest.mark.parametrize(
    ("coins", "num_accepted"),
    [
        ([0.5], 0),  # strictly below: a chance of a half loses to a coin of a half
        ([np.nextafter(np.float32(0.5), np.float32(0))], 1),
        ([0.999, 0.25], 0),
        ([0.999, 0.2499], 2),  # the first is lost, the last is won: both stand
        ([np.float32(0.25) / np.float32(0.75), 0.999], 0),
        ([0.3333, 0.999], 1),
    ],
)
def test_a_coin_must_be_below_its_chance(coins, num_accepted):
    K = len(coins)
    block, stats, tokens = small_block([two()] * (K + 1), [0] * K, [{0: 0.0}] * K)
    coins = mx.array(np.array([coins], np.float32))
    report, reach, final = decided(block, stats, tokens, coins=coins)
    assert report[0, 0] == num_accepted
    assert reach[0] == 0.5**num_accepted
    assert report[0, 1:].tolist() == [0] * num_accepted + [-1] * (K + 1 - num_accepted)
    if num_accepted < K:  # the draft's weight is used up
        assert final[0, num_accepted + 1] == 1
    else:
        assert final[0, -1] in (0, 1)


def test_a_draft_that_the_target_drops_never_stands():
    block, stats, tokens = small_block([two()] * 2, [5], [{5: 0.0, 0: 0.0}])
    coins = mx.array([[2.0**-24]])
    report, _, final = decided(block, stats, tokens, coins=coins)
    assert report[0, 0] == 0
    assert (final[0, 1:] == 1).all()  # 1/2 - 1/2 is left of 0


def test_where_no_difference_is_left_the_target_decides():
    block, stats, _ = small_block([two()] * 2, [0], [{0: 0.0, 1: 0.0}])
    got = resample(
        mx.array([[0, -1, -1]]),
        mx.ones((1,)),
        block.logits,
        stats,
        block.scores,
        block.ids,
        **block.rows,
    )
    rows, _ = exact_stats(block)
    token, _ = exact_token(block, 0, rows[0], [np.zeros(64)], 0, 1.0)
    assert np.array(got).tolist() == [[0, token, token]]


def test_tokens_whose_low_bits_are_a_candidate_s():
    V, like = 90000, [20005, 20005 + 32768, 20005 + 65536]
    row = np.full(V, -np.inf)
    row[like] = 0
    block, stats, _ = small_block([row] * 2, [like[0]], [{like[0]: 0.0}])
    seen = set()
    for offset in range(6):
        block.offset = np.array([offset])
        got = resample(
            mx.array([[0, -1, -1]]),
            mx.ones((1,)),
            block.logits,
            stats,
            block.scores,
            block.ids,
            **block.rows,
        )
        seen.add(int(got[0, 1]))
    assert seen == set(like[1:])


def test_a_round_without_drafts():
    logits = random_logits(np.random.default_rng(12), (2, 1, 40), mx.float32)
    params = [BLOCK_ROW, SamplingParams()]
    flags = {**ALL, "has_coupled": False}
    stats, tokens = check_threshold(logits, params, [4, 5], flags=flags)
    none = mx.zeros((2, 0), dtype=mx.int32)
    nothing = mx.zeros((2, 0, 64))
    report, reach = judge(
        logits, stats, tokens, none, nothing, nothing, **packed(params, [4, 5])
    )
    assert np.array(report).tolist() == [[0, int(token)] for token in tokens[:, 0]]
    assert np.array(reach).tolist() == [1, 1]


# --------------------------------------------------------------------------- the text


def test_the_order_of_threads_changes_nothing(monkeypatch):
    rng = np.random.default_rng(13)
    params = mixed_params(rng, 3, **BOTH)
    block = random_block(rng, 3, 1, 40, mx.float32, params)
    monkeypatch.setattr(common, "launch", partial(run_schedules, seeds=range(1, 5)))
    stats, tokens = threshold(block.logits, **block.rows, **ALL)
    decided(block, stats, tokens)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("kernel", [THRESHOLD, JUDGE, RESAMPLE], ids=lambda k: k.name)
def test_lint(kernel, dtype):
    if kernel is THRESHOLD:
        for flags in itertools.product([False, True], repeat=3):
            for softcap in (0.0, 30.0):
                assert lint(_text(kernel, dtype, softcap, flags)) == []
    else:
        for inject in (False, True):
            assert lint(_text(kernel, dtype, 0.0, (inject,))) == []
