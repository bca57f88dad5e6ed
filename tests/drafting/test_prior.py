"""What is thought before anything is measured.

Run: python -m pytest tests/drafting/test_prior.py
"""

import math

import pytest

from mlx_gemma_mtp.drafting.prior import Prior

TWICE = (1.0, *[2.0] * 8)


@pytest.mark.parametrize(
    ("costs", "acceptance", "name"),
    [
        ((1.0,) * 8, 0.5, "relative_cost"),
        ((2.0,) * 9, 0.5, "relative_cost"),
        ((1.0, *[-1.0] * 8), 0.5, "relative_cost"),
        ((1.0, *[math.nan] * 8), 0.5, "relative_cost"),
        ((1.0,) * 9, 1.5, "acceptance"),
    ],
)
def test_priors_must_make_sense(costs, acceptance, name):
    with pytest.raises(ValueError, match=f"{name} must be"):
        Prior(costs, acceptance)


@pytest.mark.parametrize(
    "key_cost",
    [(0.0,) * 8, (0.0,) * 8 + (-1e-6,), (math.nan,) * 9, (math.inf,) * 9],
)
def test_keys_must_make_sense(key_cost):
    with pytest.raises(ValueError, match="key_cost must be"):
        Prior(TWICE, 0.5, key_cost=key_cost)


def test_rounds_without_a_drafter_are_derived_where_nobody_says():
    """Three quarters of what drafts add, to a round and to each token of context."""
    keys = (1e-6, *[3e-6] * 8)
    assert Prior(TWICE, 0.5, key_cost=keys).verify == (
        (1.0, *[1.75] * 8),
        (1e-6, *[pytest.approx(2.5e-6)] * 8),
    )
    known = Prior(TWICE, 0.5, TWICE, key_cost=keys, verify_key_cost=keys)
    assert known.verify == known.costs == (TWICE, keys)
