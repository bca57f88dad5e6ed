"""What ranks agree on round by round, by numbers worked by hand; no round is run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest

from mlx_gemma_mtp.distributed.patience import FIRST_S
from mlx_gemma_mtp.distributed.watchdog import LIMIT_S
from mlx_gemma_mtp.drafting.policy import Way
from mlx_gemma_mtp.engine.control import Control, RanksControl
from mlx_gemma_mtp.errors import RanksError

ALL = range(9)


def control(rank: int, shared: Any = None) -> tuple[RanksControl, Any]:
    """One rank of two, and what it stands on."""
    met: list[Any] = []

    def say(is_so: bool, limit_s: float) -> bool:
        met.append((is_so, limit_s))
        return is_so

    ranks: Any = SimpleNamespace(
        rank=rank,
        size=2,
        is_first=rank == 0,
        is_lost=False,
        share=lambda value: value if shared is None else shared,
        barrier=met.append,
        all_say=say,
        exchange=lambda name, limit_s: (name, limit_s),
        check=lambda: None,
        met=met,
    )
    return RanksControl(ranks), ranks


def word_of(first: RanksControl, other: RanksControl, way: Way, *shape: int) -> Any:
    """The sum of both ranks' words for a round."""
    return first.word(way, *shape) + other.word(Way(5), *shape)


def test_a_way_holds_for_the_round_but_one():
    """Rank 0 chooses 4, 3, 0 and 2 drafts; rank 1 would have had 5."""
    (first, _), (other, _) = control(0), control(1, [1, "drafter"])
    chosen = [Way(4), Way(3, "lookup"), Way(0), Way(2)]
    found = []
    words: list[mx.array] = []
    for number, way in enumerate(chosen):
        own = first.agreed(Way(1), ALL), other.agreed(Way(7), ALL)
        assert own[0] == own[1]
        found.append(own[0])
        words.append(word_of(first, other, way, number))
        if number:  # one round is queued ahead
            for each in (first, other):
                each.read(words[number - 1], [[7]])
    assert found == [Way(1), Way(1), Way(4), Way(3, "lookup")]


def test_a_round_has_no_more_drafts_than_it_may():
    (first, _) = control(0)
    assert first.agreed(Way(6), (0, 2, 3)) == Way(3)
    first.word(Way(6))
    assert first.agreed(Way(6), (0,)) == Way(0)


def test_rank_0_leaves_with_the_round_behind_its_word():
    (first, _), (other, _) = control(0), control(1)
    first.agreed(Way(1), ALL), other.agreed(Way(1), ALL)
    first.is_leaving = other.is_leaving = True  # of others it says nothing
    words = [word_of(first, other, Way(1))]
    assert first.may_build
    assert other.may_build
    words.append(word_of(first, other, Way(1)))
    assert not first.may_build
    other.read(words[0], [[3]])
    assert not other.may_build
    assert not other.is_over
    other.read(words[1], [[3]])
    assert other.is_over


@pytest.mark.parametrize(
    ("place", "number"), [(0, 0), (0, 2), (1, 1), (5, 12), (6, 12)]
)
def test_another_round_is_seen(place, number):
    (first, ranks), (other, _) = control(0), control(1)
    word = word_of(first, other, Way(2), 1, 256).tolist()
    assert word[:5] == [1, 0, 2, 0, 0]
    assert word[5] == word[6]
    word[place] = number
    with pytest.raises(RanksError, match="must run the same rounds: got another round"):
        first.read(mx.array(word), [[3]])
    assert ranks.is_lost


def test_other_shapes_and_other_tokens_are_seen():
    (first, _), (other, _) = control(0), control(1)
    word = first.word(Way(2), 1, 256) + other.word(Way(2), 1, 512)
    with pytest.raises(RanksError):
        first.read(word, [[3]])
    (first, _), (other, _) = control(0), control(1)
    word = word_of(first, other, Way(2))
    first.read(word, [[3]])
    other.read(word, [[4]])
    with pytest.raises(RanksError):
        first.read(word_of(first, other, Way(2)), [[3]])


def test_ranks_ask_each_other_before_the_first_round_of_a_shape():
    """They wait long only where one has something to trace."""
    (own, ranks), (other, _) = control(0), control(1)
    waits: list[Any] = []
    words: list[mx.array] = []
    found = []
    for shape, is_traced in (("a", False), ("b", True), ("a", False), ("b", True)):
        words.append(word_of(own, other, Way(2)))
        found.append(own.are_traced(shape, is_traced=is_traced))
        waits.append([own.waiting(), own.reading()])
        if len(words) > 1:  # one round is queued ahead
            own.read(words[-2], [[3]])
            other.read(words[-2], [[3]])
    assert found == [False, True, True, True]
    # While they ask of the second, some may compile the first.
    assert ranks.met == [(False, LIMIT_S), (True, FIRST_S)]
    own.meet()
    assert ranks.met[2:] == [FIRST_S]
    # The first one is read behind the start of the second.
    limits = [FIRST_S, FIRST_S, LIMIT_S, LIMIT_S]
    assert waits == [[(f"round {max(i - 1, 0)}", s)] * 2 for i, s in enumerate(limits)]


def test_a_round_is_not_read_the_longer_for_one_that_is_traced_behind_it():
    (own, _), (other, _) = control(0), control(1)
    word = word_of(own, other, Way(2))
    assert own.are_traced("a", is_traced=True)
    word_of(own, other, Way(3))
    assert not own.are_traced("b", is_traced=False)
    starting: Any = own.waiting()
    reading: Any = own.reading()
    assert starting == ("round 0", FIRST_S)
    assert reading == ("round 0", LIMIT_S)
    own.read(word, [[3]])
    reading = own.reading()
    assert reading == ("round 1", FIRST_S)


def test_one_machine_agrees_with_itself():
    alone = Control()
    assert alone.agreed(Way(5), (0,)) == Way(5)
    assert alone.word(Way(5), 1) is None
    alone.is_leaving = True
    assert alone.may_build
    assert not alone.is_over
