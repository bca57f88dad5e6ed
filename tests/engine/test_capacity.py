"""Slabs grow in time, and in exact decoding at places that no draft moves.

Run: python -m pytest tests/engine/test_capacity.py
"""

from __future__ import annotations

import random

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_gemma_mtp.cache import slabs as cache_module
from mlx_gemma_mtp.cache.prompt import prefill_caches
from mlx_gemma_mtp.cache.slabs import LayerKV, SlabLayout, slots_ahead, stepped_capacity
from mlx_gemma_mtp.constants import FULL, SLIDING
from mlx_gemma_mtp.engine.batch import Batch
from mlx_gemma_mtp.engine.capacity import Capacity, ClosedBatch, OpenBatch
from mlx_gemma_mtp.engine.request import Request
from mlx_gemma_mtp.engine.sequence import TokenSequence
from mlx_gemma_mtp.models.target import Prefilled

ALL = tuple(range(9))
LAYERS = (LayerKV(SLIDING, 1, 1), LayerKV(FULL, 1, 1))


def rounds_of(count):
    """Drafts that are wanted and how many of them would be accepted."""
    one = st.tuples(st.integers(0, 8), st.integers(0, 8))
    return st.lists(one, min_size=count, max_size=count)


def capacity_of(*rows, is_closed):
    made = [TokenSequence.of(Request([1] * length, limit)) for length, limit in rows]
    return Capacity(ClosedBatch(len(made)) if is_closed else OpenBatch(), made), made


@given(
    st.lists(
        st.tuples(st.integers(0, 8), st.integers(0, 8)), min_size=250, max_size=250
    ),
    st.integers(1, 300),
    st.booleans(),
)
def test_fixed_growth_does_not_depend_on_drafts(rounds, length, can_look_ahead):
    found = []
    for drafts in ([0] * 2000, [k for k, _ in rounds]):
        capacity, (row,) = capacity_of((length, None), is_closed=True)
        kept = [a for _, a in rounds] if len(drafts) == len(rounds) else [0] * 2000
        found.append(
            simulate(capacity, row, drafts, kept, can_look_ahead=can_look_ahead)
        )
    plain, drafted = found
    for position, num_slots in drafted.items():
        if position in plain:
            assert plain[position] == num_slots


def simulate(capacity, row, drafts, accepted, *, can_look_ahead):
    """Decode as a decoder does; the capacity behind every position's logits."""
    num_slots = capacity.initial()
    in_flight: list[tuple[int, int]] = []
    behind: dict[int, int] = {}
    position = row.offset  # where the next round really starts

    def read():
        row.offset += in_flight.pop(0)[1] + 1

    for k, kept in zip(drafts, accepted, strict=True):
        while len(in_flight) > (1 if can_look_ahead else 0):
            read()
        while in_flight and not capacity.is_known(num_slots, [k for k, _ in in_flight]):
            read()
        if capacity.must_grow(num_slots, [k for k, _ in in_flight]):
            num_slots = capacity.grown(num_slots)
        count = max(a for a in capacity.allowed(ALL, num_slots) if a <= k)
        num_kept = min(kept, count)
        assert position + count + 1 <= num_slots
        for i in range(num_kept + 1):
            behind[position + i] = num_slots
        position += num_kept + 1
        in_flight.append((count, num_kept))
    return behind


@given(
    st.lists(
        st.tuples(st.integers(0, 8), st.integers(0, 8)), min_size=300, max_size=300
    ),
    st.integers(1, 300),
)
def test_ordinary_growth_always_has_room(rounds, length):
    drafts, accepted = zip(*rounds, strict=True)
    for others, is_closed in (([], False), ([(1, None)], True)):
        capacity, (row, *_) = capacity_of((length, None), *others, is_closed=is_closed)
        assert simulate(capacity, row, drafts, accepted, can_look_ahead=True)


@pytest.mark.parametrize("is_closed", [True, False])
def test_the_room_says_when_slabs_grow(is_closed):
    capacity, (row,) = capacity_of((300, None), is_closed=is_closed)
    num_slots = capacity.initial()
    while not capacity.must_grow(num_slots, []):
        room = capacity.room(num_slots)
        assert room > 0 or not is_closed
        row.offset += 1
        assert capacity.room(num_slots) == room - 1
    assert capacity.room(num_slots) <= 0


def test_a_limited_request_never_grows():
    for is_closed in (False, True):
        capacity, (row,) = capacity_of((100, 50), is_closed=is_closed)
        num_slots = capacity.initial()
        row.offset = 100 + 48  # the last round may start here, another is in flight
        assert not capacity.must_grow(num_slots, [8])


def test_a_row_that_has_ended_makes_nothing_grow():
    capacity, (one, other) = capacity_of((294, 200), (10, 200), is_closed=True)
    num_slots = capacity.initial()
    one.offset, one.finish_reason = 294 + 207, "length"
    other.offset = 100
    assert not capacity.must_grow(num_slots, [8])


def test_several_that_are_there_from_the_start_are_reserved_in_full():
    limit = 10 * slots_ahead()
    capacity, _ = capacity_of((10, limit), (20, limit), is_closed=True)
    assert capacity.initial() >= 20 + limit
    capacity, _ = capacity_of((10, limit), (20, limit), is_closed=False)
    assert capacity.initial() < limit


@pytest.mark.parametrize(("device", "ahead"), [(None, 256), ("metal", 1024)])
@pytest.mark.parametrize("is_closed", [False, True])
def test_as_many_slots_are_ahead_as_the_device_is_worth(
    monkeypatch, device, ahead, is_closed
):
    monkeypatch.setattr(cache_module, "gpu", lambda: device)
    for length in (50, 500, 2000):
        capacity, (row,) = capacity_of((length, None), is_closed=is_closed)
        num_slots = capacity.initial()
        row.offset = length + ahead
        assert not capacity.must_grow(num_slots, [8])
        # And no more than a block beyond them, or the next of few capacities.
        most = length + ahead + 18
        assert num_slots <= (stepped_capacity(most) if not is_closed else most + 255)


def test_long_texts_are_traced_seldom():
    """Slots grow by a quarter: a text of any length is traced a few times."""
    for length, end, most in ((50, 1050, 5), (50, 8242, 14), (2000, 10_192, 9)):
        capacity, _ = capacity_of((length, None), is_closed=True)
        found = [capacity.initial()]
        while found[-1] < end:
            found.append(capacity.grown(found[-1]))
        assert len(found) <= most


def test_shapes_of_a_long_day_are_few():
    """Each is a trace, with kernels of its own on the CPU that MLX never frees."""
    layout = SlabLayout(LAYERS, window=1024, dtype=mx.float32)
    batch = Batch(layout, OpenBatch())
    rng, shapes = random.Random(0), set()
    for turn in range(6000):
        is_busy = turn // 500 % 2
        if len(batch.live) < (8 if is_busy else 2) and rng.random() < 0.05:
            length = rng.choice([9, 90, 900, 3000] if is_busy else [9, 300])
            limit = rng.randint(1, 2000 if is_busy else 300)
            insert(batch, layout, TokenSequence.of(Request([1] * length, limit)))
        for row in batch.live:
            row.offset += rng.randint(1, 9)
            if row.offset >= (row.last_position or 0):
                row.finish_reason = "length"
                batch.free()
        if batch.live:
            batch.reserve((), is_awaited=rng.random() < 0.5)
            assert batch.state is not None
            ring, _, full, _ = (slab.shape for slab in batch.state.slabs)
            shapes.add((full[0], ring[2], full[2]))
        else:
            batch.clear()
    assert len({num_seats for num_seats, _, _ in shapes}) <= 6
    assert len({ring for _, ring, _ in shapes}) <= 5
    # The ring follows from the capacity, and takes part in no product.
    assert len({full for _, _, full in shapes}) <= 9
    assert len({shape[1:] for shape in shapes}) == len({full for _, _, full in shapes})
    assert len({ring for _, ring, _ in shapes}) >= 4


def insert(batch, layout, row):
    """Give a seat to a row whose prompt was read."""
    caches = prefill_caches(layout)
    for cache in caches:
        keys = mx.zeros((1, 1, row.offset, 1))
        cache.update_and_fetch(keys, keys)
    batch.insert(row, Prefilled(mx.zeros((1, 1, 4)), mx.zeros((1, 1, 2)), caches), 1)


def test_memory_of_a_short_text_is_small():
    """A ring is not longer than the slabs of full layers; as with mlx-lm at first."""
    layout = SlabLayout(LAYERS, window=1024, dtype=mx.float32)
    for num_slots in (256, 512, 1024, 2048):
        slabs = layout.allocate(3, num_slots)
        slots = min(num_slots, 1024 + 18) + num_slots
        assert layout.num_bytes(3, num_slots) == 3 * 2 * 4 * slots
        assert layout.num_bytes(3, num_slots) == sum(slab.nbytes for slab in slabs)
