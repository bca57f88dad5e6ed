"""Which sections there are, and the time each may take.

A section that raises is one that failed; the others run all the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property

import mlx.core as mx

from ..cli.tables import duration
from ..drafting.prior import Prior
from ..pair.load import load_pair
from ..pair.pair import Pair
from . import (
    busy,
    costs,
    exactness,
    kernels,
    machine,
    matmuls,
    model,
    slabs,
    tuning,
)
from .names import MACHINE, MODEL, SECTIONS
from .result import FAIL, SKIP, Result

# Parts of the time; what one section leaves over the later ones get.
_SHARES = {
    MACHINE: 0.0,
    MODEL: 4.0,
    "kernels": 3.0,
    "slabs": 2.0,
    "exactness": 3.0,
    "rows": 3.0,
    "costs": 2.0,
}
_TIMED = (MODEL, "slabs", "rows", "costs")  # of which the page tells times
_MAX_REASON = 200


@dataclass(frozen=True)
class Options:
    """What to look at.

    Attributes:
        names: Of the sections.
        seconds: For all of them together, roughly.
        family: Whose shapes random weights have; None for one that suits the machine.
        loaded: The user's pair; None without one.
    """

    names: Sequence[str]
    seconds: float
    family: str | None = None
    loaded: model.Loaded | None = None


# Given a line that says what runs: around what runs.
Running = Callable[[str], AbstractContextManager[None]]


def run(options: Options, running: Running) -> Iterator[Result]:
    """Run sections.

    Args:
        options: Which, and how.
        running: Around each.

    Yields:
        Each one's result as soon as it is there, in the order of ``SECTIONS``; the
        machine is always among them.
    """
    names = [n for n in SECTIONS if n in options.names or n == MACHINE]
    return _Run(options, running).results(names)


class _Run:
    """One run of the self-test."""

    def __init__(self, options: Options, running: Running) -> None:
        self._options = options
        self._running = running
        self._end = time.perf_counter() + options.seconds
        self._timed: list[matmuls.Timing] = []
        self._sections: dict[str, Callable[[float], Result]] = {
            MACHINE: machine.look,
            MODEL: self._model,
            "kernels": kernels.look,
            "slabs": self._slabs,
            "exactness": self._exactness,
            "rows": self._rows,
            "costs": self._costs,
        }

    def results(self, names: Sequence[str]) -> Iterator[Result]:
        """Run sections one after the other."""
        for i, name in enumerate(names):
            shares = sum(_SHARES[later] for later in names[i:]) or 1.0
            left = max(self._end - time.perf_counter(), 0.0)
            allowance_s = left * _SHARES[name] / shares
            most = f", up to about {duration(allowance_s)}" if allowance_s else ""
            with self._running(f"{name}{most} ..."):
                found = self._watched(name, allowance_s)
            yield found

    def _watched(self, name: str, allowance_s: float) -> Result:
        """One section, and whether others disturbed what it has timed."""
        if name not in _TIMED:
            return self._contained(name, allowance_s)
        before = busy.taken_share()
        result = self._contained(name, allowance_s)
        if result.status == SKIP:
            return result
        taken = max(before, busy.taken_share())
        return replace(result, caution=busy.caution(taken, result.spread))

    def _contained(self, name: str, allowance_s: float) -> Result:
        """One section, whatever happens in it."""
        start = time.perf_counter()
        try:
            result = self._sections[name](allowance_s)
        # Whatever it is, it is what the user runs this for.
        except Exception as error:  # noqa: BLE001
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            result = Result(name, FAIL, f"the section ended: {reason[:_MAX_REASON]}")
        mx.clear_cache()
        return replace(result, seconds=time.perf_counter() - start)

    def _slabs(self, allowance_s: float) -> Result:
        """Section ``slabs``: of the user's own model where it is given."""
        loaded = self._options.loaded
        return slabs.look(self._pair if loaded is None else loaded.pair, allowance_s)

    @cached_property
    def _pair(self) -> Pair:
        """The embedded pair."""
        return load_pair()

    @cached_property
    def _family(self) -> str:
        return self._options.family or matmuls.default_family()

    @property
    def _prior(self) -> Prior:
        """What the controller expects of the embedded pair here."""
        return self._pair.prior(1, 0)

    def _model(self, allowance_s: float) -> Result:
        assert self._options.loaded is not None  # the command asks for it
        return model.look(self._options.loaded, allowance_s)

    def _exactness(self, allowance_s: float) -> Result:
        return exactness.look(self._pair, self._family, allowance_s)

    def _rows(self, allowance_s: float) -> Result:
        result, self._timed = matmuls.look(self._family, allowance_s)
        lines, figures = tuning.what_runs_of(matmuls.known_shapes(self._family))
        return replace(
            result,
            lines=(*result.lines, *lines),
            figures={**result.figures, **figures},
        )

    def _costs(self, allowance_s: float) -> Result:
        return costs.look(self._pair, self._prior, self._timed, allowance_s)
