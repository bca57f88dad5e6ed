"""Section ``ranks``: several machines as one: how long are sums, is the text one text?

The sums are those of a round: of so many rows of hidden states, one behind the other as
layers have them, so each waits for the device to hand over and to go on. The greedy
text of exact decoding must be the same without drafts, with them, and on every rank.
"""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ..distributed.patience import FIRST_S
from ..distributed.ranks import Ranks
from ..distributed.work import working
from ..models.target import text_model
from ..pair.pair import Pair
from .model import Loaded, generate
from .result import FAIL, PASS, Result

NAME = "ranks"
_ROWS = (1, 5, 9)
_CHAIN = 20  # sums behind each other
_REPEATS = 7
_AUTO = "auto"


def look(loaded: Loaded, ranks: Ranks) -> Result:
    """Look at sums and at texts; every rank gives the same result.

    Args:
        loaded: The pair, of which each rank has its part.
        ranks: All machines.
    """
    pair = loaded.pair
    with working(ranks):
        took_s = {str(rows): _sum_s(pair, ranks, rows) for rows in _ROWS}
        held = ranks.gather(_weight_bytes(pair))
    fixed = pair.num_draft_tokens
    texts = {str(k): generate(loaded, k, "exact") for k in (0, _AUTO, fixed)}
    again = {str(k): generate(loaded, k, _AUTO) for k in (0, _AUTO)}
    with working(ranks):
        tokens = ranks.gather({k: text.tokens for k, text in texts.items()})
        speeds = ranks.share({k: text.last.generation_tps for k, text in again.items()})
    lines = (
        f"{ranks.size} ranks hold "
        + ", ".join(f"{num_bytes / 1e9:.2f}" for num_bytes in held)
        + " GB of the target's weights",
        "a sum of the hidden states of "
        + ", ".join(f"{rows} rows {s * 1e6:.0f} us" for rows, s in took_s.items()),
        f"exactness: {texts[_AUTO].last.stats.exactness}",
        f"tokens/s: plain {speeds['0']:.1f}, auto {speeds[_AUTO]:.1f} "
        f"({speeds[_AUTO] / speeds['0']:.2f}x)",
    )
    figures: dict[str, Any] = {
        "ranks": ranks.size,
        "weight_bytes": held,
        "sum_s": took_s,
        "tokens_per_second": speeds,
    }
    plain = tokens[0]["0"]
    differing = [
        f"K = {k} on rank {rank}"
        for rank, own in enumerate(tokens)
        for k, found in own.items()
        if found != plain
    ]
    if differing:
        sentence = f"greedy text differs: {', '.join(differing)}"
        return Result(NAME, FAIL, sentence, lines, figures)
    sentence = (
        f"exact greedy text of {len(plain)} tokens is the same on {ranks.size} ranks, "
        f"without drafts, with auto and K = {fixed}"
    )
    return Result(NAME, PASS, sentence, lines, figures)


def _sum_s(pair: Pair, ranks: Ranks, num_rows: int) -> float:
    """Seconds of one sum on the slowest rank."""
    lm = text_model(pair.target)
    x = mx.ones((1, num_rows, lm.args.hidden_size), dtype=lm.model.norm.weight.dtype)
    timings = []
    for _ in range(_REPEATS + 1):
        y = x
        for _ in range(_CHAIN):
            y = mx.distributed.all_sum(y / ranks.size, group=ranks.group)
        with ranks.exchange("sums", FIRST_S):
            start = time.perf_counter()
            mx.eval(y)
            timings.append((time.perf_counter() - start) / _CHAIN)
    slowest: float = max(ranks.gather(median(timings[1:])))
    return slowest


def _weight_bytes(pair: Pair) -> int:
    """Memory of this rank's part of the target."""
    arrays: Any = tree_flatten(pair.target.parameters())
    return sum(array.nbytes for _, array in arrays)
