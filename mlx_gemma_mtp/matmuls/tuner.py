"""Which matrices the kernel multiplies, as this machine's time says.

Each shape is timed alone first, for some numbers of rows: MLX against the kernel with
two numbers R of columns. Then whole passes of the target are timed, with all winners
against MLX alone. Shapes are dropped that passes are faster without; where the rest
still loses, forms are, then all.

The rules of timing: a candidate's numbers are checked before it is timed. The machine
is warmed up by the clock. Candidates take turns in windows, A B B A and so on, so that
a clock that falls slows all alike; the median of five windows counts. The spread is how
far the windows of one candidate lie apart: where it is above 3 %, all is timed once
more, and then MLX stays.

What is chosen is not slower in the sense of judgement.py, alone and in whole passes.

This file knows no clock, no MLX and no file: a machine is given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

from ..errors import described
from .choices import Choice, Choices, Shape
from .judgement import (
    MARGIN,
    ROW_SHARES,
    Duel,
    Timing,
    candidate_columns,
    choose_first_row,
    filled_in,
    gain,
    widest,
)

PASS_ROWS = tuple(ROW_SHARES)  # rows of the whole passes that are timed
_USUAL_ROWS = (3, 5)  # what most passes have
# Alone, in this order: where the kernel loses it shows at once.
_ROWS = (5, 3, 9, 2, 1)
WINDOW_S = 0.4
NUM_WINDOWS = 5
WARM_UP_S = 1.0
_CONTEXT_SHARE = 0.35  # of the budget, for whole passes
_LEAST_SHARE = 0.01  # of the bytes, for a shape that passes are timed without
_CAUTION = 1.2  # passes may slow down while they are timed
_CHECK_S = 2.0  # making a matrix and checking numbers: assumed
_DUEL_S = 3 * NUM_WINDOWS * WINDOW_S


class Machine(Protocol):
    """What is timed on."""

    def clock(self) -> float:
        """Seconds since some moment."""

    def disturbed(self) -> str:
        """Why timings are not to be relied on now, in words; empty where they are."""

    def is_right(self, shape: Shape, num_rows: int, columns: int) -> bool:
        """Whether the kernel's numbers are right; raises what MLX raises."""

    def product_s(
        self, shape: Shape, num_rows: int, columns: int | None, window_s: float
    ) -> float:
        """What a product takes, by products of about so many seconds.

        R is None for MLX's own; raises what MLX raises.
        """

    def pass_s(self, choices: Choices, num_rows: int, window_s: float) -> float:
        """What a pass of the target takes, by passes of so many seconds, or one."""


@dataclass(frozen=True)
class Tuned:
    """What was found.

    Attributes:
        reason: Why nothing was decided, in words; empty where something was.
        decided: The choice for every shape that was decided; None for MLX.
        bad: Why a kernel must not be used for a shape, by shape.
        reasons: Why MLX multiplies a shape, by shape, also where that is undecided.
        gains: MLX's time over the kernel's, by shape and rows, where timed alone.
        passes: What a pass takes with what was decided, seconds by rows; empty where
            none was timed.
        stock_passes: The same with MLX alone.
    """

    reason: str = ""
    decided: Mapping[Shape, Choice | None] = field(default_factory=dict)
    bad: Mapping[Shape, str] = field(default_factory=dict)
    reasons: Mapping[Shape, str] = field(default_factory=dict)
    gains: Mapping[Shape, Mapping[int, float]] = field(default_factory=dict)
    passes: Mapping[int, float] = field(default_factory=dict)
    stock_passes: Mapping[int, float] = field(default_factory=dict)

    @property
    def choices(self) -> Choices:
        """The kernel's matrices."""
        return Choices({s: c for s, c in self.decided.items() if c is not None})


def tune(
    shapes: Mapping[Shape, int],
    machine: Machine,
    *,
    budget_s: float,
    progress: Callable[[str], None],
) -> Tuned:
    """Choose for every shape of a pair.

    Args:
        shapes: How many matrices of each known shape the pair has.
        machine: What is timed on.
        budget_s: Longest time, seconds; what does not fit stays MLX's, undecided.
        progress: Told what is done, a line each.
    """
    return _Tuner(shapes, machine, budget_s, progress).tuned()


def expected_s(num_shapes: int) -> float:
    """How long it takes about to tune so many shapes, seconds."""
    alone_s = _CHECK_S + WARM_UP_S + len(_ROWS) * _DUEL_S
    rows_s = 2 * NUM_WINDOWS * WINDOW_S
    without_s = WARM_UP_S + len(_USUAL_ROWS) * rows_s
    passes_s = WARM_UP_S + len(PASS_ROWS) * rows_s
    return num_shapes * (alone_s + without_s) + passes_s


class _DisturbedError(Exception):
    """Timings are not to be relied on; the message says why."""


class _NoTimeError(Exception):
    """What comes next does not fit into the budget."""


class _StockError(Exception):
    """MLX multiplies a shape; the message says why."""


class _BadError(_StockError):
    """A kernel must not be used for a shape; the message says why."""


class _Tuner:
    """One tuning."""

    def __init__(
        self,
        shapes: Mapping[Shape, int],
        machine: Machine,
        budget_s: float,
        progress: Callable[[str], None],
    ) -> None:
        self._counts = shapes
        # Where time ends, the largest ones are done.
        self._shapes = sorted(shapes, key=lambda s: -self._num_bytes([s]))
        self._machine = machine
        self._progress = progress
        self._start = machine.clock()
        self._budget_s = budget_s
        self._reserved_s = _CONTEXT_SHARE * budget_s  # for whole passes
        self._decided: dict[Shape, Choice | None] = {}
        self._bad: dict[Shape, str] = {}
        self._reasons: dict[Shape, str] = {}
        self._gains: dict[Shape, dict[int, float]] = {}
        self._passes: tuple[dict[int, float], dict[int, float]] = {}, {}
        self._last_s = 0.0  # of a pass
        self._failure = ""

    def tuned(self) -> Tuned:
        """Do all of it."""
        try:
            winners = self._alone()
            self._reserved_s = 0.0
            self._failure = ""
            kept = self._in_context(winners)
        except _DisturbedError as error:
            return Tuned(str(error), bad=self._bad)
        decided = self._decided | kept
        found = decided, self._bad, self._reasons, self._gains
        return Tuned("", *found, *self._passes)

    # ------------------------------------------------------------------- shapes alone

    def _alone(self) -> dict[Shape, Choice]:
        """Time every shape; the winners."""
        winners = {}
        for number, shape in enumerate(self._shapes, 1):
            self._progress(f"{shape}, {number} of {len(self._shapes)}")
            try:
                winners[shape] = self._choice(shape)
            except _NoTimeError:
                self._reasons[shape] = "no time left"
            except _StockError as error:
                self._decided[shape] = None
                self._reasons[shape] = str(error)
                if isinstance(error, _BadError):
                    self._bad[shape] = str(error)
        return winners

    def _choice(self, shape: Shape) -> Choice:
        """The kernel's choice for a shape.

        Raises:
            _StockError: MLX multiplies it.
        """
        self._look()
        self._need(_CHECK_S + WARM_UP_S + _DUEL_S)
        columns = {m: self._right_columns(shape, m) for m in _ROWS}
        self._warm_up(partial(self._machine.product_s, shape, _ROWS[0], None))
        duels: dict[int, Duel] = {}
        best: dict[int, int] = {}
        for num_rows in _ROWS:
            best[num_rows], duel = self._duel(shape, num_rows, columns[num_rows])
            duels[num_rows] = duel
            ratio = duel.stock.seconds / duel.own.seconds
            self._gains.setdefault(shape, {})[num_rows] = ratio
            if num_rows > 1 and duel.loses:
                raise _StockError(f"not faster for {num_rows} rows ({ratio:.2f}x)")
        first_row = choose_first_row(duels)
        if first_row > 1:  # plain rounds that are not filled stay as they are
            duels[1] = Duel(duels[1].stock, duels[1].stock)
        won = gain(duels)
        if won <= max(MARGIN, widest(duels)):
            raise _StockError(f"not faster by more than {MARGIN:.0%} ({won:.1%})")
        return Choice(first_row, filled_in(best))

    def _right_columns(self, shape: Shape, num_rows: int) -> list[int]:
        """The R with which the kernel runs and is right.

        Raises:
            _BadError: There is none, or one is wrong.
        """
        found, failure = [], ""
        for columns in candidate_columns(num_rows):
            try:
                is_right = self._machine.is_right(shape, num_rows, columns)
            except Exception as error:  # noqa: BLE001 - whatever Metal says
                failure = described(error)
                continue
            if not is_right:
                raise _BadError(f"wrong numbers for {num_rows} rows")
            found.append(columns)
        if not found:
            raise _BadError(failure)
        return found

    def _duel(
        self, shape: Shape, num_rows: int, columns: Sequence[int]
    ) -> tuple[int, Duel]:
        """The best R for so many rows, against MLX."""

        def window(own: int | None) -> float:
            if own is None:
                return self._machine.product_s(shape, num_rows, None, WINDOW_S)
            try:
                return self._machine.product_s(shape, num_rows, own, WINDOW_S)
            except Exception as error:  # noqa: BLE001 - whatever Metal says
                self._failure = described(error)
                return math.inf

        stock, *own = self._compared([partial(window, r) for r in (None, *columns)])
        steady = [t for t in own if t.spread <= MARGIN]
        if stock.spread > MARGIN or not steady:
            raise _StockError(f"timings lie apart ({stock.spread:.0%})")
        fastest = min(steady, key=lambda t: t.seconds)
        if math.isinf(fastest.seconds):
            raise _BadError(self._failure)
        return columns[own.index(fastest)], Duel(stock, fastest)

    # ------------------------------------------------------------------- whole passes

    def _in_context(self, winners: dict[Shape, Choice]) -> dict[Shape, Choice | None]:
        """Drop what does not win in whole passes; the choices for the winners.

        They are left out where no time is left for it.
        """
        self._progress("whole passes")
        won: dict[Shape, Choice] = {}
        try:
            for better in self._that_win(winners):
                won = better
        except _NoTimeError:
            if not won:
                reason = "no time left for whole passes"
                self._reasons.update(dict.fromkeys(winners, reason))
                return {}
        lost = dict.fromkeys(set(winners) - set(won))
        self._reasons.update(dict.fromkeys(lost, "not faster in whole passes"))
        return {**lost, **won}

    def _that_win(self, tried: dict[Shape, Choice]) -> Iterator[dict[Shape, Choice]]:
        """Choices that are faster than MLX alone, or none; later ones are better."""
        won = self._that_beats_stock(tried)
        yield won
        for group_of in (str, lambda shape: str(shape.form)):
            tried = won or tried
            fewer = self._without_losers(tried, group_of)
            if fewer != tried:
                tried, won = fewer, self._that_beats_stock(fewer)
                yield won
            if won:
                return
        if self._failure:
            self._mark_bad(tried)

    def _that_beats_stock(self, tried: dict[Shape, Choice]) -> dict[Shape, Choice]:
        """The choices, with passes of one row left to MLX where they lose; or none."""
        duels = self._pass_duels({}, tried, PASS_ROWS)
        if duels[1].loses:
            tried = {s: replace(c, first_row=2) for s, c in tried.items()}
            duels[1] = Duel(duels[1].stock, duels[1].stock)
        is_faster = gain(duels) > widest(duels)
        if not is_faster or any(duel.loses for duel in duels.values()):
            tried = {}
        stock = {m: duel.stock.seconds for m, duel in duels.items()}
        own = {m: duel.own.seconds for m, duel in duels.items()}
        self._passes = own if tried else stock, stock
        return tried

    def _without_losers(
        self, tried: dict[Shape, Choice], group_of: Callable[[Shape], str]
    ) -> dict[Shape, Choice]:
        """The choices without the groups that passes are faster without."""
        for group in dict.fromkeys(map(group_of, tried)):
            rest = {s: c for s, c in tried.items() if group_of(s) != group}
            if not rest:
                break
            # What has next to no share is not seen, if it does not raise.
            share = 1 - self._num_bytes(rest) / self._num_bytes(tried)
            if share < _LEAST_SHARE and not self._failure:
                continue
            self._progress(f"whole passes without {group}")
            duels = self._pass_duels(tried, rest, _USUAL_ROWS)
            if not gain(duels) > widest(duels):
                continue
            if math.isinf(duels[_USUAL_ROWS[0]].stock.seconds):
                self._mark_bad(set(tried) - set(rest))
            tried = rest
        return tried

    def _num_bytes(self, shapes: Iterable[Shape]) -> float:
        """Bytes of all matrices of some shapes."""
        return float(sum(self._counts[s] * s.num_bytes for s in shapes))

    def _mark_bad(self, shapes: Iterable[Shape]) -> None:
        """Note that a pass with the kernel for these failed."""
        self._bad.update(dict.fromkeys(shapes, self._failure))
        self._failure = ""

    def _pass_duels(
        self,
        before: dict[Shape, Choice],
        after: dict[Shape, Choice],
        rows: Sequence[int],
    ) -> dict[int, Duel]:
        """Whole passes with some choices against those with others, by rows."""
        self._look()
        sides = [Choices(before), Choices(after)]
        runs = {
            m: [partial(self._pass_window, c, m) for c in _different(sides, m)]
            for m in rows
        }
        needed_s = WARM_UP_S
        for num_rows in rows:
            for run in runs[num_rows]:
                self._need(2 * self._last_s)
                run(0.0)  # traced and compiled
                pass_s = run(0.0)
                if math.isfinite(pass_s):
                    self._last_s = pass_s
                    needed_s += NUM_WINDOWS * max(WINDOW_S, _CAUTION * pass_s)
        self._need(needed_s)
        self._warm_up(runs[rows[0]][0])
        duels = {}
        for m in rows:
            stock, *own = self._compared([partial(run, WINDOW_S) for run in runs[m]])
            duels[m] = Duel(stock, *(own or [stock]))
        return duels

    def _pass_window(self, choices: Choices, num_rows: int, window_s: float) -> float:
        """Seconds of a pass; infinite where it fails with the kernel in it."""
        try:
            return self._machine.pass_s(choices, num_rows, window_s)
        except Exception as error:
            if not choices:
                raise
            self._failure = described(error)
            return math.inf

    # --------------------------------------------------------------------------- time

    def _compared(self, windows: Sequence[Callable[[], float]]) -> list[Timing]:
        """Time things in turn, once more where windows of one lie too far apart."""
        for is_last in (False, True):
            start = self._machine.clock()
            taken: list[list[float]] = [[] for _ in windows]
            for turn in range(NUM_WINDOWS):
                for i in range(len(windows))[:: -1 if turn % 2 else 1]:
                    self._need(0.0)
                    taken[i].append(windows[i]())
            timings = [Timing.of(each) for each in taken]
            if is_last or all(timing.spread <= MARGIN for timing in timings):
                break
            self._need(self._machine.clock() - start)
        return timings

    def _warm_up(self, run: Callable[[float], float]) -> None:
        """Work until the clocks are up."""
        end = self._machine.clock() + WARM_UP_S
        while self._machine.clock() < end and run(WINDOW_S) < math.inf:
            pass

    def _need(self, seconds: float) -> None:
        """Stop where so much more time is not there.

        Raises:
            _NoTimeError: It is not.
        """
        left = self._budget_s - self._reserved_s
        if self._machine.clock() - self._start + seconds > left:
            raise _NoTimeError

    def _look(self) -> None:
        """Stop where timings are not to be relied on.

        Raises:
            _DisturbedError: They are not.
        """
        if reason := self._machine.disturbed():
            raise _DisturbedError(reason)


def _different(sides: Sequence[Choices], num_rows: int) -> list[Choices]:
    """Both choices, or the first where they do the same with so many rows."""
    first, second = (
        {s: c.columns[num_rows - 1] for s, c in x.by_shape.items() if c.takes(num_rows)}
        for x in sides
    )
    return list(sides) if first != second else [sides[0]]
