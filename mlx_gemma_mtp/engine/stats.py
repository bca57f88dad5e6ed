"""Counts of a generation's rounds: how much of what was drafted was accepted.

Terms (vLLM's conventions): acceptance rate = accepted / drafted; acceptance length =
tokens per round, the bonus or recovered token included = 1 + accepted / rounds.

Numbers in, numbers out: no arrays, no models.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..constants import DRAFTER, FORM, LOOKUP


@dataclass
class Phases:
    """Seconds of a generation so far.

    Attributes:
        prefill_s: Reading the prompt.
        rounds_s: Handing rounds to the device and waiting for them.
        host_s: Everything else: building graphs, deciding rows, making text, and the
            caller.
    """

    prefill_s: float = 0.0
    rounds_s: float = 0.0
    host_s: float = 0.0


@dataclass
class RoundStats:
    """What the rounds of one request, or of several, have done.

    Attributes:
        rounds: Rounds run for a live row (one round of B live rows counts B).
        drafted: Draft tokens proposed.
        accepted: Draft tokens that the target accepted, those past the cut of the
            last round included.
        num_draft_tokens: Rounds by the number K of drafts.
        looked_up: The same, of rounds whose drafts came from the text itself alone.
        accepted_at: accepted_at[i] counts the rounds that accepted draft i + 1.
        drafted_at: drafted_at[i] counts the rounds that proposed draft i + 1.
        drafted_from: Draft tokens proposed, by where they came from.
        accepted_from: Those that the target accepted.
        rule: The rule that judged the drafts, in words.
        traced: Rounds that were traced, which takes the host much longer.
        exactness: What is known of the text's equality with plain decoding, in words.
        max_difference: Largest difference of a logit that the exactness probe has seen
            between a plain round and another one; None where it has not run to its end.
        why_plain: Why no round may have drafts, in words; empty where they may.
        probe_s: What the exactness probe took for this request, if it ran, seconds.
        matmuls: The matrices, by size and form, that the package's kernel multiplies,
            each with the fewest rows that it takes; MLX multiplies all others.
        phases: Where the time went.
    """

    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    num_draft_tokens: Counter[int] = field(default_factory=Counter)
    accepted_at: Counter[int] = field(default_factory=Counter)
    drafted_at: Counter[int] = field(default_factory=Counter)
    looked_up: Counter[int] = field(default_factory=Counter)
    drafted_from: Counter[str] = field(default_factory=Counter)
    accepted_from: Counter[str] = field(default_factory=Counter)
    rule: str = ""
    traced: int = 0
    exactness: str = ""
    max_difference: float | None = None
    why_plain: str = ""
    probe_s: float = 0.0
    matmuls: dict[str, int] = field(default_factory=dict)
    phases: Phases = field(default_factory=Phases)

    def add_round(
        self, *, drafted: int, accepted: int, source: str = DRAFTER, forced: int = 0
    ) -> None:
        """Count one row's part of one round.

        Args:
            drafted: Its drafts.
            accepted: How many of them were accepted.
            source: Where they came from.
            forced: How many of them, from the first on, a form has forced.
        """
        forced = min(forced, drafted)
        if forced:
            self.drafted_from[FORM] += forced
            self.accepted_from[FORM] += min(forced, accepted)
        if drafted > forced:
            self.drafted_from[source] += drafted - forced
            self.accepted_from[source] += max(accepted - forced, 0)
        if drafted and source == LOOKUP:
            self.looked_up[drafted] += 1
        self.rounds += 1
        self.drafted += drafted
        self.accepted += accepted
        self.num_draft_tokens[drafted] += 1
        self.drafted_at.update(range(drafted))
        self.accepted_at.update(range(accepted))

    def snapshot(self) -> RoundStats:
        """The counts as they are now; those of the rounds to come are not added."""
        return replace(
            self,
            num_draft_tokens=self.num_draft_tokens.copy(),
            accepted_at=self.accepted_at.copy(),
            drafted_at=self.drafted_at.copy(),
            looked_up=self.looked_up.copy(),
            drafted_from=self.drafted_from.copy(),
            accepted_from=self.accepted_from.copy(),
            phases=replace(self.phases),
        )

    def merge(self, other: RoundStats) -> None:
        """Add the counts of other rounds."""
        self.rule = joined_rules([self.rule, other.rule])
        self.rounds += other.rounds
        self.drafted += other.drafted
        self.accepted += other.accepted
        self.num_draft_tokens.update(other.num_draft_tokens)
        self.drafted_at.update(other.drafted_at)
        self.looked_up.update(other.looked_up)
        self.drafted_from.update(other.drafted_from)
        self.accepted_from.update(other.accepted_from)
        self.traced += other.traced
        self.max_difference = _largest(self.max_difference, other.max_difference)
        self.exactness = _both(self.exactness, other.exactness)
        self.why_plain = _both(self.why_plain, other.why_plain)
        self.probe_s += other.probe_s
        self.matmuls = self.matmuls | other.matmuls
        for name, seconds in asdict(other.phases).items():
            setattr(self.phases, name, getattr(self.phases, name) + seconds)
        self.accepted_at.update(other.accepted_at)

    @property
    def engaged(self) -> bool:
        """Whether any draft was proposed."""
        return self.drafted > 0

    @property
    def why_not_engaged(self) -> str:
        """Why nothing was drafted, in words; empty where something was."""
        if self.engaged:
            return ""
        if self.why_plain:
            return self.why_plain
        if not self.rounds:
            return "the text ended with the prompt's first token"
        return "rounds without drafts were expected to be faster, or measured first"

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

    def to_dict(self) -> dict[str, Any]:
        """Everything and what follows from it, as JSON takes it."""
        return {
            "rounds": self.rounds,
            "drafted": self.drafted,
            "accepted": self.accepted,
            "acceptance_rate": self.acceptance_rate,
            "acceptance_length": self.acceptance_length,
            "acceptance_by_position": self.acceptance_by_position,
            "rounds_by_num_draft_tokens": {
                str(k): self.num_draft_tokens[k] for k in sorted(self.num_draft_tokens)
            },
            "drafted_from": dict(self.drafted_from),
            "accepted_from": dict(self.accepted_from),
            "rule": self.rule,
            "traced": self.traced,
            "engaged": self.engaged,
            "why_not_engaged": self.why_not_engaged,
            "exactness": self.exactness,
            "max_difference": self.max_difference,
            "probe_s": self.probe_s,
            "matmuls": dict(self.matmuls),
            **asdict(self.phases),
        }


@dataclass
class DraftTally:
    """How many tokens came from drafts, of all that a process has generated.

    Attributes:
        num_tokens: Tokens of texts that might have drafts.
        num_from_draft: Those that had been proposed.
        why_none: Why the last text without drafts had none, in words.
    """

    num_tokens: int = 0
    num_from_draft: int = 0
    why_none: str = ""

    def add(self, num_tokens: int, num_from_draft: int) -> None:
        """Count tokens."""
        self.num_tokens += num_tokens
        self.num_from_draft += num_from_draft

    def describe(self) -> str:
        """The counts in one line; empty where nothing was generated."""
        if self.num_from_draft:
            share = self.num_from_draft / self.num_tokens
            counts = f"{self.num_from_draft} of {self.num_tokens}"
            return f"Drafts: {counts} tokens came from drafts ({share:.0%})."
        if not (self.num_tokens or self.why_none):
            return ""
        reason = self.why_none or "none that was proposed was accepted"
        return f"Drafts: no token came from one: {reason.rstrip('.')}."


def _largest(one: float | None, other: float | None) -> float | None:
    """The larger of two numbers, or the one that is there."""
    return max((n for n in (one, other) if n is not None), default=None)


def _both(one: str, other: str) -> str:
    """Two sentences, or the one that is there."""
    return " / ".join(dict.fromkeys(text for text in (one, other) if text))


def joined_rules(rules: Iterable[str]) -> str:
    """The names of several rules as one, each once."""
    names = [name for rule in rules for name in rule.split("; ") if name]
    return "; ".join(dict.fromkeys(names))
