"""What is said of a generation, in words; and how many times as fast it was.

Run: python -m pytest tests/generation/test_figures.py
"""

from types import SimpleNamespace

import pytest

from mlx_gemma_mtp.drafting.prior import DEFAULT_PRIOR
from mlx_gemma_mtp.engine.stats import RoundStats
from mlx_gemma_mtp.exactness.verdict import Verdict
from mlx_gemma_mtp.generation import figures
from mlx_gemma_mtp.generation.figures import drafts, sameness, speed, summary
from mlx_gemma_mtp.pair.calibration import Calibration
from mlx_gemma_mtp.store import Store


def response_of(stats, *, tokens=40, times=None):
    return SimpleNamespace(
        generation_tokens=tokens,
        generation_tps=100 / 3,
        prompt_tokens=7,
        times_plain=times,
        stats=stats,
    )


def stats_of(*rounds, **fields):
    stats = RoundStats(**fields)
    for drafted, accepted in rounds:
        stats.add_round(drafted=drafted, accepted=accepted)
    return stats


DRAFTED = stats_of((4, 3), (4, 0), exactness="exact: logits proved byte-equal")


@pytest.fixture(autouse=True)
def took(monkeypatch):
    """What compiling kernels took, to be set."""
    found = [0.9]
    monkeypatch.setattr(figures, "compile_seconds", lambda: found[0])
    monkeypatch.setattr(figures, "num_compiled", lambda: 98)
    return found


def test_summary(took):
    lines = [
        "Speed: 33.3 tokens per second, 2.1 times plain decoding (40 tokens after a "
        "prompt of 7)",
        "Drafts: 2.50 tokens per round, 38% of 8 drafts accepted",
        "Text: the same as by plain decoding; logits proved byte-equal",
    ]
    assert summary(response_of(DRAFTED, times=2.06)).splitlines() == lines
    took[0] = 17.4
    lines.append(
        "Compiled: 98 kernels for this CPU in 17 s, once; the speed is without that"
    )
    assert summary(response_of(DRAFTED, times=2.06)).splitlines() == lines


def test_what_is_not_known_is_not_said():
    assert speed(response_of(DRAFTED)) == "33.3 tokens per second"
    assert speed(response_of(DRAFTED, tokens=1)) == "one token tells none"
    plain = stats_of((0, 0), why_plain="the model has no drafter")
    assert drafts(plain) == "none: the model has no drafter"


@pytest.mark.parametrize(
    ("known", "said"),
    [
        ("exact: plain decoding", "plain decoding"),
        ("not exact: because", "may differ from plain decoding; because"),
        ("plain decoding", "plain decoding"),
    ],
)
def test_sameness(known, said):
    assert sameness(RoundStats(exactness=known)) == said


class TestTimesPlain:
    @pytest.fixture
    def calibration(self):
        return Calibration(Store({}, None), lambda num_rows, context: DEFAULT_PRIOR)

    def learn(self, calibration, seconds, *, min_rows=1):
        controller = calibration.controller("greedy", num_rows=1, min_rows=min_rows)
        for _ in range(50):
            for k, took in seconds.items():
                controller.costs.observe(k, took)

    def test_by_what_rounds_take(self, calibration):
        self.learn(calibration, {0: 0.010, 4: 0.020})
        stats = stats_of((4, 3), (4, 4), (0, 0), rule="greedy")
        # Ten tokens, which plain rounds would have made in 0.1 s, in 0.05 s.
        assert calibration.times_plain(stats) == pytest.approx(2.0, rel=0.02)

    def test_filled_rounds_are_slower_than_plain_decoding(self, calibration):
        calibration.keep_verdict(1, Verdict({1: (), 2: (4,)}, 0.5, 1.25, 48, 1.0))
        self.learn(calibration, {0: 0.010, 4: 0.020}, min_rows=2)
        stats = stats_of((4, 4), rule="greedy")
        assert calibration.times_plain(stats, min_rows=2) == pytest.approx(2, rel=0.02)
        # What filled rounds take says nothing of a text whose rounds were not filled.
        self.learn(calibration, {0: 0.010, 4: 0.050})
        assert calibration.times_plain(stats) == pytest.approx(1.0, rel=0.02)

    @pytest.mark.parametrize("measured", [{}, {0: 0.01}, {4: 0.02}])
    def test_is_not_guessed(self, calibration, measured):
        self.learn(calibration, measured)
        assert calibration.times_plain(stats_of((4, 4), rule="greedy")) is None

    def test_rounds_that_draft_from_the_text_have_times_of_their_own(self, calibration):
        self.learn(calibration, {0: 0.010, 4: 0.020})
        stats = stats_of((4, 3), rule="greedy")
        stats.add_round(drafted=8, accepted=8, source="lookup")
        assert calibration.times_plain(stats) is None  # never measured
        controller = calibration.controller("greedy", num_rows=1, min_rows=1)
        for _ in range(30):
            controller.lookup.costs.observe(8, 0.030)
        # 13 tokens, which plain rounds would have made in 0.13 s, in 0.05 s.
        assert calibration.times_plain(stats) == pytest.approx(2.6, rel=0.02)

    def test_rounds_from_the_text_are_not_shorter_than_plain_ones(self, calibration):
        """Where these were measured while the machine was busy."""
        self.learn(calibration, {0: 0.030})
        controller = calibration.controller("greedy", num_rows=1, min_rows=1)
        for _ in range(30):
            controller.lookup.costs.observe(8, 0.012)
        stats = stats_of(rule="greedy")
        stats.add_round(drafted=8, accepted=8, source="lookup")
        assert calibration.times_plain(stats) == pytest.approx(9.0)

    def test_rows_together_learn_of_one_text(self, calibration):
        """What stands of drafts from the text is that of every number of rows."""
        one, four = (
            calibration.controller("greedy", num_rows=n, min_rows=1) for n in (1, 4)
        )
        one.lookup.observe(20, 8)
        assert four.lookup.expected_tokens([20]) == one.lookup.expected_tokens([20])
        assert four.lookup.costs is not one.lookup.costs

    def test_says_nothing_of_other_rules_or_plain_decoding(self, calibration):
        self.learn(calibration, {0: 0.010, 4: 0.020})
        assert calibration.times_plain(stats_of((4, 4), rule="coupled")) is None
        assert calibration.times_plain(stats_of((0, 0), rule="greedy")) is None


def test_drafts_from_the_text_are_counted_apart():
    stats = stats_of((4, 3), exactness="exact")
    assert "from the text" not in " ".join(figures.describe_rounds(stats))
    stats.add_round(drafted=8, accepted=5, source="lookup")
    assert "; 5 of 8 from the text accepted" in " ".join(figures.describe_rounds(stats))
    other = stats_of((4, 1))
    other.merge(stats.snapshot())
    assert other.drafted_from == {"drafter": 8, "lookup": 8}
    assert other.accepted_from == {"drafter": 4, "lookup": 5}
    assert other.looked_up == {8: 1}


def test_what_was_never_accepted_is_counted():
    """Also of several texts together: a source of which nothing stood is no new one."""
    stats = stats_of((4, 0))
    stats.add_round(drafted=2, accepted=2, source="lookup", forced=2)
    total = RoundStats()
    total.merge(stats)
    assert total.drafted_from == {"drafter": 4, "form": 2}
    assert total.accepted_from == {"drafter": 0, "form": 2}
