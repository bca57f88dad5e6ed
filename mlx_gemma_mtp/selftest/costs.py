"""Section ``costs``: what rounds with drafts cost, against what is expected of them.

The controller starts from a prior and corrects it as it measures, so nothing has to
hold here. The family's column is what its matrices alone say, without draft steps.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median
from typing import Any

from ..cli.tables import duration
from ..constants import MAX_DRAFT_TOKENS
from ..drafting.policy import DraftPolicy, Way
from ..drafting.prior import Prior
from ..engine.decoder import Decoder, Request
from ..pair.pair import Pair
from .busy import spread
from .matmuls import FORMS, Timing, total_seconds
from .result import INFO, SKIP, Result

_PROMPT = (2, 5, 6, 7)
_NUM_ROUNDS = 12
_NUM_PASSES = 4
_LEAST_ROUNDS = 4
ALL_DRAFTS = tuple(range(MAX_DRAFT_TOKENS + 1))


class _Recorder(DraftPolicy):
    """A fixed K that keeps what its rounds took."""

    def __init__(self, num_draft_tokens: int) -> None:
        super().__init__(num_draft_tokens)
        self.seconds: list[float] = []

    def observe(
        self,
        way: Way,
        accepted: Sequence[int],
        seconds: float | None,
        *,
        matches: Sequence[int] = (),
        num_shadow_drafts: int = 0,
        context: int = 0,
    ) -> None:
        """See ``DraftPolicy``."""
        if seconds is not None:
            self.seconds.append(seconds)


def look(
    pair: Pair,
    prior: Prior,
    timed: Sequence[Timing],
    allowance_s: float,
) -> Result:
    """Time rounds of every K on the embedded pair.

    Args:
        pair: The embedded pair.
        prior: What the controller expects.
        timed: What the section ``rows`` has measured.
        allowance_s: Seconds; K = 0, 4 and 8 come first.
    """
    start = time.perf_counter()
    samples: dict[int, list[float]] = {}
    # Again and again, so that a machine that slows down slows every K.
    for k in _NUM_PASSES * sorted(
        ALL_DRAFTS, key=lambda k: (k % 4 != 0, k % 2 != 0, k)
    ):
        if len(samples) > 1 and time.perf_counter() - start > allowance_s:
            break
        samples.setdefault(k, []).extend(round_seconds(pair, k))
    measured = {k: median(s) for k, s in samples.items() if len(s) >= _LEAST_ROUNDS}
    plain = measured.get(0)
    if plain is None:
        return Result("costs", SKIP, "no plain round could be timed")
    ratios = {k: measured[k] / plain for k in sorted(measured)}
    columns: dict[str, dict[int, float]] = {
        "measured": ratios,
        "prior": dict(enumerate(prior.relative_cost)),
    }
    for form in FORMS:
        own = [timing for timing in timed if timing.form == form]
        if own:
            columns[f"matrices {form}"] = {
                k: total_seconds(own, k + 1) / total_seconds(own, 1) for k in ALL_DRAFTS
            }
    figures: dict[str, Any] = {
        "plain_round_s": plain,
        "relative_cost": {
            name: {str(k): value for k, value in column.items()}
            for name, column in columns.items()
        },
    }
    lines = [f"{'T(K) / T(0)':<18}" + "".join(f"{f'K={k}':>6}" for k in ALL_DRAFTS)]
    for name, column in columns.items():
        cells = (
            f"{column[k]:6.2f}" if k in column else f"{'-':>6}" for k in ALL_DRAFTS
        )
        lines.append(f"{name:<18}" + "".join(cells))
    off = [ratios[k] / prior.relative_cost[k] for k in ratios if k]
    sentence = f"plain rounds of the embedded pair take {duration(plain)}"
    if off:
        sentence += (
            f"; those with drafts {min(off):.2f} to {max(off):.2f} times the prior"
        )
    return Result(
        "costs",
        INFO,
        sentence,
        tuple(lines),
        figures,
        spread=spread(list(samples.values())),
    )


def round_seconds(pair: Pair, num_draft_tokens: int) -> list[float]:
    """What the rounds of a short text take; those that were traced have no time."""
    recorder = _Recorder(num_draft_tokens)
    num_tokens = _NUM_ROUNDS * (num_draft_tokens + 1)
    decoder = Decoder(
        pair.rounds,
        [Request(list(_PROMPT), num_tokens)],
        num_draft_tokens=recorder,
    )
    outputs = decoder.run()
    for _, _ in zip(range(_NUM_ROUNDS + 1), outputs, strict=False):
        pass
    outputs.close()
    return recorder.seconds
