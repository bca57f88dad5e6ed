"""Seconds that a round of K drafts takes, K = 0..8, learnt from measured rounds.

The logarithms of the nine times are jointly Gaussian: a scale common to all, and a
shape around the relative costs given at first, smooth in K, so that each measurement
tells about its neighbours too. Both drift slowly; the scale jumps at a new request
(another context length). Measuring is a Kalman update. A round that took far longer
than thought is more likely a stalled host than news: it weighs less, and beyond four
standard deviations it is set aside, unless several in a row of the same K agree, as
they do when a machine throttles.

Numbers in, numbers out: reads no clock.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..constants import MAX_DRAFT_TOKENS
from .saved_numbers import numbers

_N = MAX_DRAFT_TOKENS + 1

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
_NOISE_FIRST = 0.05  # of one measurement
_NOISE_BOUNDS = (1e-4, 0.04)  # variance
_NOISE_RATE = 0.03  # weight of a new square in the variance of the noise

_DOUBT = 2.0  # standard deviations, from where on a measurement weighs less
_OUTLIER = 4.0  # standard deviations, from where on it needs others that agree
_AGREEING = 3
TYPICAL_COST = (1.0, 1.15, 1.3, 1.45, 1.6, 1.75, 1.9, 2.05, 2.2)


def _shape_covariance(i: int, j: int) -> float:
    """Prior covariance of log T(i) / T(0) and log T(j) / T(0)."""
    if not (i and j):
        return 0.0
    u, v = math.log2(1 + i), math.log2(1 + j)
    slope = 0.35**2 * u * v
    bend = 0.15**2 * math.exp(-((u - v) ** 2) / (2 * 0.8**2))
    steps = 0.05**2 * min(i, j)
    return slope + bend + steps + (0.02**2 if i == j else 0.0)


_SHAPE = [[_shape_covariance(i, j) for j in range(_N)] for i in range(_N)]
_DRIFT = [[_SCALE_DRIFT**2 + _SHAPE_DRIFT * s for s in row] for row in _SHAPE]


class CostModel:
    """Seconds per round for K = 0..8.

    Args:
        relative_cost: For K = 0..8, a round's time over that of K = 0 while nothing
            is known: 9 positive numbers.
    """

    def __init__(self, relative_cost: Sequence[float] = TYPICAL_COST) -> None:
        self._usual = [math.log(cost) for cost in relative_cost]
        self._mean = list(self._usual)
        self._covariance = [[_UNKNOWN_SCALE**2 + s for s in row] for row in _SHAPE]
        self._noise = _NOISE_FIRST**2
        self._outliers = [0] * _N  # in a row, by K; negative: shorter than thought
        self._num_measured = [0] * _N
        self._here: set[int] = set()
        self._num_plain = 0  # rounds of K = 0 since one of another K

    def usual_ratio(self, num_draft_tokens: int, other: int) -> float:
        """T(num_draft_tokens) / T(other) before anything was measured."""
        return math.exp(self._usual[num_draft_tokens] - self._usual[other])

    def has_measured_here(self, num_draft_tokens: int) -> bool:
        """Whether this process has learnt from a round of that K, not long ago."""
        return num_draft_tokens in self._here

    def resume(self, relative_cost: Sequence[float]) -> None:
        """Begin a process: what another one has learnt may be wrong by far.

        What was learnt while other matmuls ran must not come here. In simulation (MLX's
        on an M1 Max, then the kernel) the first 500 tokens took 9 to 25 % longer than
        from a new model, and 39 to 70 % longer where nobody told of the change.
        Who keeps what is learnt keeps it apart for each choice of matmuls.

        Args:
            relative_cost: What was thought before anything was measured. The shape may
                be that one after all: it is thought to be within 1.4 deviations.
        """
        self._usual = [math.log(cost) for cost in relative_cost]
        self._here.clear()
        self._widen(scale=_SCALE_START**2, shape=_RESUMED)
        self._doubt()

    def start(self) -> None:
        """Begin a request: its context length may have changed the scale."""
        self._widen(scale=_SCALE_START**2, shape=0.0)

    def observe(self, num_draft_tokens: int, seconds: float) -> None:
        """Learn from a round of K drafts; time not above 0, or infinite, is ignored."""
        k = num_draft_tokens
        if not 0 < seconds < math.inf:
            return
        surprise = math.log(seconds) - self._mean[k]
        variance = self._covariance[k][k] + self._noise
        if surprise * surprise > _OUTLIER**2 * variance:
            if not self._is_lasting(k, surprise):
                return
            self._widen(scale=_SCALE_JUMP**2, shape=_SHAPE_JUMP)
            variance = self._covariance[k][k] + self._noise
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
        return math.exp(self._mean[num_draft_tokens])

    def all_seconds(self) -> list[float]:
        """`seconds` of K = 0..8."""
        return [math.exp(mean) for mean in self._mean]

    def ratio_deviations(self, num_draft_tokens: int) -> list[float]:
        """Standard deviations of log T(0..8) / T(num_draft_tokens)."""
        base = self._covariance[num_draft_tokens]
        variance = base[num_draft_tokens]
        return [
            math.sqrt(max(row[k] + variance - 2 * base[k], 0.0))
            for k, row in enumerate(self._covariance)
        ]

    def to_dict(self) -> dict[str, Any]:
        """All that was learnt, in values that JSON has."""
        return {
            "mean": list(self._mean),
            # The lower triangle, row by row: the matrix is symmetric.
            "covariance": [
                c for i, row in enumerate(self._covariance) for c in row[: i + 1]
            ],
            "noise": self._noise,
            "measured": list(self._num_measured),
        }

    @classmethod
    def from_dict(cls, data: Any) -> CostModel:
        """The model that `to_dict` describes.

        Raises:
            ValueError: `data` is not what `to_dict` returns.
        """
        model = cls()
        model._mean = numbers(data, "mean", _N, low=-50, high=50)
        size = _N * (_N + 1) // 2
        triangle = numbers(data, "covariance", size, low=-1e6, high=1e6)
        rows = [triangle[i * (i + 1) // 2 : (i + 1) * (i + 2) // 2] for i in range(_N)]
        if not _is_positive_definite(rows):
            raise ValueError("covariance must be that of nine variables")
        model._covariance = [
            [rows[max(i, j)][min(i, j)] for j in range(_N)] for i in range(_N)
        ]
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
            [c + scale + shape * s for c, s in zip(row, prior, strict=True)]
            for row, prior in zip(self._covariance, _SHAPE, strict=True)
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
            m - self._mean[0] - usual
            for m, usual in zip(self._mean, self._usual, strict=True)
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
        row = self._covariance[k]
        square = min(surprise * surprise, 6 * variance) - row[k]
        noise = self._noise + _NOISE_RATE * (square - self._noise)
        low, high = _NOISE_BOUNDS
        self._noise = min(max(noise, low), high)
        gains = [c / (variance + doubt) for c in row]
        self._mean = [m + g * surprise for m, g in zip(self._mean, gains, strict=True)]
        self._covariance = [
            [c - gain * r + d for c, r, d in zip(old, row, drift, strict=True)]
            for old, drift, gain in zip(self._covariance, _DRIFT, gains, strict=True)
        ]


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
