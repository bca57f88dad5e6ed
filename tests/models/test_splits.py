"""What each of several machines holds of a layer.

Run: python -m pytest tests/models/test_splits.py
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_gemma_mtp.constants import LAYER_TYPES
from mlx_gemma_mtp.drafting.bytes_read import num_kv_heads
from mlx_gemma_mtp.errors import RequestError
from mlx_gemma_mtp.models.families import FAMILIES
from mlx_gemma_mtp.models.splits import SIZES, Heads, heads, split

sizes = st.sampled_from(SIZES)
units = st.sampled_from((1, 32, 64, 128))


@pytest.mark.parametrize(
    ("groups", "size", "parts"),
    [
        (11, 1, [11]),
        (11, 2, [6, 5]),  # the experts of 26B-A4B
        (11, 4, [3, 3, 3, 2]),
        (33, 2, [17, 16]),  # its dense part
        (33, 4, [9, 8, 8, 8]),
        (336, 4, [84, 84, 84, 84]),  # 31B
        (4, 4, [1, 1, 1, 1]),
    ],
)
def test_groups_of_64_are_split_as_counted_by_hand(groups, size, parts):
    assert [len(part) for part in split(64 * groups, size, 64)] == [
        64 * part for part in parts
    ]


@given(count=st.integers(4, 400), size=sizes, unit=units)
def test_parts_tile_the_width_in_whole_units(count, size, unit):
    width = count * unit
    parts = split(width, size, unit)
    assert len(parts) == size
    assert [place for part in parts for place in part] == list(range(width))
    counts = [len(part) // unit for part in parts]
    assert all(len(part) % unit == 0 and part.step == 1 for part in parts)
    assert counts == sorted(counts, reverse=True)
    assert counts[0] - counts[-1] <= 1


@given(size=sizes, sharing=st.integers(1, 8), kv=st.integers(1, 16))
def test_a_ranks_queries_read_the_keys_it_holds(size, sharing, kv):
    num_heads = sharing * kv
    if num_heads % size or (kv % size and size % kv):
        with pytest.raises(RequestError, match="number of machines must"):
            heads(num_heads, kv, 0, size)
        return
    ranks = [heads(num_heads, kv, rank, size) for rank in range(size)]
    assert [q for held in ranks for q in held.queries] == list(range(num_heads))
    for held in ranks:
        assert {query // sharing for query in held.queries} == set(held.kv)
        assert held.kv.step == 1
        # Each head of keys that is here has as many queries here.
        assert len(held.queries) % len(held.kv) == 0
    held_kv = [head for held in ranks for head in held.kv]
    assert len(held_kv) == max(kv, size)
    assert held_kv == sorted(held_kv)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("size", SIZES)
def test_every_family_splits(family, size):
    text = family.target_text
    for layer_type in LAYER_TYPES:
        kv = num_kv_heads(family, layer_type)
        for rank in range(size):
            held = heads(text["num_attention_heads"], kv, rank, size)
            assert len(held.kv) == max(1, kv // size)
    for width in (text["intermediate_size"], text["moe_intermediate_size"]):
        for unit in (32, 64) if width else ():
            assert sum(map(len, split(width, size, unit))) == width


def test_a_head_of_keys_that_several_ranks_need_is_on_each():
    assert heads(8, 2, 3, 4) == Heads(range(6, 8), range(1, 2))
    assert heads(16, 1, 1, 2) == Heads(range(8, 16), range(1))
    assert heads(32, 16, 1, 4) == Heads(range(8, 16), range(4, 8))


@pytest.mark.parametrize("size", [0, -1, 3, 5, 8])
def test_other_numbers_of_machines_are_refused(size):
    message = f"^number of machines must be 1, 2 or 4: got {size}. Launch so many.$"
    with pytest.raises(RequestError, match=message):
        split(512, size, 64)
    with pytest.raises(RequestError, match=message):
        heads(16, 8, 0, size)


def test_what_does_not_split_is_refused_in_a_line():
    with pytest.raises(RequestError, match="at most 3, as a width of 192 has 3 parts"):
        split(192, 4, 64)
    with pytest.raises(RequestError, match="must be a multiple of 64: got 100"):
        split(100, 2, 64)
    with pytest.raises(RequestError, match="must divide the 6 heads of queries: got 4"):
        heads(6, 3, 0, 4)
    with pytest.raises(RequestError, match="must divide the 3 heads of keys, or be"):
        heads(6, 3, 0, 2)
