"""What follows from a verdict.

Run: python -m pytest tests/engine/test_route.py
"""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_gemma_mtp.engine.route import PLAIN, check_mode, inexact_route
from mlx_gemma_mtp.errors import RequestError
from mlx_gemma_mtp.exactness.verdict import Verdict, exact_routes

DRAFTS = st.sets(st.integers(1, 8)).map(lambda ks: tuple(sorted(ks)))
VERDICTS = st.builds(
    Verdict,
    equal=st.fixed_dictionaries({1: DRAFTS, 2: DRAFTS}),
    max_difference=st.floats(0, 10),
    fill_cost=st.floats(1, 3),
    num_passes=st.integers(0, 100),
    seconds=st.floats(0, 100),
)


def verdict(one=(), two=()):
    return Verdict({1: tuple(one), 2: tuple(two)}, 0.5, 1.1, 48, 1.0)


@given(VERDICTS)
def test_routes_allow_what_was_proved_and_no_more(found):
    for route in exact_routes(found):
        assert route.is_exact
        assert route.allowed == (0, *found.equal[route.min_rows])
        assert route.max_difference == found.max_difference


@given(VERDICTS)
def test_the_first_route_has_most_drafts_and_is_filled_up_only_for_more(found):
    first, second = exact_routes(found)
    assert len(first.allowed) >= len(second.allowed)
    if len(first.allowed) == len(second.allowed):
        assert first.min_rows == 1


@given(VERDICTS)
def test_a_verdict_survives_json(found):
    assert Verdict.from_dict(json.loads(json.dumps(found.to_dict()))) == found


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["form", "equal", "1", "2", "max_difference", "seconds"]),
            inner,
            max_size=4,
        )
    ),
)


@given(st.dictionaries(st.text(max_size=5), JSON, max_size=4))
def test_nonsense_is_no_verdict(values):
    with pytest.raises(ValueError, match="must be"):
        Verdict.from_dict(values)


@pytest.mark.parametrize(
    "change",
    [
        {"form": 0},
        {"form": 2},  # of before, which spoke of growth too
        {"equal": {"1": [1]}},
        {"equal": {"1": [9], "2": []}},
        {"equal": {"1": ["x"], "2": []}},
        {"seconds": "long"},
        {"equal": None},
        {"equal": {"1": [True], "2": []}},
        {"num_passes": math.inf},
        {"fill_cost": math.nan},
        {"fill_cost": 0.5},
    ],
)
def test_a_damaged_verdict_is_none(change):
    with pytest.raises(ValueError, match="must be"):
        Verdict.from_dict(verdict((1,), (1,)).to_dict() | change)


@pytest.mark.parametrize(
    ("one", "two", "min_rows", "words"),
    [
        (range(1, 9), range(1, 9), 1, "K = 0 to 8"),
        ((), range(1, 9), 2, "K = 0 to 8, plain rounds filled up to 2 rows"),
        ((1, 2, 4), (1,), 1, "K = 0 to 2, 4"),
        ((), (), 1, "exact: plain decoding"),
    ],
)
def test_words(one, two, min_rows, words):
    route = exact_routes(verdict(one, two))[0]
    assert route.min_rows == min_rows
    assert words in route.state


def test_inexact_routes_have_any_drafts():
    route = inexact_route("because", max_difference=0.25)
    assert (route.is_exact, route.has_drafts) == (False, True)
    assert route.max_difference == 0.25
    assert route.state == "not exact: because"
    assert not PLAIN.has_drafts


@pytest.mark.parametrize("mode", ["AUTO", "", None, 1, True])
def test_unknown_modes(mode):
    with pytest.raises(RequestError, match="auto, exact or fast"):
        check_mode(mode)
