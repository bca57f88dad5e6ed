"""Check and time the matmul of a few rows on an NVIDIA GPU, against MLX's own.

    python -m scripts.cuda_matmuls --json build/cuda_matmuls.json

The bodies are those of Apple's GPUs, in CUDA's words. What it tells: whether a real
compiler and real threads give the right bits, and how the time of M rows grows. What it
does not tell is Apple's time: an H200 has fewer instructions for a weight than any of
their chips.

The matrices are those of 31B and E4B with 4 bits, the largest of them also with 8 bits
and dense. The largest ones come first, so that what the time does not suffice for, and
the last lines name, is small.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import mlx.core as mx

from mlx_gemma_mtp.kernels import common
from mlx_gemma_mtp.kernels.matmul import DENSE, MAX_ROWS, Form, default_columns
from mlx_gemma_mtp.matmuls.bench import Products
from mlx_gemma_mtp.matmuls.choices import Shape
from mlx_gemma_mtp.selftest.matmuls import matrix_shapes

FAMILIES = ("31b", "e4b")
FORM = Form(4, 64, mx.bfloat16)
OTHER_FORMS = (Form(8, 64, mx.bfloat16), Form(DENSE, 0, mx.bfloat16))
ROWS = tuple(range(1, MAX_ROWS + 1))
BUDGET_S = 240.0
WINDOW_S = 0.02  # of a timing
REPEATS = 3


class Bench(Protocol):
    """What multiplies and takes the time: ``Products``, or what stands in for it."""

    def is_right(self, shape: Shape, num_rows: int, columns: int) -> bool:
        """Whether the kernel's numbers are right, and those of other M."""

    def product_s(
        self, shape: Shape, num_rows: int, columns: int | None, window_s: float
    ) -> float:
        """Seconds of a product by the kernel, or by MLX where there is no R."""


@dataclass(frozen=True)
class Found:
    """What one matrix gave.

    Attributes:
        shape: Its name.
        num_bytes: Its bytes.
        wrong_rows: Each M for which numbers were not right, or not those of other M.
        own_s: Seconds of the kernel for M = 1 to 9.
        stock_s: Seconds of MLX's own.
    """

    shape: str
    num_bytes: int
    wrong_rows: tuple[int, ...]
    own_s: tuple[float, ...]
    stock_s: tuple[float, ...]

    def lines(self) -> list[str]:
        """Two lines of the table: T(M) over T(1), and GB/s of one row."""
        said = f"wrong for M = {self.wrong_rows}" if self.wrong_rows else "right"
        return [
            f"{self.shape:<28} {name:<6} {seconds[0] * 1e6:8.1f} us "
            f"{self.num_bytes / seconds[0] / 1e9:6.0f} GB/s"
            + "".join(f"{s / seconds[0]:6.2f}" for s in seconds[1:])
            + (f"  {said}" if name == "kernel" else "")
            for name, seconds in (("kernel", self.own_s), ("MLX", self.stock_s))
        ]


def shapes_of(families: tuple[str, ...]) -> list[Shape]:
    """The matrices of families, the largest first; each form's are known."""
    sizes = {size for family in families for size in matrix_shapes(family)[0]}
    ordered = sorted(sizes, key=lambda size: (-size[0] * size[1], size))
    shapes = [Shape(*size, FORM) for size in ordered]
    # The head is the largest; a layer's own stands for the other forms.
    largest = ordered[1 if len(ordered) > 1 else 0]
    others = [Shape(*largest, form) for form in OTHER_FORMS]
    return [shape for shape in (*shapes[:2], *others, *shapes[2:]) if shape.is_known]


def measure(shape: Shape, bench: Bench) -> Found:
    """Check a matrix for every M, then time it, the two beside each other."""
    columns = {num_rows: default_columns(num_rows) for num_rows in ROWS}
    wrong = tuple(m for m in ROWS if not bench.is_right(shape, m, columns[m]))
    own: dict[int, list[float]] = {num_rows: [] for num_rows in ROWS}
    stock: dict[int, list[float]] = {num_rows: [] for num_rows in ROWS}
    for _ in range(REPEATS):
        for m in ROWS:
            own[m].append(bench.product_s(shape, m, columns[m], WINDOW_S))
            stock[m].append(bench.product_s(shape, m, None, WINDOW_S))
    return Found(
        str(shape),
        shape.num_bytes,
        wrong,
        tuple(median(own[m]) for m in ROWS),
        tuple(median(stock[m]) for m in ROWS),
    )


def measure_all(
    shapes: list[Shape],
    bench: Bench,
    *,
    budget_s: float,
    clock: Callable[[], float] = time.perf_counter,
    say: Callable[[str], None] = print,
) -> tuple[list[Found], list[str]]:
    """Measure one matrix after another while the time suffices.

    Args:
        shapes: The matrices, in their order.
        bench: Multiplies.
        budget_s: Seconds for all; none is begun that may outlast them.
        clock: Seconds since some moment.
        say: Takes a line as soon as it is known.

    Returns:
        What was found, and the names of those that were left out.
    """
    begun, longest = clock(), 0.0
    found: list[Found] = []
    for number, shape in enumerate(shapes):
        start = clock()
        if start - begun + longest > budget_s:
            return found, [str(each) for each in shapes[number:]]
        found.append(measure(shape, bench))
        longest = max(longest, clock() - start)
        for line in found[-1].lines():
            say(line)
    return found, []


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, and write what was found; 1 where numbers are wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--families", nargs="+", default=list(FAMILIES))
    parser.add_argument("--seconds", type=float, default=BUDGET_S)
    parser.add_argument("--json", type=Path, help="where to write what was found")
    options = parser.parse_args(arguments)
    if common.backend() != "cuda":
        parser.error(f"an NVIDIA GPU is needed: MLX runs on {mx.default_device()}")
    head = "".join(f"{f'M={m}':>6}" for m in ROWS[1:])
    print(f"{'outputs x inputs, form':<28} {'':<6} {'M=1':>11} {'':>11}{head}")
    shapes = shapes_of(tuple(options.families))
    found, left_out = measure_all(shapes, Products(), budget_s=options.seconds)
    for name in left_out:
        print(f"{name:<28} left out: the time does not suffice")
    if options.json:
        figures: dict[str, Any] = {
            "device": mx.device_info(),
            "mlx": version("mlx"),
            "found": [asdict(each) for each in found],
            "left_out": left_out,
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(figures, indent=2, default=str) + "\n")
    return int(any(each.wrong_rows for each in found))


if __name__ == "__main__":
    raise SystemExit(main())
