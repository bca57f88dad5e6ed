"""Caches kept for prompts that begin alike: what serves, what goes, what is shared.

Run: python -m pytest tests/cache/test_kept.py
"""

from typing import Any

import mlx.core as mx
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.models.cache import KVCache, RotatingKVCache

from mlx_gemma_mtp.cache.beginning import num_common
from mlx_gemma_mtp.cache.kept import KeptCaches

WINDOW = 16


def some(**settings):
    usual = {"max_size": 16, "max_bytes": 2 * 10**9, "num_sure": 2}
    return KeptCaches(**{**usual, **settings})


@given(*[st.lists(st.integers(0, 1), max_size=9)] * 2)
def test_num_common(one, other):
    count = 0
    while count < min(len(one), len(other)) and one[count] == other[count]:
        count += 1
    assert num_common(one, other) == count


def filled(num_tokens, *, window=WINDOW):
    """A full and a sliding layer's caches of so many tokens, read in one go."""
    caches: list[Any] = [KVCache(), RotatingKVCache(max_size=window)]
    for cache in caches:
        keys = mx.arange(num_tokens, dtype=mx.float32)[None, None, :, None]
        cache.update_and_fetch(keys, -keys)
    return caches


def taken(kept, prompt):
    """What a prompt can go on from; there must be something."""
    caches, num_tokens = kept.find(prompt)
    assert caches is not None
    return caches, num_tokens


class TestKeptCaches:
    def test_inside_the_window_it_is_cut_back(self):
        kept = some()
        kept.keep([1, 2, 3, 4, 5], filled(5))
        caches, num_tokens = taken(kept, [1, 2, 3, 9, 9])
        assert num_tokens == 3
        assert [cache.offset for cache in caches] == [3, 3]
        assert kept.find([7]) == (None, 0)

    def test_one_token_is_left_to_read(self):
        kept = some()
        kept.keep([1, 2, 3], filled(3))
        assert kept.find([1, 2, 3])[1] == 2

    def test_past_the_window_only_a_whole_beginning_serves(self):
        kept = some()
        short, long = list(range(20)), list(range(30))
        kept.keep(short, filled(20))
        kept.keep(long, filled(30))
        assert kept.find([*long, 99])[1] == 30
        assert kept.find([*range(25), 99])[1] == 20
        assert kept.find([*range(19), 99])[1] == 0
        assert kept.find(long)[1] == 20  # a token must be left

    def test_a_cache_that_can_be_cut_takes_the_place_of_its_beginnings(self):
        kept = some()
        for length in (3, 5, 8):
            kept.keep(list(range(length)), filled(length))
        assert len(kept) == 1
        kept.keep(list(range(20)), filled(20))
        assert len(kept) == 2
        assert kept.find([0, 1, 2, 3, 99])[1] == 4

    def test_who_takes_it_may_write_to_it(self):
        kept = some()
        kept.keep(list(range(20)), filled(20))
        for _ in range(2):
            caches, _ = taken(kept, list(range(21)))
            assert [cache.offset for cache in caches] == [20, 20]
            for cache in caches:
                assert cache.keys[0, 0, 19, 0].item() == 19
                cache.update_and_fetch(mx.zeros((1, 1, 1, 1)), mx.zeros((1, 1, 1, 1)))
                cache.keys[...] = 7

    def test_full_layers_share_their_arrays(self):
        kept = some()
        kept.keep(list(range(20)), filled(20))
        kept.keep(list(range(1000)), filled(1000))
        alone = some()
        alone.keep(list(range(1000)), filled(1000))
        # One more window of 16, as read in one go: 20 entries.
        assert kept.num_bytes == alone.num_bytes + 2 * 20 * 4
        caches, num_tokens = taken(kept, [*range(20), 5])
        keys, _ = caches[0].update_and_fetch(*[mx.full((1, 1, 1, 1), 50.0)] * 2)
        assert num_tokens == 20
        assert keys[0, 0, :, 0].tolist() == [*range(20), 50]

    def test_memory_is_bounded(self):
        size = some()
        size.keep(list(range(20)), filled(20))
        kept = some(max_bytes=3 * size.num_bytes)
        for first in range(6):
            kept.keep([first, *range(19)], filled(20))
        assert len(kept) == 3
        few = some(max_bytes=0)
        for first in range(6):
            few.keep([first, *range(19)], filled(20))
        assert len(few) == 2
        assert few.find([5, *range(30)])[1] == 20

    def test_nothing_once_cleared(self):
        kept = some()
        kept.keep([1, 2], filled(2))
        kept.clear()
        assert (len(kept), kept.num_bytes, kept.find([1, 2])) == (0, 0, (None, 0))

    def test_a_beginning_that_comes_later_shares_too(self):
        kept = some()
        kept.keep(list(range(1000)), filled(1000))
        before = kept.num_bytes
        kept.keep(list(range(20)), filled(20))
        assert kept.num_bytes == before + 2 * 20 * 4  # a window
        assert kept.find([*range(20), 5])[1] == 20

    def test_salts_share_nothing(self):
        kept = some()
        kept.keep(list(range(20)), filled(20), salt="a")
        before = kept.num_bytes
        kept.keep(list(range(30)), filled(30), salt="b")
        alone = some()
        alone.keep(list(range(30)), filled(30))
        assert kept.num_bytes == before + alone.num_bytes
        assert kept.find([*range(30), 5], salt="a")[1] == 20

    def test_answers_go_before_questions_and_these_before_instructions(self):
        kept = some(max_size=3, num_sure=0)
        for first, kind in enumerate(("system", "user", "assistant", "assistant")):
            kept.keep([first, *range(19)], filled(20), kind=kind)
        assert [entry.tokens[0] for entry in kept._entries] == [0, 1, 3]
        kept.keep([4, *range(19)], filled(20), kind="user")
        assert [entry.tokens[0] for entry in kept._entries] == [0, 3, 4]

    def test_what_is_larger_than_all_memory_goes(self):
        kept = some(max_bytes=10, num_sure=0)
        kept.keep(list(range(20)), filled(20))
        assert (len(kept), kept.num_bytes) == (0, 0)
