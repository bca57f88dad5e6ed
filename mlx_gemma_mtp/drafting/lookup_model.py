"""What drafts from the text itself are worth: how many stand, and what rounds take.

While a text repeats what it said before, nearly all of them stand, else nearly none.
Which it is shows in how long it has done so: how many of its newest tokens stood there
before. As rounds are chosen before the last report is read, this is a round old; what
is learnt is how many drafts stand *then*. Every round teaches it, whatever it drafted.

Numbers in, numbers out: knows neither texts nor time.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

from ..constants import MAX_DRAFT_TOKENS
from .acceptance_model import AcceptanceModel, tokens_per_round
from .cost_model import NO_KEYS, CostModel
from .saved_numbers import numbers

# Lengths from which on matches are alike, and what is thought of each kind at first:
# P(a draft is accepted | those before it were).
_LENGTHS = (3, 5, 9, 16)
_LONG = 9
_FIRST_DRAFTED = 0.8
_DOUBT = 1.0  # standard deviations
_SHARE_MEMORY = 500.0  # rounds
_FIRST = (0.2, 0.5, 0.65, 0.8, 0.9)
# What K rows more are thought to cost without a drafter, where nobody says it: this
# share of what they cost with one.
_VERIFY_SHARE = 0.75


def kind_of(length: int) -> int:
    """The kind of match that a length is, 0 to 4."""
    return bisect_right(_LENGTHS, length)


def verify_cost(costs: Sequence[float]) -> tuple[float, ...]:
    """What rounds of K = 0..8 take without a drafter, where only the whole is known."""
    plain = costs[0]
    return tuple(plain + _VERIFY_SHARE * (cost - plain) for cost in costs)


class LookupModel:
    """What is known of rounds whose drafts come from the text.

    Args:
        relative_cost: Their time for K = 0..8, see ``CostModel``.
        key_cost: What each token of context adds, see ``CostModel``.

    Attributes:
        acceptance: For each kind of match, how many drafts stand.
        shares: Of rounds, how many of late had a match of each kind.
        drafter: How many of the drafter's stand while a match is long: more than else.
        costs: Seconds of rounds.
    """

    def __init__(
        self, relative_cost: Sequence[float], key_cost: Sequence[float] = NO_KEYS
    ) -> None:
        self.acceptance = [AcceptanceModel(first) for first in _FIRST]
        self.shares = [1.0, *[0.0] * (len(_FIRST) - 1)]
        self.drafter = AcceptanceModel(_FIRST_DRAFTED)
        self.costs = CostModel(relative_cost, key_cost)

    def resume(
        self, relative_cost: Sequence[float], key_cost: Sequence[float] = NO_KEYS
    ) -> None:
        """Begin a process; see ``CostModel.resume``."""
        for model in (*self.acceptance, self.drafter):
            model.resume()
        self.costs.resume(relative_cost, key_cost)

    def start(self) -> None:
        """Begin a request: other text."""
        for model in (*self.acceptance, self.drafter):
            model.start()
        self.costs.start()

    def observe(self, length: int, num_same: int) -> None:
        """Learn from what was looked up.

        Args:
            length: How long the match was when its round was chosen.
            num_same: How many of the tokens that came, up to 8, were those looked up.
        """
        kind = kind_of(length)
        self.acceptance[kind].observe(MAX_DRAFT_TOKENS, num_same)
        self.shares = [
            share + ((i == kind) - share) / _SHARE_MEMORY
            for i, share in enumerate(self.shares)
        ]

    def observe_drafted(
        self, length: int, num_draft_tokens: int, num_accepted: int
    ) -> None:
        """Learn from a round of the drafter; of a short match it says nothing here.

        Args:
            length: How long the match was when it was chosen.
            num_draft_tokens: Its K.
            num_accepted: How many of its drafts were accepted.
        """
        if length >= _LONG:
            self.drafter.observe(num_draft_tokens, num_accepted)

    def drafted_tokens(
        self, lengths: Sequence[int], num_draft_tokens: int, others: float
    ) -> float:
        """Tokens of a round of the drafter, on average over rows.

        Args:
            lengths: How long the match of each row is.
            num_draft_tokens: Its K.
            others: What rows of short matches emit.
        """
        num_long = sum(length >= _LONG for length in lengths)
        if not num_long:
            return others
        tokens = self.drafter.expected_tokens()[num_draft_tokens]
        return others + num_long / len(lengths) * (tokens - others)

    def expected_tokens(self, lengths: Sequence[int]) -> list[float]:
        """Tokens of a round of K = 0..8, on average over rows.

        Args:
            lengths: How long the match of each row is.
        """
        kinds = [kind_of(length) for length in lengths]
        tokens = {k: self._sure_tokens(k) for k in set(kinds)}
        return [
            sum(tokens[kind][k] for kind in kinds) / len(kinds)
            for k in range(MAX_DRAFT_TOKENS + 1)
        ]

    def _sure_tokens(self, kind: int) -> list[float]:
        """Tokens of a round of K = 0..8 of a kind, if the doubt is to its disfavour.

        Every round teaches it: nothing must be tried in hope.
        """
        model = self.acceptance[kind]
        return tokens_per_round(model.hopeful_probabilities(-_DOUBT))

    def all_seconds(self, with_drafter: CostModel) -> list[float]:
        """Seconds of rounds of K = 0..8.

        Args:
            with_drafter: What is known of rounds that also run a drafter: those
                without take no longer.
        """
        limits = with_drafter.all_seconds()
        is_drafting = any(map(with_drafter.has_measured, range(1, len(limits))))
        if is_drafting or not self.costs.has_measured_any():
            # Their share of rounds that draft is known better than their growth.
            share = [
                self.costs.usual_ratio(k, 0) / with_drafter.usual_ratio(k, 0)
                for k in range(len(limits))
            ]
            thought = [s * each for s, each in zip(limits, share, strict=True)]
        else:
            thought = self.costs.all_seconds()
        own = self.costs.all_seconds()
        return [
            min(own[k], limits[k] if with_drafter.has_measured_here(k) else own[k])
            if self.costs.has_measured(k)
            else thought[k]
            for k in range(len(limits))
        ]

    def best_rate(
        self,
        choices: Sequence[int],
        others: Sequence[tuple[float, float]],
        with_drafter: CostModel,
    ) -> float:
        """Tokens per second where each round is the best for its match.

        Args:
            choices: K's that may be run.
            others: Tokens and seconds of rounds that may be run in their place.
            with_drafter: See ``all_seconds``.
        """
        seconds = self.all_seconds(with_drafter)
        rates = []
        for model in self.acceptance:
            tokens = model.expected_tokens()
            rounds = [*others, *((tokens[k], seconds[k]) for k in choices if k)]
            rates.append(max(rounds, key=lambda each: each[0] / each[1]))
        total = [
            sum(w * r[i] for w, r in zip(self.shares, rates, strict=True))
            for i in (0, 1)
        ]
        return total[0] / total[1]

    def to_dict(self) -> dict[str, Any]:
        """All that was learnt, in values that JSON has."""
        return {
            "acceptance": [model.to_dict() for model in self.acceptance],
            "shares": list(self.shares),
            "drafter": self.drafter.to_dict(),
            "costs": self.costs.to_dict(),
        }

    @classmethod
    def from_dict(cls, data: Any) -> LookupModel:
        """The model that `to_dict` describes.

        Raises:
            ValueError: `data` is not what `to_dict` returns.
        """
        found = data.get("acceptance") if isinstance(data, dict) else None
        if not isinstance(found, list) or len(found) != len(_FIRST):
            raise ValueError(f"acceptance must be {len(_FIRST)} models")
        model = cls([1.0] * (MAX_DRAFT_TOKENS + 1))
        model.acceptance = [AcceptanceModel.from_dict(each) for each in found]
        model.shares = numbers(data, "shares", len(_FIRST), low=0, high=1)
        model.drafter = AcceptanceModel.from_dict(data.get("drafter"))
        model.costs = CostModel.from_dict(data.get("costs"))
        return model
