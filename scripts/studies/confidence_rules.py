"""Who decides how many drafts are verified, and what that is worth: numbers alone.

A text is a list of blocks (confidence_blocks.py), one behind each of its tokens; who
accepts n drafts goes on n + 1 blocks later. Rounds take what a modelled machine takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mlx_gemma_mtp.constants import MAX_DRAFT_TOKENS
from mlx_gemma_mtp.drafting.acceptance_model import AcceptanceModel, tokens_per_round
from mlx_gemma_mtp.drafting.controller import DraftLengthController
from mlx_gemma_mtp.drafting.prior import Prior

from .confidence_blocks import Block

Text = Sequence[Block]
_EDGE = 1e-4  # of a probability whose odds are taken
_WALK = 4  # drafts of the rounds that a model learns from
_RIDGE = 1.0  # squares of weights, in trials: few trials must not say much
_TURNS = 12  # of Newton's method: it settles sooner


@dataclass(frozen=True)
class Costs:
    """Seconds of the parts of a round.

    Attributes:
        step_s: Of a draft step.
        pass_s: Of a pass over 1 to 9 rows.
    """

    step_s: float
    pass_s: tuple[float, ...]

    def round_s(self, num_drafted: int, num_verified: int) -> float:
        """Of a round that drafts so many tokens and verifies so many of them."""
        return num_drafted * self.step_s + self.pass_s[num_verified]


@dataclass(frozen=True)
class Played:
    """What rounds over texts have come to.

    Attributes:
        tokens: That were emitted.
        seconds: That they took.
        verified: Drafts that were verified.
        rounds: How many there were.
    """

    tokens: int = 0
    seconds: float = 0.0
    verified: int = 0
    rounds: int = 0

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds

    def __add__(self, other: Played) -> Played:
        return Played(
            self.tokens + other.tokens,
            self.seconds + other.seconds,
            self.verified + other.verified,
            self.rounds + other.rounds,
        )


def logit(probability: float) -> float:
    """Log-odds, of what is kept away from 0 and 1."""
    inside = min(max(probability, _EDGE), 1 - _EDGE)
    return math.log(inside / (1 - inside))


def sigmoid(log_odds: float) -> float:
    """The probability of log-odds."""
    return 1 / (1 + math.exp(-log_odds))


def auc(scores: Sequence[float], hits: Sequence[bool]) -> float:
    """P(a hit scores above a miss), ties half; 0.5 where one of them is missing."""
    values = np.asarray(scores, dtype=float)
    is_hit = np.asarray(hits, dtype=bool)
    won, lost = np.sort(values[is_hit]), np.sort(values[~is_hit])
    if not len(won) or not len(lost):
        return 0.5
    below = np.searchsorted(lost, won, side="left").sum()
    same = np.searchsorted(lost, won, side="right").sum() - below
    return float((below + 0.5 * same) / (len(won) * len(lost)))


def log_loss(probabilities: Sequence[float], hits: Sequence[bool]) -> float:
    """Mean of -log P(what happened), nats."""
    return -sum(
        math.log(p if hit else 1 - p)
        for p, hit in zip(probabilities, hits, strict=True)
    ) / len(hits)


def fitted(features: np.ndarray, hits: np.ndarray) -> np.ndarray:
    """Weights of a logistic regression, by Newton's method with a small ridge.

    Args:
        features: [N, M], the first column ones.
        hits: [N], 0 or 1.
    """
    weights = np.zeros(features.shape[1])
    ridge = _RIDGE * np.eye(len(weights))
    ridge[0, 0] = 1e-6
    for _ in range(_TURNS):
        probs = 1 / (1 + np.exp(-np.clip(features @ weights, -30, 30)))
        slope = features.T @ (hits - probs) - ridge @ weights
        curve = features.T @ (features * (probs * (1 - probs))[:, None]) + ridge
        weights = weights + np.linalg.solve(curve, slope)
    return weights


def walk(text: Text, num_drafts: int, start: int = 0) -> Iterator[int]:
    """Places of the rounds that verify so many drafts each."""
    place = start
    while place < len(text):
        yield place
        place += 1 + min(num_drafts, text[place].num_accepted)


Features = Callable[[Sequence[float], Sequence[float]], list[list[float]]]


def by_level(levels: Sequence[float], probs: Sequence[float]) -> list[list[float]]:
    """What the acceptance of late says of each draft."""
    return [[1.0, logit(level)] for level in levels]


def by_both(levels: Sequence[float], probs: Sequence[float]) -> list[list[float]]:
    """That, and the drafter's probability of each."""
    return [
        [1.0, logit(level), logit(prob)]
        for level, prob in zip(levels, probs, strict=True)
    ]


def by_last(levels: Sequence[float], probs: Sequence[float]) -> list[list[float]]:
    """That, and how sure the drafter was of its first drafts in another round."""
    mean = sum(map(logit, probs[:_WALK])) / _WALK
    return [[1.0, logit(level), mean] for level in levels]


class ChanceModel:
    """P(a draft is accepted | those before it were), from features of its position.

    Weights are the same for all positions: by position few trials say too much.

    Args:
        texts: What it learns from.
        features: Of a block.
        lag: By how many rounds the probabilities it is told are old.
    """

    def __init__(
        self, texts: Sequence[Text], features: Features = by_both, *, lag: int = 0
    ) -> None:
        self.features, self.lag = features, lag
        rows: list[list[float]] = []
        hits: list[bool] = []
        for block, found in trials(texts, features, lag=lag):
            count = min(block.num_accepted + 1, MAX_DRAFT_TOKENS)
            rows += found[:count]
            hits += [i < block.num_accepted for i in range(count)]
        self.weights = fitted(np.array(rows), np.array(hits, float)).tolist()

    def chances(self, levels: Sequence[float], probs: Sequence[float]) -> list[float]:
        """Of 8 drafts, where 8 levels and probabilities are known."""
        return self.at(self.features(levels, probs))

    def at(self, features: Sequence[Sequence[float]]) -> list[float]:
        """Of 8 drafts with such features."""
        return [
            sigmoid(sum(w * x for w, x in zip(self.weights, row, strict=True)))
            for row in features
        ]


def trials(
    texts: Sequence[Text], features: Features, *, lag: int = 0
) -> Iterator[tuple[Block, list[list[float]]]]:
    """Blocks of rounds of a few drafts, and their features."""
    for text in texts:
        for start in range(_WALK):
            model = AcceptanceModel()
            before = [text[start].probs] * (2 * lag + 1)
            for place in walk(text, _WALK, start):
                block = text[place]
                before = [*before[1:], block.probs]
                yield block, features(model.probabilities(), before[0])
                model.observe(_WALK, min(block.num_accepted, _WALK))


def play_fixed(texts: Sequence[Text], costs: Costs, num_drafts: int) -> Played:
    """Rounds of one number of drafts."""
    rounds = [(t[p].num_accepted) for t in texts for p in walk(t, num_drafts)]
    tokens = sum(1 + min(num_drafts, n) for n in rounds)
    seconds = len(rounds) * costs.round_s(num_drafts, num_drafts)
    return Played(tokens, seconds, num_drafts * len(rounds), len(rounds))


def best_fixed(texts: Sequence[Text], costs: Costs) -> Played:
    """Rounds of the number of drafts that is best for all of these texts."""
    played = [play_fixed(texts, costs, k) for k in range(MAX_DRAFT_TOKENS + 1)]
    return max(played, key=lambda each: each.rate)


def play_controller(
    texts: Sequence[Text], costs: Costs, controller: DraftLengthController
) -> Played:
    """Rounds of the package's controller, told of each round one round late."""
    total = Played()
    for text in texts:
        controller.start()
        late: list[tuple[int, int]] = []
        place, known = 0, 0
        while place < len(text):
            k = controller.choose(tokens_left=len(text) - known)
            accepted = min(k, text[place].num_accepted)
            seconds = costs.round_s(k, k)
            total += Played(1 + accepted, seconds, k, 1)
            late.append((k, accepted))
            place += 1 + accepted
            if len(late) > 1:
                k, accepted = late.pop(0)
                controller.observe(k, [accepted], costs.round_s(k, k))
                known += 1 + accepted
    return total


def controller_of(costs: Costs, acceptance: float) -> DraftLengthController:
    """A controller that starts from the machine's true costs."""
    rounds = [costs.round_s(k, k) for k in range(MAX_DRAFT_TOKENS + 1)]
    return DraftLengthController(
        Prior(tuple(s / rounds[0] for s in rounds), acceptance)
    )


@dataclass(frozen=True)
class Confident:
    """Rounds that verify as many of their drafts as pay.

    Costs are known, and what became of a few drafts of every round is, too, whether
    they were verified or not: better than any controller can have it.

    Attributes:
        model: What is thought of drafts.
        num_drafts: How many are drafted; where probabilities are those of an earlier
            round, no more are than are verified.
        price_s: What a round takes on top, as the host must read before it verifies.
    """

    model: ChanceModel
    num_drafts: int = MAX_DRAFT_TOKENS
    price_s: float = 0.0

    def play(self, texts: Sequence[Text], costs: Costs, rate: float) -> Played:
        """Rounds over texts, a token being worth 1 / rate seconds."""
        total = Played()
        for text in texts:
            total += self._play(text, costs, rate)
        return total

    def _play(self, text: Text, costs: Costs, rate: float) -> Played:
        tokens = verified = rounds = 0
        seconds = 0.0
        acceptance, lag = AcceptanceModel(), self.model.lag
        before = [text[0].probs] * (2 * lag + 1)
        late: list[int] = []
        place = 0
        while place < len(text):
            block = text[place]
            before = [*before[1:], block.probs]
            chances = self.model.chances(acceptance.probabilities(), before[0])
            expected = tokens_per_round(chances)
            took = [self._seconds(costs, k) for k in range(self.num_drafts + 1)]
            k = max(range(len(took)), key=lambda k: expected[k] - rate * took[k])
            accepted = min(k, block.num_accepted)
            tokens, verified, rounds = tokens + 1 + accepted, verified + k, rounds + 1
            seconds += took[k]
            place += 1 + accepted
            late.append(min(block.num_accepted, _WALK))
            if len(late) > lag:
                acceptance.observe(_WALK, late.pop(0))
        return Played(tokens, seconds, verified, rounds)

    def _seconds(self, costs: Costs, num_verified: int) -> float:
        drafted = num_verified if self.model.lag else self.num_drafts
        return costs.round_s(drafted, num_verified) + self.price_s

    def best_play(self, texts: Sequence[Text], costs: Costs) -> Played:
        """`play` with the rate that it comes to itself."""
        first = self.play(texts, costs, best_fixed(texts, costs).rate)
        again = self.play(texts, costs, first.rate)
        return max(first, again, key=lambda played: played.rate)
