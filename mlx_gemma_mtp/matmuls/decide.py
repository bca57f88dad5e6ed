"""Which matrices of a pair the kernel multiplies in this process.

What was kept for this machine holds. Where nothing was, MLX multiplies; on M1 and M2,
whose MLX reads a matrix again for every row, a check of under a second may give the
kernel all matrices from two rows on. Every kernel that a round may then hold has run
alone once: one that fails inside a round would take the round's caches with it.

This file knows nothing of modules or of rounds.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from pathlib import Path
from statistics import median

import mlx.core as mx

from ..errors import described
from ..kernels import common, matmul
from ..kernels.matmul import DENSE, MAX_ROWS, Form, default_columns
from ..machine import apple_gpu
from .bench import Products
from .choices import STOCK, Choice, Choices, Shape
from .judgement import MARGIN
from .kept import Kept

logger = logging.getLogger("mlx_gemma_mtp")

_REREADING = (13, 14)  # GPUs whose MLX reads affine weights for every row: M1 and M2
# The check: how many rows, of which matrices, and for how long.
_ROWS = 3
_NUM_CHECKED = 2
_MOST_BYTES = 64_000_000  # of the matrix that is timed; copies of a small one have more
_WINDOW_S, _NUM_WINDOWS = 0.05, 3

_lock = threading.Lock()
_ran: set[tuple[Form, int, int]] = set()  # in this process


def decide(shapes: Mapping[Shape, int], *, folder: Path | None) -> Choices:
    """What multiplies in this process; to be called before anything is traced.

    Args:
        shapes: How many matrices of each shape a pair has.
        folder: Where decisions are kept; None for nowhere.
    """
    known = {shape: count for shape, count in shapes.items() if shape.is_known}
    if common.backend() != "metal" or not known:
        return STOCK
    with _lock:
        kept = Kept(folder)
        new = {s: count for s, count in known.items() if not kept.is_decided(s)}
        if new and _rereads():
            _check(new, kept)
        while not _runs_alone(kept.choices(known), kept):
            pass
        return kept.choices(known)


def _rereads() -> bool:
    """Whether MLX reads a matrix again for every row on this GPU."""
    gpu = apple_gpu(str(mx.device_info().get("architecture")))
    return gpu is not None and gpu[0] in _REREADING


def _check(shapes: Mapping[Shape, int], kept: Kept) -> None:
    """Give the kernel shapes that nobody has timed, if it is right and faster."""
    choice: Choice | None = Choice(first_row=2)
    try:
        if not _is_right(shapes):
            kept.mark_bad(shapes, "wrong numbers in the first check")
            _warn("is wrong here", "numbers differ from MLX's")
            return
        if not _is_faster(shapes):
            choice = None
    except Exception as error:  # noqa: BLE001 - whatever Metal and its compiler say
        kept.mark_bad(shapes, described(error))
        _warn("does not run here", described(error))
        return
    for shape in shapes:
        kept.keep(shape, choice)


def _is_right(shapes: Mapping[Shape, int]) -> bool:
    """Whether the kernel is right for the smallest shapes, of several forms if any."""
    products = Products(copy_bytes=1)
    by_size = sorted(shapes, key=lambda shape: shape.num_bytes)
    smallest = {shape.form: shape for shape in reversed(by_size)}
    checked = dict.fromkeys([*smallest.values(), *by_size])
    return all(
        products.is_right(shape, _ROWS, default_columns(_ROWS))
        for shape in list(checked)[:_NUM_CHECKED]
    )


def _is_faster(shapes: Mapping[Shape, int]) -> bool:
    """Whether the kernel is faster for the shape that takes most time, if not huge."""
    small = [shape for shape in shapes if shape.num_bytes <= _MOST_BYTES]
    shape = max(
        small or [min(shapes, key=lambda shape: shape.num_bytes)],
        key=lambda shape: shapes[shape] * shape.num_bytes,
    )
    products = Products(copy_bytes=_MOST_BYTES)
    sides = (None, default_columns(_ROWS))
    taken: dict[int | None, list[float]] = {side: [] for side in sides}
    for turn in range(1 + _NUM_WINDOWS):
        for side in sides[:: -1 if turn % 2 else 1]:
            found = products.product_s(shape, _ROWS, side, _WINDOW_S)
            if turn:  # the first is for the clocks to rise
                taken[side].append(found)
    stock_s, own_s = (median(taken[side]) for side in sides)
    return own_s < (1 - MARGIN) * stock_s


def _runs_alone(choices: Choices, kept: Kept) -> bool:
    """Run every kernel that rounds may hold, alone; whether all of them did.

    The first that fails is marked bad, with its shapes.
    """
    users: dict[tuple[Form, int, int], list[Shape]] = {}
    for shape, choice in choices.by_shape.items():
        for num_rows in range(choice.first_row, MAX_ROWS + 1):
            pipeline = shape.form, num_rows, choice.columns[num_rows - 1]
            users.setdefault(pipeline, []).append(shape)
    for pipeline, its_shapes in users.items():
        if pipeline in _ran:
            continue
        try:
            _run(min(its_shapes, key=lambda shape: shape.num_bytes), *pipeline[1:])
        except Exception as error:  # noqa: BLE001 - whatever Metal and its compiler say
            kept.mark_bad(its_shapes, described(error))
            name = matmul.kernel(*pipeline).name
            _warn("does not run here", described(error), name)
            return False
        _ran.add(pipeline)
    return True


def _run(shape: Shape, num_rows: int, columns: int) -> None:
    """Multiply zeros."""
    form = shape.form
    x = mx.zeros((num_rows, shape.num_inputs), form.dtype)
    if form.bits == DENSE:
        arrays = [mx.zeros((shape.num_outputs, shape.num_inputs), form.dtype)]
    else:
        words = shape.num_inputs * form.bits // 32
        groups = (shape.num_outputs, shape.num_inputs // form.group_size)
        scales = mx.zeros(groups, form.dtype)
        arrays = [mx.zeros((shape.num_outputs, words), mx.uint32), scales, scales]
    mx.eval(matmul.multiply(x, *arrays, form=form, num_columns=columns))


def _warn(what: str, reason: str, name: str = "matmul") -> None:
    """Say why MLX multiplies."""
    logger.warning(
        "kernel %r %s, MLX's own takes its place, which may be slower: %s",
        name,
        what,
        reason,
    )


def blame(choices: Choices, *, folder: Path | None) -> None:
    """Run kernels alone again, as a round with them failed; mark bad what fails."""
    with _lock:
        _ran.clear()
        _runs_alone(choices, Kept(folder))
