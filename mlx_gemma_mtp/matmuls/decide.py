"""Which matrices of a pair the kernel multiplies in this process.

What was kept for this machine holds. Where nothing was, MLX multiplies; on M1 and M2,
whose MLX reads a quantized matrix again for every row, a check of about a second times
one matrix of a form. The kernel may then have all of that form from two rows on. What
is not quantized waits for the tuner.

Every kernel that a round may then hold has run alone once, and was right: one that
fails inside a round would take the round's caches with it.

This file knows nothing of modules or of rounds.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import median

import mlx.core as mx

from ..errors import described, is_of_others
from ..kernels import common, layer_trial, matmul
from ..kernels.layer_trial import NO_LAYERS, LayerSizes
from ..kernels.matmul import DENSE, MAX_ROWS, Form, default_columns
from ..kernels.ways import MATRIX_WAYS
from ..machine import apple_gpu
from .bench import Products
from .choices import STOCK, Choice, Choices, Shape
from .judgement import MARGIN
from .kept import Kept

logger = logging.getLogger("mlx_gemma_mtp")

_REREADING = (13, 14)  # GPUs whose MLX reads affine weights for every row: M1 and M2
# The check: which forms, of which matrix, for how long. One number of rows is timed
# well, as what is won is judged by it; others only so that no cliff is missed.
_NUM_CHECKED = 1  # forms at a time: a first use may cost a second
_MOST_BYTES = 64_000_000  # of the matrix that is timed; copies of a small one have more
_ROWS = 3
_WINDOW_S, _NUM_WINDOWS = 0.04, 3
_CLIFF_WINDOW_S = 0.01

_Pipeline = tuple[Form, int, int]  # form, M, R
_Way = tuple[str, LayerSizes, tuple[Form, ...]]  # a way to run layers, and for which

_lock = threading.Lock()
_ran: set[_Pipeline | _Way] = set()  # in this process: kernels, and ways' kernels


def decide(
    shapes: Mapping[Shape, int],
    sizes: LayerSizes = NO_LAYERS,
    *,
    folder: Path | None,
) -> Choices:
    """What multiplies in this process; to be called before anything is traced.

    Args:
        shapes: How many matrices of each shape a pair has.
        sizes: Of its layers.
        folder: Where decisions are kept; None for nowhere.
    """
    known = {shape: count for shape, count in shapes.items() if shape.is_known}
    if common.backend() != "metal":
        return STOCK
    with _lock:
        kept = Kept(folder)
        if _rereads():
            _check_forms(known, kept)
        chosen = Choices(kept.choices(known).by_shape, kept.ways(sizes.structure))
        return _that_run(chosen, sizes, kept)


def blame(
    choices: Choices, sizes: LayerSizes = NO_LAYERS, *, folder: Path | None
) -> None:
    """Find out which kernels made a round fail: each runs alone again.

    What fails, or is wrong, is MLX's from now on. Where all are right alone, the ways
    that layers were run in are given up: a round may hold more of them than was tried.

    Args:
        choices: What the round multiplied by, and how it ran layers.
        sizes: Of the layers.
        folder: Where decisions are kept; None for nowhere.
    """
    with _lock:
        for shape, choice in choices.by_shape.items():
            _ran.difference_update(_pipelines(shape, choice))
        _ran.difference_update(ran for ran in list(_ran) if ran[0] in choices.ways)
        kept = Kept(folder)
        if _that_run(choices, sizes, kept) == choices:
            for way in choices.ways:
                kept.mark_bad_way(way, "a round with it failed")


def _rereads() -> bool:
    """Whether MLX reads a quantized matrix again for every row on this GPU."""
    gpu = apple_gpu(str(mx.device_info().get("architecture")))
    return gpu is not None and gpu[0] in _REREADING


# ------------------------------------------------------------------- the first check


def _check_forms(shapes: Mapping[Shape, int], kept: Kept) -> None:
    """Give the kernel quantized shapes that nobody has timed, where it is faster.

    Forms with more bytes come first; those that are left come next time.
    """
    by_form: dict[Form, dict[Shape, int]] = {}
    for shape, count in shapes.items():
        if shape.form.bits != DENSE and not kept.is_decided(shape):
            num_bytes = by_form.setdefault(shape.form, {})
            num_bytes[shape] = count * shape.num_bytes
    largest = sorted(by_form.values(), key=lambda each: -sum(each.values()))
    for num_bytes in largest[:_NUM_CHECKED]:
        _check(num_bytes, kept)


def _check(num_bytes: Mapping[Shape, int], kept: Kept) -> None:
    """Time one matrix of a form and keep what is found for all of its shapes.

    Args:
        num_bytes: Of all matrices of each shape.
        kept: Where it is kept.
    """
    small = [shape for shape in num_bytes if shape.num_bytes <= _MOST_BYTES]
    shape = max(
        small or [min(num_bytes, key=lambda shape: shape.num_bytes)],
        key=lambda shape: num_bytes[shape],
    )
    products, choice = Products(copy_bytes=_MOST_BYTES), Choice(first_row=2)
    for pipeline in _pipelines(shape, choice):
        if (reason := _failure(products, shape, pipeline)) is not None:
            _give_up(pipeline, reason, num_bytes, kept)
            return
    try:
        is_faster = _is_faster(products, shape)
    except Exception as error:  # noqa: BLE001 - whatever Metal says
        reason = "" if is_of_others(error) else described(error)
        _give_up((shape.form, _ROWS, default_columns(_ROWS)), reason, num_bytes, kept)
        return
    for alike in num_bytes:
        kept.keep(alike, choice if is_faster else None)


def _is_faster(products: Products, shape: Shape) -> bool:
    """Whether the kernel is faster for three rows, and for no others slower."""
    stock_s, own_s = _times(products, shape, _ROWS, _WINDOW_S, 1 + _NUM_WINDOWS)
    if own_s >= (1 - MARGIN) * stock_s:
        return False
    for num_rows in range(2, MAX_ROWS + 1):
        if num_rows != _ROWS:
            stock_s, own_s = _times(products, shape, num_rows, _CLIFF_WINDOW_S, 1)
            if own_s > stock_s:
                return False
    return True


def _times(
    products: Products, shape: Shape, num_rows: int, window_s: float, num_windows: int
) -> tuple[float, float]:
    """What MLX and the kernel take in turn, seconds.

    The first of several windows is for the clocks to rise.
    """
    sides = (None, default_columns(num_rows))
    taken: dict[int | None, list[float]] = {side: [] for side in sides}
    for turn in range(num_windows):
        for side in sides[:: -1 if turn % 2 else 1]:
            found = products.product_s(shape, num_rows, side, window_s)
            taken[side].append(found)
    stock_s, own_s = (median(taken[side][1:] or taken[side]) for side in sides)
    return stock_s, own_s


# ------------------------------------------------------------------- kernels alone


def _that_run(choices: Choices, sizes: LayerSizes, kept: Kept) -> Choices:
    """Those choices whose kernels have all run alone in this process, and were right.

    Each runs with the smallest matrix that it multiplies. Shapes of what fails are bad.
    """
    left = dict(choices.by_shape)
    products = Products(copy_bytes=1)
    for shape in sorted(left, key=lambda shape: shape.num_bytes):
        every = [] if shape not in left else _pipelines(shape, left[shape])
        new = [pipeline for pipeline in every if pipeline not in _ran]
        # The first has most rows: those of the others must have the same bits.
        for pipeline in dict.fromkeys([*every[:1], *new]) if new else ():
            if (reason := _failure(products, shape, pipeline)) is not None:
                users = [s for s in left if pipeline in _pipelines(s, left[s])]
                _give_up(pipeline, reason, users, kept)
                for user in users:
                    del left[user]
                break
            _ran.add(pipeline)
    forms = Choices(left).forms
    ways = {way for way in choices.ways if forms or way not in MATRIX_WAYS}
    found = (way for way in sorted(ways) if _runs(way, sizes, forms, kept))
    return Choices(left, frozenset(found))


def _runs(way: str, sizes: LayerSizes, forms: tuple[Form, ...], kept: Kept) -> bool:
    """Whether the kernels of a way run in this process, and are right; else it is bad.

    Args:
        way: The way.
        sizes: Of the layers that it runs.
        forms: Of the matrices, where it multiplies.
        kept: Where it is marked as bad.
    """
    used = way, sizes, forms if way in MATRIX_WAYS else ()
    if used in _ran:
        return True
    try:
        reason = "" if layer_trial.is_right(*used) else "wrong numbers"
    except Exception as error:  # noqa: BLE001 - whatever Metal and its compiler say
        if is_of_others(error):
            logger.info("layers cannot be run %r now, MLX's way takes its place", way)
            return False
        reason = described(error)
    if reason:
        kept.mark_bad_way(way, reason)
        logger.warning(
            "layers cannot be run %r here, MLX's way takes its place, which may be "
            "slower: %s",
            way,
            reason,
        )
        return False
    _ran.add(used)
    return True


def _pipelines(shape: Shape, choice: Choice) -> list[_Pipeline]:
    """The kernels that rounds may hold for a shape, most rows first."""
    rows = range(MAX_ROWS, choice.first_row - 1, -1)
    return [(shape.form, num_rows, choice.columns[num_rows - 1]) for num_rows in rows]


def _failure(products: Products, shape: Shape, pipeline: _Pipeline) -> str | None:
    """Why a kernel is not to be used, by running it alone; None where it is right.

    Returns:
        A reason that is empty where nothing is known of the kernel itself.
    """
    _, num_rows, columns = pipeline
    try:
        products.prepare(shape)
    except Exception:  # noqa: BLE001 - MLX's own: no memory for it
        return ""
    try:
        if products.is_right(shape, num_rows, columns):
            return None
    except Exception as error:  # noqa: BLE001 - whatever Metal and its compiler say
        return "" if is_of_others(error) else described(error)
    return f"wrong numbers for {num_rows} rows"


def _give_up(
    pipeline: _Pipeline, reason: str, users: Iterable[Shape], kept: Kept
) -> None:
    """Leave shapes to MLX: in this process, or for good where the reason is known."""
    name = matmul.kernel(*pipeline).name
    if not reason:
        logger.info("kernel %r cannot be tried now, MLX's own takes its place", name)
        return
    kept.mark_bad(users, reason)
    logger.warning(
        "kernel %r does not run here, MLX's own takes its place, which may be slower: "
        "%s",
        name,
        reason,
    )
