"""Seconds that a round of K drafts takes, K = 0..8, learnt from measured rounds.

A round takes longer with every token of context, and with more drafts it does so
faster: T(K, n) = T(K) (1 + n c(K)). The logarithms of the nine times T(K) are jointly
Gaussian: a scale common to all, and a shape around the relative costs given at first,
smooth in K, so that each measurement tells about its neighbours too. Both drift slowly;
the scale jumps at a new request. c(K) is what was given at first, times
exp(g + h K / 8) with Gaussian g and h: rounds at several lengths of context tell them
from the shape. Measuring is an update of a Kalman filter, an extended one, as
log T(K, n) bends in g and h.

A round that took far longer than thought is more likely a stalled host than news: it
weighs less, and beyond four standard deviations it is set aside, unless several in a
row of the same K agree, as they do when a machine throttles.

Numbers in, numbers out: reads no clock.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..constants import MAX_DRAFT_TOKENS
from .saved_numbers import numbers

_N = MAX_DRAFT_TOKENS + 1
_LEVEL, _TILT = _N, _N + 1  # places of g and h behind the nine times
_SIZE = _N + 2

# All in logarithms of seconds; standard deviations unless called variance.
_UNKNOWN_SCALE = 5.0
_SCALE_START = 0.25  # of the scale, from one request to the next
_SCALE_JUMP = 0.7  # of the scale, where several outliers agree
_SCALE_DRIFT = 0.004  # of the scale, per round
_SHAPE_JUMP = 0.05  # share of the prior variance of the shape, where outliers agree
_SHAPE_DRIFT = 1e-5  # share of the prior variance of the shape, per round
_RESUMED = 0.02  # share of the prior variance of the shape, in a new process
_RESUMED_AWAY = 0.5  # variance along the way to the usual shape, whose square is 1
_FRESH = 600  # rounds without a draft, until what is known of drafting is old
_LEVEL_START = 0.5  # of g
_TILT_START = 0.5  # of h
_NOISE_FIRST = 0.05  # of one measurement
_NOISE_BOUNDS = (1e-4, 0.04)  # variance
_NOISE_RATE = 0.03  # weight of a new square in the variance of the noise

_DOUBT = 2.0  # standard deviations, from where on a measurement weighs less
_OUTLIER = 4.0  # standard deviations, from where on it needs others that agree
_AGREEING = 3
TYPICAL_COST = (1.0, 1.15, 1.3, 1.45, 1.6, 1.75, 1.9, 2.05, 2.2)
# 12B's in 4 bits, where reading is all that counts: 16 KB a token of 6.7 GB, 1.4 times
# with one row, a third more with each draft.
TYPICAL_KEY_COST = tuple(3.4e-6 * (1 + k / 3) for k in range(_N))
NO_KEYS = (0.0,) * _N


def _shape_covariance(i: int, j: int) -> float:
    """Prior covariance of log T(i) / T(0) and log T(j) / T(0)."""
    if not (i and j):
        return 0.0
    u, v = math.log2(1 + i), math.log2(1 + j)
    slope = 0.35**2 * u * v
    bend = 0.15**2 * math.exp(-((u - v) ** 2) / (2 * 0.8**2))
    steps = 0.05**2 * min(i, j)
    return slope + bend + steps + (0.02**2 if i == j else 0.0)


def _prior_covariance(i: int, j: int) -> float:
    """Prior covariance of the shape, g and h; of the scale nothing is known."""
    if max(i, j) < _N:
        return _shape_covariance(i, j)
    return {_LEVEL: _LEVEL_START, _TILT: _TILT_START}[i] ** 2 if i == j else 0.0


_PRIOR = [[_prior_covariance(i, j) for j in range(_SIZE)] for i in range(_SIZE)]
_SCALE = [[float(max(i, j) < _N) for j in range(_SIZE)] for i in range(_SIZE)]


def _variance(*, scale: float, shape: float) -> list[list[float]]:
    """The covariance of so much of the scale, and such a share of the prior one."""
    return [
        [scale * one + shape * prior for one, prior in zip(ones, priors, strict=True)]
        for ones, priors in zip(_SCALE, _PRIOR, strict=True)
    ]


_DRIFT = _variance(scale=_SCALE_DRIFT**2, shape=_SHAPE_DRIFT)


class CostModel:
    """Seconds per round for K = 0..8 at one length of context.

    Args:
        relative_cost: For K = 0..8, a round's time without a context over that of
            K = 0 while nothing is known: 9 positive numbers.
        key_cost: What each token of context adds to these: 9 numbers, 0 or more.
    """

    def __init__(
        self,
        relative_cost: Sequence[float] = TYPICAL_COST,
        key_cost: Sequence[float] = TYPICAL_KEY_COST,
    ) -> None:
        self._context = 0
        self._mean = [*map(math.log, relative_cost), 0.0, 0.0]
        self._expect(relative_cost, key_cost)
        self._covariance = _variance(scale=_UNKNOWN_SCALE**2, shape=1.0)
        self._noise = _NOISE_FIRST**2
        self._outliers = [0] * _N  # in a row, by K; negative: shorter than thought
        self._num_measured = [0] * _N
        self._here: set[int] = set()
        self._num_plain = 0  # rounds of K = 0 since one of another K

    def usual_ratio(self, num_draft_tokens: int, other: int) -> float:
        """T(num_draft_tokens) / T(other) before anything was measured."""
        return math.exp(self._log_usual(num_draft_tokens) - self._log_usual(other))

    def _log_usual(self, k: int) -> float:
        return self._usual[k] + math.log1p(self._context * self._key_share[k])

    def at(self, context: int) -> None:
        """Go to a length of context: all that is said and heard is of it.

        Args:
            context: Tokens that the longest row attends to.
        """
        if context != self._context:
            self._context = context
            self._take_context()

    def has_measured_here(self, num_draft_tokens: int) -> bool:
        """Whether this process has learnt from a round of that K, not long ago."""
        return num_draft_tokens in self._here

    def resume(
        self,
        relative_cost: Sequence[float],
        key_cost: Sequence[float] = TYPICAL_KEY_COST,
    ) -> None:
        """Begin a process: what another one has learnt may be wrong by far.

        What was learnt while other matmuls ran must not come here. In simulation (MLX's
        on an M1 Max, then the kernel) the first 500 tokens took 9 to 25 % longer than
        from a new model, and 39 to 70 % longer where nobody told of the change.
        Who keeps what is learnt keeps it apart for each choice of matmuls.

        Args:
            relative_cost: What was thought before anything was measured. The shape may
                be that one after all: it is thought to be within 1.4 deviations.
            key_cost: The same of what each token of context adds.
        """
        self._expect(relative_cost, key_cost)
        self._here.clear()
        self._widen(scale=_SCALE_START**2, shape=_RESUMED)
        self._doubt()

    def start(self) -> None:
        """Begin a request: the machine may have become faster or slower."""
        self._widen(scale=_SCALE_START**2, shape=0.0)

    def observe(self, num_draft_tokens: int, seconds: float) -> None:
        """Learn from a round of K drafts; time not above 0, or infinite, is ignored."""
        k = num_draft_tokens
        if not 0 < seconds < math.inf:
            return
        surprise = math.log(seconds) - self._log_seconds(k)
        variance = self._variance_of(k) + self._noise
        if surprise * surprise > _OUTLIER**2 * variance:
            if not self._is_lasting(k, surprise):
                return
            self._widen(scale=_SCALE_JUMP**2, shape=_SHAPE_JUMP)
            variance = self._variance_of(k) + self._noise
            doubt = 0.0
        else:
            doubt = max(surprise - _DOUBT * math.sqrt(variance), 0.0)
        self._outliers[k] = 0
        self._num_measured[k] += 1
        self._update(k, surprise, variance, doubt * doubt)
        self._age(k)

    def has_measured(self, num_draft_tokens: int) -> bool:
        """Whether a round of that K has been learnt from."""
        return self._num_measured[num_draft_tokens] > 0

    def has_measured_any(self) -> bool:
        """Whether any round has been learnt from: seconds are relative before."""
        return any(self._num_measured)

    def seconds(self, num_draft_tokens: int) -> float:
        """Median time of a round of K drafts."""
        k = num_draft_tokens
        return math.exp(self._mean[k]) * (1 + self._keys[k])

    def all_seconds(self) -> list[float]:
        """`seconds` of K = 0..8."""
        return [self.seconds(k) for k in range(_N)]

    def ratio_deviations(self, num_draft_tokens: int) -> list[float]:
        """Standard deviations of log T(0..8) / T(num_draft_tokens)."""
        base = self._row(num_draft_tokens)
        variance = self._variance_of(num_draft_tokens)
        deviations = []
        for k in range(_N):
            level, tilt = self._slopes[k]
            both = base[k] + level * base[_LEVEL] + tilt * base[_TILT]
            own = self._variance_of(k)
            deviations.append(math.sqrt(max(own + variance - 2 * both, 0.0)))
        return deviations

    def to_dict(self) -> dict[str, Any]:
        """All that was learnt, in values that JSON has."""
        # The lower triangle, row by row: the matrix is symmetric.
        rows = [row[: i + 1] for i, row in enumerate(self._covariance)]
        return {
            "mean": self._mean[:_N],
            "covariance": [c for row in rows[:_N] for c in row],
            # Apart, as versions that did not know of them can read the rest.
            "key_mean": self._mean[_N:],
            "key_covariance": [c for row in rows[_N:] for c in row],
            "noise": self._noise,
            "measured": list(self._num_measured),
        }

    @classmethod
    def from_dict(cls, data: Any) -> CostModel:
        """The model that `to_dict` describes; an older one knew nothing of contexts.

        Raises:
            ValueError: `data` is not what `to_dict` returns.
        """
        model = cls()
        mean = numbers(data, "mean", _N, low=-50, high=50)
        size = _N * (_N + 1) // 2
        triangle = numbers(data, "covariance", size, low=-1e6, high=1e6)
        if "key_mean" in data:
            mean += numbers(data, "key_mean", _SIZE - _N, low=-50, high=50)
            rest = _SIZE * (_SIZE + 1) // 2 - size
            triangle += numbers(data, "key_covariance", rest, low=-1e6, high=1e6)
        else:
            mean += model._mean[_N:]
            triangle += [c for i in (_LEVEL, _TILT) for c in _PRIOR[i][: i + 1]]
        model._mean = mean
        model._grow()
        model._covariance = _symmetric(triangle)
        low, high = _NOISE_BOUNDS
        (model._noise,) = numbers(data, "noise", 1, low=low, high=high)
        measured = numbers(data, "measured", _N, low=0, high=1e15)
        model._num_measured = [int(count) for count in measured]
        return model

    def _is_lasting(self, k: int, surprise: float) -> bool:
        """Whether enough outliers in a row agree.

        A round can be stalled but not hurried: where only a stalled one was measured,
        a single shorter one puts it right.
        """
        sign = 1 if surprise > 0 else -1
        run = self._outliers[k]
        self._outliers[k] = run + sign if run * sign > 0 else sign
        needed = _AGREEING if sign > 0 else min(_AGREEING, self._num_measured[k])
        return abs(self._outliers[k]) >= needed

    def _widen(self, *, scale: float, shape: float) -> None:
        """Add variance to the scale, and to the shape a share of its prior one."""
        self._covariance = [
            [c + w for c, w in zip(row, wider, strict=True)]
            for row, wider in zip(
                self._covariance, _variance(scale=scale, shape=shape), strict=True
            )
        ]

    def _age(self, k: int) -> None:
        """A round of K has been learnt from; what was long ago is not trusted more.

        The machine may have been busy while it drafted, and where it drafts no longer
        nothing else would ever say so.
        """
        self._here.add(k)
        self._num_plain = 0 if k else self._num_plain + 1
        if self._num_plain == _FRESH:
            self._num_plain, self._here = 0, {0}
            self._doubt()

    def _doubt(self) -> None:
        """Let the shape be the usual one after all."""
        away = [
            *(
                m - self._mean[0] - usual
                for m, usual in zip(self._mean[:_N], self._usual, strict=True)
            ),
            *self._mean[_N:],
        ]
        self._covariance = [
            [c + _RESUMED_AWAY * a * b for c, b in zip(row, away, strict=True)]
            for row, a in zip(self._covariance, away, strict=True)
        ]

    def _update(self, k: int, surprise: float, variance: float, doubt: float) -> None:
        """One step of a Kalman filter, and the drift until the next.

        Args:
            k: Which was measured.
            surprise: By how much it took longer than thought.
            variance: Of the surprise, as expected.
            doubt: Variance on top, that a stall may account for.
        """
        row = self._row(k)
        square = min(surprise * surprise, 6 * variance) - self._variance_of(k)
        noise = self._noise + _NOISE_RATE * (square - self._noise)
        low, high = _NOISE_BOUNDS
        self._noise = min(max(noise, low), high)
        gains = [c / (variance + doubt) for c in row]
        self._mean = [m + g * surprise for m, g in zip(self._mean, gains, strict=True)]
        self._grow()
        self._covariance = [
            [c - gain * r + d for c, r, d in zip(old, row, drift, strict=True)]
            for old, drift, gain in zip(self._covariance, _DRIFT, gains, strict=True)
        ]

    def _expect(
        self, relative_cost: Sequence[float], key_cost: Sequence[float]
    ) -> None:
        """Take what is thought while nothing is known."""
        self._usual = [math.log(cost) for cost in relative_cost]
        self._key_share = [
            key / cost for key, cost in zip(key_cost, relative_cost, strict=True)
        ]
        self._grow()

    def _grow(self) -> None:
        """Take c(K) from g and h, which have changed."""
        level, tilt = self._mean[_N:]
        self._growth = [
            share * math.exp(level + tilt * k / MAX_DRAFT_TOKENS)
            for k, share in enumerate(self._key_share)
        ]
        self._take_context()

    def _take_context(self) -> None:
        """Take what the context adds from its length and c(K), of which one is new.

        For each K: n c(K), the part of a round that the context adds, over the rest;
        and the derivatives of log T(K, n) by g and h.
        """
        self._keys = [self._context * growth for growth in self._growth]
        shares = [keys / (1 + keys) for keys in self._keys]
        self._slopes = [
            (share, share * k / MAX_DRAFT_TOKENS) for k, share in enumerate(shares)
        ]

    def _log_seconds(self, k: int) -> float:
        return self._mean[k] + math.log1p(self._keys[k])

    def _row(self, k: int) -> list[float]:
        """Covariances of log T(K, n) with the state."""
        level, tilt = self._slopes[k]
        return [
            row[k] + level * row[_LEVEL] + tilt * row[_TILT] for row in self._covariance
        ]

    def _variance_of(self, k: int) -> float:
        """Variance of log T(K, n)."""
        level, tilt = self._slopes[k]
        all_of, own = self._covariance, self._covariance[k]
        both = level * all_of[_LEVEL][_LEVEL] + 2 * tilt * all_of[_LEVEL][_TILT]
        variance = own[k] + level * (2 * own[_LEVEL] + both)
        return variance + tilt * (2 * own[_TILT] + tilt * all_of[_TILT][_TILT])


def _symmetric(triangle: list[float]) -> list[list[float]]:
    """The symmetric matrix of a lower triangle, row by row.

    Raises:
        ValueError: It is no covariance.
    """
    rows = [triangle[i * (i + 1) // 2 : (i + 1) * (i + 2) // 2] for i in range(_SIZE)]
    if not _is_positive_definite(rows):
        raise ValueError("covariance must be that of times and their growth")
    return [[rows[max(i, j)][min(i, j)] for j in range(_SIZE)] for i in range(_SIZE)]


def _is_positive_definite(rows: list[list[float]]) -> bool:
    """Whether a symmetric matrix, given as lower triangle, has a Cholesky factor."""
    factor: list[list[float]] = []
    for i, row in enumerate(rows):
        new: list[float] = []
        for j in range(i):
            dot = sum(a * b for a, b in zip(new, factor[j], strict=False))
            new.append((row[j] - dot) / factor[j][j])
        rest = row[i] - sum(a * a for a in new)
        if rest <= 0:
            return False
        factor.append([*new, math.sqrt(rest)])
    return True
