"""Counts of a generation's rounds: how much of what was drafted was accepted.

Terms (vLLM's conventions): acceptance rate = accepted / drafted; acceptance length =
tokens per round, the bonus or recovered token included = 1 + accepted / rounds.

Numbers in, numbers out: no arrays, no models.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass
class RoundStats:
    """What the rounds of one request, or of several, have done.

    Attributes:
        rounds: Rounds run for a live row (one round of B live rows counts B).
        drafted: Draft tokens proposed.
        accepted: Draft tokens that the target accepted, those past the cut of the
            last round included.
        num_draft_tokens: Rounds by the number K of drafts.
        accepted_at: accepted_at[i] counts the rounds that accepted draft i + 1.
        drafted_at: drafted_at[i] counts the rounds that proposed draft i + 1.
        rule: The rule that judged the drafts, in words.
    """

    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    num_draft_tokens: Counter[int] = field(default_factory=Counter)
    accepted_at: Counter[int] = field(default_factory=Counter)
    drafted_at: Counter[int] = field(default_factory=Counter)
    rule: str = ""

    def add_round(self, *, drafted: int, accepted: int) -> None:
        """Count one row's part of one round."""
        self.rounds += 1
        self.drafted += drafted
        self.accepted += accepted
        self.num_draft_tokens[drafted] += 1
        self.drafted_at.update(range(drafted))
        self.accepted_at.update(range(accepted))

    def merge(self, other: RoundStats) -> None:
        """Add the counts of other rounds."""
        self.rule = joined_rules([self.rule, other.rule])
        self.rounds += other.rounds
        self.drafted += other.drafted
        self.accepted += other.accepted
        self.num_draft_tokens += other.num_draft_tokens
        self.drafted_at += other.drafted_at
        self.accepted_at += other.accepted_at

    @property
    def acceptance_rate(self) -> float:
        """Accepted over drafted, 0.0 to 1.0; 0.0 before anything was drafted."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def acceptance_length(self) -> float:
        """Tokens per round, 1.0 to K + 1; 0.0 before the first round."""
        return 1 + self.accepted / self.rounds if self.rounds else 0.0

    @property
    def acceptance_by_position(self) -> list[float]:
        """For each draft position, the share of rounds that accepted it."""
        return [
            self.accepted_at[i] / self.drafted_at[i]
            for i in range(max(self.drafted_at, default=-1) + 1)
        ]


def joined_rules(rules: Iterable[str]) -> str:
    """The names of several rules as one, each once."""
    names = [name for rule in rules for name in rule.split("; ") if name]
    return "; ".join(dict.fromkeys(names))
