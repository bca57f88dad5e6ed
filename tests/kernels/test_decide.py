"""The kernel that decides rounds, against the plain operations of decision.py.

Outputs are whole numbers and must be the same, but where rounding decides: there a
number of the kernel may differ in its last bits and with it the token. Which places
these are is computed in float64 (``is_close_call``); they are left out, and must be
few.

Run: python -m pytest tests/kernels/test_decide.py
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

if sys.platform == "darwin":
    pytest.skip("MLX runs kernels on Metal itself here", allow_module_level=True)

from mlx_gemma_mtp.engine.state import Report
from mlx_gemma_mtp.kernels import common, decide
from mlx_gemma_mtp.sampling import decision
from mlx_gemma_mtp.sampling.acceptance import Draft, accept_block
from mlx_gemma_mtp.sampling.candidates import sorted_best
from mlx_gemma_mtp.sampling.decision import joined, propose
from mlx_gemma_mtp.sampling.distribution import Distribution, distribution
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
    def graph(self):
        return sampling_graph(self.params)

    @property
    def has_block(self):
        return any(group.has_block for group in self.graph.groups)

    @property
    def sampling(self):
        return sampling_arrays(self.params)

    @property
    def num_drafts(self):
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
    rows, graph = sampling_arrays(params), sampling_graph(params)
    drafts = [
        propose(
            guesses[:, i : i + 1], rows, graph=graph, offset=offset, step=i + 1,
            token_ids=None,
        )
        for i in range(K)
    ]  # fmt: skip
    draft = joined(drafts) if K else Draft(mx.zeros((B, 0), mx.int32), None)
    return Case(params, logits, draft, offset)


def reference(case):
    """What the plain operations report, int [B, K + 2]."""
    original = decision.uniform_noise
    if case.coins is not None:
        decision.uniform_noise = lambda *_: case.coins
    try:
        accepted = decision.decide(
            case.draft,
            case.logits,
            case.sampling,
            graph=case.graph,
            offset=case.offset,
            verification=accept_block,
        )
        report = Report.of(case.draft.tokens, accepted, case.logits, case.graph)
        return np.array(report.tokens)
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
    best = sorted_best(case.logits, min(LIST, case.logits.shape[-1]))
    highest = case.logits.max(axis=-1)
    total = mx.exp(case.logits - highest[..., None]).sum(axis=-1)
    source = case.draft.source if case.has_block else None
    rows = case.sampling
    floats = np.zeros((len(case.params), common.ROW_FLOATS), np.float32)
    words = np.zeros((len(case.params), common.ROW_WORDS), np.uint32)
    for column, values in enumerate((rows.temp, rows.top_p, rows.min_p)):
        floats[:, column] = np.array(values).reshape(-1)
    words[:, :2] = np.array(rows.seed)
    words[:, 2] = modes(case)
    words[:, 3] = np.array(rows.top_k).reshape(-1)
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
    if case.graph.is_sampled:
        places = case.offset[:, None] + mx.arange(1, case.num_drafts + 2)
        lists = case.graph.of_drafts  # they hold whatever a row keeps
        target = distribution(case.logits, case.sampling, group=lists, positions=places)
    rules = {
        common.GREEDY: lambda *_: False,
        common.COUPLED: _is_close_by_equality,
        common.BLOCK: _is_close_by_block if case.num_drafts else _is_close_by_equality,
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
    places = case.offset[:, None] + mx.arange(1, case.num_drafts + 2)
    noise = np.array(gumbel_noise(case.sampling.seed, places, target.token_ids))[b]
    weights = np.exp(np.array(target.scores[b]).astype(np.float64))
    tokens = np.array(target.token_ids[b])
    for i in range(case.num_drafts + 1):
        if _is_close_maximum(weights[i], weights[i], noise[i]):
            return True
        token = tokens[i, (np.log(weights[i] + 1e-300) + noise[i]).argmax()]
        if i < case.num_drafts and token != int(case.draft.tokens[b, i]):
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

    K, start = case.num_drafts, case.offset[b : b + 1]
    seed = case.sampling.seed[b : b + 1]
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
    least = np.maximum(share - owed - rounding, 0)
    most = np.where(p[n] > 0, np.maximum(share - owed + rounding, 0), 0)
    return _is_close_maximum(least, most, np.array(noise)[0, 0])


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


@pytest.mark.parametrize(
    "K",
    [
        *(0, 1, 4, 8),
        *(pytest.param(K, marks=pytest.mark.slow) for K in (2, 3, 5, 6, 7)),
    ],
)
def test_reports_are_those_of_the_plain_operations(K):
    seen: dict[int, set[int]] = {}
    num_close = num_rows = 0
    for seed in range(36):
        case = random_case(seed, K)
        if (K, K > 0 and case.has_block, False) not in TEMPLATES:
            continue
        is_close = is_close_call(case)
        num_close, num_rows = num_close + is_close.sum(), num_rows + len(is_close)
        got, want = run(case), reference(case)
        np.testing.assert_array_equal(got[~is_close], want[~is_close], f"seed {seed}")
        for mode, report in zip(modes(case), want, strict=True):
            seen.setdefault(mode, set()).add(int(report[0]))
    assert num_close <= 0.05 * num_rows
    assert set(seen) == {common.GREEDY, common.COUPLED, common.BLOCK}
    if K <= 3:
        assert seen[common.BLOCK] == set(range(K + 1))


@pytest.mark.parametrize("K", range(1, 9))
def test_every_number_of_drafts_is_accepted(K):
    """Target and drafter agree, but on one row the target cannot say the draft."""
    rng = np.random.default_rng(K)
    for n in range(K + 1):
        params = [random_params(rng, mode, V=40) for mode in (2, 0, 1)]
        params = [replace(p, top_k=0, top_p=1.0, min_p=0.0) for p in params]
        case = make_case(params, rng, K=K, V=40, nearness=0)
        if n < K:
            logits = np.array(case.logits)
            logits[range(3), n, np.array(case.draft.tokens)[:, n]] = -np.inf
            case.logits = mx.array(logits)
        got = run(case)
        np.testing.assert_array_equal(got[:, 0], n)
        np.testing.assert_array_equal(got, reference(case))


# ------------------------------------------------------------------- exact edges

EVEN_4 = [0.0] * 4 + [-np.inf] * 4  # the first four of eight tokens, a quarter each
OTHERS = EVEN_4[::-1]
BELOW = np.nextafter(np.float32(0.5), np.float32(0))
BELOW_1 = np.nextafter(np.float32(1), np.float32(0))


def edge_case(rows, lists, drafts, coins, *, scores=None, top_p=1.0):
    """A block with given logits [K + 1, 8], proposals of equal weight, and coins."""
    scores = np.zeros(np.shape(lists)) if scores is None else scores
    source = Distribution(
        mx.array(np.array([scores], np.float32)),
        mx.array(np.array([lists], np.int32)),
        is_whole=False,
    )
    return Case(
        [SamplingParams(temp=1.0, top_p=top_p, reproducible=False)],
        mx.array(np.array([rows], np.float32)),
        Draft(mx.array([drafts], mx.int32), source),
        mx.array([17], mx.int32),
        mx.array(np.array([coins], np.float32)),
    )


@pytest.mark.parametrize(
    ("case", "want", "support"),
    [
        # p / q = 1/4 : 1/2, the last chance is exactly a half
        (edge_case([EVEN_4] * 2, [[0, 1]], [0], [0.5]), 0, {2, 3}),
        (edge_case([EVEN_4] * 2, [[0, 1]], [0], [BELOW]), 1, {0, 1, 2, 3}),
        # of equal tokens top-p keeps all: still a quarter each
        (edge_case([EVEN_4] * 2, [[0, 1]], [0], [0.5], top_p=0.3), 0, {2, 3}),
        # the chance before the last: nothing overlaps, 0.5 : (0.5 + 1 - 0.5)
        (
            edge_case([EVEN_4, OTHERS, EVEN_4], [[0, 1]] * 2, [0, 0], [0.5, 0.0]),
            0,
            {2, 3},
        ),
        (
            edge_case([EVEN_4, OTHERS, EVEN_4], [[0, 1]] * 2, [0, 0], [BELOW, 0.0]),
            1,
            {4, 5, 6, 7},
        ),
        # the second is won though the first is lost
        (
            edge_case([EVEN_4] * 3, [[0, 1]] * 2, [0, 1], [0.9, 0.2]),
            2,
            {0, 1, 2, 3},
        ),
        # what the target cannot say is never accepted
        (edge_case([OTHERS] * 2, [[0, 1]], [0], [0.0]), 0, {4, 5, 6, 7}),
        (edge_case([OTHERS] * 3, [[0, 1]] * 2, [0, 0], [0.0, 0.0]), 0, {4, 5, 6, 7}),
        # equal distributions accept everything
        (edge_case([EVEN_4] * 2, [[0, 1, 2, 3]], [2], [BELOW_1]), 1, {0, 1, 2, 3}),
        (
            edge_case([EVEN_4] * 3, [[0, 1, 2, 3]] * 2, [2, 0], [1.0, BELOW_1]),
            2,
            {0, 1, 2, 3},
        ),
        # and where they do not, nothing is left to draw from: the target's own
        (edge_case([EVEN_4] * 2, [[0, 1, 2, 3]], [2], [1.0]), 0, {0, 1, 2, 3}),
        # a draft that its own list has not, or has dropped
        (edge_case([EVEN_4] * 2, [[0, 1]], [2], [0.0]), 0, {2, 3}),
        (
            edge_case(
                [EVEN_4] * 2, [[0, 1]], [1], [BELOW_1], scores=[[0.0, -np.inf]]
            ),
            1,
            {0, 1, 2, 3},
        ),
    ],
)  # fmt: skip
def test_edges(case, want, support):
    tokens = set()
    for seed in range(20):
        again = replace(case, params=[replace(case.params[0], seed=seed)])
        got = run(again)
        np.testing.assert_array_equal(got, reference(again))
        assert got[0, 0] == want
        tokens.add(int(got[0, want + 1]))
    assert tokens == support


def test_coins_come_from_the_generator():
    case = random_case(5, 2, chosen=[common.BLOCK] * 3)
    places = case.offset[:, None] + mx.arange(1, 3)
    coins = uniform_noise(case.sampling.seed, places, Stream(COIN, case.offset))
    np.testing.assert_array_equal(run(case), run(replace(case, coins=coins)))


def test_block_rows_without_a_source_are_decided_as_coupled():
    case = random_case(6, 3, chosen=[common.COUPLED] * 2, nearness=0.3)
    positional, named = arguments(case)
    words = np.array(named["row_words"])
    words[:, 2] = common.BLOCK
    named["row_words"] = mx.array(words)
    original = common.launch
    common.launch = run_on_cpu
    try:
        got = decide.decide(*positional, **named)
    finally:
        common.launch = original
    np.testing.assert_array_equal(got, run(case))


def test_too_many_drafts():
    case = random_case(0, 9, chosen=[common.GREEDY])
    with pytest.raises(ValueError, match="K must be at most 8: got 9"):
        run(case)


# ------------------------------------------------------------- schedules and lint


@pytest.mark.parametrize("K", [1, 4, 8])
def test_report_does_not_depend_on_the_order_of_threads(K):
    for seed in range(3):
        case = random_case(seed, K, chosen=[2, seed, 1])
        np.testing.assert_array_equal(run(case, run_schedules), run(case))


@pytest.mark.parametrize("options", [{"noise_ulps": 2}, {"contract": True}])
def test_last_bits_matter_only_in_close_calls(options):
    for seed in range(20):
        case = random_case(seed, 4, chosen=[2, 0, 1])
        is_sure = ~is_close_call(case)
        got = run(case, **options)
        np.testing.assert_array_equal(got[is_sure], reference(case)[is_sure])


@pytest.mark.parametrize("template", TEMPLATES)
def test_lint_has_nothing_to_say(template):
    assert lint(text_of(*template)) == []


# --------------------------------------------------------------------- properties


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    K=st.integers(1, 4),
    B=st.integers(1, 3),
    temp=st.floats(1e-3, 100),
    top_p=st.sampled_from([1e-6, 0.3, 0.999, 2.0]),
    min_p=st.sampled_from([0.0, 1e-3, 0.5, 1.0]),
    top_k=st.sampled_from([1, 3, 63, 64, 2**31 - 1]),
    size=st.integers(1, LIST),
    spread=st.sampled_from([0.0, 1e-3, 1.0, 100.0]),
)
def test_reports_are_valid(seed, K, B, temp, top_p, min_p, top_k, size, spread):
    """Of lists that have nothing to do with each other, too."""
    rng = np.random.default_rng(seed)

    def lists(num_rows):
        values = np.full((B, num_rows, LIST), -np.inf, np.float32)
        values[..., :size] = -np.sort(rng.normal(size=(B, num_rows, size)) * spread)
        ids = np.full(values.shape, NO_ID, np.int32)
        for row in ids.reshape(-1, LIST):
            row[:size] = rng.choice(80, size, replace=False)
        return values, ids

    values, ids = lists(K + 1)
    scores, draft_ids = lists(K)
    drafts = rng.integers(80, size=(B, K)).astype(np.int32)
    total = np.exp(values - values[..., :1]).sum(axis=-1)
    floats = np.zeros((B, common.ROW_FLOATS), np.float32)
    floats[:, :3] = temp, top_p, min_p
    words = np.zeros((B, common.ROW_WORDS), np.uint32)
    words[:, :5] = [[*rng.integers(2**32, size=2), m, top_k, 9] for m in range(B)]
    inputs = values, ids, np.stack([values[..., 0], total], axis=-1), drafts
    original = common.launch
    common.launch = run_on_cpu
    try:
        report = decide.decide(
            *map(mx.array, (*inputs, scores, draft_ids)),
            row_floats=mx.array(floats),
            row_words=mx.array(words),
        )
    finally:
        common.launch = original
    for b, (n, *tokens) in enumerate(np.array(report).tolist()):
        assert 0 <= n <= K
        assert tokens[:n] == drafts[b, :n].tolist()
        assert tokens[n:] == [tokens[n]] * (K + 1 - n)
        row = values[b, n]
        kept = (np.arange(LIST) < top_k) & (row >= row[0] + np.log(max(min_p, 1e-30)))
        assert tokens[n] in ids[b, n][kept & (row > -np.inf)]
