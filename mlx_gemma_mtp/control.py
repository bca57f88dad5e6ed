"""How many drafts K the next round should have: the most tokens per second.

A round of K drafts emits E(K) tokens on average and takes T(K) seconds. Neither is
known: `AcceptanceModel` learns E, `CostModel` learns T, both from each round. The K of
the largest E / T is run; K = 0, plain decoding, is one of them and is measured first,
because every other is judged against it.

What is never tried is never learnt, so now and then another K is tried: one whose E / T
would be better if the models erred in its favour by a standard deviation or two
(optimism in the face of uncertainty). Such a probe costs T(K) - E(K) / (best rate)
seconds, and is paid for from a credit: an allowance of a few plain rounds at first, and
later a small share of the time that passes. So drafting that never pays costs no more
than that share, and what was learnt too slowly. Credit that nothing asked for is spent
on larger doubts, such as whether the rounds that spoke against a K were all stalled.

The idea of choosing by expected value over measured cost, with depth 0 as the way out
and probes to come back, is that of Ollama's MLX runner
(ollama:x/mlxrunner/speculate_depth.go). Here acceptance and cost carry their
uncertainties, positions and K's inform their neighbours, and probes have a budget in
place of a back-off.

Numbers in, K out: no arrays, no models, no clock, no randomness.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .acceptance_model import AcceptanceModel, tokens_per_round
from .config import MAX_DRAFT_TOKENS
from .cost_model import TYPICAL_COST, CostModel
from .learnt import numbers

_ANY = range(MAX_DRAFT_TOKENS + 1)
_NOTHING: Mapping[int, float] = {}
_VERSION = 1

# Credit for probes, in plain rounds or as a share of the time that passes.
_ALLOWANCE = 5.0
_SHARE = 0.005
_MOST_CREDIT = 6.0
_LEAST_CREDIT = -1.0

# Optimism, in standard deviations.
_LEVEL_OPTIMISM = 1.5
_PROFILE_OPTIMISM = 1.0
_COST_OPTIMISM = 1.5
_SPARE_CREDIT = 0.95  # of the most: from there on it is spent on doubts that are
_SPARE_OPTIMISM = 3.0  # this many times as large
_LEAST_GAIN = 0.01  # of the rate: less is not worth a probe

_HORIZON = 512  # tokens over which tracing a round must pay off
_PAYOFF = 1.25  # times over
_PLAIN_TRIES = 3  # rounds of K = 0 that may pass unmeasured
_PLAIN_HORIZON = 128  # tokens left that justify tracing K = 0 to measure it
_FLIGHT = 2  # rounds until a probe has been observed
_LAST_TOKENS = MAX_DRAFT_TOKENS  # tokens left that justify no probe


@dataclass(frozen=True)
class Prior:
    """What is thought of a machine and a pair before anything is measured.

    Attributes:
        relative_cost: Round time for K = 0..8 over that of K = 0: 9 numbers, the
            first 1.0.
        acceptance: P(a draft is accepted | those before it were), 0 to 1.

    Raises:
        ValueError: Not such numbers.
    """

    relative_cost: tuple[float, ...]
    acceptance: float

    def __post_init__(self) -> None:
        costs = self.relative_cost
        if len(costs) != len(_ANY) or costs[0] != 1 or not all(c > 0 for c in costs):
            raise ValueError(
                f"relative_cost must be 9 positive numbers, the first 1.0: got {costs}"
            )
        if not 0 <= self.acceptance <= 1:
            raise ValueError(f"acceptance must be within 0..1: got {self.acceptance}")


DEFAULT_PRIOR = Prior(TYPICAL_COST, 0.6)


@dataclass(frozen=True, slots=True)
class _Probe:
    """A round run to learn from: what it was charged, what its tokens are worth."""

    num_draft_tokens: int
    price_s: float
    worth_s: float


class DraftLengthController:
    """Chooses each round's K and learns from each round.

    Rounds may be observed late: the next K's may be chosen first.

    Args:
        prior: What to start from.
        acceptance: What is known of the text, where others learn it too.
        costs: What is known of the machine.

    Attributes:
        acceptance: What is known of the text by now.
        costs: What is known of the machine by now.
        credit_s: Seconds that probes may still cost; None before any measurement.
    """

    def __init__(
        self,
        prior: Prior = DEFAULT_PRIOR,
        *,
        acceptance: AcceptanceModel | None = None,
        costs: CostModel | None = None,
    ) -> None:
        self.acceptance = acceptance or AcceptanceModel(prior.acceptance)
        self.costs = costs or CostModel(prior.relative_cost)
        self.credit_s: float | None = None  # None: nothing measured yet
        self._probe: _Probe | None = None
        self._flight = 0
        self._plain_tries = _PLAIN_TRIES

    def start(self) -> None:
        """Begin a request: other text, another context length."""
        self.acceptance.start()
        self.costs.start()
        self._probe, self._flight = None, 0

    def choose(
        self,
        *,
        allowed: Collection[int] = _ANY,
        setup_s: Mapping[int, float] = _NOTHING,
        tokens_left: int | None = None,
    ) -> int:
        """The next round's K.

        Args:
            allowed: K's that may be run, within 0..8.
            setup_s: Seconds that the first round of a K takes on top, where it must
                still be traced. Must pay off over the tokens left.
            tokens_left: Tokens that may still be emitted; None: many. Drafts beyond
                tokens_left - 1 are worth nothing.

        Raises:
            ValueError: Nothing is allowed, or a K outside 0..8.
        """
        choices = _sorted_choices(allowed)
        left = _HORIZON if tokens_left is None else max(1, min(tokens_left, _HORIZON))
        if self._needs_plain(choices, setup_s, left):
            self._plain_tries -= 1
            return 0
        tokens = self.acceptance.expected_tokens()
        if left <= MAX_DRAFT_TOKENS:
            choices = [k for k in choices if k < left] or choices
            tokens = [tokens[min(k, left - 1)] for k in _ANY]
        seconds = self.costs.all_seconds()
        cost = [s / t for s, t in zip(seconds, tokens, strict=True)]  # per token
        if setup_s:
            for k, setup in setup_s.items():
                cost[k] += _PAYOFF * setup / left
        best = min(choices, key=cost.__getitem__)
        if self.credit_s is None or self._flight or left <= _LAST_TOKENS:
            return best
        probe = self._best_probe(choices, best, tokens, seconds, setup_s)
        if probe is None:
            return best
        self.credit_s -= probe.price_s
        self._probe, self._flight = probe, _FLIGHT
        return probe.num_draft_tokens

    def observe(
        self, num_draft_tokens: int, accepted: Sequence[int], seconds: float | None
    ) -> None:
        """Learn from a round.

        Args:
            num_draft_tokens: Its K, chosen here or not.
            accepted: For each live row, how many drafts were accepted, 0..K.
            seconds: What it took; None if that says nothing of the next ones: it was
                traced first, the host was busy elsewhere.

        Raises:
            ValueError: More accepted than drafted, or a K outside 0..8.
        """
        for num_accepted in accepted:
            self.acceptance.observe(num_draft_tokens, num_accepted)
        self._flight = max(self._flight - 1, 0)
        if seconds is None:
            return
        self.costs.observe(num_draft_tokens, seconds)
        plain_s = self.costs.seconds(0)
        typical_s = self.costs.seconds(num_draft_tokens)
        credit_s = self.credit_s
        if credit_s is None:
            credit_s = _ALLOWANCE * plain_s
        if self._probe and self._probe.num_draft_tokens == num_draft_tokens:
            # Charge what it did cost, by the learnt time: a stall is not its fault.
            credit_s += self._probe.price_s - max(typical_s - self._probe.worth_s, 0.0)
            credit_s = max(credit_s, _LEAST_CREDIT * plain_s)
            self._probe = None
        credit_s += _SHARE * min(max(seconds, 0.0), 2 * typical_s)
        self.credit_s = min(credit_s, _MOST_CREDIT * plain_s)

    def best_rate(self, allowed: Collection[int] = _ANY) -> float | None:
        """Tokens per second and row of the best K; None before anything was measured.

        Raises:
            ValueError: Nothing is allowed, or a K outside 0..8.
        """
        choices = _sorted_choices(allowed)
        if not self.costs.has_measured_any():
            return None
        tokens, seconds = self.acceptance.expected_tokens(), self.costs.all_seconds()
        return max(tokens[k] / seconds[k] for k in choices)

    def to_dict(self) -> dict[str, Any]:
        """All that was learnt, in values that JSON has."""
        return {
            "version": _VERSION,
            "acceptance": self.acceptance.to_dict(),
            "costs": self.costs.to_dict(),
            "credit_s": self.credit_s,
        }

    @classmethod
    def from_dict(cls, data: Any) -> DraftLengthController:
        """The controller that `to_dict` describes.

        Raises:
            ValueError: `data` is not what this version's `to_dict` returns.
        """
        numbers(data, "version", 1, low=_VERSION, high=_VERSION)
        controller = cls(
            acceptance=AcceptanceModel.from_dict(data.get("acceptance")),
            costs=CostModel.from_dict(data.get("costs")),
        )
        if data.get("credit_s") is not None:
            (credit_s,) = numbers(data, "credit_s", 1, low=-1e6, high=1e6)
            controller.credit_s = credit_s
        return controller

    def _needs_plain(
        self, choices: list[int], setup_s: Mapping[int, float], left: int
    ) -> bool:
        """Whether this round should measure plain decoding, unmeasured so far."""
        return (
            choices[0] == 0
            and self._plain_tries > 0
            and not self.costs.has_measured(0)
            and (left >= _PLAIN_HORIZON or not setup_s.get(0))
        )

    def _best_probe(
        self,
        choices: list[int],
        best: int,
        tokens: list[float],
        seconds: list[float],
        setup_s: Mapping[int, float],
    ) -> _Probe | None:
        """The K that promises most for its price, if any is affordable."""
        credit_s = self.credit_s or 0.0
        is_spare = credit_s >= _SPARE_CREDIT * _MOST_CREDIT * seconds[0]
        optimism = _SPARE_OPTIMISM if is_spare else 1.0
        rate = tokens[best] / seconds[best]
        hopes = self._hopeful_tokens(best, optimism)
        deviations = self.costs.ratio_deviations(best)
        found, most = None, 0.0
        for k in choices:
            deviation = deviations[k]
            hope = hopes[k] / seconds[k] * (1 + _COST_OPTIMISM * optimism * deviation)
            gain = hope / rate - 1
            if k == best or gain <= _LEAST_GAIN:
                continue
            worth_s = tokens[k] / rate
            price_s = max(seconds[k] * (1 + 0.5 * deviation) - worth_s, 0.0)
            price_s += setup_s.get(k, 0.0)
            score = min(gain, 1.0) / (price_s + 0.05 * seconds[best])
            if score > most and price_s <= credit_s:
                found, most = _Probe(k, price_s, worth_s), score
        return found

    def _hopeful_tokens(self, best: int, optimism: float) -> list[float]:
        """E(0..8) if what rounds of the best K cannot tell is better than thought.

        Those of K = 0 tell nothing of acceptance, those of K > 0 all but the positions
        beyond K.
        """
        if best == 0:
            hopes = self.acceptance.hopeful_probabilities(optimism * _LEVEL_OPTIMISM)
        else:
            hopes = self.acceptance.probabilities()
        deviations = self.acceptance.profile_deviations()
        for i in range(best, MAX_DRAFT_TOKENS):
            hopes[i] = min(hopes[i] + optimism * _PROFILE_OPTIMISM * deviations[i], 1.0)
        return tokens_per_round(hopes)


def _sorted_choices(allowed: Collection[int]) -> list[int]:
    choices = sorted(allowed)
    if not choices or choices[0] < 0 or choices[-1] > MAX_DRAFT_TOKENS:
        raise ValueError(f"allowed must be some of 0..8: got {choices}")
    return choices
