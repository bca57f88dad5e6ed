"""What a sum of several machines costs, by hand.

Run: python -m pytest tests/drafting/test_links.py
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_gemma_mtp.drafting.links import (
    JACCL,
    JACCL_FAST,
    LINKS,
    RING,
    Link,
    link_of,
)

links = st.sampled_from(LINKS)
sizes = st.sampled_from((2, 4))
amounts = st.floats(0, 1e9)
TENFOLD = Link("by hand", hand_over_s=3.0, latency_s=1.0, bandwidth=10.0)
ROUND = Link("by hand", hand_over_s=3.0, latency_s=1.0, bandwidth=10.0, is_ring=True)


@pytest.mark.parametrize(
    ("link", "size", "sum_s", "gather_s"),
    [
        (TENFOLD, 2, 3 + 1 + 4, 3 + 1 + 4),
        (TENFOLD, 4, 3 + 1 + 4, 3 + 1 + 4),
        # Halves to the neighbour and halves back; of four, three times a quarter each.
        (ROUND, 2, 3 + 2 + 4, 3 + 1 + 4),
        (ROUND, 4, 3 + 6 + 6, 3 + 3 + 12),
    ],
)
def test_forty_bytes_by_hand(link, size, sum_s, gather_s):
    assert link.sum_s(40, size) == pytest.approx(sum_s)
    assert link.gather_s(40, size) == pytest.approx(gather_s)


def test_published_figures():
    assert JACCL.sum_s(0, 2) == pytest.approx(206e-6)
    assert JACCL_FAST.sum_s(0, 2) == pytest.approx(30e-6)
    assert RING.sum_s(0, 2) == pytest.approx(780e-6)
    # 62,000 bytes at 6.2 GB/s.
    assert JACCL.sum_s(62_000, 2) == pytest.approx(216e-6)


@given(links, amounts, amounts, sizes)
def test_more_bytes_and_more_machines_never_take_less(link, one, other, size):
    low, high = sorted((one, other))
    for took in (link.sum_s, link.gather_s):
        assert 0 < took(low, size) <= took(high, size)
        assert took(low, 2) <= took(low, 4)


@given(links, amounts)
def test_one_machine_waits_for_nobody(link, num_bytes):
    assert link.sum_s(num_bytes, 1) == link.gather_s(num_bytes, 1) == 0


def test_the_link_of_settings():
    assert link_of(has_rdma=True, has_fast_synch=False) == JACCL
    assert link_of(has_rdma=True, has_fast_synch=True) == JACCL_FAST
    assert link_of(has_rdma=False, has_fast_synch=False) == RING
    fast = link_of(has_rdma=False, has_fast_synch=True)
    assert fast.sum_s(0, 2) == pytest.approx(604e-6)
