"""Regular expressions of numbers with bounds, against the numbers themselves."""

import re
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_gemma_mtp.markup.ranges import at_least, at_most

BOUNDS = [0, 1, -1, 5, 5.75, -0.5, 0.05, 0.1, 9, 10, 99, -10, 100.25, -2000, 1999.99]


def check(bound, text):
    """A text is of a range exactly if its number is, apart from zero's sign."""
    value = float(text)
    for is_open in (False, True):
        above = value > bound or (value == bound and not is_open)
        below = value < bound or (value == bound and not is_open)
        found = [
            bool(re.fullmatch(pattern(bound, is_open=is_open), text))
            for pattern in (at_least, at_most)
        ]
        if value:
            assert found == [above, below], (bound, text, is_open)
        else:
            assert found <= [above, below], (bound, text, is_open)


@pytest.mark.parametrize("bound", BOUNDS)
def test_all_numbers_near_a_bound(bound):
    for step in range(-220, 221):
        number = Decimal(repr(bound)) + Decimal(step) / 100
        for text in {f"{number:.2f}", f"{number:.4f}", f"{number.normalize():f}"}:
            check(bound, text)


@given(
    st.integers(-(10**6), 10**6) | st.floats(-1e6, 1e6).map(lambda x: round(x, 4)),
    st.from_regex(r"-?(0|[1-9][0-9]{0,6})(\.[0-9]{1,7})?", fullmatch=True),
)
@settings(deadline=None)
def test_any_numbers(bound, text):
    check(bound, re.sub("[^0-9.-]", "1", text))


@pytest.mark.parametrize("bound", [0, 1, 0.1, 0.7, 123456.789, 99999.5, 1e-7, 2.5e14])
@pytest.mark.parametrize("sign", [1, -1])
def test_what_is_nearest_to_an_open_bound_is_another_number(bound, sign):
    """However many digits are allowed, the float of a text is not the bound."""
    bound *= sign
    exact = Decimal(repr(bound))
    for power in range(1, 60):
        for digits in (1, 9):
            for side in (1, -1):
                near = f"{exact + side * digits * Decimal(10) ** -power:.{power}f}"
                for pattern in (at_least, at_most):
                    if re.fullmatch(pattern(bound, is_open=True), near):
                        assert float(near) != bound


def test_zero():
    assert re.fullmatch(at_least(0), "0")
    assert re.fullmatch(at_most(0), "0") or re.fullmatch(at_most(0), "-0")
    assert not re.fullmatch(at_least(0, is_open=True), "0")
    assert not re.fullmatch(at_most(0, is_open=True), "-0.0")
