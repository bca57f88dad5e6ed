"""CostModel on a machine whose round times are known, some of them stalled.

Run: python -m pytest tests/drafting/test_cost_model.py
"""

import json
import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_gemma_mtp.drafting.cost_model import NO_KEYS, TYPICAL_COST, CostModel
from tests.drafting.simulator import CURVES, PLAIN_S

KEYS = tuple(4e-6 * (1 + k / 3) for k in range(9))  # of a plain round
contexts = st.integers(0, 200_000)
counts = st.integers(0, 8)


def measured(rng, k, *, slower=1.0, stalls=0.01):
    factor = math.exp(rng.gauss(0, 0.03)) * slower
    if rng.random() < stalls:
        factor *= rng.uniform(5, 20)
    return PLAIN_S * CURVES["m3"][k] * factor


@pytest.mark.parametrize("seed", range(20))
def test_stalls_do_not_pollute_costs(seed):
    model, rng = CostModel(), random.Random(seed)
    for _ in range(100):
        for k in 0, 2, 4:
            model.observe(k, measured(rng, k, stalls=0.03))
    for k in 0, 2, 4:
        assert model.seconds(k) == pytest.approx(PLAIN_S * CURVES["m3"][k], rel=0.05)


def test_a_stall_in_the_very_first_round_is_put_right():
    model, rng = CostModel(), random.Random(0)
    model.observe(0, 10 * PLAIN_S)
    for _ in range(3):
        model.observe(0, measured(rng, 0, stalls=0))
    assert model.seconds(0) == pytest.approx(PLAIN_S, rel=0.1)


@pytest.mark.parametrize("seed", range(20))
def test_costs_follow_a_throttled_machine(seed):
    model, rng = CostModel(), random.Random(seed)
    for _ in range(20):
        model.observe(0, measured(rng, 0))
    for _ in range(300):
        model.observe(4, measured(rng, 4))
    for _ in range(12):
        model.observe(4, measured(rng, 4, slower=2.0))
    for k, tolerance in (4, 0.1), (0, 0.3):  # K = 0 was not measured since
        expected = 2 * PLAIN_S * CURVES["m3"][k]
        assert model.seconds(k) == pytest.approx(expected, rel=tolerance)


def test_costs_follow_a_longer_context_at_once():
    model, rng = CostModel(), random.Random(0)
    for _ in range(200):
        for k in 0, 4:
            model.observe(k, measured(rng, k))
    model.start()
    model.observe(4, measured(rng, 4, slower=1.4, stalls=0))
    for k in 0, 4:
        expected = 1.4 * PLAIN_S * CURVES["m3"][k]
        assert model.seconds(k) == pytest.approx(expected, rel=0.12)


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.inf, math.nan])
def test_times_that_are_none_are_ignored(seconds):
    model = CostModel()
    model.observe(1, seconds)
    assert model.to_dict() == CostModel().to_dict()


def test_impossible_state_is_refused():
    state = CostModel().to_dict()
    state["covariance"][1] = 30.0  # more than the variances of T(0) and T(1) allow
    with pytest.raises(ValueError, match="covariance must be"):
        CostModel.from_dict(state)


# --- contexts ---------------------------------------------------------------------


def true_s(k, context, times=1.0):
    """A machine whose attention costs so many times as much as was thought."""
    return PLAIN_S * (CURVES["m3"][k] + context * times * KEYS[k])


def learn(model, rounds, *, times=1.0, seed=0):
    """Tell of rounds of K drafts at lengths of context, with noise."""
    rng = random.Random(seed)
    for k, context in rounds:
        model.at(context)
        noise = math.exp(rng.gauss(0, 0.03))
        model.observe(k, true_s(k, context, times) * noise)


def all_seconds(model, context):
    model.at(context)
    return model.all_seconds()


@given(contexts, contexts)
def test_before_anything_is_measured_times_follow_the_line(one, other):
    model = CostModel(CURVES["m3"], KEYS)
    for context in one, other:
        expected = [CURVES["m3"][k] + context * KEYS[k] for k in range(9)]
        assert all_seconds(model, context) == pytest.approx(expected)
        assert model.usual_ratio(8, 2) == pytest.approx(expected[8] / expected[2])
    short, long = (all_seconds(model, n) for n in sorted((one, other)))
    for k in range(9):
        assert short[k] <= long[k]
        # More drafts read keys more often, but are dearer without them as well.
        assert long[k] - short[k] >= long[0] - short[0]


rounds = st.lists(st.tuples(counts, st.floats(0.5, 2)), max_size=30)


@given(rounds)
def test_without_a_context_what_keys_cost_changes_nothing(history):
    with_keys, without = CostModel(TYPICAL_COST, KEYS), CostModel(TYPICAL_COST, NO_KEYS)
    for model in with_keys, without:
        for k, factor in history:
            model.observe(k, PLAIN_S * factor)
    assert with_keys.all_seconds() == without.all_seconds()
    assert with_keys.ratio_deviations(3) == without.ratio_deviations(3)


@given(rounds, contexts)
def test_at_one_length_of_context_the_shape_is_learnt_as_before(history, context):
    """But for what is doubtful of attention itself, it is only another first shape."""
    model = CostModel(TYPICAL_COST, KEYS)
    model.at(context)
    for k, _ in [*history, *((k, 1.0) for k in (0, 4, 8) * 60)]:
        model.observe(k, true_s(k, context))
    for k in 0, 4, 8:
        assert model.seconds(k) == pytest.approx(true_s(k, context), rel=0.02)


@pytest.mark.parametrize("times", [0.3, 1.0, 2.5])
def test_what_attention_costs_is_learnt_from_several_contexts(times):
    model = CostModel(CURVES["m3"], KEYS)
    plan = [(k, n) for n in (1000, 30_000, 2000, 20_000) * 3 for k in (0, 2, 4, 7) * 8]
    learn(model, plan, times=times)
    for context in 1000, 10_000, 40_000:
        found = all_seconds(model, context)
        for k in 0, 3, 7:
            assert found[k] == pytest.approx(true_s(k, context, times), rel=0.08)


def test_a_long_context_in_between_spoils_no_short_one():
    """One K is measured; where nothing knows of contexts, others' times go wrong."""
    model = CostModel(CURVES["m3"], KEYS)
    learn(model, [(k, 1000) for k in (0, 2, 4, 7) * 20])
    learn(model, [(k, n) for n in range(1000, 32_000, 100) for k in (2, 4)])
    model.start()
    learn(model, [(2, 1000)] * 3)
    for k, found in enumerate(all_seconds(model, 1000)):
        assert found == pytest.approx(true_s(k, 1000), rel=0.06)


def state_of(model):
    """Mean and covariance of nine times, g and h."""
    state = model.to_dict()
    covariance = np.zeros((11, 11))
    covariance[np.tril_indices(11)] = state["covariance"] + state["key_covariance"]
    covariance += np.tril(covariance, -1).T
    return np.array(state["mean"] + state["key_mean"]), covariance


def log_seconds(mean, k, context):
    keys = context * KEYS[k] / CURVES["m3"][k] * np.exp(mean[9] + mean[10] * k / 8)
    return mean[k] + np.log1p(keys)


def slopes(mean, k, context):
    """By differences."""
    steps = 1e-5 * np.eye(11)
    return np.array(
        [
            (log_seconds(mean + s, k, context) - log_seconds(mean - s, k, context))
            / 2e-5
            for s in steps
        ]
    )


histories = st.lists(st.tuples(counts, contexts), max_size=6)


@given(histories, counts, contexts)
def test_a_measurement_is_one_step_of_an_extended_kalman_filter(history, k, context):
    model = CostModel(CURVES["m3"], KEYS)
    learn(model, history)
    mean, covariance = state_of(model)
    slope = slopes(mean, k, context)
    variance = slope @ covariance @ slope + model.to_dict()["noise"]
    surprise = 0.5 * math.sqrt(variance)  # no stall, no outlier
    model.at(context)
    model.observe(k, math.exp(log_seconds(mean, k, context) + surprise))
    expected = mean + covariance @ slope * surprise / variance
    assert state_of(model)[0] == pytest.approx(expected, abs=1e-5)


@given(histories, counts, contexts)
def test_deviations_are_those_of_the_state(history, k, context):
    model = CostModel(CURVES["m3"], KEYS)
    learn(model, history)
    mean, covariance = state_of(model)
    model.at(context)
    found = model.ratio_deviations(k)
    for other in range(9):
        apart = slopes(mean, other, context) - slopes(mean, k, context)
        expected = math.sqrt(max(apart @ covariance @ apart, 0.0))
        assert found[other] == pytest.approx(expected, abs=1e-4)


def test_files_of_older_versions_stay_readable():
    model = CostModel()
    learn(model, [(k, 0) for k in (0, 2, 4) * 20])
    old = json.loads(json.dumps(model.to_dict()))
    del old["key_mean"], old["key_covariance"]
    again = CostModel.from_dict(old)
    assert all_seconds(again, 0) == all_seconds(model, 0)
    assert all_seconds(again, 32_000) == all_seconds(model, 32_000)
    assert again.to_dict()["key_mean"] == [0.0, 0.0]


def test_older_versions_can_read_these_files():
    state = CostModel().to_dict()
    assert len(state["mean"]) == len(state["measured"]) == 9
    assert len(state["covariance"]) == 45


def test_impossible_doubts_of_attention_are_refused():
    state = CostModel().to_dict()
    state["key_covariance"][9] = -0.25  # the variance of its level
    with pytest.raises(ValueError, match="covariance must be"):
        CostModel.from_dict(state)
