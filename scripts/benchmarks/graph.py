"""How much graph an engine hands to MLX: nodes, kernel launches, evaluations.

In a counting run every call that evaluates something is intercepted, and the graph that
is pending then is written out with ``mx.export_to_dot`` and counted.

- A node is one primitive; what MLX has fused into one is one.
- A launch is a node that moves data: all but those that only describe the same bytes
  anew (``VIEWS``). It is an estimate: a primitive may take several kernels (a sort, a
  reduction, attention where it is not fused), a reshape may copy, and a backend may
  treat a node as nothing. Counts belong to the device: the CPU has no fused norms,
  rotations and attention, so that each of these is many nodes there.
- An evaluation is a call of ``mx.eval`` or ``mx.async_eval``, or a read (``item``,
  ``tolist``) of what was not evaluated yet.
"""

from __future__ import annotations

import io
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from .measure import measure, warm_up
from .step import Engine

VIEWS = frozenset(
    {
        "AsStrided",
        "Broadcast",
        "BroadcastAxes",
        "Copy",
        "Depends",
        "ExpandDims",
        "Flatten",
        "NumberOfElements",
        "Reshape",
        "Slice",
        "Split",
        "Squeeze",
        "StopGradient",
        "Transpose",
        "Unflatten",
        "View",
    }
)
_NODE = re.compile(r'\d+ \[label ="([^"]*)", shape=rectangle\]')
_MARGIN = 3  # steps at the begin and at the end that are not like the others


@dataclass
class Count:
    """What was handed over so far.

    Attributes:
        primitives: Nodes by their name.
        evaluations: Calls that evaluated something.
    """

    primitives: Counter[str] = field(default_factory=Counter)
    evaluations: int = 0

    @property
    def nodes(self) -> int:
        """All nodes."""
        return self.primitives.total()

    @property
    def launches(self) -> int:
        """Nodes that move data."""
        views = sum(self.primitives[name] for name in VIEWS)
        return self.nodes - views

    def add(self, *trees: Any) -> None:
        """Count what is pending behind arrays, in whatever they are nested."""
        arrays = [leaf for tree in trees for leaf in _arrays(tree)]
        if not arrays:
            return
        text = io.StringIO()
        mx.export_to_dot(text, *arrays)
        found = _NODE.findall(text.getvalue())
        self.primitives.update(found)
        self.evaluations += bool(found)


def _arrays(tree: Any) -> list[mx.array]:
    if isinstance(tree, nn.Module):
        tree = tree.parameters()
    flat: Any = tree_flatten(tree)
    return [leaf for _, leaf in flat if isinstance(leaf, mx.array)]


@contextmanager
def counting() -> Iterator[Count]:
    """Count whatever is evaluated inside."""
    count = Count()
    places = [
        (mx, "eval"),
        (mx, "async_eval"),
        (mx.array, "item"),
        (mx.array, "tolist"),
    ]
    originals = [(place, name, getattr(place, name)) for place, name in places]
    for place, name, original in originals:
        setattr(place, name, _counted(original, count))
    try:
        yield count
    finally:
        for place, name, original in originals:
            setattr(place, name, original)


def _counted(original: Callable[..., Any], count: Count) -> Callable[..., Any]:
    def counted(*args: Any) -> Any:
        count.add(*args)
        return original(*args)

    return counted


def graph_figures(
    engine: Engine, prompt: list[int], max_tokens: int, sampling: dict[str, Any]
) -> dict[str, Any]:
    """Nodes, launches, evaluations and host time per round and per token.

    Counts are medians over the rounds of a counting run; times and tokens per round
    are of a run in which nothing is intercepted.
    """
    warm_up(engine, [prompt], max_tokens, sampling)
    run = measure(engine, [prompt], max_tokens, sampling)
    totals = []
    with counting() as count:
        for _ in engine.steps([prompt], max_tokens, sampling):
            totals.append((count.nodes, count.launches, count.evaluations))
    inner = totals[_MARGIN:-_MARGIN] if len(totals) > 2 * _MARGIN + 1 else totals
    differences = [
        [late - early for early, late in zip(first, second, strict=True)]
        for first, second in pairwise(inner)
    ]
    nodes, launches, evaluations = (
        statistics.median(values) for values in zip(*differences, strict=True)
    )
    tokens_per_round = run["tokens"] / run["steps"]
    host_ms = 1000 * run["host_s"] / run["steps"]
    return {
        "tokens_per_round": tokens_per_round,
        "nodes_per_round": nodes,
        "launches_per_round": launches,
        "evaluations_per_round": evaluations,
        "host_ms_per_round": host_ms,
        "ms_per_round": 1000 * run["seconds"] / run["steps"],
        "nodes_per_token": nodes / tokens_per_round,
        "launches_per_token": launches / tokens_per_round,
        "host_ms_per_token": host_ms / tokens_per_round,
        "most_frequent": dict(count.primitives.most_common(12)),
    }
