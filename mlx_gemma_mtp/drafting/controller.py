"""How many drafts K the next round should have: the most tokens per second.

A round of K drafts emits E(K) tokens on average and takes T(K) seconds. Neither is
known: `AcceptanceModel` learns E, `CostModel` learns T, both from each round. The K of
the largest E / T is run; K = 0, plain decoding, is one of them. What tracing a round
takes must pay off over the tokens that are left. Now and then something else is run to
learn from it: see trials.py.

What was learnt is kept across processes, and may be wrong by far: another text, a
machine that was busy. So a process starts from it, but what is thought of a pair before
anything is measured stays possible until this process has measured (`resume`).

The idea of choosing by expected value over measured cost, with depth 0 as the way out
and trials to come back, is that of Ollama's MLX runner
(ollama:x/mlxrunner/speculate_depth.go). Here acceptance and cost carry their
uncertainties, positions and K's inform their neighbours, and trials have a budget in
place of a back-off.

Numbers in, K out: no arrays, no models, no clock, no randomness.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ..constants import DRAFTER, LOOKUP, MAX_DRAFT_TOKENS
from .acceptance_model import AcceptanceModel
from .cost_model import CostModel
from .lookup_model import LookupModel
from .prior import DEFAULT_PRIOR, Prior
from .saved_numbers import numbers
from .ski_rental import SkiRental
from .trials import PAYOFF, SEEN, Credit, Outlook, Trial, find_trial

_ANY = range(MAX_DRAFT_TOKENS + 1)
_NOTHING: Mapping[int, float] = {}
_VERSION = 1

_HORIZON = 512  # tokens over which tracing a round must pay off
_PLAIN_TRIES = 3  # rounds of K = 0 that may pass unmeasured
_PLAIN_HORIZON = 128  # tokens left that justify tracing K = 0 to measure it
_FLIGHT = 2  # rounds until a trial has been observed
_LAST_TOKENS = MAX_DRAFT_TOKENS  # tokens left that justify no trial
_SHORTEST = 3  # tokens of a match that is used in a drafter's place
_LOOKUP_EDGE = 0.91  # of the time of others: less is not worth another source
_LOOKUPS = (2, 4, 8)  # drafts from the text: few numbers, for few traces
_FIRST_OPTIMISM = 0.25  # standard deviations, where nothing is traced yet


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
        credit: What trials may still cost.
        lookup: What is known of drafts from the text itself.
    """

    def __init__(
        self,
        prior: Prior = DEFAULT_PRIOR,
        *,
        acceptance: AcceptanceModel | None = None,
        costs: CostModel | None = None,
    ) -> None:
        self.acceptance = acceptance or AcceptanceModel(prior.acceptance)
        self.costs = costs or CostModel(*prior.costs)
        self.credit = Credit()
        self.lookup = LookupModel(*prior.verify)
        self._trial: Trial | None = None
        self._flight = 0
        self._plain_tries = _PLAIN_TRIES
        self._num_shadow_drafts = 0
        self._looks_up = False
        self._rental = SkiRental()

    def resume(self, prior: Prior = DEFAULT_PRIOR) -> None:
        """Begin a process with what another one has learnt.

        Args:
            prior: What is thought of the pair before anything is measured.
        """
        self.acceptance.resume()
        self.costs.resume(*prior.costs)
        self.lookup.resume(*prior.verify)
        self.credit.resume()

    def start(self) -> None:
        """Begin a request: other text."""
        self.acceptance.start()
        self.costs.start()
        self.lookup.start()
        self._trial, self._flight, self.credit.num_shadows = None, 0, 0

    def choose(
        self,
        *,
        allowed: Collection[int] = _ANY,
        setup_s: Mapping[int, float] = _NOTHING,
        tokens_left: int | None = None,
        can_shadow: bool = False,
        context: int = 0,
    ) -> int:
        """The next round's K.

        Args:
            allowed: K's that may be run, within 0..8.
            setup_s: Seconds that the first round of a K takes on top, where it must
                still be traced. Must pay off over the tokens left.
            tokens_left: Tokens that may still be emitted; None: many. Drafts beyond
                tokens_left - 1 are worth nothing.
            can_shadow: Whether drafts may be made beside a plain round; how many is
                then in `num_shadow_drafts`.
            context: Tokens that the longest row attends to.

        Raises:
            ValueError: Nothing is allowed, or a K outside 0..8.
        """
        choices = _sorted_choices(allowed)
        left = _HORIZON if tokens_left is None else max(1, min(tokens_left, _HORIZON))
        self._num_shadow_drafts = 0
        self._at(context)
        self.credit.expect(setup_s)
        if self._needs_plain(choices, setup_s, left):
            self._plain_tries -= 1
            return 0
        outlook = self._outlook(choices, setup_s, left, can_shadow)
        if self.credit.seconds is None or left <= _LAST_TOKENS:
            return outlook.best
        trial = self._trial
        if trial and trial.num_rounds:
            trial.num_rounds -= 1
            if trial.num_draft_tokens in choices:
                return trial.num_draft_tokens
        return outlook.best if self._flight else self._explored(outlook, can_shadow)

    def choose_lookup(
        self,
        lengths: Sequence[int],
        *,
        allowed: Collection[int] = _ANY,
        drafter_allowed: Collection[int] = _ANY,
        setup_s: Mapping[int, float] = _NOTHING,
        drafter_setup_s: Mapping[int, float] = _NOTHING,
        tokens_left: int | None = None,
        tokens_to_growth: int | None = None,
        context: int = 0,
    ) -> int:
        """K of the next round where its drafts should come from the text, else 0.

        Where it is 0, `choose` says how the round drafts.

        Args:
            lengths: How long each row's match is, see `lookup_model.continued`.
            allowed: K's that may be run so.
            drafter_allowed: K's that may be run with the drafter; 0 alone without one.
            setup_s: What the first round of a K takes on top, from the text.
            drafter_setup_s: The same with the drafter.
            tokens_left: See `choose`.
            tokens_to_growth: Tokens that a round serves that is traced now; None: many.
            context: See `choose`.
        """
        choices = [k for k in _sorted_choices(allowed) if k]
        if len(choices) > 1:  # where the number is fixed it is that
            choices = [k for k in choices if k in _LOOKUPS]
        others = _sorted_choices(drafter_allowed)
        left = _HORIZON if tokens_left is None else max(1, min(tokens_left, _HORIZON))
        self._looks_up = True
        self._at(context)
        # What a drafter is worth must be seen where a text does not repeat itself.
        is_new = max(lengths, default=0) < _SHORTEST and others != [0]
        if not choices or is_new or self._needs_plain(others, drafter_setup_s, left):
            return 0
        other = self._outlook(others, drafter_setup_s, left, can_shadow=False)
        seconds = self.lookup.all_seconds(self.costs)
        tokens = self.lookup.expected_tokens(lengths)
        cost = [seconds[k] / tokens[min(k, left - 1)] for k in _ANY]  # per token
        best = other.best
        drafted = self.lookup.drafted_tokens(lengths, best, other.tokens[best])
        other_s = other.seconds[best] / drafted
        other_s += PAYOFF * drafter_setup_s.get(best, 0.0) / left
        ready = [k for k in choices if k not in setup_s]
        best = min(ready, key=cost.__getitem__, default=0)
        if best and cost[best] <= _LOOKUP_EDGE * other_s:
            best_s, emitted = cost[best], min(tokens[best], left)
            self._rental.repay(emitted * (other_s - best_s))
        else:
            best, best_s, emitted = 0, other_s, min(drafted, left)
        new = min(setup_s.keys() & set(choices), key=cost.__getitem__, default=0)
        if (
            not new
            or cost[new] > _LOOKUP_EDGE * best_s
            or not self.costs.has_measured_any()
        ):
            return best
        saved_s = best_s - cost[new]  # per token
        until = left if tokens_to_growth is None else min(left, tokens_to_growth)
        pays = self._rental.pays(
            rent_s=emitted * saved_s, price_s=setup_s[new], coming_s=until * saved_s
        )
        return new if pays else best

    def observe_lookup(
        self, num_draft_tokens: int, seconds: float | None, *, context: int = 0
    ) -> None:
        """Learn what a round took whose drafts came from the text.

        Args:
            num_draft_tokens: Its K.
            seconds: See `observe`.
            context: See `observe`.
        """
        self.acceptance.observe(0, 0)
        self._at(context)
        if seconds is None or not math.isfinite(seconds):
            return
        self.lookup.costs.observe(num_draft_tokens, seconds)
        typical_s = self.lookup.costs.seconds(num_draft_tokens)
        self.credit.earn(min(max(seconds, 0.0), 2 * typical_s), self.costs.seconds(0))

    @property
    def num_shadow_drafts(self) -> int:
        """Drafts to make beside the round last chosen, a plain one; mostly 0."""
        return self._num_shadow_drafts

    def observe(
        self,
        num_draft_tokens: int,
        accepted: Sequence[int],
        seconds: float | None,
        *,
        matches: Sequence[int] = (),
        num_shadow_drafts: int = 0,
        context: int = 0,
    ) -> None:
        """Learn from a round.

        Args:
            num_draft_tokens: Its K, chosen here or not.
            accepted: For each live row, how many drafts were accepted, 0..K.
            seconds: What it took; None if that says nothing of the next ones: it was
                traced first, the host was busy elsewhere.
            matches: How long each row's match was when it was chosen; ``()`` where
                nobody looks.
            num_shadow_drafts: Drafts that were made beside it.
            context: Tokens that its longest row attended to.

        Raises:
            ValueError: More accepted than drafted, or a K outside 0..8.
        """
        self._at(context)
        for num_accepted in accepted:
            self.acceptance.observe(num_draft_tokens, num_accepted)
        if num_draft_tokens:
            for length, num_accepted in zip(matches, accepted, strict=False):
                self.lookup.observe_drafted(length, num_draft_tokens, num_accepted)
        self._flight = max(self._flight - 1, 0)
        if seconds is None or not math.isfinite(seconds):
            return
        if num_shadow_drafts:
            plain_s = self.costs.seconds(0)
            took_s = seconds - plain_s
            self.credit.learn_shadow(num_shadow_drafts, took_s, plain_s)
            return
        self.costs.observe(num_draft_tokens, seconds)
        if num_draft_tokens == 0 and self._looks_up:
            self.lookup.costs.observe(0, seconds)
        plain_s = self.costs.seconds(0)
        typical_s = self.costs.seconds(num_draft_tokens)
        self.credit.earn(min(max(seconds, 0.0), 2 * typical_s), plain_s)
        trial = self._trial
        if (
            trial
            and trial.num_draft_tokens == num_draft_tokens
            and not trial.num_rounds
        ):
            # By the learnt time: a stall is not its fault.
            self.credit.settle(trial, typical_s, plain_s)
            self._trial = None

    def observe_shadow(self, num_draft_tokens: int, accepted: Sequence[int]) -> None:
        """Learn from drafts that were made beside a plain round.

        Args:
            num_draft_tokens: How many.
            accepted: For each row, how many of them are the tokens that came.

        Raises:
            ValueError: More accepted than drafted, or a K outside 0..8.
        """
        self.credit.num_shadows = max(self.credit.num_shadows - 1, 0)
        for num_accepted in accepted:
            self.acceptance.observe(num_draft_tokens, num_accepted)

    def best_rate(
        self,
        allowed: Collection[int] = _ANY,
        *,
        sources: Collection[str] = (DRAFTER,),
    ) -> float | None:
        """Tokens per second and row of the best K; None before anything was measured.

        Args:
            allowed: K's that may be run.
            sources: Where drafts may come from.

        Raises:
            ValueError: Nothing is allowed, or a K outside 0..8.
        """
        choices = _sorted_choices(allowed)
        if not self.costs.has_measured_any():
            return None
        tokens, seconds = self.acceptance.expected_tokens(), self.costs.all_seconds()
        drafted = [k for k in choices if DRAFTER in sources or not k]
        rounds = [(tokens[k], seconds[k]) for k in drafted]
        if LOOKUP in sources:
            return self.lookup.best_rate(choices, rounds, self.costs)
        return max(t / s for t, s in rounds)

    def to_dict(self) -> dict[str, Any]:
        """All that was learnt, in values that JSON has."""
        lookup = {"lookup": self.lookup.to_dict()} if self._looks_up else {}
        return {
            "version": _VERSION,
            "acceptance": self.acceptance.to_dict(),
            "costs": self.costs.to_dict(),
            "credit_s": self.credit.seconds,
            **lookup,
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
            controller.credit.seconds = credit_s
        if "lookup" in data:
            controller.lookup = LookupModel.from_dict(data["lookup"])
            controller._looks_up = True
        return controller

    def _at(self, context: int) -> None:
        self.costs.at(context)
        self.lookup.costs.at(context)

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

    def _outlook(
        self,
        choices: list[int],
        setup_s: Mapping[int, float],
        left: int,
        can_shadow: bool,
    ) -> Outlook:
        """What is expected of each K, and the best of those that pay off."""
        tokens = self.acceptance.expected_tokens()
        tokens = [tokens[min(k, left - 1)] for k in _ANY]
        seconds = self._seconds()
        cost = [s / t for s, t in zip(seconds, tokens, strict=True)]  # per token
        for k, setup in setup_s.items():
            cost[k] += PAYOFF * setup / left
        settled = choices
        if can_shadow and choices[0] == 0 and not self._has_seen_drafts():
            # They are seen beside plain rounds before one is traced for them.
            settled = [k for k in choices if not (k and k in setup_s)]
        best = min(settled, key=cost.__getitem__)
        if best and setup_s.keys() >= set(choices):
            # Whatever is chosen is traced now, so one that is known less costs no more.
            doubts = self.costs.ratio_deviations(best)
            best = min(
                (k for k in settled if k),
                key=lambda k: cost[k] * math.exp(-_FIRST_OPTIMISM * doubts[k]),
            )
        return Outlook(choices, tokens, seconds, setup_s, left, best)

    def _seconds(self) -> list[float]:
        """T(0..8); T(0) is less than those of more rows, whatever was learnt."""
        seconds = self.costs.all_seconds()
        if not self.costs.has_measured_here(0):
            # By half of what more rows are thought to cost, in logarithms.
            seconds[0] = min(
                s / math.sqrt(self.costs.usual_ratio(k, 0)) if s < seconds[0] else s
                for k, s in enumerate(seconds)
            )
        return seconds

    def _has_seen_drafts(self) -> bool:
        """Whether anything is known of how many drafts are accepted."""
        return max(self.acceptance.num_seen, self.acceptance.num_tried) >= SEEN

    def _explored(self, outlook: Outlook, can_shadow: bool) -> int:
        """The best K, or one that is tried, or the best with drafts beside it."""
        trial = find_trial(
            outlook, self.acceptance, self.costs, self.credit, can_shadow=can_shadow
        )
        if trial is None:
            return outlook.best
        self.credit.pay(trial, outlook.seconds[0])
        if trial.is_shadow:
            self._num_shadow_drafts = trial.num_draft_tokens
            return outlook.best
        self._trial, self._flight = trial, _FLIGHT
        trial.num_rounds -= 1
        return trial.num_draft_tokens


def _sorted_choices(allowed: Collection[int]) -> list[int]:
    choices = sorted(allowed)
    if not choices or choices[0] < 0 or choices[-1] > MAX_DRAFT_TOKENS:
        raise ValueError(f"allowed must be some of 0..8: got {choices}")
    return choices
