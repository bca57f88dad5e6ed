"""AcceptanceModel on texts whose acceptance is known.

Run: python -m pytest tests/drafting/test_acceptance_model.py
"""

import random

import pytest

from mlx_gemma_mtp.drafting.acceptance_model import AcceptanceModel


def test_what_is_seen_at_first_positions_extends_to_all():
    model = AcceptanceModel(0.5)
    for _ in range(100):
        model.observe(2, 2)
    assert model.expected_tokens()[8] > 8


@pytest.mark.parametrize("before", [0.1, 0.9])
def test_acceptance_follows_the_text(before):
    model, rng = AcceptanceModel(), random.Random(5)
    for rate, rounds in (before, 1000), (1 - before, 40):
        for _ in range(rounds):
            run = 0
            while run < 3 and rng.random() < rate:
                run += 1
            model.observe(3, run)
    assert model.probabilities()[0] == pytest.approx(1 - before, abs=0.2)


def test_acceptance_of_positions_is_told_apart():
    model, rng = AcceptanceModel(), random.Random(5)
    for _ in range(1000):
        run = 0
        while run < 3 and rng.random() < (0.9, 0.5, 0.2)[run]:
            run += 1
        model.observe(3, run)
    assert model.probabilities()[:3] == pytest.approx([0.9, 0.5, 0.2], abs=0.1)


@pytest.mark.parametrize(("drafted", "accepted"), [(2, 3), (9, 1), (3, -1)])
def test_impossible_counts(drafted, accepted):
    with pytest.raises(ValueError, match=r"must be within 0\.\.8"):
        AcceptanceModel().observe(drafted, accepted)


def test_impossible_state_is_refused():
    state = AcceptanceModel().to_dict()
    state["accepted"][0] = 5.0
    with pytest.raises(ValueError, match="at most as many"):
        AcceptanceModel.from_dict(state)
