"""A training run on disk: everything that its next step depends on.

Written whole or not at all, so a killed run goes on from its last checkpoint, and a
resumed run equals an unbroken one. Knows arrays and numbers, nothing of what they mean.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from ...errors import OutputError
from ..recording.arrays import Arrays, read_arrays, write_arrays
from ..report.measured import Point


@dataclass(frozen=True)
class Progress:
    """How far a training run has come.

    Attributes:
        weights: The trained weights, float32, as a tree.
        optimizer: The optimizer's state, a tree.
        best: The weights that were best so far.
        step: Optimizer steps so far.
        seconds: Time of training so far, over all resumptions.
        best_length: Their acceptance length on held-out records.
        best_step: After which step they were measured.
        losses: Of the steps since the last measurement.
        history: What was measured on the way.
    """

    weights: dict[str, Any]
    optimizer: dict[str, Any]
    best: dict[str, Any]
    step: int = 0
    seconds: float = 0.0
    best_length: float = 0.0
    best_step: int = 0
    losses: list[float] = field(default_factory=list)
    history: list[Point] = field(default_factory=list)


_TREES = ("weights", "optimizer", "best")


def canonical(tree: Any) -> Any:
    """A tree as it would come back from a file: its order, and the arrays' layout.

    Sums over a tree follow its order, and products of matrices are rounded otherwise
    where these are laid out otherwise. Else a resumed run would part from an unbroken
    one, bit by bit.
    """
    leaves = cast(list[tuple[str, mx.array]], tree_flatten(tree))
    arrays = {name: mx.contiguous(array) for name, array in leaves}
    return tree_unflatten(_sorted_leaves(arrays))


def _sorted_leaves(arrays: Arrays, *, prefix: str = "") -> list[tuple[str, mx.array]]:
    """The leaves of one tree by name, without the prefix."""
    return sorted(
        (name.removeprefix(prefix), array)
        for name, array in arrays.items()
        if name.startswith(prefix)
    )


def write_snapshot(path: Path, progress: Progress) -> None:
    """Keep a run's progress in a file."""
    arrays: Arrays = {}
    for name in _TREES:
        leaves = tree_flatten(getattr(progress, name), prefix=f".{name}")
        arrays.update(cast(list[tuple[str, mx.array]], leaves))
    numbers = {
        "step": progress.step,
        "seconds": progress.seconds,
        "best_length": progress.best_length,
        "best_step": progress.best_step,
        "losses": progress.losses,
        "history": [asdict(point) for point in progress.history],
    }
    write_arrays(path, arrays, {"progress": json.dumps(numbers)})


def read_snapshot(path: Path) -> Progress | None:
    """A run's progress; None where none was kept.

    Raises:
        OutputError: The file is damaged, or another one.
    """
    if not path.exists():
        return None
    arrays, metadata = read_arrays(path)
    if "progress" not in metadata:
        raise OutputError(
            f"{path} must be a training run's: got another file of arrays. Remove it, "
            "then --resume."
        )
    numbers = json.loads(metadata["progress"])
    trees: dict[str, Any] = {
        tree: tree_unflatten(_sorted_leaves(arrays, prefix=f"{tree}."))
        for tree in _TREES
    }
    mx.eval(trees)
    return Progress(
        **trees,
        step=numbers["step"],
        seconds=numbers["seconds"],
        best_length=numbers["best_length"],
        best_step=numbers["best_step"],
        losses=numbers["losses"],
        history=[Point(**point) for point in numbers["history"]],
    )
