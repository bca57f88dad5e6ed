"""How likely each draft of the next round is accepted, learnt from the rounds before.

Two time scales. The *profile* is slow: per draft position, discounted counts of how
often a draft was accepted given that those before it were; each position has the one
before it as its prior, so that what is seen at positions 1 and 2 extends to 8. The
*level* is fast: what the last few dozen drafts achieved against what the profile
expected of them. Their odds ratio moves all positions together, and so follows the
text. Which of the two to believe is itself learnt, from how well each foretold the
drafts so far: on even text the level is mostly noise, on mixed text it is most of the
truth. Where the last dozen drafts cannot be of the level, the text has changed, and
the level starts again from them. While nothing is drafted the level keeps its mean and
loses its weight: what held last is still the best guess, but no longer a certain one.

Numbers in, numbers out: knows neither time nor what a round costs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..constants import MAX_DRAFT_TOKENS
from .saved_numbers import numbers

# In trials: a trial is one draft whose predecessors in its round were all accepted.
_PROFILE_MEMORY = 2000.0  # of one position
_PROFILE_PRIOR = 6.0  # that the position before counts for
_FIRST_PRIOR = 2.0  # that the acceptance given at first counts for
_LEVEL_MEMORY = 60.0
_LEVEL_KEPT = 4.0  # at most, that the last request counts for in a new one
_LEVEL_USUAL = 8.0  # at most, that the profile counts for in a new request
_LEVEL_IDLE = 1.5  # that remain after many rounds without a draft
_EVIDENCE_MEMORY = 200.0
_BREAK_MEMORY = 12.0
_BREAK_LEAST = 6.0  # below which nothing is news

# By how many standard deviations (of undiscounted trials; of these, seven tenths) the
# last trials differ from the level where a text has changed.
_BREAK = 2.2
_RESUMED = 24.0  # at most, that another process's of a position count for
_SEEN_MEMORY = 1000.0  # rounds without a draft
_IDLE_MEMORY = 40.0  # rounds without a draft
# Log-odds that the level foretells better than the profile alone: bounds, so that
# either can come back, and the offset in favour of the level.
_EVIDENCE_BOUNDS = (-3.0, 5.0)
_EVIDENCE_OFFSET = 0.5
_EDGE = 0.002  # an acceptance is never thought to be nearer to 0 or 1
_MOST = 1 - _EDGE


@dataclass(slots=True)
class _Tally:
    """Discounted counts: drafts accepted, how many the profile expected, trials."""

    hits: float
    expected: float
    trials: float

    def fade(self, keep: float) -> None:
        self.hits *= keep
        self.expected *= keep
        self.trials *= keep

    def add(self, hits: float, expected: float, trials: int, *, memory: float) -> None:
        keep = memory / (memory + trials)
        self.hits = self.hits * keep + hits
        self.expected = self.expected * keep + expected
        self.trials = self.trials * keep + trials

    def is_possible(self) -> bool:
        return max(self.hits, self.expected) <= self.trials

    def to_list(self) -> list[float]:
        return [self.hits, self.expected, self.trials]


class AcceptanceModel:
    """P(a draft is accepted | those before it in its round were), by position.

    Args:
        acceptance: That probability while nothing is known, 0 to 1.
    """

    def __init__(self, acceptance: float = 0.6) -> None:
        self._prior = _inside(acceptance)
        self._accepted = [0.0] * MAX_DRAFT_TOKENS
        self._tried = [0.0] * MAX_DRAFT_TOKENS
        self._profile = [self._prior] * MAX_DRAFT_TOKENS
        first = _FIRST_PRIOR * self._prior
        self._late = _Tally(first, first, _FIRST_PRIOR)
        self._last = _Tally(0.0, 0.0, 0.0)
        self._here = _Tally(0.0, 0.0, 0.0)
        self._evidence = 0.0

    @property
    def num_seen(self) -> float:
        """Drafts of late that were judged in this process."""
        return self._here.trials

    @property
    def num_tried(self) -> float:
        """Rounds with drafts that were learnt from, in any process."""
        return self._tried[0]

    def resume(self) -> None:
        """Begin a process: what another one has learnt is a prior that soon fades."""
        for i, tried in enumerate(self._tried):
            kept = min(1.0, _RESUMED / tried) if tried else 1.0
            self._tried[i] *= kept
            self._accepted[i] *= kept
        self._here = _Tally(0.0, 0.0, 0.0)
        self._update_profile()

    def start(self) -> None:
        """Begin a request: its level is probably the usual one."""
        known = min(_LEVEL_USUAL, _FIRST_PRIOR + self._tried[0])
        usual = known * self._profile[0]
        self._late.fade(min(1.0, _LEVEL_KEPT / self._late.trials))
        self._late = _Tally(
            self._late.hits + usual,
            self._late.expected + usual,
            self._late.trials + known,
        )
        self._last = _Tally(0.0, 0.0, 0.0)

    def observe(self, num_draft_tokens: int, num_accepted: int) -> None:
        """Learn from one row of a round.

        Args:
            num_draft_tokens: K, 0..8.
            num_accepted: Length of the longest accepted prefix, 0..K.

        Raises:
            ValueError: Either is out of its range.
        """
        if not 0 <= num_accepted <= num_draft_tokens <= MAX_DRAFT_TOKENS:
            raise ValueError(
                f"num_accepted <= num_draft_tokens must be within 0..8: "
                f"got {num_accepted} and {num_draft_tokens}"
            )
        if num_draft_tokens == 0:
            keep = max(1 - 1 / _IDLE_MEMORY, _LEVEL_IDLE / self._late.trials)
            self._late.fade(min(keep, 1.0))
            self._here.fade(1 - 1 / _SEEN_MEMORY)
            return
        tried = min(num_accepted + 1, num_draft_tokens)
        self._weigh(tried, num_accepted)
        expected = sum(self._profile[:tried])
        self._late.add(num_accepted, expected, tried, memory=_LEVEL_MEMORY)
        self._last.add(num_accepted, expected, tried, memory=_BREAK_MEMORY)
        self._here.add(num_accepted, expected, tried, memory=_LEVEL_MEMORY)
        if self._has_broken():
            self._late = replace(self._last)
        keep = 1 - 1 / _PROFILE_MEMORY
        for i in range(tried):
            self._tried[i] = self._tried[i] * keep + 1
            self._accepted[i] = self._accepted[i] * keep + (i < num_accepted)
        self._update_profile()

    def probabilities(self) -> list[float]:
        """For draft i + 1, i = 0..7: P(accepted | those before it were)."""
        weight = 1 / (1 + math.exp(-self._evidence - _EVIDENCE_OFFSET))
        usual = self._usual_level()
        return self._at(usual + weight * (self._level() - usual))

    def hopeful_probabilities(self, deviations: float) -> list[float]:
        """`probabilities` if the level is that many standard deviations higher.

        In a new process it may be what was thought of drafts at first, until drafts
        were judged here.
        """
        late, here = self._late.trials, self._here.trials
        first = self._here.hits + _FIRST_PRIOR * self._prior
        return self._at(
            max(
                _upper(self._level(), late, deviations),
                _upper(first / (here + _FIRST_PRIOR), here, deviations),
            )
        )

    def profile_deviations(self) -> list[float]:
        """For draft i + 1, i = 0..7: standard deviation of its profile."""
        return [
            math.sqrt((p * (1 - p) + 0.01) / (n + _PROFILE_PRIOR))
            for p, n in zip(self._profile, self._tried, strict=True)
        ]

    def expected_tokens(self) -> list[float]:
        """Tokens that a round of K drafts emits, K = 0..8; 1.0 for K = 0."""
        return tokens_per_round(self.probabilities())

    def to_dict(self) -> dict[str, Any]:
        """All that was learnt, in values that JSON has."""
        return {
            "prior": self._prior,
            "accepted": list(self._accepted),
            "tried": list(self._tried),
            "late": self._late.to_list(),
            "last": self._last.to_list(),
            "evidence": self._evidence,
        }

    @classmethod
    def from_dict(cls, data: Any) -> AcceptanceModel:
        """The model that `to_dict` describes.

        Raises:
            ValueError: `data` is not what `to_dict` returns.
        """
        (prior,) = numbers(data, "prior", 1, low=_EDGE, high=1 - _EDGE)
        model = cls(prior)
        model._tried = numbers(data, "tried", MAX_DRAFT_TOKENS, low=0, high=1e4)
        model._accepted = numbers(data, "accepted", MAX_DRAFT_TOKENS, low=0, high=1e4)
        model._late = _Tally(*numbers(data, "late", 3, low=0, high=1e4))
        model._last = _Tally(*numbers(data, "last", 3, low=0, high=1e4))
        low, high = _EVIDENCE_BOUNDS
        (model._evidence,) = numbers(data, "evidence", 1, low=low, high=high)
        counts = zip(model._accepted, model._tried, strict=True)
        tallies = model._late.is_possible() and model._last.is_possible()
        if any(a > n for a, n in counts) or not tallies or model._late.trials < 1:
            raise ValueError("accepted drafts must be at most as many as tried ones")
        model._update_profile()
        return model

    def _has_broken(self) -> bool:
        """Whether the last few trials cannot be of the level: the text has changed."""
        level, last = self._level(), self._last
        distance = last.hits - last.trials * level
        variance = last.trials * (level * (1 - level) + 0.01)
        is_news = _BREAK_LEAST <= last.trials < self._late.trials
        return is_news and distance * distance > _BREAK**2 * variance

    def _level(self) -> float:
        """Acceptance of late, with half a trial of what is usual against 0 and 1."""
        late = self._late
        return (late.hits + 0.5 * self._usual_level()) / (late.trials + 0.5)

    def _usual_level(self) -> float:
        """What the profile alone expected of the same drafts."""
        return _inside(self._late.expected / self._late.trials)

    def _at(self, level: float) -> list[float]:
        """The profile, its odds moved by those of a level over the usual one."""
        level, usual = _inside(level), self._usual_level()
        ratio = level / (1 - level) * (1 - usual) / usual
        return [ratio * p / (1 - p + ratio * p) for p in self._profile]

    def _weigh(self, tried: int, num_accepted: int) -> None:
        """Note which foretold a round better, the level or the profile alone."""
        odds = 1.0
        leveled = self._at(self._level())
        for i in range(tried):
            with_level, without = leveled[i], self._profile[i]
            if i < num_accepted:
                odds *= with_level / without
            else:
                odds *= (1 - with_level) / (1 - without)
        low, high = _EVIDENCE_BOUNDS
        kept = self._evidence * _EVIDENCE_MEMORY / (_EVIDENCE_MEMORY + tried)
        self._evidence = min(max(kept + math.log(odds), low), high)

    def _update_profile(self) -> None:
        before, weight = self._prior, _FIRST_PRIOR
        for i in range(MAX_DRAFT_TOKENS):
            hits = self._accepted[i] + weight * before
            before = _inside(hits / (self._tried[i] + weight))
            self._profile[i] = before
            weight = _PROFILE_PRIOR


def tokens_per_round(probabilities: Sequence[float]) -> list[float]:
    """1 + the sum of the products of the first K probabilities, K = 0..8."""
    tokens, product = [1.0], 1.0
    for p in probabilities:
        product *= p
        tokens.append(tokens[-1] + product)
    return tokens


def _upper(level: float, trials: float, deviations: float) -> float:
    """A level that is so many standard deviations higher."""
    spread = math.sqrt((level * (1 - level) + 0.02) / (trials + 1))
    return level + deviations * spread


def _inside(probability: float) -> float:
    if probability < _EDGE:
        return _EDGE
    return probability if probability < _MOST else _MOST
