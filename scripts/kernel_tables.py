"""The tables of docs/kernels.md, from what was counted (count_kernels.py).

Slots are instructions that a lane issues: each counts one, but shifts and conversions
take four on M1 and M2 (philipturner/metal-benchmarks). What computes addresses is not
counted, nor how long anything waits. Nothing here was measured.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from mlx_gemma_mtp.drafting.chips import CHIPS
from mlx_gemma_mtp.drafting.growth import bend, constants_of, slots_per_weight
from mlx_gemma_mtp.kernels.matmul import MAX_ROWS, parse_form
from scripts.roofline import GROWTH_SHOWN, row_of, table

RECORD = Path(__file__).parent / "data" / "kernel_counts.json"
ROWS = range(1, MAX_ROWS + 1)
M1, M3 = 13, 15  # generations
_SLOW = 4  # slots of a shift or a conversion before M3
_SLOWER = ("shift", "from_short", "from_integer", "to_short", "to_integer")
_NOT_SLOTS = ("columns", "bytes", "scale_bytes")
_KINDS = {  # of instructions
    "loads": ("load",),
    "multiply-adds": ("fma",),
    "logic of words": ("logic", "pack"),
    "shifts": ("shift",),
}
_WHAT = {
    "select": "rows of logits, each once",
    "propose": "the drafter's list",
    "decide": "the target's lists",
    "threshold": "rows of logits: the best, the mass, what is kept",
    "threshold, top-p": "and three bits of the bound a pass",
    "judge": "logits of the drafter's candidates",
    "resample": "the one row that is drawn from",
}


@cache
def _record() -> dict[str, Any]:
    return dict(json.loads(RECORD.read_text(encoding="utf-8")))


def slots(
    counts: dict[str, float], *, generation: int, has_free_halves: bool = True
) -> float:
    """Instructions for a weight, in slots.

    Args:
        counts: Of one number of rows.
        generation: Of the GPU: 13 is M1, 15 M3.
        has_free_halves: Whether a multiply-add takes a half as it is; otherwise a
            weight costs a conversion.
    """
    slow = _SLOW if generation < M3 else 1
    total = 0.0
    for name, count in counts.items():
        if name in _NOT_SLOTS or (name == "from_short" and has_free_halves):
            continue
        total += count * (slow if name in _SLOWER else 1)
    return total


def bytes_lines() -> Iterator[str]:
    """What each kernel reads."""
    heads = ("reads", "bytes over floor", "barriers of a thread")
    yield from table("kernel", heads)
    four_bits, *_ = _record()["matmul"].values()
    weights = {f"{counts['bytes']:.2f}" for counts in four_bits}
    scales = {f"{counts['scale_bytes']:.0f}" for counts in four_bits}
    (weight_bytes,), (scale_bytes,) = weights, scales
    yield row_of("matmul", ("weights, 4 bits", weight_bytes, "0"))
    yield row_of("", ("scales and biases, from the cache", scale_bytes, ""))
    for name, found in _record()["others"].items():
        figures = (f"{found['bytes']:.2f}", f"{found['barriers']:.0f}")
        yield row_of(name, (_WHAT[name], *figures))


def slots_lines() -> Iterator[str]:
    """What the matmul issues for each weight."""
    found = _record()["matmul"]
    shown, *_ = found
    yield from table(f"{_words(shown)}: rows", map(str, ROWS))
    yield row_of("outputs of a simdgroup", (str(m["columns"]) for m in found[shown]))
    for label, names in _KINDS.items():
        cells = (sum(m.get(each, 0) for each in names) for m in found[shown])
        yield row_of(label, (f"{cell:.2f}" for cell in cells))
    for name, rows in found.items():
        for label, generation in (("M1, M2", M1), ("since M3", M3)):
            cells = (_pair(*_both(m, generation), digits=1) for m in rows)
            yield row_of(f"slots, {_words(name)}, {label}", cells)


def costs_lines() -> Iterator[str]:
    """What M rows cost over reading the weights once, modelled."""
    yield from table("modelled, not measured: rows", map(str, ROWS))
    for name, rows in _record()["matmul"].items():
        bits = parse_form(name).bits
        for chip in map(CHIPS.__getitem__, GROWTH_SHOWN):
            available = slots_per_weight(chip, bits, constants_of(chip).efficiency)
            costs = (
                [bend(needed / available) for needed in _both(m, chip.generation)]
                for m in rows
            )
            cells = (_pair(*pair, digits=2) for pair in costs)
            yield row_of(f"{chip.name}, {_words(name)}", cells)


def _both(counts: dict[str, float], generation: int) -> list[float]:
    """Slots with free halves, and without."""
    return [
        slots(counts, generation=generation, has_free_halves=is_free)
        for is_free in (True, False)
    ]


def _pair(free: float, cautious: float, *, digits: int) -> str:
    """A figure, and in brackets the one with conversions if it differs."""
    first, second = f"{free:.{digits}f}", f"{cautious:.{digits}f}"
    return first if first == second else f"{first} ({second})"


def _words(name: str) -> str:
    """A form in words."""
    form = parse_form(name)
    return f"{form.bits} bits" if form.group_size else "bfloat16"
