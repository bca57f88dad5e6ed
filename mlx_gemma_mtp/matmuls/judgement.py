"""When the kernel is faster than MLX: from timings to choices.

What is chosen is not slower, in this sense: for every number of rows that the kernel
takes, 1 to 9, what it lost and the spread together are at most 3 %; and over the rounds
to expect, ``ROW_SHARES``, it gained more than the spread (alone: and more than 3 %).
The spread is how far timings of the same thing lie apart.

Plain decoding is in it. A plain round has one row. Exact decoding fills it up to two as
long as MLX rounds one row differently, whatever is chosen here: it then takes the time
of two. So there are two questions. Does the kernel, from two rows on, lose nothing to
MLX, with two rows among them? Then ``first_row`` may be 2, and unfilled plain rounds
stay MLX's own. Does it also lose nothing with one row, or less than it saves where
filling ends with it (then all rows have one arithmetic), half of the plain rounds
taken to be filled, and never more than the 3 %? Then ``first_row`` is 1.

A matrix that only a drafter has is in no plain round: most of its steps have one row,
whatever is filled. There ``first_row`` is 1 only where one row gained more than the
spread and 3 %.

This file knows nothing of how things are timed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from ..kernels.matmul import default_columns

# Rounds to expect by their rows, shares of 1: assumed. Those of one row are plain and
# unfilled; of two plain and filled, or of one draft; others have two drafts or more.
ROW_SHARES = {
    **{1: 0.1, 2: 0.1, 3: 0.25, 4: 0.1, 5: 0.25},
    **{6: 0.05, 7: 0.05, 8: 0.05, 9: 0.05},
}
FILLED_SHARE = 0.5  # of plain rounds, where filling may end: assumed
MARGIN = 0.03


def candidate_columns(num_rows: int) -> tuple[int, int]:
    """The R that are timed for M rows: the default, and another."""
    default = default_columns(num_rows)
    return default, 3 if default == 2 else 2


@dataclass(frozen=True)
class Timing:
    """What several windows of one thing have taken.

    Attributes:
        seconds: The median; infinite where it failed.
        spread: How far the windows lie apart, over the median.
    """

    seconds: float
    spread: float

    @classmethod
    def of(cls, windows: Sequence[float]) -> Timing:
        """The timing of some windows."""
        middle = median(windows)
        if math.isinf(max(windows)):
            return cls(math.inf, 0.0)
        return cls(middle, (max(windows) - min(windows)) / middle)


@dataclass(frozen=True)
class Duel:
    """Two timings of as many rows.

    Attributes:
        stock: What there is, MLX's mostly.
        own: What may take its place.
    """

    stock: Timing
    own: Timing

    @property
    def spread(self) -> float:
        """The larger one's."""
        return max(self.stock.spread, self.own.spread)

    @property
    def loses(self) -> bool:
        """Whether it may be slower by more than the margin."""
        loss = self.own.seconds / self.stock.seconds - 1
        return not loss + self.spread <= MARGIN


def gain(duels: Mapping[int, Duel]) -> float:
    """The share of time that is won over the rounds to expect, by rows."""
    stock = sum(ROW_SHARES[m] * duel.stock.seconds for m, duel in duels.items())
    own = sum(ROW_SHARES[m] * duel.own.seconds for m, duel in duels.items())
    return 1 - own / stock


def widest(duels: Mapping[int, Duel]) -> float:
    """The largest spread."""
    return max(duel.spread for duel in duels.values())


def choose_first_row(duels: Mapping[int, Duel]) -> int:
    """The fewest rows that the kernel is to multiply, see above."""
    one, two = duels[1], duels[2]
    unfilled = (1 - FILLED_SHARE) * one.stock.seconds
    plain_s = unfilled + FILLED_SHARE * two.own.seconds
    return 1 if not one.loses and one.own.seconds <= plain_s else 2


def drafter_first_row(duels: Mapping[int, Duel]) -> int:
    """The same for a matrix that only a drafter has."""
    one = {1: duels[1]}
    return 1 if gain(one) > max(MARGIN, widest(one)) else 2
