"""CostModel on a machine whose round times are known, some of them stalled.

Run: python -m pytest tests/drafting/test_cost_model.py
"""

import math
import random

import pytest

from mlx_gemma_mtp.drafting.cost_model import CostModel
from tests.drafting.simulator import CURVES, PLAIN_S


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
