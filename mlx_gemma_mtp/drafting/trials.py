"""Trials: rounds and drafts that are run to learn, and what they may cost.

What is never tried is never learnt. Another K than the best is tried where its tokens
per second would be better if the models erred in its favour by a standard deviation or
two (optimism in the face of uncertainty). Two doubts, two kinds of trial:

* Whether drafts are accepted: *shadow drafts* are made beside a plain round and
  compared with the tokens that come. They cost the drafter's steps and change no text.
* What a round takes: one is run. Where it must be traced first, several are, so that
  one of them can be timed.

A trial costs T(K) - E(K) / (best rate) seconds and is paid for from a credit: an
allowance at first, then a small share of the time that passes, saved across processes.
Tracing takes many rounds' time. It is paid from the credit once that has grown, or from
a larger share of this process's own time where the question is whether to draft at
all: a process that runs long enough always asks that, whatever others have learnt.

Numbers in, numbers out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ..constants import MAX_DRAFT_TOKENS
from .acceptance_model import AcceptanceModel, tokens_per_round
from .cost_model import CostModel

# Credit, in plain rounds or as a share of the time that passes.
_ALLOWANCE = 5.0
_SHARE = 0.005
_FIRST_SHARE = 0.0125  # for so many plain rounds of a process
_FIRST_ROUNDS = 300
_MOST = 6.0
_LEAST = -1.0
_SETUPS = 1.25  # what tracing takes, times over, on top of the most
# Shares of the time of this process that tracing for a trial may take: to learn whether
# to draft, and whether not to.
_TO_DRAFT = 0.09
_TO_STOP = 0.03

# Optimism, in standard deviations.
_LEVEL_OPTIMISM = 1.5
_PROFILE_OPTIMISM = 1.0
_COST_OPTIMISM = 1.5
_SPARE_CREDIT = 0.3  # plain rounds below the most: from there it is spent on doubts
_SPARE_OPTIMISM = 3.0  # that are this many times as large
_LEAST_RATIO = 0.8  # of what was thought, now or at first, of a round's time
_ROW_COST = 0.02  # of a plain round: a draft is not thought to take less

_LEAST_GAIN = 0.01  # of the rate: less is not worth a trial
_LEAST_TRACED_GAIN = 0.2  # nor less than this, where it must be traced
_HORIZON = 512  # tokens over which tracing must pay off
PAYOFF = 1.25  # times over
_TRACED_ROUNDS = 3  # of a trial that is traced; the first one has no time
_DEAR = 2.0  # plain rounds: what takes longer to trace is not tried lightly
SEEN = 8.0  # drafts that must have been judged before that

# Shadow drafts.
_SHADOW_COST = (0.1, 0.1)  # of all and of each, in plain rounds, until measured
_SHADOW_RATE = 0.3  # weight of a new measurement
_LEAST_FACTOR = 0.25  # of what was thought: nothing is free
_MOST_SURPRISE = 4.0  # times over, that one measurement may be
_SHADOWS = (2, 4)  # fewest and most drafts
_MOST_SHADOWS = 3  # that have not been compared yet


@dataclass(frozen=True, slots=True)
class Outlook:
    """What is expected of each K where one is to be chosen.

    Attributes:
        choices: The K's that may be run.
        tokens: Of a round of K = 0..8.
        seconds: Of the same.
        setup_s: What tracing a K takes on top.
        left: Tokens that are left, as far as they matter.
        best: The K of the most tokens per second.
    """

    choices: list[int]
    tokens: list[float]
    seconds: list[float]
    setup_s: Mapping[int, float]
    left: int
    best: int

    @property
    def rate(self) -> float:
        """Tokens per second of the best K."""
        return self.tokens[self.best] / self.seconds[self.best]

    def is_dear(self, num_draft_tokens: int) -> bool:
        """Whether a K takes long to trace."""
        return self.setup_s.get(num_draft_tokens, 0.0) > _DEAR * self.seconds[0]


@dataclass(slots=True)
class Trial:
    """What is run to learn from.

    Attributes:
        num_draft_tokens: Drafts of each round, or beside it.
        is_shadow: Whether they are shadow drafts.
        price_s: What it takes more than the best K would for its tokens.
        setup_s: What tracing takes.
        worth_s: What the tokens of one round are worth.
        num_rounds: Rounds that are still to be run.
    """

    num_draft_tokens: int
    is_shadow: bool
    price_s: float
    setup_s: float = 0.0
    worth_s: float = 0.0
    num_rounds: int = 1


class Credit:
    """Seconds that trials may still cost.

    Attributes:
        seconds: Of them; None before anything was measured.
        num_shadows: Shadow drafts that have not been compared yet.
    """

    def __init__(self) -> None:
        self.seconds: float | None = None
        self.num_shadows = 0
        self._passed_s = 0.0  # of this process
        self._since_traced_s = 0.0  # of it, since a trial was traced
        self._most_setup_s = 0.0
        self._shadow_factor = 1.0

    def resume(self) -> None:
        """Begin a process: debts are forgotten."""
        if self.seconds is not None:
            self.seconds = max(self.seconds, 0.0)

    def expect(self, setup_s: Mapping[int, float]) -> None:
        """Hear what tracing takes: so much may be saved for it."""
        self._most_setup_s = max([self._most_setup_s, *setup_s.values()])

    def earn(self, passed_s: float, plain_s: float) -> None:
        """Let time pass.

        Args:
            passed_s: How much.
            plain_s: What a plain round takes.
        """
        if self.seconds is None:
            self.seconds = _ALLOWANCE * plain_s
        self._passed_s += passed_s
        self._since_traced_s += passed_s
        is_first = self._passed_s < _FIRST_ROUNDS * plain_s
        self.seconds += (_FIRST_SHARE if is_first else _SHARE) * passed_s
        self.seconds = min(self.seconds, self._most_s(plain_s))

    def affords(self, trial: Trial, outlook: Outlook, *, is_doubted: bool) -> bool:
        """Whether a trial may be run.

        Args:
            trial: The trial.
            outlook: What is expected.
            is_doubted: Whether it only pays if more drafts are accepted than thought.
        """
        cost_s = trial.price_s + trial.setup_s
        own_s = 0.0 if is_doubted else self._own_s(trial, outlook)
        return cost_s <= max(self.seconds or 0.0, own_s)

    def is_spare(self, plain_s: float) -> bool:
        """Whether there is hardly room for more."""
        most_s = self._most_s(plain_s) - _SPARE_CREDIT * plain_s
        return (self.seconds or 0.0) >= most_s

    def pay(self, trial: Trial, plain_s: float) -> None:
        """Pay for a trial."""
        self._add(-trial.price_s - trial.setup_s, plain_s)
        if trial.setup_s:
            self._since_traced_s = 0.0
        self.num_shadows += trial.is_shadow

    def settle(self, trial: Trial, round_s: float, plain_s: float) -> None:
        """Charge a trial for what its round did take, in place of its price."""
        self._add(trial.price_s - max(round_s - trial.worth_s, 0.0), plain_s)

    def shadow_s(self, num_draft_tokens: int, plain_s: float) -> float:
        """What so many shadow drafts take."""
        return _shadow_share(num_draft_tokens) * self._shadow_factor * plain_s

    def learn_shadow(
        self, num_draft_tokens: int, took_s: float, plain_s: float
    ) -> None:
        """Learn what so many shadow drafts took."""
        found = max(took_s, 0.0) / (_shadow_share(num_draft_tokens) * plain_s)
        found = min(max(found, _LEAST_FACTOR), _MOST_SURPRISE * self._shadow_factor)
        self._shadow_factor += _SHADOW_RATE * (found - self._shadow_factor)

    def _add(self, seconds: float, plain_s: float) -> None:
        self.seconds = max((self.seconds or 0.0) + seconds, _LEAST * plain_s)

    def _most_s(self, plain_s: float) -> float:
        return _MOST * plain_s + _SETUPS * self._most_setup_s

    def _own_s(self, trial: Trial, outlook: Outlook) -> float:
        """What the process may spend of its own time on tracing a trial."""
        is_whether = bool(outlook.best) != bool(trial.num_draft_tokens)
        is_late = outlook.left * outlook.seconds[0] < 2 * trial.setup_s
        if not trial.setup_s or not is_whether or is_late:
            return 0.0
        share = _TO_DRAFT if trial.num_draft_tokens else _TO_STOP
        return share * self._since_traced_s


def find_trial(
    outlook: Outlook,
    acceptance: AcceptanceModel,
    costs: CostModel,
    credit: Credit,
    *,
    can_shadow: bool,
) -> Trial | None:
    """The trial that promises most for its price, of those that can be paid for.

    Args:
        outlook: What is expected.
        acceptance: What is known of the text.
        costs: What is known of the machine.
        credit: What there is to pay.
        can_shadow: Whether drafts may be made beside a plain round.
    """
    ways = outlook.choices
    if ways == [0] and can_shadow:  # others learn from what is seen here
        ways = list(range(MAX_DRAFT_TOKENS + 1))
    search = _Search(outlook, acceptance, costs, credit, can_shadow)
    found, most = None, 0.0
    for k in ways:
        if k == outlook.best:
            continue
        hope = search.hope(k)
        if hope.gain <= hope.least:
            continue
        trial = search.trial(k, hope)
        if trial is None:
            continue
        cost_s = trial.price_s + trial.setup_s
        score = min(hope.gain, 1.0) / (cost_s + 0.05 * outlook.seconds[outlook.best])
        if score > most and credit.affords(
            trial, outlook, is_doubted=outlook.best == 0 and hope.is_doubted
        ):
            found, most = trial, score
    return found


@dataclass(frozen=True, slots=True)
class _Hope:
    """What a K is worth if the models err in its favour.

    Attributes:
        gain: By what share it is then faster than the best.
        least: Less is not worth a trial.
        is_doubted: Whether it is so only if more drafts are accepted than thought.
        is_new: Whether this process knows nothing of what its rounds take.
    """

    gain: float
    least: float
    is_doubted: bool
    is_new: bool


class _Search:
    """What trials of one moment promise and take; see ``find_trial``."""

    def __init__(
        self,
        outlook: Outlook,
        acceptance: AcceptanceModel,
        costs: CostModel,
        credit: Credit,
        can_shadow: bool,
    ) -> None:
        self._outlook, self._costs, self._credit = outlook, costs, credit
        self._rate = outlook.rate
        self._is_unseen = acceptance.num_seen < SEEN
        self._can_shadow = can_shadow
        is_spare = credit.is_spare(outlook.seconds[0])
        self._optimism = _SPARE_OPTIMISM if is_spare else 1.0
        self._tokens = _hopeful_tokens(acceptance, outlook.best, self._optimism)
        self._deviations = costs.ratio_deviations(outlook.best)

    def hope(self, k: int) -> _Hope:
        """What a K may be worth."""
        outlook, costs = self._outlook, self._costs
        is_plain_best = outlook.best == 0
        # Learnt long ago, or by another process: perhaps on a busy machine.
        is_old = costs.has_measured(k) and not costs.has_measured_here(k)
        is_dear = outlook.is_dear(k)
        is_new = is_dear or (is_plain_best and is_old)
        least = _LEAST_TRACED_GAIN if is_dear else _LEAST_GAIN
        seconds = self._seconds(k, is_new=is_new)
        gain = self._tokens[k] / seconds / self._rate - 1
        if k == 0 and not is_plain_best and not costs.has_measured_here(0):
            gain = max(gain, 2 * least)  # never plain here: not known to be slower
        sure = outlook.tokens[k] / seconds / self._rate - 1
        return _Hope(gain, least, sure <= least, is_new)

    def trial(self, k: int, hope: _Hope) -> Trial | None:
        """How a K is tried: by drafts beside a plain round or by rounds of its own.

        Returns:
            None where that must wait, or would not pay off.
        """
        outlook, credit = self._outlook, self._credit
        is_unseen = outlook.is_dear(k) and self._is_unseen
        is_question = outlook.best == 0 and (hope.is_doubted or is_unseen)
        if self._can_shadow and (is_question or k not in outlook.choices):
            if credit.num_shadows >= _MOST_SHADOWS:
                return None
            depth = min(max(k, _SHADOWS[0]), _SHADOWS[1])
            return Trial(depth, True, credit.shadow_s(depth, outlook.seconds[0]))
        trial = self._rounds(k, is_new=hope.is_new)
        pays_off = _pays_off(hope.gain, trial.setup_s, outlook.seconds[0])
        return trial if pays_off else None

    def _seconds(self, k: int, *, is_new: bool) -> float:
        """T(K) if it is shorter than thought.

        Of a K that is new not much shorter than what was thought of it now or before
        anything was measured.
        """
        best, seconds = self._outlook.best, self._outlook.seconds
        doubt = _COST_OPTIMISM * self._deviations[k]
        if not is_new:
            return seconds[k] / (1 + self._optimism * doubt)
        usual_s = seconds[best] * self._costs.usual_ratio(k, best)
        least_s = _LEAST_RATIO * min(seconds[k], usual_s)
        if k:
            least_s = max(least_s, min(seconds[0] * (1 + _ROW_COST * k), seconds[k]))
        return max(seconds[k] * math.exp(-doubt), least_s)

    def _rounds(self, k: int, *, is_new: bool) -> Trial:
        """Rounds of K drafts as a trial."""
        outlook, deviation = self._outlook, self._deviations[k]
        worth_s = outlook.tokens[k] / outlook.rate
        # What is thought of a K that was never run here must not price it out.
        factor = math.exp(-deviation) if is_new else 1 + 0.5 * deviation
        price_s = max(outlook.seconds[k] * factor - worth_s, 0.0)
        setup_s = outlook.setup_s.get(k, 0.0)
        num_rounds = _TRACED_ROUNDS if setup_s else 1
        return Trial(k, False, num_rounds * price_s, setup_s, worth_s, num_rounds)


def _pays_off(gain: float, setup_s: float, plain_s: float) -> bool:
    """Whether tracing is worth it, over texts to come, if the hope comes true."""
    gain = min(gain, 1.0)
    return _HORIZON * plain_s * gain / (1 + gain) >= PAYOFF * setup_s


def _hopeful_tokens(
    acceptance: AcceptanceModel, best: int, optimism: float
) -> list[float]:
    """E(0..8) if what rounds of the best K cannot tell is better than thought.

    Those of K = 0 tell nothing of acceptance, those of K > 0 all but the positions
    beyond K.
    """
    if best == 0:
        hopes = acceptance.hopeful_probabilities(optimism * _LEVEL_OPTIMISM)
    else:
        hopes = acceptance.probabilities()
    deviations = acceptance.profile_deviations()
    for i in range(best, MAX_DRAFT_TOKENS):
        hopes[i] = min(hopes[i] + optimism * _PROFILE_OPTIMISM * deviations[i], 1.0)
    return tokens_per_round(hopes)


def _shadow_share(num_draft_tokens: int) -> float:
    """What so many shadow drafts are thought to take, in plain rounds."""
    first, each = _SHADOW_COST
    return first + each * num_draft_tokens
