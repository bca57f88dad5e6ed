"""RoundStats against tables counted by hand.

Run: python -m pytest tests/engine/test_stats.py
"""

import json

import pytest

from mlx_gemma_mtp.engine.stats import DraftTally, Phases, RoundStats


def stats_of(*rounds):
    stats = RoundStats()
    for drafted, accepted in rounds:
        stats.add_round(drafted=drafted, accepted=accepted)
    return stats


def test_nothing_yet():
    stats = RoundStats()
    assert (stats.rounds, stats.drafted, stats.accepted) == (0, 0, 0)
    assert (stats.acceptance_rate, stats.acceptance_length) == (0.0, 0.0)
    assert stats.acceptance_by_position == []


# Each round is (drafted, accepted).
@pytest.mark.parametrize(
    ("rounds", "totals", "rate", "length", "by_position"),
    [
        ([(0, 0), (0, 0)], (2, 0, 0), 0.0, 1.0, []),  # plain decoding
        ([(4, 0)], (1, 4, 0), 0.0, 1.0, [0, 0, 0, 0]),
        ([(4, 4)], (1, 4, 4), 1.0, 5.0, [1, 1, 1, 1]),
        (
            [(4, 0), (4, 1), (4, 3), (4, 4)],
            (4, 16, 8),
            0.5,
            3.0,
            [3 / 4, 2 / 4, 2 / 4, 1 / 4],
        ),
        ([(1, 1), (3, 2), (0, 0)], (3, 4, 3), 0.75, 2.0, [2 / 2, 1 / 1, 0 / 1]),
    ],
)
def test_tables(rounds, totals, rate, length, by_position):
    stats = stats_of(*rounds)
    assert (stats.rounds, stats.drafted, stats.accepted) == totals
    assert stats.acceptance_rate == pytest.approx(rate)
    assert stats.acceptance_length == pytest.approx(length)
    assert stats.acceptance_by_position == pytest.approx(by_position)


def test_counts_by_number_and_position():
    stats = stats_of((4, 2), (4, 0), (2, 2))
    assert stats.num_draft_tokens == {4: 2, 2: 1}
    assert stats.drafted_at == {0: 3, 1: 3, 2: 2, 3: 2}
    assert stats.accepted_at == {0: 2, 1: 2}


def test_two_do_not_share_counts():
    stats_of((4, 4))
    assert RoundStats().accepted_at == {}


@pytest.mark.parametrize(
    ("stats", "words"),
    [
        (stats_of((2, 0)), ""),
        (RoundStats(why_plain="no drafter"), "no drafter"),
        (RoundStats(), "the text ended with the prompt's first token"),
        (
            stats_of((0, 0)),
            "rounds without drafts were expected to be faster, or measured first",
        ),
    ],
)
def test_why_nothing_was_drafted(stats, words):
    assert stats.why_not_engaged == words
    assert stats.engaged == (words == "")


def test_merged():
    one, two = stats_of((4, 2), (0, 0)), stats_of((4, 4))
    one.exactness, two.exactness = "exact", "exact"
    one.traced, two.traced = 1, 2
    two.max_difference = 0.25
    one.matmuls, two.matmuls = {"2x8 bfloat16": 2}, {"4x8 bfloat16": 1}
    one.phases, two.phases = Phases(1.0, 2.0, 3.0), Phases(0.5, 0.25, 0.125)
    one.merge(two)
    assert (one.rounds, one.drafted, one.accepted) == (3, 8, 6)
    assert (one.exactness, one.traced, one.max_difference) == ("exact", 3, 0.25)
    one.merge(RoundStats(max_difference=0.5))
    assert one.max_difference == 0.5
    assert one.phases == Phases(1.5, 2.25, 3.125)
    found = json.loads(json.dumps(one.to_dict()))["matmuls"]
    assert found == {"2x8 bfloat16": 2, "4x8 bfloat16": 1}


def test_as_json():
    stats = stats_of((4, 2), (0, 0), (4, 0))
    found = json.loads(json.dumps(stats.to_dict()))
    assert found["rounds_by_num_draft_tokens"] == {"0": 1, "4": 2}
    assert found["acceptance_by_position"] == [0.5, 0.5, 0, 0]
    assert found["acceptance_length"] == pytest.approx(5 / 3)
    assert (found["engaged"], found["max_difference"]) == (True, None)
    assert {"prefill_s", "rounds_s", "host_s"} <= found.keys()


class TestTally:
    def test_of_all_texts_together(self):
        tally = DraftTally()
        tally.add(3, 1)
        tally.add(5, 3)
        assert tally.describe() == "Drafts: 4 of 8 tokens came from drafts (50%)."

    def test_nothing_was_generated(self):
        assert DraftTally().describe() == ""

    def test_no_draft_was_accepted(self):
        tally = DraftTally()
        tally.add(3, 0)
        assert tally.describe().endswith(
            "from one: none that was proposed was accepted."
        )

    def test_there_were_none(self):
        tally = DraftTally(why_none="A sentence says why.")
        assert tally.describe() == (
            "Drafts: no token came from one: A sentence says why."
        )
