"""When tracing rounds that draft from the text pays, against the textbook's bound.

Run: python -m pytest tests/drafting/test_ski_rental.py
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_gemma_mtp.drafting.ski_rental import SkiRental

K = 8
PRICE_S = 1.0


def asked(rental, *, rent_s=0.0, ready=(), left=100, price_s=PRICE_S):
    return rental.pays(K, ready=ready, rent_s=rent_s, price_s=price_s, left=left)


@given(rents=st.lists(st.floats(0, 0.5), max_size=200))
def test_never_more_than_twice_what_was_best_in_hindsight(rents):
    """Of one text's trace, whatever comes; up to the rent of one round."""
    rental, paid_s = SkiRental(), 0.0
    for rent_s in rents:
        paid_s += rent_s
        if asked(rental, rent_s=rent_s):
            paid_s += PRICE_S
            break
    assert paid_s <= 2 * min(sum(rents), PRICE_S) + max(rents, default=0.0) + 1e-9


def test_short_texts_together_pay_for_what_none_of_them_pays_for_alone():
    rental = SkiRental()
    answers = [asked(rental, rent_s=0.09, left=20) for _ in range(12)]
    assert answers == [False] * 11 + [True]


def test_after_that_rent_is_paid_anew():
    rental = SkiRental()
    assert asked(rental, rent_s=PRICE_S)
    assert not asked(rental, rent_s=0.9)
    assert asked(rental, rent_s=0.2)


def test_what_was_saved_of_late_says_it_sooner():
    rental = SkiRental()
    for _ in range(100):
        rental.note(5, {K: 0.1})
    assert not asked(rental, rent_s=0.2)  # this text has not said so yet
    assert not asked(rental, rent_s=0.2, left=10)
    assert asked(rental, rent_s=0.1)


def test_what_another_number_saves_does_not_count():
    rental = SkiRental()
    for _ in range(100):
        rental.note(5, {4: 0.09, K: 0.1})
    assert not asked(rental, rent_s=0.5, ready=[4])
    assert asked(rental, rent_s=0.0, ready=[2])


def test_texts_that_save_nothing_make_it_forget():
    rental = SkiRental()
    for _ in range(100):
        rental.note(5, {K: 0.1})
    for _ in range(1000):
        rental.note(5, {})
    assert not asked(rental, rent_s=0.5)


@pytest.mark.parametrize("price_s", [0.1, 10.0])
def test_the_price_counts(price_s):
    rental = SkiRental()
    for _ in range(100):
        rental.note(5, {K: 0.03})
    assert asked(rental, rent_s=0.3, price_s=price_s) == (price_s < 1)
