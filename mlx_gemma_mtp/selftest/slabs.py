"""Section ``slabs``: do rounds write the caches in place?

A round that copies a cache takes memory for the copy, and longer the more room there
is. Decoding runs with far more room than the text needs; what it takes beyond the slabs
must stay below the size of one.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import mlx.core as mx

from ..cache.slabs import SlabLayout
from ..cli.tables import duration
from ..engine.decoder import Decoder, Request
from ..engine.rounds import Rounds
from ..models.target import Target
from ..pair.pair import Pair
from .busy import spread
from .result import FAIL, INFO, PASS, Result

CAPACITIES = (1024, 8192, 32768)
DRAFTS = (0, 4)
_JUDGED_SLOTS = 8192  # with fewer, other arrays are larger than a slab
_PROMPT = (2, 5, 6, 7)
_WARM_UP, _NUM_ROUNDS = 4, 6


@dataclass(frozen=True)
class _RoomyLayout(SlabLayout):
    """A layout whose full layers have more slots than asked for."""

    slots: int = 0

    def allocate(self, num_rows: int, capacity: int) -> list[mx.array]:
        """See ``SlabLayout``."""
        return super().allocate(num_rows, max(capacity, self.slots))


def look(
    pair: Pair, allowance_s: float, capacities: Sequence[int] | None = None
) -> Result:
    """Run rounds over slabs of several capacities.

    Args:
        pair: Whose rounds are run.
        allowance_s: Larger slabs are left out when it is used up, seconds.
        capacities: Slots, the fewest first; None for ``CAPACITIES``.
    """
    capacities = CAPACITIES if capacities is None else capacities
    start = time.perf_counter()
    measured: list[dict[str, Any]] = []
    done: list[int] = []
    last_s = 0.0
    for capacity in capacities:
        begun = time.perf_counter()
        # With four times the slots or more it may take four times as long.
        if len(done) > 1 and begun - start + 4 * last_s > allowance_s:
            break
        for num_drafts in DRAFTS:
            for look_ahead in (False, True):
                measured.append(_measure(pair, capacity, num_drafts, look_ahead))
        done.append(capacity)
        last_s = time.perf_counter() - begun
    lines = [_line(measured, k, ahead) for k in DRAFTS for ahead in (False, True)]
    judged = [m for m in measured if m["capacity"] == done[-1]]
    worst = max(m["extra_bytes"] / m["slab_bytes"] for m in judged)
    figures = {"measured": measured, "capacities": done, "worst_share": worst}
    status, meaning = PASS, "caches are written in place"
    if done[-1] < _JUDGED_SLOTS:
        status, meaning = INFO, "too few slots to tell more"
    elif worst >= 1:
        status, meaning = FAIL, "caches seem to be copied"
    sentence = f"{meaning}: {worst:.2f} of a slab beyond the slabs at {done[-1]} slots"
    if len(done) < len(capacities):
        lines.append(f"no time for {capacities[len(done)]} slots")
    found = spread([m["rounds_s"] for m in measured])
    return Result("slabs", status, sentence, tuple(lines), figures, spread=found)


def _line(measured: list[dict[str, Any]], num_drafts: int, look_ahead: bool) -> str:
    own = [
        m
        for m in measured
        if (m["num_draft_tokens"], m["look_ahead"]) == (num_drafts, look_ahead)
    ]
    parts = (
        f"{m['capacity']}: {duration(m['round_s'])} {_size(m['extra_bytes'])}"
        for m in own
    )
    ahead = "with" if look_ahead else "without"
    return f"K = {num_drafts} {ahead + ' look-ahead':<19} {', '.join(parts)}"


def _size(num_bytes: int) -> str:
    return f"+{num_bytes / 1e6:.2f} MB"


def _measure(
    pair: Pair, capacity: int, num_drafts: int, look_ahead: bool
) -> dict[str, Any]:
    """Median time of a round, and memory beyond what was there before."""
    target = Target(pair.target)
    layout = target.layout
    target.layout = _RoomyLayout(layout.layers, layout.window, layout.dtype, capacity)
    rounds = Rounds(target, pair.drafter, use_compile=pair.rounds.use_compile)
    num_tokens = (_WARM_UP + _NUM_ROUNDS + 2) * (num_drafts + 1)
    decoder = Decoder(
        rounds,
        [Request(list(_PROMPT), num_tokens)],
        num_draft_tokens=num_drafts,
        look_ahead=look_ahead,
    )
    outputs = decoder.run()
    for _ in range(_WARM_UP):
        next(outputs)
    mx.clear_cache()
    mx.reset_peak_memory()
    before, seconds = mx.get_active_memory(), []
    for _ in range(_NUM_ROUNDS):
        start = time.perf_counter()
        next(outputs)
        seconds.append(time.perf_counter() - start)
    outputs.close()
    slab = max(s.nbytes for s in target.layout.allocate(1, capacity))
    return {
        "capacity": capacity,
        "num_draft_tokens": num_drafts,
        "look_ahead": look_ahead,
        "round_s": median(seconds),
        "rounds_s": seconds,
        "extra_bytes": mx.get_peak_memory() - before,
        "slab_bytes": slab,
    }
