"""Who is decoded next: turns between requests, whatever the number of their choices.

Run: python -m pytest tests/server/test_turns.py
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_gemma_mtp.engine.capacity import slots_for
from mlx_gemma_mtp.models.target import Target
from mlx_gemma_mtp.server.served_model import leaves_room
from mlx_gemma_mtp.server.turns import Turns, largest_share
from tests.server.serving import ScriptedDecoder, echo
from tests.server.test_worker import order_of, read, run, stepping
from tests.tiny import reference_pair


@pytest.mark.parametrize(
    ("rows", "share"), [(1, 1), (2, 1), (3, 2), (4, 3), (8, 6), (32, 24)]
)
def test_the_largest_share_is_three_quarters_and_at_least_a_row(rows, share):
    assert largest_share(rows) == share


def test_owners_take_turns():
    turns: Turns[str] = Turns(9, most_new=9)
    for item in ("a1", "a2", "a3", "b1", "c1", "c2"):
        turns.append(item[0], item)
    assert [turns.take() for _ in range(7)] == [
        "a1",
        "b1",
        "c1",
        "a2",
        "c2",
        "a3",
        None,
    ]


OWNERS = st.sampled_from("abc")
ACTIONS = st.lists(st.tuples(st.sampled_from(["append", "take", "drop"]), OWNERS))


@given(ACTIONS, st.integers(1, 3))
def test_nobody_has_more_than_the_share_and_nothing_waits_in_vain(actions, most):
    turns: Turns[tuple[str, int]] = Turns(most, most_new=99)
    waiting: list[tuple[str, int]] = []
    taken: list[tuple[str, int]] = []
    for number, (action, owner) in enumerate(actions):
        if action == "append":
            waiting.append((owner, number))
            turns.append(owner, waiting[-1])
        elif action == "take":
            item = turns.take()
            busy = {o for o, _ in waiting if sum(t[0] == o for t in taken) == most}
            if item is None:
                assert {o for o, _ in waiting} <= busy
                continue
            assert item == next(w for w in waiting if w[0] == item[0])  # in its order
            waiting.remove(item)
            taken.append(item)
            assert sum(t[0] == item[0] for t in taken) <= most
        else:
            own = [item for item in waiting + taken if item[0] == owner]
            if own:
                turns.drop(owner, own[number % len(own)])
                holder = waiting if own[number % len(own)] in waiting else taken
                holder.remove(own[number % len(own)])
        assert len(turns) == len(waiting)


def test_what_has_not_begun_is_limited_too():
    turns: Turns[str] = Turns(4, most_new=2)
    for item in ("a1", "a2", "a3", "a4", "a5", "a6"):
        turns.append("a", item)
    assert [turns.take() for _ in range(3)] == ["a1", "a2", None]
    turns.begin("a", "a1")
    assert [turns.take() for _ in range(2)] == ["a3", None]
    turns.drop("a", "a2")  # before it began
    assert [turns.take() for _ in range(2)] == ["a4", None]
    turns.begin("a", "a3")
    turns.begin("a", "a4")
    assert [turns.take() for _ in range(2)] == ["a5", None]
    turns.begin("a", "a5")
    assert turns.take() is None  # four have begun
    turns.append("b", "b1")
    assert turns.take() == "b1"
    assert len(turns) == 1


@given(st.lists(st.integers(1, 9), min_size=1), st.integers(1, 30))
def test_an_owner_leaves_room_or_has_one_at_a_time(sizes, most):
    turns: Turns[tuple[int, int]] = Turns(
        99, 99, leaves_room=lambda items: sum(size for _, size in items) <= most
    )
    for number, size in enumerate(sizes):
        turns.append("a", (number, size))
    done = 0
    while len(turns):
        taken = []
        while (item := turns.take()) is not None:
            taken.append(item)
        assert taken
        assert len(taken) == 1 or sum(size for _, size in taken) <= most
        for own in taken:
            turns.drop("a", own)
        done += len(taken)
    assert done == len(sizes)


def test_long_choices_leave_memory_for_another_request():
    """Each of them reserves memory for all that it may write."""
    layout = Target(reference_pair("12b").target).layout
    short, long = order_of("a", max_tokens=1), order_of("a", max_tokens=4000)
    budget = layout.num_bytes(8, slots_for(len(long.prompt) + long.max_tokens))
    for number in range(1, 9):
        assert leaves_room(layout, budget, [long] * number) == (number < 8)
    assert leaves_room(layout, budget, [short] * 20)


def test_a_request_of_many_choices_leaves_a_row_free():
    """Also where it came first, and nobody else is there."""
    decoder = stepping(max_rows=4)

    async def test(case):
        many = case.submit(*(order_of("a", max_tokens=9) for _ in range(20)))
        case.start()
        await many.accepted()
        decoder.allowed.release(4)  # three read their prompts, and one has decoded
        one = case.submit(order_of("b", max_tokens=1))
        decoder.allowed.release(1000)
        await read(one)
        await read(many)

    run(test, decoder=decoder, starts=False)
    prompts = [request.prompt for request, _ in decoder.added]
    assert prompts.index(order_of("b").prompt) <= 3 + 3
    assert len(prompts) == 21


def test_requests_take_rows_in_turn():
    decoder = stepping(max_rows=2)

    async def test(case):
        replies = [
            case.submit(*(order_of(t, max_tokens=1) for _ in range(n)))
            for t, n in (("a", 4), ("b", 3), ("c", 1))
        ]
        case.start()
        for reply in replies:
            await reply.accepted()
        decoder.allowed.release(1000)
        for reply in replies:
            await read(reply)

    run(test, decoder=decoder, starts=False, max_rows=2)
    prompts = [request.prompt for request, _ in decoder.added]
    assert prompts == [order_of(t).prompt for t in "abcababa"]


def test_where_there_is_one_row_a_request_has_it():
    decoder = ScriptedDecoder(echo, max_rows=1)

    async def test(case):
        return await read(case.submit(*(order_of("a", max_tokens=4) for _ in range(3))))

    assert all(run(test, decoder=decoder, max_rows=1))


def test_choices_that_were_let_go_of_count_no_longer():
    decoder = stepping(max_rows=4)

    async def test(case):
        many = case.submit(*(order_of("a", max_tokens=99) for _ in range(9)))
        case.start()
        await many.accepted()
        decoder.allowed.release(4)
        case.bridge.cancel(many.jobs)
        again = case.submit(*(order_of("b", max_tokens=2) for _ in range(9)))
        decoder.allowed.release(1000)
        return await read(again)

    assert all(run(test, decoder=decoder, starts=False))
    assert len(decoder.added) == 3 + 9


def test_another_prompt_is_read_soon_where_a_request_has_many():
    decoder = stepping(max_rows=32)

    async def test(case):
        many = case.submit(*(order_of("a", max_tokens=9) for _ in range(128)))
        case.start()
        await many.accepted()
        one = case.submit(order_of("b", max_tokens=1))
        decoder.allowed.release(1000)
        await read(one)
        await read(many)

    run(test, decoder=decoder, starts=False, max_rows=32)
    prompts = [request.prompt for request, _ in decoder.added]
    assert prompts.index(order_of("b").prompt) <= 4 + 1
