"""How often attention reads keys and values, by rows, heads and generation.

Run: python -m pytest tests/drafting/test_attention.py
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_gemma_mtp.drafting.attention import reads


@pytest.mark.parametrize(
    ("sharing", "kv_heads", "generation", "first", "fifth"),
    [
        (8, 4, 15, 3.0, 5.3),  # 31B
        (8, 2, 14, 3.0, 8.5),  # 26B-A4B
        (4, 2, 17, 2.2, 3.6),  # E4B
        (4, 2, 13, 2.2, 5.0),
        (16, 1, 16, 1.4, 2.8),  # 12B
        (8, 1, 13, 1.4, 3.5),  # E2B
        (8, 3, 15, 3.0, 5.3),  # three sequences of E2B
    ],
)
def test_estimates(sharing, kv_heads, generation, first, fifth):
    settings = {"sharing": sharing, "kv_heads": kv_heads, "generation": generation}
    assert reads(1, **settings) == first
    assert reads(5, **settings) == pytest.approx(fifth)
    assert reads(9, **settings) == pytest.approx(2 * fifth - first)


@given(st.integers(1, 100), st.integers(1, 32), st.integers(1, 64))
def test_older_gpus_read_no_less(rows, sharing, kv_heads):
    old, new = (
        reads(rows, sharing=sharing, kv_heads=kv_heads, generation=generation)
        for generation in (14, 15)
    )
    assert old >= new >= 1
