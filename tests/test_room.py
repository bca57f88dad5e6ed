"""Slabs grow in time, and in exact decoding at places that no draft moves.

Run: python -m pytest tests/test_room.py
"""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mlx_gemma_mtp.cache import next_capacity
from mlx_gemma_mtp.room import RESERVED_TOKENS, Room
from mlx_gemma_mtp.row import Request, Row

ALL = tuple(range(9))


def rounds_of(count):
    """Drafts that are wanted and how many of them would be accepted."""
    one = st.tuples(st.integers(0, 8), st.integers(0, 8))
    return st.lists(one, min_size=count, max_size=count)


def room_of(*rows, is_fixed):
    made = [Row.of(Request([1] * length, limit)) for length, limit in rows]
    return Room(made, is_fixed=is_fixed), made


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
        room, (row,) = room_of((length, None), is_fixed=True)
        kept = [a for _, a in rounds] if len(drafts) == len(rounds) else [0] * 2000
        found.append(simulate(room, row, drafts, kept, can_look_ahead=can_look_ahead))
    plain, drafted = found
    for position, capacity in drafted.items():
        if position in plain:
            assert plain[position] == capacity


def simulate(room, row, drafts, accepted, *, can_look_ahead):
    """Decode as a decoder does; the capacity behind every position's logits."""
    capacity = room.initial_capacity()
    in_flight: list[tuple[int, int]] = []
    behind: dict[int, int] = {}
    position = row.offset  # where the next round really starts

    def read():
        row.offset += in_flight.pop(0)[1] + 1

    for k, kept in zip(drafts, accepted, strict=True):
        while len(in_flight) > (1 if can_look_ahead else 0):
            read()
        while in_flight and not room.is_known(capacity, [k for k, _ in in_flight]):
            read()
        if room.must_grow(capacity, [k for k, _ in in_flight]):
            capacity = next_capacity(capacity + 1, capacity)
        count = max(a for a in room.allowed(ALL, capacity) if a <= k)
        num_kept = min(kept, count)
        assert position + count + 1 <= capacity
        for i in range(num_kept + 1):
            behind[position + i] = capacity
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
    room, (row,) = room_of((length, None), is_fixed=False)
    drafts, accepted = zip(*rounds, strict=True)
    assert simulate(room, row, drafts, accepted, can_look_ahead=True)


def test_a_limited_request_never_grows():
    for is_fixed in (False, True):
        room, (row,) = room_of((100, 50), is_fixed=is_fixed)
        capacity = room.initial_capacity()
        row.offset = 100 + 48  # the last round may start here, another is in flight
        assert not room.must_grow(capacity, [8])


def test_rows_of_a_batch_are_reserved_in_full_where_growth_is_fixed():
    limit = 10 * RESERVED_TOKENS
    room, _ = room_of((10, limit), (20, limit), is_fixed=True)
    assert room.initial_capacity() >= 20 + limit
    room, _ = room_of((10, limit), (20, limit), is_fixed=False)
    assert room.initial_capacity() < 2 * RESERVED_TOKENS
