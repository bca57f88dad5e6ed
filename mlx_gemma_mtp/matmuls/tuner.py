"""Which matrices the kernel multiplies, as this machine's time says.

Each shape is timed alone first, for 1 to 9 rows: MLX against the kernel with two
numbers R of columns, whose numbers are checked before. Then whole passes of the target
are timed, with all winners that it has against MLX alone. Shapes are dropped that
passes are faster without; where the rest still loses, forms are, then all. What only
the drafter has is judged alone. Ways to run layers come last, one after another: each
is kept that makes passes faster with all that was kept before.

Things are timed as windows.py says. Where windows of one thing lie too far apart, MLX
stays. What is chosen is not slower in the sense of judgement.py.

This file knows no clock, no MLX and no file: a machine is given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

from ..errors import described, is_of_others
from ..kernels.matmul import Form
from ..kernels.ways import LONG_WAYS, MATRIX_WAYS
from .choices import STOCK, Choice, Choices, Shape
from .judgement import (
    MARGIN,
    ROW_SHARES,
    Duel,
    candidate_columns,
    choose_first_row,
    drafter_first_row,
    gain,
    widest,
)
from .passes import DisturbedError, PassMachine, PassTimer
from .tuned import Tuned
from .windows import NUM_WINDOWS, WARM_UP_S, WINDOW_S, NoTimeError, Windows

PASS_ROWS = tuple(ROW_SHARES)  # rows of the whole passes that are timed
_USUAL_ROWS = (3, 5)  # what most passes have
# Alone, in this order: where the kernel loses it shows at once. Some in windows of a
# share of the usual length: registers may not suffice for any number of rows, but most
# often what is won follows the others.
_ROWS = {5: 1.0, 3: 1.0, 9: 1.0, 2: 1.0, 8: 0.5, 7: 0.5, 6: 0.5, 4: 0.5, 1: 1.0}
_CONTEXT_SHARE = 0.25  # of the budget, for whole passes
_LEAST_SHARE = 0.01  # of the bytes, for a shape that passes are timed without
_CHECK_S = 2.0  # making a matrix and checking numbers: assumed
_DUEL_S = 3 * NUM_WINDOWS * WINDOW_S


class Machine(PassMachine, Protocol):
    """What is timed on."""

    def clock(self) -> float:
        """Seconds since some moment."""

    def prepare(self, shape: Shape) -> None:
        """Make ready a matrix without the kernel; raises what MLX raises."""

    def is_right(self, shape: Shape, num_rows: int, columns: int) -> bool:
        """Whether the kernel's numbers are right; raises what MLX raises."""

    def is_right_way(self, way: str, forms: Iterable[Form]) -> bool:
        """Whether the kernels of a way are right; raises what MLX raises."""

    def product_s(
        self, shape: Shape, num_rows: int, columns: int | None, window_s: float
    ) -> float:
        """What a product takes, by products of about so many seconds.

        R is None for MLX's own; raises what MLX raises.
        """


def tune(
    shapes: Mapping[Shape, int],
    machine: Machine,
    *,
    in_passes: Mapping[Shape, int],
    budget_s: float,
    progress: Callable[[str], None],
    ways: Sequence[str] = (),
) -> Tuned:
    """Choose for every shape of a pair.

    Args:
        shapes: How many matrices of each known shape the pair has.
        machine: What is timed on.
        in_passes: How many of them the target has: its passes are timed.
        budget_s: Longest time, seconds; what does not fit stays MLX's, undecided.
        progress: Told what is done, a line each.
        ways: Ways to run layers that make a difference to the target.
    """
    return _Tuner(shapes, in_passes, machine, budget_s, progress, ways).tuned()


def expected_s(num_shapes: int, num_in_passes: int, num_ways: int = 0) -> float:
    """How long it takes about to tune so many shapes, seconds.

    Args:
        num_shapes: All of them.
        num_in_passes: Those that the target has.
        num_ways: Ways to run layers.
    """
    alone_s = _CHECK_S + WARM_UP_S + sum(_ROWS.values()) * _DUEL_S
    rows_s = 2 * NUM_WINDOWS * WINDOW_S
    without_s = WARM_UP_S + len(_USUAL_ROWS) * rows_s
    passes_s = WARM_UP_S + len(PASS_ROWS) * rows_s
    contexts_s = (1 + num_ways) * passes_s
    return num_shapes * alone_s + num_in_passes * without_s + contexts_s


class _UndecidedError(Exception):
    """Nothing is known of a shape; the message says why."""


class _StockError(Exception):
    """MLX multiplies a shape; the message says why."""


class _BadError(_StockError):
    """A kernel must not be used for a shape; the message says why."""


class _Tuner:
    """One tuning."""

    def __init__(
        self,
        shapes: Mapping[Shape, int],
        in_passes: Mapping[Shape, int],
        machine: Machine,
        budget_s: float,
        progress: Callable[[str], None],
        ways: Sequence[str],
    ) -> None:
        # Where time ends, the largest ones are done.
        self._shapes = sorted(shapes, key=lambda s: -shapes[s] * s.num_bytes)
        self._in_passes = in_passes
        self._machine = machine
        self._progress = progress
        self._candidates = ways
        self._bad_ways: dict[str, str] = {}
        self._windows = Windows(machine.clock, budget_s)
        self._windows.reserved_s = _CONTEXT_SHARE * budget_s  # for whole passes
        self._decided: dict[Shape, Choice | None] = {}
        self._bad: dict[Shape, str] = {}
        self._reasons: dict[Shape, str] = {}
        self._gains: dict[Shape, dict[int, float]] = {}
        self._passes: tuple[dict[int, float], dict[int, float]] = {}, {}
        self._timed = PassTimer(machine, self._windows)
        self._failure = ""

    def tuned(self) -> Tuned:
        """Do all of it."""
        try:
            winners = self._alone()
            self._windows.reserved_s = 0.0
            tried = {s: c for s, c in winners.items() if s in self._in_passes}
            kept = self._in_context(tried)
            ways = self._ways(kept)
        except DisturbedError as error:
            return Tuned(str(error), bad=self._bad)
        others = {s: c for s, c in winners.items() if s not in tried}
        decided = self._decided | others | kept
        found = decided, self._bad, self._reasons, self._gains
        return Tuned("", *found, *self._passes, ways, self._bad_ways)

    # ------------------------------------------------------------------- shapes alone

    def _alone(self) -> dict[Shape, Choice]:
        """Time every shape; the winners."""
        winners = {}
        for number, shape in enumerate(self._shapes, 1):
            self._progress(f"{shape}, {number} of {len(self._shapes)}")
            try:
                winners[shape] = self._choice(shape)
            except NoTimeError:
                self._reasons[shape] = "no time left"
            except _UndecidedError as error:
                self._reasons[shape] = f"not timed: {error}"
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
            _UndecidedError: There is no telling now.
        """
        self._timed.look()
        self._windows.need(_CHECK_S + WARM_UP_S + _DUEL_S)
        self._ready(shape)
        # Most rows first: those of the others must have the same bits.
        columns = {m: self._right_columns(shape, m) for m in sorted(_ROWS)[::-1]}
        self._windows.warm_up(partial(self._product_window, shape, 5, None))
        duels: dict[int, Duel] = {}
        best: dict[int, int] = {}
        for num_rows in _ROWS:
            best[num_rows], duel = self._duel(shape, num_rows, columns[num_rows])
            duels[num_rows] = duel
            ratio = duel.stock.seconds / duel.own.seconds
            self._gains.setdefault(shape, {})[num_rows] = ratio
            if num_rows > 1 and duel.loses:
                raise _StockError(f"not faster for {num_rows} rows ({ratio:.2f}x)")
        is_in_passes = shape in self._in_passes
        first_row = (choose_first_row if is_in_passes else drafter_first_row)(duels)
        if first_row > 1:  # plain rounds that are not filled stay as they are
            duels[1] = Duel(duels[1].stock, duels[1].stock)
        won = gain(duels)
        if won <= max(MARGIN, widest(duels)):
            raise _StockError(f"not faster by more than {MARGIN:.0%} ({won:.1%})")
        return Choice(first_row, tuple(best[m] for m in sorted(best)))

    def _ready(self, shape: Shape) -> None:
        """Make a shape's matrix.

        Raises:
            _UndecidedError: There is no memory for it, say: no fault of the kernel.
        """
        try:
            self._machine.prepare(shape)
        except Exception as error:
            raise _UndecidedError(described(error)) from error

    def _right_columns(self, shape: Shape, num_rows: int) -> list[int]:
        """The R with which the kernel runs and is right.

        Raises:
            _BadError: There is none, or one is wrong.
            _UndecidedError: It was not the kernel that failed.
        """
        found, failure = [], ""
        for columns in candidate_columns(num_rows):
            try:
                is_right = self._machine.is_right(shape, num_rows, columns)
            except Exception as error:
                failure = described(error)
                if is_of_others(error):
                    raise _UndecidedError(failure) from error
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
        sides = (None, *columns)
        windows = [partial(self._product_window, shape, num_rows, r) for r in sides]
        stock, *own = self._windows.compared(windows, _ROWS[num_rows])
        steady = [t for t in own if t.spread <= MARGIN]
        if stock.spread > MARGIN or not steady:
            raise _StockError(f"timings lie apart ({stock.spread:.0%})")
        fastest = min(steady, key=lambda t: t.seconds)
        if math.isinf(fastest.seconds):
            raise _BadError(self._failure)
        return columns[own.index(fastest)], Duel(stock, fastest)

    def _product_window(
        self, shape: Shape, num_rows: int, columns: int | None, window_s: float
    ) -> float:
        """Seconds of a product; infinite where the kernel fails.

        Raises:
            _UndecidedError: It was not the kernel that failed.
        """
        try:
            return self._machine.product_s(shape, num_rows, columns, window_s)
        except Exception as error:
            self._failure = described(error)
            if columns is None or is_of_others(error):
                raise _UndecidedError(self._failure) from error
            return math.inf

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
        except NoTimeError:
            if not won:
                reason = "no time left for whole passes"
                self._reasons.update(dict.fromkeys(winners, reason))
                return {}
        lost = dict.fromkeys(set(winners) - set(won))
        self._reasons.update(dict.fromkeys(lost, "not faster in whole passes"))
        return {**lost, **won}

    def _that_win(self, tried: dict[Shape, Choice]) -> Iterator[dict[Shape, Choice]]:
        """Choices that are faster than MLX alone, or none; later ones are better."""
        won, rows = self._that_beats_stock(tried)
        if self._timed.failure:
            tried = self._without_failing(tried)
            won, rows = self._that_beats_stock(tried)
        yield won
        for group_of in (str, lambda shape: str(shape.form)):
            tried = won or tried
            fewer = self._without_losers(tried, group_of, rows)
            if fewer != tried:
                tried = fewer
                won, rows = self._that_beats_stock(fewer)
                yield won

    def _without_failing(self, tried: dict[Shape, Choice]) -> dict[Shape, Choice]:
        """The choices without those that make a pass fail alone: these are bad."""
        left = dict(tried)
        for shape, choice in tried.items():
            self._timed.failure = ""
            alone = Choices({shape: choice})
            if any(self._timed.fails(alone, num_rows) for num_rows in PASS_ROWS):
                self._bad[shape] = self._timed.failure
                del left[shape]
        return left

    def _that_beats_stock(
        self, tried: dict[Shape, Choice]
    ) -> tuple[dict[Shape, Choice], list[int]]:
        """The choices, with passes of one row left to MLX where they lose; or none.

        And the number of rows that loses most, if one does.
        """
        duels = self._timed.duels(STOCK, Choices(tried), PASS_ROWS)
        if duels[1].loses:
            tried = {s: replace(c, first_row=2) for s, c in tried.items()}
            duels[1] = Duel(duels[1].stock, duels[1].stock)
        stock = {m: duel.stock.seconds for m, duel in duels.items()}
        own = _own(duels)
        lost = [m for m, duel in duels.items() if duel.loses]
        if lost or not gain(duels) > widest(duels):
            tried = {}
        self._passes = own if tried else stock, stock
        return tried, sorted(lost, key=lambda m: stock[m] / own[m])[:1]

    def _without_losers(
        self,
        tried: dict[Shape, Choice],
        group_of: Callable[[Shape], str],
        lost: Sequence[int],
    ) -> dict[Shape, Choice]:
        """The choices without the groups that passes are faster without.

        That is over usual rows, or with those that lost.
        """
        for group in dict.fromkeys(map(group_of, tried)):
            rest = {s: c for s, c in tried.items() if group_of(s) != group}
            if not rest:
                break
            # What has next to no share is not seen.
            if self._num_bytes(rest) > (1 - _LEAST_SHARE) * self._num_bytes(tried):
                continue
            self._progress(f"whole passes without {group}")
            rows = sorted({*_USUAL_ROWS, *lost})
            duels = self._timed.duels(Choices(tried), Choices(rest), rows)
            usual = {m: duels[m] for m in _USUAL_ROWS}
            compared = [usual, *({m: duels[m]} for m in lost)]
            if any(gain(each) > widest(each) for each in compared):
                tried = rest
        return tried

    def _num_bytes(self, shapes: Iterable[Shape]) -> float:
        """Bytes of all matrices of some shapes in a pass."""
        return float(sum(self._in_passes[s] * s.num_bytes for s in shapes))

    # ------------------------------------------------------------------------ layers

    def _ways(self, kept: Mapping[Shape, Choice | None]) -> dict[str, bool]:
        """Whether passes are faster with each way to run layers, one after another.

        What there is no time or no memory for is left out, and what others disturb too.
        What was found before stays.
        """
        choices = Choices({s: c for s, c in kept.items() if c is not None})
        found: dict[str, bool] = {}
        for way in self._candidates:
            if way in MATRIX_WAYS and not choices.by_shape:
                continue
            self._progress(f"whole passes, {way}")
            with_it = choices.with_way(way)
            try:
                if not self._is_right_way(way, choices.forms):
                    continue
                duels = self._timed.duels(
                    choices, with_it, PASS_ROWS, is_long=way in LONG_WAYS
                )
            except NoTimeError:
                break
            except Exception as error:  # noqa: BLE001 - MLX's own: memory ends, say
                self._progress(f"{way} was not timed: {described(error)}")
                continue
            is_lost = any(duel.loses for duel in duels.values())
            found[way] = not is_lost and gain(duels) > widest(duels)
            if found[way]:
                choices = with_it
                if way not in LONG_WAYS:
                    self._passes = _own(duels), self._passes[1]
        return found

    def _is_right_way(self, way: str, forms: Iterable[Form]) -> bool:
        """Whether the kernels of a way run and are right; else it is bad.

        Raises:
            Exception: It cannot be tried now.
        """
        try:
            reason = ""
            if not self._machine.is_right_way(way, forms):
                reason = "wrong numbers"
        except Exception as error:
            if is_of_others(error):
                raise
            reason = described(error)
        if reason:
            self._bad_ways[way] = reason
        return not reason


def _own(duels: Mapping[int, Duel]) -> dict[int, float]:
    """What passes took that won, seconds by rows."""
    return {m: duel.own.seconds for m, duel in duels.items()}
