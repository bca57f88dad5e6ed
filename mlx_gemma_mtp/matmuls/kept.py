"""What was decided of matrices on this machine, kept from one process to the next.

A decision holds for one GPU, system, MLX, its settings, and one text of the kernels:
where any of them changes, everything is decided anew. This file knows nothing of how
decisions are made.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import platform
import threading
from collections.abc import Iterable, Mapping
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..kernels import add_norm, matmul_fused, norm_rope, route
from ..kernels.matmul import COLUMNS, FORMS, MAX_ROWS, MAX_SUMS, kernel
from ..kernels.ways import STOCK_WAYS, WAYS, Ways
from ..machine import mlx_settings, system_version
from ..store import Store
from .choices import Choice, Choices, Shape

# Another set of candidates, or another way to judge them, gets another number.
_CANDIDATES = 1
_SECTIONS = ("choices", "gains", "bad", "passes", "ways")
_MOST_PASSES = 16  # sets of shapes whose passes and ways are kept
_MAX_REASON = 200  # characters

_lock = threading.Lock()
# What this process knows where nothing is kept on disk, or nothing can be.
_known: dict[tuple[Path | None, str], dict[str, dict[str, Any]]] = {}


class Kept:
    """What was decided of matrices on this machine.

    Several threads and processes may keep something.

    Args:
        folder: Where it is kept; None for in this process alone.
    """

    def __init__(self, folder: Path | None) -> None:
        key = kept_key()
        self._store = Store(key, folder)
        self._place = folder, json.dumps(key, sort_keys=True)
        with _lock:
            self._found = self._read()

    def choices(self, shapes: Iterable[Shape]) -> Choices:
        """The choices for those of some shapes that have one; MLX has the others."""
        found: dict[Shape, Choice] = {}
        for shape in shapes:
            if not self.is_bad(shape):
                try:
                    found[shape] = Choice.from_dict(self._found["choices"][str(shape)])
                except (KeyError, ValueError):  # none, or MLX's, or damage
                    continue
        return Choices(found)

    def ways(self, structure: str) -> Ways:
        """The ways that were faster for pairs of a structure, without bad ones."""
        found = self._found["ways"].get(structure)
        if not isinstance(found, dict):
            return STOCK_WAYS
        return frozenset(
            way for way in WAYS if found.get(way) is True and not self.is_bad_way(way)
        )

    def keep_ways(self, structure: str, ways: Mapping[str, bool]) -> None:
        """Keep whether the layers of pairs of a structure are faster so."""
        known = self._found["ways"].get(structure)
        found = {**(known if isinstance(known, dict) else {}), **ways}
        self._change("ways", {structure: found})

    def mark_bad_way(self, way: str, reason: str) -> None:
        """No layer runs so from now on: a kernel failed, or was wrong."""
        self._change("bad", {way: reason[:_MAX_REASON]})

    def is_bad_way(self, way: str) -> bool:
        """Whether a kernel of a way failed, or was wrong."""
        return way in self._found["bad"]

    def is_decided(self, shape: Shape) -> bool:
        """Whether it is known what multiplies a shape, be it MLX."""
        found, name = self._found["choices"], str(shape)
        is_stock = name in found and found[name] is None
        return is_stock or self.is_bad(shape) or bool(self.choices([shape]))

    def keep(
        self,
        shape: Shape,
        choice: Choice | None,
        gains: Mapping[int, float] | None = None,
    ) -> None:
        """Keep what multiplies a shape.

        Args:
            shape: The shape.
            choice: The kernel's; None for MLX.
            gains: MLX's time over the kernel's, by rows, where it was measured.
        """
        value = None if choice is None else choice.to_dict()
        self._change("choices", {str(shape): value})
        self._change("gains", {str(shape): _named(gains or {})})

    def gains(self, shape: Shape) -> dict[int, float]:
        """MLX's time over the kernel's, by rows; empty where nobody measured it."""
        return _by_rows(self._found["gains"].get(str(shape)))

    def mark_bad(self, shapes: Iterable[Shape], reason: str) -> None:
        """MLX multiplies these from now on: a kernel failed, or was wrong."""
        self._change("bad", {str(shape): reason[:_MAX_REASON] for shape in shapes})

    def is_bad(self, shape: Shape) -> bool:
        """Whether a kernel failed for a shape, or was wrong."""
        return str(shape) in self._found["bad"]

    def pass_seconds(self, shapes: set[Shape]) -> dict[int, float] | None:
        """What a pass of a target takes that has exactly these shapes, seconds.

        Returns:
            Seconds by the number of rows, 1 to 9; None where it was not measured with
            the choices that hold now.
        """
        return _by_rows(self._found["passes"].get(self._name_of(shapes))) or None

    def keep_passes(self, shapes: set[Shape], seconds: Mapping[int, float]) -> None:
        """Keep what a pass with the present choices takes, see ``pass_seconds``."""
        self._change("passes", {self._name_of(shapes): _named(seconds)})

    def _name_of(self, shapes: set[Shape]) -> str:
        """What a set of shapes is called, with what multiplies each."""
        names = [*sorted(map(str, shapes)), self.choices(shapes).digest]
        return hashlib.sha256("\n".join(names).encode()).hexdigest()[:24]

    def _change(self, section: str, values: Mapping[str, Any]) -> None:
        """Write some values, beside what others have written meanwhile."""
        with _lock, self._store.locked():
            found = self._read()
            for name, value in values.items():
                found[section].pop(name, None)
                found[section][name] = value
            for by_pair in (found["passes"], found["ways"]):
                for name in list(by_pair)[:-_MOST_PASSES]:
                    del by_pair[name]
            self._found = _known[self._place] = found
            self._store.write(found)

    def _read(self) -> dict[str, dict[str, Any]]:
        """What is on disk; what this process knows where nothing is."""
        found = self._store.read() or _known.get(self._place, {})
        sections = {name: found.get(name) for name in _SECTIONS}
        return {
            name: dict(section) if isinstance(section, dict) else {}
            for name, section in sections.items()
        }


def kept_key() -> dict[str, Any]:
    """What must be equal for a decision to hold, JSON values.

    MLX does not tell how many cores a GPU has; its name and the memory's size stand
    for them.
    """
    info = mx.device_info()
    names = ("architecture", "device_name", "memory_size")
    return {
        "matmuls": _CANDIDATES,
        "kernels": kernels_digest(),
        "gpu": [str(info.get(name, "")) for name in names],
        "system": [system_version(), platform.release()],
        "mlx": importlib.metadata.version("mlx"),
        "settings": mlx_settings(),
    }


@cache
def kernels_digest() -> str:
    """A text that differs for kernels of other texts."""
    found = hashlib.sha256()
    texts = [*add_norm.kernels(), *norm_rope.kernels(), route.KERNEL]
    for form, num_rows in product(FORMS, range(1, MAX_ROWS + 1)):
        texts += [
            kernel(form, num_rows, columns)
            for columns in COLUMNS
            if num_rows * columns <= MAX_SUMS
        ]
        texts += matmul_fused.kernels(form, num_rows)
    for text in texts:
        found.update(f"{text.header}{text.source}".encode())
    return found.hexdigest()


def _named(by_rows: Mapping[int, float]) -> dict[str, float]:
    """Numbers by rows, as JSON takes them."""
    return {str(num_rows): float(number) for num_rows, number in by_rows.items()}


def _by_rows(found: object) -> dict[int, float]:
    """What ``_named`` gave; empty where it gave something else."""
    if not isinstance(found, dict):
        return {}
    for name, number in found.items():
        is_number = isinstance(number, float) and math.isfinite(number) and number > 0
        if not (name.isdecimal() and is_number):
            return {}
    return {int(name): number for name, number in found.items()}
