"""Section ``rows``: what matrices cost for 1 to 9 rows, and the bandwidth reached.

A round verifies K + 1 rows at once; drafting pays as far as that costs little more than
one row. The matrices are those of one published family with random weights, one of each
shape. Several copies take turns, so that no cache of the chip holds them.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..cli.tables import duration
from ..kernels.matmul import DENSE, Form
from ..matmuls.bench import COPY_BYTES, filled
from ..matmuls.choices import Shape
from .busy import spread
from .machine import is_on_cpu, memory_bytes
from .random_pair import skeletons
from .result import INFO, SKIP, Result

ROWS = tuple(range(1, 10))
BITS, GROUP_SIZE = 4, 64
FORMS = ("4-bit", "bfloat16")
# The largest family that leaves a laptop room beside it, by memory in GB.
_FAMILIES = ((64, "31b"), (24, "12b"), (16, "e4b"))
_SMALLEST = "e2b"
_MAX_COPIES = 32
_MAX_SHARE = 0.2  # of memory, for one matrix with its copies
_COPY_BYTES = 256_000_000
_CPU_COPY_BYTES = 64_000_000
_BAND = 256  # outputs with random weights of their own
# What it takes to time a matrix, in times of one row, making it included.
_COST = sum(ROWS) + 10
_REPEATS = 5
_MAX_SHOWN = 5


def default_family() -> str:
    """The family whose shapes suit this machine."""
    if is_on_cpu():
        return _SMALLEST
    memory_gb = memory_bytes() / 1e9
    return next((name for least, name in _FAMILIES if memory_gb >= least), _SMALLEST)


@dataclass(frozen=True)
class Timing:
    """What one matrix costs.

    Attributes:
        name: Its first name in the target.
        shape: Outputs and inputs.
        count: How many such matrices the target has.
        form: One of ``FORMS``.
        num_bytes: Bytes of one.
        seconds: For each entry of ``ROWS``.
    """

    name: str
    shape: tuple[int, int]
    count: int
    form: str
    num_bytes: int
    seconds: tuple[float, ...]

    @property
    def ratios(self) -> tuple[float, ...]:
        """Seconds over those of one row."""
        return tuple(s / self.seconds[0] for s in self.seconds)

    @property
    def bandwidth_gbs(self) -> float:
        """Bytes a second of one row, in GB."""
        return self.num_bytes / self.seconds[0] / 1e9

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        return {
            "name": self.name,
            "shape": list(self.shape),
            "count": self.count,
            "form": self.form,
            "bytes": self.num_bytes,
            "rows": list(ROWS),
            "seconds": list(self.seconds),
            "ratios": list(self.ratios),
            "bandwidth_gbs": self.bandwidth_gbs,
        }


def look(family: str, allowance_s: float) -> tuple[Result, list[Timing]]:
    """Time the matrices of a family, the heaviest ones first.

    Args:
        family: Whose shapes.
        allowance_s: What would take longer is left out, seconds.

    Returns:
        The result, and what was timed.
    """
    start = time.perf_counter()
    copy_gbs, sum_gbs = _plain_bandwidth()
    shapes, names = matrix_shapes(family)
    heaviest = sorted(shapes, key=lambda s: -shapes[s] * s[0] * s[1])
    timed: list[Timing] = []
    series: list[list[float]] = []
    skipped: dict[str, str] = {}
    # Each form has half of the time, and each matrix its part of what is left.
    for number, form in enumerate(FORMS):
        end = start + allowance_s * (number + 1) / len(FORMS)
        pace = _pace(heaviest[-1], form)
        for shape in heaviest:
            left = end - time.perf_counter()
            found = time_matrix(shape, form, left, pace)
            if isinstance(found, str):
                skipped[f"{names[shape]} {form}"] = found
                continue
            num_bytes, samples = found
            series += samples
            seconds = tuple(map(median, samples))
            timed.append(
                Timing(names[shape], shape, shapes[shape], form, num_bytes, seconds)
            )
    figures: dict[str, Any] = {
        "family": family,
        "copy_gbs": copy_gbs,
        "sum_gbs": sum_gbs,
        "matrices": [timing.to_dict() for timing in timed],
        "skipped": skipped,
    }
    lines = [f"plain copy {copy_gbs:.0f} GB/s (read and written), sum {sum_gbs:.0f}"]
    lines += _table(timed)
    if skipped:
        reason = next(iter(skipped.values()))
        lines.append(f"{len(skipped)} left out, the first because {reason}")
    if not timed:
        return Result("rows", SKIP, "no time for any matrix", tuple(lines), figures), []
    result = Result(
        "rows",
        INFO,
        _sentence(family, timed),
        tuple(lines),
        figures,
        spread=spread(series),
    )
    return result, timed


def _sentence(family: str, timed: list[Timing]) -> str:
    parts = []
    for form in FORMS:
        own = [timing for timing in timed if timing.form == form]
        if own:
            ratio = total_seconds(own, 5) / total_seconds(own, 1)
            parts.append(f"{ratio:.2f} ({form})")
    return f"matrices of {family}: 5 rows cost {', '.join(parts)} times one row"


def total_seconds(timings: list[Timing], num_rows: int) -> float:
    """All of a target's matrices that were timed, for so many rows."""
    return sum(t.count * t.seconds[num_rows - 1] for t in timings)


def _table(timed: list[Timing]) -> list[str]:
    """The heaviest matrices, a line each."""
    if not timed:
        return []
    head = "".join(f"{f'M={rows}':>6}" for rows in ROWS[1:])
    lines = [f"{'outputs x inputs':<16} {'':<9} {'M=1':>8} {'GB/s':>6}{head}"]
    for form in FORMS:
        for timing in [t for t in timed if t.form == form][:_MAX_SHOWN]:
            ratios = "".join(f"{ratio:6.2f}" for ratio in timing.ratios[1:])
            shape = "x".join(map(str, timing.shape))
            lines.append(
                f"{shape:<16} {form:<9} {duration(timing.seconds[0]):>8} "
                f"{timing.bandwidth_gbs:6.1f}{ratios}"
            )
    return lines


def matrix_shapes(family: str) -> tuple[Counter[tuple[int, int]], dict[Any, str]]:
    """How many matrices of each shape a token passes, and one name of each.

    Experts are left out: which of them are read depends on the text. So are tables of
    which a token reads one row; the embedding counts, as the head.
    """
    target, _ = skeletons(family)
    counts: Counter[tuple[int, int]] = Counter()
    names: dict[Any, str] = {}
    for path, module in target.named_modules():
        is_head = path == "model.embed_tokens"
        if isinstance(module, nn.Linear) or is_head:
            shape = (int(module.weight.shape[0]), int(module.weight.shape[1]))
            counts[shape] += 1
            names.setdefault(shape, path.rpartition(".")[2])
    return counts, names


def known_shapes(family: str) -> list[Shape]:
    """The same shapes, in the forms that are timed here, as kernels know them."""
    forms = Form(BITS, GROUP_SIZE, mx.bfloat16), Form(DENSE, 0, mx.bfloat16)
    sizes = matrix_shapes(family)[0]
    return [Shape(*size, form) for form in forms for size in sizes]


def _num_bytes(shape: tuple[int, int], form: str) -> int:
    """Bytes of a matrix, with its scales."""
    bits = BITS + 32 / GROUP_SIZE if form == "4-bit" else 16
    return int(shape[0] * shape[1] * bits / 8)


def _pace(shape: tuple[int, int], form: str) -> float:
    """Seconds a byte of a small matrix takes for one row: a first guess for others."""
    multiply = _multiplier(shape, form, 1)
    _timed(multiply, 1)  # what is built once is built here
    return min(_timed(multiply, 1) for _ in range(3)) / _num_bytes(shape, form)


def time_matrix(
    shape: tuple[int, int], form: str, budget_s: float, pace: float
) -> tuple[int, list[list[float]]] | str:
    """Bytes of a matrix and its timings for each entry of ``ROWS``, seconds.

    Args:
        shape: Outputs and inputs.
        form: One of ``FORMS``.
        budget_s: Longest time, seconds.
        pace: Seconds a byte may take for one row.

    Returns:
        Why it was left out, in words, where it was.
    """
    num_bytes = _num_bytes(shape, form)
    if num_bytes > _MAX_SHARE * memory_bytes():
        return f"{shape[0]}x{shape[1]} takes {num_bytes / 1e9:.1f} GB"
    if pace * num_bytes * _COST > budget_s:
        needed_s = pace * num_bytes * _COST
        return f"{shape[0]}x{shape[1]} may take {duration(needed_s)}"
    # On the CPU nothing is cached that counts, and one copy takes long enough.
    num_copies = 1
    if not is_on_cpu():
        room = int(_MAX_SHARE * memory_bytes() // num_bytes)
        num_copies = max(1, min(_MAX_COPIES, COPY_BYTES // num_bytes, room))
    multiply = _multiplier(shape, form, num_copies)
    begun = time.perf_counter()
    _timed(multiply, 1)  # what is built once is built here
    first = _timed(multiply, 1)
    left = budget_s - (time.perf_counter() - begun)
    # Rows may each cost as much as the first.
    repeats = int(max(1, min(_REPEATS, left / (first * 2 * sum(ROWS)))))
    samples: list[list[float]] = [[] for _ in ROWS]
    for _ in range(repeats):  # interleaved, so that heat slows all rows alike
        for rows in ROWS:
            samples[rows - 1].append(_timed(multiply, rows) / num_copies)
    return num_bytes, samples


def _multiplier(
    shape: tuple[int, int], form: str, num_copies: int
) -> Callable[[int], list[mx.array]]:
    """What multiplies so many rows by every copy of a random matrix."""
    num_outputs, num_inputs = shape
    # The CPU sums in the inputs' type, and takes ten times as long for bfloat16.
    is_float32 = form == "4-bit" and is_on_cpu()
    dtype = mx.float32 if is_float32 else mx.bfloat16
    inputs = mx.random.normal((max(ROWS), num_inputs)).astype(dtype)
    mx.eval(inputs)
    if form == "4-bit":
        words = (num_outputs, num_inputs * BITS // 32)
        groups = (num_outputs, num_inputs // GROUP_SIZE)
        bits = mx.random.randint(0, 2**31 - 1, (_BAND, words[1])).astype(mx.uint32)
        packed = [filled(bits, num_outputs) for _ in range(num_copies)]
        scales, biases = mx.full(groups, 0.01, dtype), mx.full(groups, -0.08, dtype)
        mx.eval(scales, biases)
        return lambda rows: [
            mx.quantized_matmul(
                inputs[:rows], w, scales, biases, group_size=GROUP_SIZE, bits=BITS
            )
            for w in packed
        ]
    band = mx.random.normal((_BAND, num_inputs)).astype(dtype)
    dense = [filled(band, num_outputs) for _ in range(num_copies)]
    return lambda rows: [inputs[:rows] @ w.T for w in dense]


def _timed(multiply: Callable[[int], list[mx.array]], rows: int) -> float:
    """Seconds of one turn over all copies."""
    start = time.perf_counter()
    mx.eval(multiply(rows))
    return time.perf_counter() - start


def _plain_bandwidth() -> tuple[float, float]:
    """GB/s of a copy, read and written, and of a sum over an array."""
    num_bytes = _CPU_COPY_BYTES if is_on_cpu() else _COPY_BYTES
    array = mx.random.randint(0, 100, (num_bytes // 4,)).astype(mx.float32)
    mx.eval(array)

    def fastest(compute: Callable[[], mx.array]) -> float:
        seconds = []
        for _ in range(4):
            start = time.perf_counter()
            mx.eval(compute())
            seconds.append(time.perf_counter() - start)
        return min(seconds)

    copy_s, sum_s = fastest(lambda: array + 1), fastest(array.sum)
    return 2 * array.nbytes / copy_s / 1e9, array.nbytes / sum_s / 1e9
