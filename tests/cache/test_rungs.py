"""Rungs: where they stand, which go first, what they share.

Run: python -m pytest tests/cache/test_rungs.py
"""

from __future__ import annotations

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import KVCache, RotatingKVCache

from mlx_gemma_mtp.cache.entries import Entry, packed, share_arrays
from mlx_gemma_mtp.cache.kept import KeptCaches
from mlx_gemma_mtp.cache.rungs import rung_interval, rungs_between
from mlx_gemma_mtp.cache.worth import next_rung_to_go

WINDOW = 8
RING_BYTES = 2 * WINDOW * 4
TOKEN_BYTES = 2 * 4  # of the full layer


def filled(num_tokens):
    """A full and a sliding layer's caches, as a decoder gives them."""
    keys = mx.arange(num_tokens, dtype=mx.float32)[None, None, :, None]
    full, sliding = KVCache(), RotatingKVCache(max_size=WINDOW)
    full.state = (keys, -keys, num_tokens)
    ring = mx.contiguous(keys[:, :, -WINDOW:])
    sliding.state = (ring, -ring, num_tokens, 0, WINDOW, ring.shape[2])
    return [full, sliding]


def some(max_bytes=10**9, **fields):
    return KeptCaches(**{"max_size": 10, "max_bytes": max_bytes, **fields})


def places_of(kept):
    return sorted(entry.num_tokens for entry in kept._entries)


@pytest.mark.parametrize(
    ("step_size", "interval"),
    [(1, 1024), (512, 1024), (1500, 1500), (2048, 2048), (10**6, 4096)],
)
def test_they_stand_where_chunks_end(step_size, interval):
    assert rung_interval(step_size) == interval


@given(st.integers(0, 50), st.integers(0, 50), st.integers(1, 9))
def test_their_places_depend_on_nothing_but_the_interval(first, last, interval):
    expected = [n for n in range(1, last) if n > first and n % interval == 0]
    assert list(rungs_between(first, last, interval)) == expected


def exact_bytes(entries):
    """What entries would take if arrays that they share were as long as they need."""
    longest: dict[int, int] = {}
    for entry in entries:
        key = id(entry.caches[0].keys)
        longest[key] = max(longest.get(key, 0), entry.num_tokens)
    rings = sum(entry.caches[1].nbytes for entry in entries)
    return TOKEN_BYTES * sum(longest.values()) + rings


@st.composite
def entries(draw):
    """Entries of few tokens, many of which begin alike; one at least is a rung."""
    texts = st.lists(st.integers(0, 1), min_size=1, max_size=6).map(tuple)
    keys = st.tuples(texts, st.sampled_from([None, "", "a"]))
    found = [
        Entry(
            packed(tokens),
            filled(draw(st.integers(1, 12))),
            draw(st.sampled_from(["rung", "user"])),
            salt,
            draw(st.integers(0, 3)),
        )
        for tokens, salt in draw(st.lists(keys, unique=True, min_size=1, max_size=12))
    ]
    found[0].kind = "rung"
    for one, other in draw(st.lists(st.tuples(*[st.sampled_from(found)] * 2))):
        share_arrays(one.caches, other.caches)
    return found


@settings(max_examples=50)
@given(entries())
def test_the_one_whose_loss_costs_the_least_goes(found):
    """Against the definition, pair by pair."""

    def begins(one, other):
        return one.salt == other.salt and other.tokens.startswith(one.tokens)

    def worth(entry):
        before = [e.num_tokens for e in found if begins(e, entry) and e is not entry]
        end = max(e.num_tokens for e in found if begins(entry, e))
        gap = entry.num_tokens - max(before, default=0)
        share = gap / (gap + end - entry.num_tokens) / (1 + 5 - entry.used)
        others = [e for e in found if e is not entry]
        return share / (exact_bytes(found) - exact_bytes(others))

    chosen = next_rung_to_go(found, 5)
    *rungs, newest = [entry for entry in found if entry.is_rung]
    assert chosen in (rungs or [newest])
    least = min(worth(entry) for entry in rungs or [newest])
    assert worth(chosen) == pytest.approx(least)


class TestKept:
    def test_a_prompt_reads_on_from_the_last_one_before_the_parting(self):
        kept = some()
        for end in (20, 40, 60):
            kept.keep(range(end), filled(end), kind="rung")
        kept.keep(range(75), filled(75), kind="user")
        for parting, held in ((75, 75), (74, 60), (60, 60), (59, 40), (19, 0)):
            _, num_tokens = kept.find([*range(parting), 999, 999])
            assert num_tokens == held

    def test_each_costs_its_ring_alone(self):
        alone, kept = some(), some()
        alone.keep(range(1000), filled(1000), kind="user")
        for end in (200, 400, 600):
            kept.keep(range(end), filled(end), kind="rung")
            assert kept.num_bytes == end * TOKEN_BYTES + end // 200 * RING_BYTES
        kept.keep(range(1000), filled(1000), kind="user")
        assert kept.num_bytes == alone.num_bytes + 3 * RING_BYTES
        full = {id(entry.caches[0].keys) for entry in kept._entries}
        assert len(full) == 1

    def test_they_count_as_no_prompts(self):
        kept = some(max_size=1)
        for end in (20, 40, 60):
            kept.keep(range(end), filled(end), kind="rung")
        for first in (100, 200):
            kept.keep([first, *range(30)], filled(31), kind="user")
        assert places_of(kept) == [20, 31, 40, 60]
        assert kept.find([200, *range(40)])[1] == 31

    def test_where_memory_is_short_they_are_densest_at_the_end(self):
        end, step = 6400, 100
        kept = some(max_bytes=end * TOKEN_BYTES + 8 * RING_BYTES)
        for place in range(step, end, step):
            kept.keep(range(place), filled(place), kind="rung")
        kept.keep(range(end), filled(end), kind="user")
        *rungs, last = places_of(kept)
        assert last == end
        assert len(rungs) == 7
        # Each prompt of the same length reads hardly more than twice its own rest.
        for parting in range(step, end):
            held = max((rung for rung in rungs if rung <= parting), default=0)
            assert parting - held <= 1.5 * (end - parting) + step

    def test_what_nobody_asks_for_goes(self):
        kept = some(max_bytes=2 * 40 * TOKEN_BYTES + 4 * RING_BYTES)
        for first in (100, 200):
            for end in (20, 40):
                kept.keep([first, *range(end - 1)], filled(end), kind="rung")
        for _ in range(20):
            assert kept.find([100, *range(50)])[1] == 40
        kept.keep([300], filled(1), kind="rung")
        assert kept.find([200, *range(50)])[1] < 40
        assert kept.find([100, *range(50)])[1] == 40

    def test_where_memory_is_short_they_have_as_much_as_the_others(self):
        most = 10 * (RING_BYTES + 10 * TOKEN_BYTES)
        kept = some(most, max_size=100)
        for kinds in (["rung"] * 9, ["user"] * 20, ["rung"] * 9):
            for kind in kinds:
                tokens = [len(kept), kept._num_looked_for, *range(8)]
                kept.find(tokens)
                kept.keep(tokens, filled(10), kind=kind)
        found = [entry.kind for entry in kept._entries]
        assert (found.count("rung"), found.count("user")) == (5, 5)

    def test_the_arrays_of_what_went_are_cut(self):
        kept = some(max_bytes=10**9, max_size=1)
        kept.keep(range(100), filled(100), kind="rung")
        kept.keep(range(5000), filled(5000), kind="user")
        kept.keep([7, *range(20)], filled(21), kind="user")
        assert places_of(kept) == [21, 100]
        assert kept.num_bytes == 121 * TOKEN_BYTES + 2 * RING_BYTES
        caches, num_tokens = kept.find(range(200))
        assert num_tokens == 100
        assert caches[0].keys.shape[2] == 100
        assert caches[0].keys[0, 0, :, 0].tolist() == list(range(100))

    def test_one_at_the_end_of_a_prompt_is_that_end(self):
        kept = some()
        kept.keep(range(50), filled(50), kind="system")
        kept.keep(range(50), filled(50), kind="rung")
        assert [entry.kind for entry in kept._entries] == ["system"]

    @given(
        st.lists(
            st.tuples(
                st.integers(0, 2), st.integers(1, 40), st.sampled_from(["rung", "user"])
            ),
            max_size=12,
        ),
        st.integers(0, 1500),
    )
    def test_the_budget_holds_whatever_is_kept(self, given_entries, max_bytes):
        kept = some(max_bytes, max_size=4)
        for first, end, kind in given_entries:
            kept.keep([first] * end, filled(end), kind=kind)
            assert kept.num_bytes <= max_bytes
            assert sum(not entry.is_rung for entry in kept._entries) <= 4
            for entry in kept._entries:
                ends = {cache.offset for cache in entry.caches}
                assert ends == {entry.num_tokens}
                assert entry.caches[0].keys.shape[2] >= entry.num_tokens
