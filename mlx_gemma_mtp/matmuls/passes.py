"""Whole passes of a target, timed with some choices against others.

This file knows no clock and no MLX: a machine is given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Protocol

from ..errors import described, is_of_others
from .choices import Choices
from .judgement import Duel
from .windows import NUM_WINDOWS, WARM_UP_S, WINDOW_S, Window, Windows

_CAUTION = 1.2  # passes may slow down while they are timed


class PassMachine(Protocol):
    """What passes run on."""

    def disturbed(self) -> str:
        """Why timings are not to be relied on now, in words; empty where they are."""

    def pass_s(
        self, choices: Choices, num_rows: int, window_s: float, *, is_long: bool
    ) -> float:
        """What a pass of the target takes, by passes of so many seconds, or one.

        It is over a short text, or over a long one.
        """


class DisturbedError(Exception):
    """Timings are not to be relied on; the message says why."""


class PassTimer:
    """Times passes on a machine.

    Args:
        machine: The machine.
        windows: In which they are timed.

    Attributes:
        failure: Why a pass failed last; empty where none did.
    """

    def __init__(self, machine: PassMachine, windows: Windows) -> None:
        self.failure = ""
        self._machine = machine
        self._windows = windows
        self._last_s = 0.0

    def duels(
        self,
        before: Choices,
        after: Choices,
        rows: Sequence[int],
        *,
        is_long: bool = False,
    ) -> dict[int, Duel]:
        """Passes with some choices against those with others, by rows.

        Raises:
            DisturbedError: Timings are not to be relied on.
            NoTimeError: There is no time for it.
        """
        self.look()
        sides = [before, after]
        runs: dict[int, list[Window]] = {
            m: [
                partial(self._window, choices, m, is_long=is_long)
                for choices in _different(sides, m)
            ]
            for m in rows
        }
        needed_s = WARM_UP_S
        for num_rows in rows:
            for run in runs[num_rows]:
                self._windows.need(2 * self._last_s)
                run(0.0)  # traced and compiled
                pass_s = run(0.0)
                if math.isfinite(pass_s):
                    self._last_s = pass_s
                    needed_s += NUM_WINDOWS * max(WINDOW_S, _CAUTION * pass_s)
        self._windows.need(needed_s)
        self._windows.warm_up(runs[rows[0]][0])
        duels = {}
        for m in rows:
            stock, *own = self._windows.compared(runs[m])
            duels[m] = Duel(stock, *(own or [stock]))
        return duels

    def fails(self, choices: Choices, num_rows: int) -> bool:
        """Whether a pass fails; ``failure`` then says why."""
        self._windows.need(2 * self._last_s)
        return math.isinf(self._window(choices, num_rows, 0.0))

    def look(self) -> None:
        """Stop where timings are not to be relied on.

        Raises:
            DisturbedError: They are not.
        """
        if reason := self._machine.disturbed():
            raise DisturbedError(reason)

    def _window(
        self,
        choices: Choices,
        num_rows: int,
        window_s: float,
        *,
        is_long: bool = False,
    ) -> float:
        """Seconds of a pass; infinite where it fails with a kernel in it.

        Raises:
            DisturbedError: It was not the kernel that failed.
        """
        try:
            return self._machine.pass_s(choices, num_rows, window_s, is_long=is_long)
        except Exception as error:
            if not choices:
                raise
            if is_of_others(error):
                raise DisturbedError(described(error)) from error
            self.failure = described(error)
            return math.inf


def _different(sides: Sequence[Choices], num_rows: int) -> list[Choices]:
    """Both choices, or the first where they do the same with so many rows."""
    first, second = (
        {s: c.columns[num_rows - 1] for s, c in x.by_shape.items() if c.takes(num_rows)}
        for x in sides
    )
    is_same = first == second and sides[0].ways == sides[1].ways
    return [sides[0]] if is_same else list(sides)
