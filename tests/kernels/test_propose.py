"""The kernel of a draft, run from its Metal text on the CPU.

Compared                       with                            tolerance
scores                         decision.propose                4e-6 relative to 1 + |x|
what the filters keep          decision.propose                0, where margins allow
drafts                         decision.propose                0, where margins allow

Margins, in float64: the mass before an entry is 3e-6 away from top-p, a value 1e-5
away from min-p's floor, the two best noisy scores 1e-4 apart, and the draw 1e-5 away
from the edges of a token's share. Rows below one are left out; few may be.

Run: python -m pytest tests/test_kernels_propose.py
"""

import sys
from functools import partial

import mlx.core as mx
import numpy as np
import pytest

if sys.platform == "darwin":
    pytest.skip("MLX runs kernels on Metal itself here", allow_module_level=True)

from mlx_gemma_mtp.kernels import common, propose
from mlx_gemma_mtp.sampling import candidates, decision, noise
from mlx_gemma_mtp.sampling import graph as graphs
from mlx_gemma_mtp.sampling.params import SamplingParams
from tests.metal.lint import lint
from tests.metal.run import run_on_cpu, run_schedules
from tests.metal.text import metal_text
from tests.metal.tsan import run_under_tsan

PAD_ID = 0x7FFFFFFF
SCORE_TOLERANCE = 4e-6
MASS_MARGIN = 3e-6
FLOOR_MARGIN = 1e-5
NOISE_MARGIN = 1e-4
DRAW_MARGIN = 1e-5
MAX_LEFT_OUT = 0.03  # share of rows

GREEDY = {"temp": 0.0}
COUPLED = {"temp": 1.0, "reproducible": True}
BLOCK = {"temp": 1.0, "reproducible": False}
MODES = [GREEDY, COUPLED, BLOCK]
FILTERS = [
    {},
    {"top_p": 0.9},
    {"min_p": 0.05},
    {"top_k": 8},
    {"top_p": 0.95, "min_p": 0.02, "top_k": 20},
    {"top_p": 0.1},
    {"top_k": 1},
    {"min_p": 1.0},
]


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch):
    monkeypatch.setattr(common, "launch", run_on_cpu)


def settings_of(B, *, filters=FILTERS, modes=MODES, temps=(1.0, 0.6, 1.7, 0.01)):
    """Settings of B rows: every mode with every filter, temperatures and seeds."""
    rows = []
    for b in range(B):
        mode = modes[b % len(modes)]
        chosen = {**mode, **filters[b // len(modes) % len(filters)]}
        chosen["temp"] *= temps[b % len(temps)]
        rows.append(SamplingParams(**chosen, seed=(b * 0x9E3779B97F4A7C15) % 2**64))
    return rows


def example_logits(B, M, *, seed=0, scale=3.0, is_rounded=False):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(B, 1, M)) * scale
    return mx.array(np.round(logits) if is_rounded else logits).astype(mx.float32)


def example_ids(B, M, *, seed=0):
    rng = np.random.default_rng(seed)
    rows = [rng.choice(262144, M, replace=False) for _ in range(B)]
    return mx.array(np.stack(rows).astype(np.int32)[:, None])


def kernel_inputs(params, logits, offset, token_ids):
    """The kernel's arrays, from the plain operations."""
    B, _, M = logits.shape
    count = min(64, M)
    best = candidates.sorted_best(logits, count, token_ids=token_ids)
    room = [(0, 0), (0, 64 - count)]
    values = mx.pad(best.logits[:, 0], room, constant_values=-mx.inf)
    ids = mx.pad(best.token_ids[:, 0], room, constant_values=PAD_ID)
    largest = logits[:, 0].max(axis=-1, keepdims=True)
    mass = mx.exp(logits[:, 0] - largest).sum(axis=-1, keepdims=True)
    rows = graphs.sampling_arrays(params)
    mode = [
        common.GREEDY
        if p.temp <= 0
        else common.COUPLED
        if p.reproducible
        else common.BLOCK
        for p in params
    ]
    columns = [
        *(rows.seed[:, i] for i in range(2)),
        mx.array(mode, dtype=mx.uint32),
        rows.top_k[:, 0, 0].astype(mx.uint32),
        offset.astype(mx.uint32),
        *[mx.zeros((B,), dtype=mx.uint32)] * 3,
    ]
    floats = [column[:, 0, 0] for column in (rows.temp, rows.top_p, rows.min_p)]
    row_floats = mx.stack([*floats, *[mx.zeros((B,))] * 5], axis=1)
    arrays = (values, ids, mx.concatenate([largest, mass], axis=1))
    return arrays, {"row_floats": row_floats, "row_words": mx.stack(columns, axis=1)}


class Margins:
    """Which rows are too close to call, from float64."""

    def __init__(self, params, logits, want, offset, step):
        self.logits = np.array(logits, np.float64)[:, 0]
        self.want = want
        positions = offset[:, None] + step
        rows = graphs.sampling_arrays(params)
        stream = noise.Stream(noise.PROPOSAL, offset)
        self.uniform = np.array(noise.uniform_noise(rows.seed, positions, stream))
        ids = want.source.token_ids
        gumbel = noise.gumbel_noise(rows.seed, positions, ids)
        self.gumbel = np.array(gumbel, np.float64)[:, 0]
        self.scores = np.array(want.source.scores, np.float64)[:, 0]

    def filters_are_clear(self, b, p):
        row = -np.sort(-self.logits[b])
        probs = np.exp(row - row[0])
        probs /= probs.sum()
        row, before = row[:64], (np.cumsum(probs) - probs)[:64]  # of the list
        if 0 < p.top_p < 1 and np.abs(before - p.top_p).min() < MASS_MARGIN:
            return False
        if p.min_p == 1.0:  # the floor is the best value itself
            return True
        floor = row[0] + np.log(p.min_p) if p.min_p > 0 else -np.inf
        return bool(np.abs(row - floor).min() >= FLOOR_MARGIN)

    def draw_is_clear(self, b, p):
        if p.temp <= 0:
            return True
        if p.reproducible:
            noisy = np.sort(self.scores[b] + self.gumbel[b])[::-1]
            return len(noisy) < 2 or noisy[0] - noisy[1] > NOISE_MARGIN
        sums = np.cumsum(np.exp(self.scores[b]))
        edges = sums / sums[-1]
        return bool(np.abs(edges - self.uniform[b]).min() > DRAW_MARGIN)


def check(params, logits, *, token_ids=None, step=2, offset=None):
    """Compare with the plain operations; the share of rows that were left out."""
    B = len(params)
    offset = mx.arange(B, dtype=mx.int32) * 97 + 5 if offset is None else offset
    graph = graphs.sampling_graph(params)
    want = decision.propose(
        logits,
        graphs.sampling_arrays(params),
        graph=graph,
        offset=offset,
        step=step,
        token_ids=token_ids,
    )
    arrays, rows = kernel_inputs(params, logits, offset, token_ids)
    tokens, scores = propose.propose(*arrays, **rows, step=step)
    assert (tokens.shape, tokens.dtype) == ((B, 1), mx.int32)
    assert (scores.shape, scores.dtype) == ((B, 1, 64), mx.float32)
    if want.source is None:
        np.testing.assert_array_equal(tokens, want.tokens)
        return 0.0
    count = want.source.scores.shape[-1]
    np.testing.assert_array_equal(arrays[1][:, :count], want.source.token_ids[:, 0])
    margins = Margins(params, logits, want, offset, step)
    left_out = 0
    for b, p in enumerate(params):
        if not margins.filters_are_clear(b, p):
            left_out += 1
            continue
        row = np.array(scores[b, 0])
        np.testing.assert_allclose(
            row[:count],
            np.array(want.source.scores[b, 0]),
            rtol=SCORE_TOLERANCE,
            atol=SCORE_TOLERANCE,
        )
        assert (row[count:] == -np.inf).all()
        if margins.draw_is_clear(b, p):
            assert tokens[b, 0].item() == want.tokens[b, 0].item(), (b, p)
        else:
            left_out += 1
    return left_out / B


# ---------------------------------------------------------------------------- rows


@pytest.mark.parametrize("is_rounded", [False, True])
@pytest.mark.parametrize("M", [300, 4096])
def test_all_modes_and_filters_at_once(M, is_rounded):
    logits = example_logits(240, M, is_rounded=is_rounded)
    assert check(settings_of(240), logits) <= MAX_LEFT_OUT


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("mode", MODES, ids=["greedy", "coupled", "block"])
def test_one_mode_and_filter(mode, filters):
    params = settings_of(40, modes=[mode], filters=[filters])
    assert check(params, example_logits(40, 500, seed=1)) <= MAX_LEFT_OUT


@pytest.mark.parametrize("M", [1, 2, 9, 40, 63, 64, 65])
def test_short_lists(M):
    assert check(settings_of(48), example_logits(48, M, seed=M)) <= MAX_LEFT_OUT


def test_ids_of_candidates():
    logits = example_logits(96, 400)
    ids = example_ids(96, 400)
    assert check(settings_of(96), logits, token_ids=ids) <= MAX_LEFT_OUT


def test_equal_logits():
    assert check(settings_of(96), mx.zeros((96, 1, 64))) <= MAX_LEFT_OUT


@pytest.mark.parametrize("B", [1, 2, 3])
def test_few_rows(B):
    check(settings_of(B, modes=[BLOCK]), example_logits(B, 200))


@pytest.mark.parametrize("step", [1, 7, 15])
def test_steps_and_places(step):
    offset = mx.array([0, 1, 131071, 262144, 2**30] * 8, dtype=mx.int32)
    logits = example_logits(40, 300, seed=step)
    assert check(settings_of(40), logits, step=step, offset=offset) <= MAX_LEFT_OUT


def test_tiny_temperature():
    params = settings_of(48, temps=(1e-3, 1e-30))
    assert check(params, example_logits(48, 300)) <= MAX_LEFT_OUT


@pytest.mark.parametrize("noise_ulps", [0, 2])
def test_noise_of_functions(monkeypatch, noise_ulps):
    launch = partial(run_on_cpu, noise_ulps=noise_ulps, contract=True)
    monkeypatch.setattr(common, "launch", launch)
    assert check(settings_of(120), example_logits(120, 300, seed=3)) <= MAX_LEFT_OUT


# -------------------------------------------------------------------------- draws


@pytest.mark.parametrize("mode", [COUPLED, BLOCK], ids=["coupled", "block"])
def test_draws_follow_the_scores(mode):
    # One row at many places; 5 standard deviations.
    B = 6000
    logits = mx.broadcast_to(example_logits(1, 200, scale=1.5), (B, 1, 200))
    params = [SamplingParams(**mode, top_p=0.8, top_k=40, seed=7)] * B
    arrays, rows = kernel_inputs(params, logits, mx.arange(B), None)
    tokens, scores = propose.propose(*arrays, **rows, step=1)
    weights = np.exp(np.array(scores[0, 0], np.float64))
    probs = weights / weights.sum()
    ids = np.array(arrays[1])[0]
    shares = np.array([(np.array(tokens) == i).mean() for i in ids])
    assert shares.sum() == pytest.approx(1)
    assert (shares[probs == 0] == 0).all()
    assert (np.abs(shares - probs) <= 5 * np.sqrt(probs / B) + 1e-9).all()


def test_nan_gives_a_token_of_the_list():
    params = settings_of(6)
    logits = mx.full((6, 1, 64), mx.nan)
    arrays, rows = kernel_inputs(params, mx.zeros_like(logits), mx.arange(6), None)
    values = mx.full((6, 64), mx.nan)
    tokens, _ = propose.propose(values, arrays[1], arrays[2] * mx.nan, **rows, step=1)
    np.testing.assert_array_equal(tokens, np.zeros((6, 1)))


# ---------------------------------------------------------------------------- text


def test_schedules(monkeypatch):
    monkeypatch.setattr(common, "launch", run_schedules)
    check(settings_of(12), example_logits(12, 100))


def test_lint(monkeypatch):
    findings = []

    def launch(kernel, inputs, **options):
        assert all(x.size >= 8 for x in inputs)
        findings.append(lint(metal_text(kernel, inputs, **options)))
        return [mx.zeros((1, 1)), mx.zeros((1, 1, 64))]

    monkeypatch.setattr(common, "launch", launch)
    arrays, rows = kernel_inputs(
        settings_of(1), example_logits(1, 100), mx.arange(1), None
    )
    propose.propose(*arrays, **rows, step=1)
    assert findings == [[]]


@pytest.mark.tsan
def test_no_races(monkeypatch):
    races = []

    def launch(kernel, inputs, **options):
        races.append(run_under_tsan(kernel, inputs, **options))
        return run_on_cpu(kernel, inputs, **options)

    monkeypatch.setattr(common, "launch", launch)
    check(settings_of(6), example_logits(6, 100))
    assert races == [[]]
