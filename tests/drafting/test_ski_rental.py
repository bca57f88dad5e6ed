"""When tracing rounds that draft from the text pays, against the textbook's bound.

Run: python -m pytest tests/drafting/test_ski_rental.py
"""

from hypothesis import given
from hypothesis import strategies as st

from mlx_gemma_mtp.drafting.ski_rental import SkiRental

PRICE_S = 1.0


def asked(rental, *, rent_s=0.0, price_s=PRICE_S, coming_s=10.0):
    return rental.pays(rent_s=rent_s, price_s=price_s, coming_s=coming_s)


@given(rents=st.lists(st.floats(0, 0.5), max_size=200))
def test_never_more_than_twice_what_was_best_in_hindsight(rents):
    """Of one trace, whatever comes; up to the rent of one round."""
    rental, paid_s = SkiRental(), 0.0
    for rent_s in rents:
        paid_s += rent_s
        if asked(rental, rent_s=rent_s):
            paid_s += PRICE_S
            break
    assert paid_s <= 2 * min(sum(rents), PRICE_S) + max(rents, default=0.0) + 1e-9


@given(
    rents=st.lists(st.floats(0, 0.5), max_size=400),
    prices=st.lists(st.floats(0.1, 2.0), min_size=1, max_size=10),
)
def test_traces_that_save_nothing_become_rare(rents, prices):
    """Of what was missed, at most a share that shrinks is lost on top."""
    rental, paid = SkiRental(), [0.0]
    for rent_s in rents:
        price_s = prices[len(paid) % len(prices)]
        if asked(rental, rent_s=rent_s, price_s=price_s):
            paid.append(price_s)
    owed = 0.0
    needed = 0.0
    for price_s in paid[1:]:
        needed += price_s + 2 * owed
        owed += price_s
    assert needed <= sum(rents) + 1e-9


def test_short_texts_together_pay_for_what_none_of_them_pays_for_alone():
    rental = SkiRental()
    answers = [asked(rental, rent_s=0.09) for _ in range(12)]
    assert answers == [False] * 11 + [True]


def test_what_was_saved_pays_a_debt():
    rental = SkiRental()
    assert asked(rental, rent_s=1.0)
    rental.repay(0.75)
    assert not asked(rental, rent_s=1.4)  # 1 and twice 0.25
    assert asked(rental, rent_s=0.2)
    rental.repay(100.0)  # no more than is owed
    assert asked(rental, rent_s=1.0)
    assert not asked(rental, rent_s=2.9)


def test_nothing_is_traced_for_the_last_tokens():
    rental = SkiRental()
    assert not asked(rental, rent_s=5.0, coming_s=0.9)
    assert asked(rental)
