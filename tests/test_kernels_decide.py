"""The kernel that decides rounds, against the plain operations of decision.py.

Outputs are whole numbers and must be the same, but where rounding decides: there a
number of the kernel may differ in its last bits and with it the token. Which places
these are is computed in float64 (``is_close_call``); they are left out, and must be
few.

Run: python -m pytest tests/test_kernels_decide.py
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

if sys.platform == "darwin":
    pytest.skip("MLX runs kernels on Metal itself here", allow_module_level=True)

from mlx_gemma_mtp import decision
from mlx_gemma_mtp.acceptance import Draft, accept_block
from mlx_gemma_mtp.config import SamplingParams
from mlx_gemma_mtp.decision import joined, propose
from mlx_gemma_mtp.kernels import common, decide
from mlx_gemma_mtp.noise import COIN, RESIDUAL, Stream, gumbel_noise, uniform_noise
from mlx_gemma_mtp.rounds import _report
from mlx_gemma_mtp.sampling import (
    Distribution,
    distribution,
    most_likely,
    sampling_rows,
    sampling_rule,
)
from tests.metal.build import compile_kernel
from tests.metal.lint import lint
from tests.metal.run import run_on_cpu, run_schedules
from tests.metal.text import metal_text

LIST = common.LIST
NO_ID = 0x7FFFFFFF
TOLERANCE = 1e-5  # of masses, probabilities, chances, and relative of noisy scores
# What a graph with drafts, and with coins of the test's, compiles for.
TEMPLATES = [
    *[(K, True, False) for K in range(1, 9)],
    (0, False, False),
    (3, False, False),
    (1, True, True),
    (2, True, True),
]


@dataclass
class Case:
    """A round that is to be decided."""

    params: list[SamplingParams]
    logits: mx.array  # [B, K + 1, V]
    draft: Draft
    offset: mx.array  # [B]
    coins: mx.array | None = None

    @property
    def rule(self):
        return sampling_rule(self.params)

    @property
    def rows(self):
        return sampling_rows(self.params)

    @property
    def K(self):
        return self.draft.tokens.shape[1]


def make_case(params, rng, *, K, V, nearness=1.0, scale=2.0, has_ties=False):
    """A round of random logits, with drafts from a drafter as near as asked for."""
    B = len(params)
    logits = rng.normal(size=(B, K + 1, V)) * scale
    guesses = logits + rng.normal(size=logits.shape) * nearness
    if has_ties:
        logits, guesses = np.round(logits), np.round(guesses)
        logits[..., ::7] = -np.inf
        logits[..., 1] = 0.0  # never nothing
    logits = mx.array(logits.astype(np.float32))
    guesses = mx.array(guesses.astype(np.float32))
    offset = mx.array(rng.integers(0, 100_000, size=B).astype(np.int32))
    rows, rule = sampling_rows(params), sampling_rule(params)
    drafts = [
        propose(
            guesses[:, i : i + 1], rows, rule=rule, offset=offset, step=i + 1,
            token_ids=None,
        )
        for i in range(K)
    ]  # fmt: skip
    draft = joined(drafts) if K else Draft(mx.zeros((B, 0), mx.int32), None)
    return Case(params, logits, draft, offset)


def reference(case, monkeypatch=None):
    """What the plain operations report, int [B, K + 2]."""
    original = decision.uniform_noise
    if case.coins is not None:
        decision.uniform_noise = lambda *_: case.coins
    try:
        accepted = decision.decide(
            case.draft,
            case.logits,
            case.rows,
            rule=case.rule,
            offset=case.offset,
            verification=accept_block,
        )
        return np.array(_report(case.draft.tokens, accepted))
    finally:
        decision.uniform_noise = original


def padded(array, value):
    """A list [..., M] as one of 64."""
    missing = LIST - array.shape[-1]
    return mx.pad(
        array, [*[(0, 0)] * (array.ndim - 1), (0, missing)], constant_values=value
    )


def arguments(case):
    """The arguments of ``decide``."""
    best = most_likely(case.logits, min(LIST, case.logits.shape[-1]))
    highest = case.logits.max(axis=-1)
    total = mx.exp(case.logits - highest[..., None]).sum(axis=-1)
    source = case.draft.source if case.rule.has_block else None
    rows = case.rows
    floats = np.zeros((len(case.params), common.ROW_FLOATS), np.float32)
    words = np.zeros((len(case.params), common.ROW_WORDS), np.uint32)
    for column, name in enumerate(("temp", "top_p", "min_p")):
        floats[:, column] = np.array(rows[name]).reshape(-1)
    words[:, :2] = np.array(rows["seed"])
    words[:, 2] = modes(case)
    words[:, 3] = np.array(rows["top_k"]).reshape(-1)
    words[:, 4] = np.array(case.offset)
    return (
        padded(best.logits, -np.inf),
        padded(best.token_ids, NO_ID),
        mx.stack([highest, total], axis=-1),
        case.draft.tokens,
        None if source is None else padded(source.scores, -np.inf),
        None if source is None else padded(source.token_ids, NO_ID),
    ), {
        "row_floats": mx.array(floats),
        "row_words": mx.array(words),
        "coins": case.coins,
    }


def modes(case):
    def mode(p):
        if p.temp <= 0:
            return common.GREEDY
        return common.COUPLED if p.reproducible else common.BLOCK

    return [mode(p) for p in case.params]


def run(case, harness=run_on_cpu, **options):
    """What the kernel reports, int [B, K + 2]."""
    original = common.launch
    common.launch = lambda kernel, inputs, **launch: harness(
        kernel, inputs, **launch, **options
    )
    try:
        positional, named = arguments(case)
        return np.array(decide.decide(*positional, **named))
    finally:
        common.launch = original


# ------------------------------------------------------------------- close calls


def is_close_call(case):
    """For each row of the batch whether rounding may decide it, bool [B]."""
    target = None
    if case.rule.is_sampled:
        places = case.offset[:, None] + mx.arange(1, case.K + 2)
        target = distribution(case.logits, case.rows, rule=case.rule, positions=places)
    rules = {
        common.GREEDY: lambda *_: False,
        common.COUPLED: _is_close_by_equality,
        common.BLOCK: _is_close_by_block if case.K else _is_close_by_equality,
    }
    return np.array(
        [
            _is_close_to_a_filter(case, b) or rules[mode](case, target, b)
            for b, mode in enumerate(modes(case))
        ]
    )


def _is_close_to_a_filter(case, b):
    p = case.params[b]
    if p.temp <= 0:
        return False
    logits = np.sort(np.array(case.logits[b]).astype(np.float64))[:, ::-1]
    close = False
    if 0 < p.top_p < 1:
        probs = np.exp(logits - logits[:, :1])
        above = np.cumsum(probs / probs.sum(axis=-1, keepdims=True), axis=-1)
        close = (abs(above - p.top_p) < TOLERANCE).any()
    if p.min_p > 0:
        floor = logits[:, :1] + np.log(p.min_p)
        close = close or (abs(logits - floor) < TOLERANCE).any()
    return close


def _is_close_maximum(low, high, noise):
    """Whether the best of weights between two bounds is unsure."""
    with np.errstate(divide="ignore"):
        low, high = np.log(low) + noise, np.log(high) + noise
    best = low.argmax()
    others = np.delete(high, best)
    return others.size and low[best] - others.max() < TOLERANCE * 10


def _is_close_by_equality(case, target, b):
    places = case.offset[:, None] + mx.arange(1, case.K + 2)
    noise = np.array(gumbel_noise(case.rows["seed"], places, target.token_ids))[b]
    weights = np.exp(np.array(target.scores[b]).astype(np.float64))
    tokens = np.array(target.token_ids[b])
    for i in range(case.K + 1):
        if _is_close_maximum(weights[i], weights[i], noise[i]):
            return True
        token = tokens[i, (np.log(weights[i] + 1e-300) + noise[i]).argmax()]
        if i < case.K and token != int(case.draft.tokens[b, i]):
            return False  # what follows is not looked at
    return False


def _looked_up(probs, ids, V):
    whole = np.zeros((*ids.shape[:-1], V))
    np.put_along_axis(whole, ids, probs, axis=-1)
    return whole


def _is_close_by_block(case, target, b):
    def whole(source):
        weights = np.exp(np.array(source.scores[b]).astype(np.float64))
        probs = weights / weights.sum(axis=-1, keepdims=True)
        ids = np.array(source.token_ids[b])
        return _looked_up(probs, ids, case.logits.shape[-1])

    K, start = case.K, case.offset[b : b + 1]
    seed = case.rows["seed"][b : b + 1]
    p, q = whole(target), whole(case.draft.source)
    drafts = np.array(case.draft.tokens[b])
    places = start[:, None] + mx.arange(1, K + 1)
    coins = uniform_noise(seed, places, Stream(COIN, start))[0]
    if case.coins is not None:
        coins = case.coins[b]
    reaches = [1.0]
    for i, x in enumerate(drafts):
        reaches.append(min(1.0, reaches[-1] * p[i, x] / max(q[i, x], 1e-30)))
    n = 0
    for i in range(K, 0, -1):
        low = high = reaches[i]
        if i < K:
            missing = reaches[i] - np.minimum(reaches[i] * p[i], q[i]).sum()
            lost = 1 - reaches[i]
            low, high = max(missing - TOLERANCE, 0), missing + TOLERANCE
            low /= low + lost + TOLERANCE
            high /= high + max(lost - TOLERANCE, 0)
        if float(coins[i - 1]) < low - TOLERANCE:
            n = i
            break
        if float(coins[i - 1]) < high + TOLERANCE:
            return True
    share, owed = reaches[n] * p[n], q[n] if n < K else np.zeros_like(p[n])
    rounding = np.maximum(share, owed) * 1e-6
    left = np.maximum(share - owed, 0)
    if left.sum() < 1e-4:
        return True
    ids = mx.arange(p.shape[-1])[None, None]
    noise = gumbel_noise(seed, start[:, None], ids, Stream(RESIDUAL, start))
    low = np.maximum(share - owed - rounding, 0)
    high = np.where(p[n] > 0, np.maximum(share - owed + rounding, 0), 0)
    return _is_close_maximum(low, high, np.array(noise)[0, 0])


# ---------------------------------------------------------------- random instances

FILTERS = [
    {},
    {"top_p": 0.9},
    {"min_p": 0.05},
    {"top_k": 5},
    {"top_k": 64},
    {"top_k": 40, "top_p": 0.8, "min_p": 0.02},
    {"top_k": 1},
]


def random_params(rng, mode, V):
    if mode == common.GREEDY:
        return SamplingParams()
    filters = dict(FILTERS[rng.integers(len(FILTERS))])
    if V > LIST:
        filters.setdefault("top_k", LIST)
    return SamplingParams(
        temp=float(rng.choice([0.1, 0.7, 1.0, 3.0])),
        seed=int(rng.integers(2**63)),
        reproducible=mode == common.COUPLED,
        **filters,
    )


def random_case(seed, K, *, chosen=None, **options):
    """A round of one to three rows, each of a random mode."""
    rng = np.random.default_rng([seed, K])
    V = int(rng.choice([8, 33, 64, 200]))
    chosen = rng.integers(3, size=rng.integers(1, 4)) if chosen is None else chosen
    options = {
        "nearness": float(rng.choice([0.02, 0.3, 1.0, 4.0])),
        "scale": float(rng.choice([0.5, 2.0, 4.0])),
        "has_ties": bool(rng.integers(4) == 0),
        **options,
    }
    params = [random_params(rng, mode, V) for mode in chosen]
    return make_case(params, rng, K=K, V=V, **options)


@pytest.fixture(scope="module", autouse=True)
def _compiled():
    """Compile the kernel for every template on all cores before the first test."""
    with ThreadPoolExecutor() as pool:
        list(pool.map(compile_kernel, [text_of(*t) for t in TEMPLATES]))


def text_of(K, has_block, has_coins):
    """The Metal text for a template."""
    mode = common.BLOCK if has_block else common.COUPLED
    case = random_case(0, K, chosen=[mode])
    if has_coins:
        case.coins = mx.ones((1, K)) / 2
    texts = []

    def keep(kernel, inputs, **launch):
        texts.append(metal_text(kernel, inputs, **launch))
        return [mx.zeros((1,))]

    run(case, keep)
    return texts[0]


@pytest.mark.parametrize("K", range(9))
def test_reports_are_those_of_the_plain_operations(K):
    seen, num_close, num_rows = {}, 0, 0
    for seed in range(40):
        # Without drafts, or where nobody asks, there is nothing to judge by block.
        case = random_case(seed, K)
        if K not in (0, 3) and not case.rule.has_block:
            continue
        is_close = is_close_call(case)
        num_close, num_rows = num_close + is_close.sum(), num_rows + len(is_close)
        got, want = run(case), reference(case)
        np.testing.assert_array_equal(got[~is_close], want[~is_close], f"seed {seed}")
        for mode, report in zip(modes(case), want, strict=True):
            seen.setdefault(mode, set()).add(int(report[0]))
    assert num_close <= 0.1 * num_rows
    assert set(seen) == {common.GREEDY, common.COUPLED, common.BLOCK}
