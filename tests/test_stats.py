"""RoundStats against tables counted by hand.

Run: python -m pytest tests/test_stats.py
"""

import pytest

from mlx_gemma_mtp.stats import RoundStats


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
