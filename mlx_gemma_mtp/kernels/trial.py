"""Whether kernels run on this machine: each is tried once, on a row or two.

What a chip or its compiler does not take (a threadgroup too large for the registers
that a kernel needs, say) shows only when a kernel is run. Then plain operations take
its place for as long as the process lasts, and a line in the log says so.

This file knows how to call each kernel, and nothing of what for.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from . import common, decide, judge, propose, resample, select, threshold
from .common import LIST, Kernel

logger = logging.getLogger("mlx_gemma_mtp")

_MAX_TEXT = 200  # characters of a compiler's answer
_THRESHOLD_FLAGS = ("has_top_p", "has_min_p", "has_coupled")

_lock = threading.Lock()
_is_working: dict[str, bool] = {}


def works(*kernels: Kernel) -> bool:
    """Whether all of these kernels run on the default device.

    The first call for a kernel compiles and runs it.
    """
    if common.backend() == "ops":
        return False
    with _lock:
        return all(_works(kernel.name) for kernel in kernels)


def _works(name: str) -> bool:
    """Whether one kernel runs; what was found once stays."""
    if name not in _is_working:
        try:
            mx.eval(_TRIALS[name]())
            _is_working[name] = True
        # MLX raises whatever Metal and its compiler say.
        except Exception as error:  # noqa: BLE001
            _is_working[name] = False
            reason = " ".join(str(error).split())[:_MAX_TEXT]
            logger.warning(
                "kernel %r does not run here, plain operations take its place, which "
                "is slower: %s: %s",
                name,
                type(error).__name__,
                reason,
            )
    return _is_working[name]


def _rows() -> dict[str, Any]:
    """The settings of one row that is judged by block."""
    floats = [1.0, 0.5, 0.1, *[0.0] * (common.ROW_FLOATS - 3)]
    words = [1, 2, common.BLOCK, LIST, 7, *[0] * (common.ROW_WORDS - 5)]
    return {
        "row_floats": mx.array([floats]),
        "row_words": mx.array([words], dtype=mx.uint32),
    }


def _logits(num_tokens: int, width: int) -> mx.array:
    """Logits [1, num_tokens, width] in the type that models have."""
    return mx.zeros((1, num_tokens, width), dtype=mx.bfloat16)


def _lists(num_tokens: int) -> tuple[mx.array, mx.array]:
    """Scores and ids of lists, [1, num_tokens, 64] each."""
    ids = mx.broadcast_to(mx.arange(LIST, dtype=mx.int32), (1, num_tokens, LIST))
    return mx.zeros((1, num_tokens, LIST)), ids


def _try_select() -> list[mx.array]:
    # More than a block has, so that a second launch joins the lists of two.
    return list(select.most_likely(_logits(1, select.BLOCK + 1)[0]))


def _try_propose() -> list[mx.array]:
    values, ids = _lists(1)
    stats = mx.ones((1, 2))
    return list(propose.propose(values[0], ids[0], stats, **_rows(), step=1))


def _try_decide() -> list[mx.array]:
    most = decide.MAX_DRAFT_TOKENS
    (values, ids), (scores, draft_ids) = _lists(most + 1), _lists(most)
    stats, tokens = mx.ones((1, most + 1, 2)), draft_ids[..., 0]
    return [
        decide.decide(values, ids, stats, tokens, scores, draft_ids, **_rows()),
    ]


def _try_threshold() -> list[mx.array]:
    flags: dict[str, Any] = dict.fromkeys(_THRESHOLD_FLAGS, True)
    return list(threshold.threshold(_logits(2, 8), **_rows(), **flags))


def _judged() -> tuple[mx.array, ...]:
    """One draft as ``judge`` and ``resample`` take it, behind the logits."""
    return mx.ones((1, 2, 4)), *_lists(1)


def _try_judge() -> list[mx.array]:
    stats, scores, ids = _judged()
    tokens = mx.zeros((1, 2), dtype=mx.int32)
    draft = tokens[:, :1]
    return list(
        judge.judge(_logits(2, 8), stats, tokens, draft, scores, ids, **_rows())
    )


def _try_resample() -> list[mx.array]:
    stats, scores, ids = _judged()
    report, reach = mx.array([[0, -1, -1]]), mx.ones((1,))
    return [
        resample.resample(report, reach, _logits(2, 8), stats, scores, ids, **_rows())
    ]


_TRIALS: dict[str, Callable[[], list[mx.array]]] = {
    select.KERNEL.name: _try_select,
    propose.KERNEL.name: _try_propose,
    decide.KERNEL.name: _try_decide,
    threshold.KERNEL.name: _try_threshold,
    judge.KERNEL.name: _try_judge,
    resample.KERNEL.name: _try_resample,
}
