"""Which sections there are, and the time each may take.

A section that raises is one that failed; the others run all the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import mlx.core as mx

from ..control import Prior
from ..load import load_pair
from ..pair import Pair
from . import costs, exactness, kernels, machine, matmuls, model, slabs
from .names import MACHINE, MODEL, SECTIONS
from .result import FAIL, Result

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


def run(options: Options, note: Callable[[str], None]) -> list[Result]:
    """Run sections.

    Args:
        options: Which, and how.
        note: Called with a line before each.

    Returns:
        Their results, in the order of ``SECTIONS``; the machine is always among them.
    """
    names = [n for n in SECTIONS if n in options.names or n == MACHINE]
    return _Run(options, note).results(names)


class _Run:
    """One run of the self-test."""

    def __init__(self, options: Options, note: Callable[[str], None]) -> None:
        self._options = options
        self._note = note
        self._end = time.perf_counter() + options.seconds
        self._timed: list[matmuls.Timing] = []
        self._sections: dict[str, Callable[[float], Result]] = {
            MACHINE: machine.look,
            MODEL: self._model,
            "kernels": kernels.look,
            "slabs": lambda allowance_s: slabs.look(self._pair, allowance_s),
            "exactness": self._exactness,
            "rows": self._rows,
            "costs": self._costs,
        }

    def results(self, names: Sequence[str]) -> list[Result]:
        """Run sections one after the other."""
        found = []
        for i, name in enumerate(names):
            shares = sum(_SHARES[later] for later in names[i:]) or 1.0
            left = max(self._end - time.perf_counter(), 0.0)
            found.append(self._contained(name, left * _SHARES[name] / shares))
        return found

    def _contained(self, name: str, allowance_s: float) -> Result:
        """One section, whatever happens in it."""
        self._note(f"{name}, up to about {allowance_s:.0f} s ...")
        start = time.perf_counter()
        try:
            result = self._sections[name](allowance_s)
        # Whatever it is, it is what the user runs this for.
        except Exception as error:  # noqa: BLE001
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            result = Result(name, FAIL, f"the section ended: {reason[:_MAX_REASON]}")
        mx.clear_cache()
        return replace(result, seconds=time.perf_counter() - start)

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
        return result

    def _costs(self, allowance_s: float) -> Result:
        return costs.look(self._pair, self._prior, self._timed, allowance_s)
