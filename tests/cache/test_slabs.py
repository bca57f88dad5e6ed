"""Slabs and masks against a simulation that tracks every key by name.

Run: python -m pytest tests/cache/test_slabs.py
"""

from __future__ import annotations

from typing import Any, cast

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_gemma_mtp.cache import masks as cache_module
from mlx_gemma_mtp.cache.masks import (
    draft_masks,
    over_heads,
    verify_masks,
    verify_slots,
)
from mlx_gemma_mtp.cache.prompt import PrefillCache, insert_row, prefill_caches
from mlx_gemma_mtp.cache.slabs import (
    CAPACITY_BLOCK,
    MAX_DRAFT_TOKENS,
    LayerKV,
    SlabLayout,
    SlabView,
    next_capacity,
    resize,
    stepped_capacity,
)
from mlx_gemma_mtp.constants import FULL, SLIDING
from mlx_gemma_mtp.engine.decoder import Decoder, Request
from mlx_gemma_mtp.engine.rounds import Rounds
from mlx_gemma_mtp.models import attention
from mlx_gemma_mtp.pair.load import load_pair
from tests.tiny import REFERENCE

WINDOW = 6
CAPACITY = 160
LAYOUT = SlabLayout(
    (LayerKV(SLIDING, 1, 1), LayerKV(FULL, 1, 1)), window=WINDOW, dtype=mx.float32
)


def visible(mask, slab, row, query):
    """The keys that a query sees, sorted; keys are numbers that name their write."""
    return sorted(np.array(slab)[row, 0, np.array(mask)[row, 0, query], 0].tolist())


def check_draft_masks(slabs, offsets, first, truth):
    masks = draft_masks(
        LAYOUT,
        offset=mx.array(offsets),
        first_position=mx.array(first),
        capacity=CAPACITY,
    )
    for row, offset in enumerate(offsets):
        for kind, start in ((SLIDING, offset - WINDOW - 1), (FULL, 0)):
            slab = slabs[0] if kind == SLIDING else slabs[2]
            start = max(start, first[row], 0) if kind == SLIDING else 0
            seen = truth[row][start:offset]
            assert visible(masks[kind], slab, row, 0) == sorted(seen)


def check_verify(slabs, offsets, first, truth, num_tokens, names):
    """Write a block whose keys have these names; check what each query sees."""
    offset = mx.array(offsets)
    slots = verify_slots(
        LAYOUT, offset=offset, num_tokens=num_tokens, capacity=CAPACITY
    )
    masks = verify_masks(
        LAYOUT,
        offset=offset,
        first_position=mx.array(first),
        num_tokens=num_tokens,
        capacity=CAPACITY,
    )
    new = mx.array(names, dtype=mx.float32)[:, None, :, None]
    written: list[mx.array] = []
    for i, kind in enumerate((SLIDING, FULL)):
        view = SlabView(
            slabs[2 * i], slabs[2 * i + 1], offset=offset, slots=slots[kind]
        )
        written += view.update_and_fetch(new, new)
    for row, offset_of_row in enumerate(offsets):
        for query in range(num_tokens):
            position = offset_of_row + query
            in_ring = max(position - WINDOW + 1, first[row])
            for i, start in ((0, in_ring), (1, 0)):
                seen = [
                    truth[row][p]
                    if p < offset_of_row
                    else names[row][p - offset_of_row]
                    for p in range(max(start, 0), position + 1)
                ]
                mask = masks[(SLIDING, FULL)[i]]
                assert visible(mask, written[2 * i], row, query) == sorted(seen)
    return written


@settings(max_examples=25)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=3),
    first=st.integers(0, 3),
    rounds=st.lists(
        st.tuples(
            st.integers(0, MAX_DRAFT_TOKENS),
            st.lists(st.integers(0, MAX_DRAFT_TOKENS), min_size=3, max_size=3),
        ),
        min_size=1,
        max_size=8,
    ),
)
def test_every_query_sees_exactly_its_keys(lengths, first, rounds):
    """Random K, random acceptance, ragged rows, rejected keys left lying about."""
    num_rows = len(lengths)
    names = iter(range(1, 10**6))
    slabs = LAYOUT.allocate(num_rows, CAPACITY)
    truth: list[list[int]] = []
    for row, length in enumerate(lengths):
        keys = [next(names) for _ in range(length)]
        truth.append(keys)
        caches = prefill_caches(LAYOUT)
        array = mx.array(keys, dtype=mx.float32)[None, None, :, None]
        for cache in caches:
            cache.update_and_fetch(array, array)
        insert_row(slabs, LAYOUT, row, caches)
    firsts = [min(first, length - 1) for length in lengths]
    for num_draft_tokens, accepted in rounds:
        offsets = [len(keys) for keys in truth]
        check_draft_masks(slabs, offsets, firsts, truth)
        num_tokens = num_draft_tokens + 1
        block = [[next(names) for _ in range(num_tokens)] for _ in range(num_rows)]
        slabs = check_verify(slabs, offsets, firsts, truth, num_tokens, block)
        for row in range(num_rows):
            truth[row] += block[row][: min(accepted[row], num_draft_tokens) + 1]


def test_a_round_too_many_loses_no_key_of_the_window():
    """After a stop in round r, round r + 1 has written: the window must be whole."""
    layout = SlabLayout((LayerKV(SLIDING, 1, 1),), window=WINDOW, dtype=mx.float32)
    offset = 50
    # Worst case: round r emits one token, and both rounds write whole blocks.
    last_written = offset + 1 + 1 + 2 * MAX_DRAFT_TOKENS
    kept = {last_written - i for i in range(layout.ring)}
    assert set(range(offset + 1 - WINDOW, offset + 1)) <= kept


@pytest.mark.parametrize("chunks", [[23], [1] * 23, [5, 9, 9], [22, 1]])
def test_prefill_cache_keeps_what_the_drafter_sees(chunks):
    cache, position = PrefillCache(WINDOW + 1), 0
    for size in chunks:
        mask = np.array(cache.make_mask(size, window_size=WINDOW, return_array=False))
        keys = mx.arange(position, position + size)[None, None, :, None]
        seen, _ = cache.update_and_fetch(keys, keys)
        for query in range(size):
            expected = range(
                max(0, position + query - WINDOW + 1), position + query + 1
            )
            got = np.array(seen)[0, 0, mask[query], 0].tolist()
            assert got == list(expected)
        position += size
    assert cache.offset == 23
    kept, _ = cache.keys_and_values()
    assert kept[0, 0, :, 0].tolist() == list(range(23 - WINDOW - 1, 23))


def test_growth_keeps_what_was_written():
    slabs = [mx.random.normal(slab.shape) for slab in LAYOUT.allocate(2, 32)]
    before = [np.array(slab) for slab in slabs]
    resize(slabs, LAYOUT, 96)
    assert [slab.shape[2] for slab in slabs] == [LAYOUT.ring, LAYOUT.ring, 96, 96]
    for old, new in zip(before, slabs, strict=True):
        np.testing.assert_array_equal(np.array(new)[:, :, : old.shape[2]], old)


@pytest.mark.parametrize(
    ("needed", "capacity", "expected"),
    [
        (1, 0, CAPACITY_BLOCK),
        (CAPACITY_BLOCK, 0, CAPACITY_BLOCK),
        (CAPACITY_BLOCK + 1, CAPACITY_BLOCK, 2 * CAPACITY_BLOCK),
        (8 * CAPACITY_BLOCK + 1, 8 * CAPACITY_BLOCK, 10 * CAPACITY_BLOCK),
    ],
)
def test_capacity_grows_by_blocks_and_at_least_a_quarter(needed, capacity, expected):
    assert next_capacity(needed, capacity) == expected


def test_a_row_is_inserted_without_touching_the_others():
    slabs = LAYOUT.allocate(3, 32)
    for row in (2, 0, 1, 0):
        caches = prefill_caches(LAYOUT)
        keys = mx.full((1, 1, 5, 1), row + 1.0)
        for cache in caches:
            cache.update_and_fetch(keys, keys)
        insert_row(slabs, LAYOUT, row, caches)
    for slab in slabs:
        for row in range(3):
            assert set(np.array(slab)[row, 0, :5, 0].tolist()) == {row + 1.0}
            assert not np.array(slab)[row, 0, 5:].any()


def test_capacities_of_rows_that_come_and_go_are_few():
    """Each is a trace: no more than two for a doubling, none with half to spare."""
    found = {needed: stepped_capacity(needed) for needed in range(1, 70_000, 13)}
    assert len(set(found.values())) <= 18
    for needed, capacity in found.items():
        assert needed <= capacity <= max(2 * needed, CAPACITY_BLOCK)
        assert capacity % CAPACITY_BLOCK == 0
        assert stepped_capacity(capacity) == capacity


class TestOverHeads:
    """Masks that Metal's fused attention need not copy, by the rule in its source."""

    @pytest.fixture(autouse=True)
    def _metal(self, monkeypatch):
        monkeypatch.setattr(cache_module, "gpu", lambda: "metal")

    @given(
        num_rows=st.integers(1, 3),
        num_queries=st.integers(1, 9),
        groups=st.sampled_from([1, 2, 8]),
        head_dim=st.sampled_from([32, 256, 512]),
    )
    def test_the_mask_is_not_copied(self, num_rows, num_queries, groups, head_dim):
        mask = mx.arange(20)[None, None, None] <= mx.arange(
            num_rows * num_queries
        ).reshape(num_rows, 1, num_queries, 1)
        keys = mx.zeros((num_rows, 2, 20, head_dim))
        num_heads = 2 * groups
        given = over_heads(mask, keys, num_heads=num_heads)
        is_fused = head_dim == 256 and num_queries <= 8 and num_queries * groups <= 32
        if num_rows == 1 or not is_fused:
            assert given is mask
            return
        assert given.shape == (num_rows, num_heads, num_queries, 20)
        assert mx.array_equal(given, mx.broadcast_to(mask, given.shape)).item()
        strides = memoryview(cast(Any, given)).strides
        assert strides is not None
        assert strides[0] == strides[1] * num_heads
        broadcast = memoryview(cast(Any, mx.broadcast_to(mask, given.shape))).strides
        assert broadcast is not None
        assert broadcast[0] != broadcast[1] * num_heads  # which is why

    def test_elsewhere_nothing_is_done(self, monkeypatch):
        mask, keys = mx.ones((2, 1, 3, 20)) > 0, mx.zeros((2, 2, 20, 256))
        for name in ("ops", "cuda"):
            monkeypatch.setattr(cache_module, "gpu", lambda name=name: name)
            assert over_heads(mask, keys, num_heads=4) is mask

    @pytest.mark.parametrize("family", ["e2b", "31b"])
    def test_rounds_of_several_rows_say_the_same(self, monkeypatch, family):
        pair = load_pair(REFERENCE / family / "target", REFERENCE / family / "drafter")
        for module in (cache_module, attention):
            monkeypatch.setattr(module, "FUSED_HEAD_DIMS", (16, 32, 64))
        shapes: dict[str, set[tuple[int, ...]]] = {"cuda": set(), "metal": set()}
        texts = []
        attend = mx.fast.scaled_dot_product_attention
        for name, seen in shapes.items():

            def recorded(*arrays: Any, seen: Any = seen, **options: Any) -> mx.array:
                if isinstance(options["mask"], mx.array) and options["mask"].ndim == 4:
                    seen.add(options["mask"].shape[:2])
                return attend(*arrays, **options)

            for module in (cache_module, attention):
                monkeypatch.setattr(module, "gpu", lambda name=name: name)
            monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", recorded)
            rounds = Rounds(pair.rounds.target, pair.drafter, use_compile=False)
            requests = [Request([2, 17, 300], 30), Request([2, 5], 20)]
            decoder = Decoder(rounds, requests, num_draft_tokens=3)
            texts.append([e.tokens for es in decoder.run() for e in es])
        assert texts[0] == texts[1]
        assert shapes["cuda"] == {(2, 1)}
        assert not shapes["metal"] & {(2, 1)}
