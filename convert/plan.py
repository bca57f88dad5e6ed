"""What a conversion will do, tensor by tensor.

A plan holds every parameter of the model, the rows of the checkpoint's tensor that it
is made of, its format and the arrays it becomes. Data only: ``planner.py`` makes it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mlx_gemma_mtp.checkpoints.checkpoint import DTYPE_BITS, Checkpoint, TensorInfo
from mlx_gemma_mtp.checkpoints.quantization import Format


@dataclass(frozen=True)
class Array:
    """One array that is written.

    Attributes:
        name: Its name in the file.
        dtype: safetensors' name of its type.
        shape: Its shape.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8


@dataclass(frozen=True)
class Block:
    """Neighbouring rows of a tensor.

    Attributes:
        source_row: The first of them in the tensor.
        row: The first of them in the parameter.
        num_rows: How many.
    """

    source_row: int
    row: int
    num_rows: int


@dataclass(frozen=True)
class Rows:
    """The rows of a tensor, seen as a matrix, that a parameter is made of.

    Runs of neighbouring rows in equal distances: one run for a whole matrix, one per
    expert for half of a fused one.

    Attributes:
        num_columns: Length of a row.
        first: The first row of the first run.
        run_length: Rows of a run.
        run_stride: Rows from the start of a run to the start of the next.
        num_runs: How many runs.
    """

    num_columns: int
    first: int
    run_length: int
    run_stride: int
    num_runs: int

    @property
    def num_rows(self) -> int:
        """How many rows they are."""
        return self.run_length * self.num_runs

    def blocks(self, max_rows: int) -> Iterator[Block]:
        """Cut the rows into blocks of neighbours.

        Args:
            max_rows: Most rows of a block, >= 1.
        """
        for run in range(self.num_runs):
            for start in range(0, self.run_length, max_rows):
                yield Block(
                    self.first + run * self.run_stride + start,
                    run * self.run_length + start,
                    min(max_rows, self.run_length - start),
                )


@dataclass(frozen=True)
class Packing:
    """How a matrix is packed that is written in full.

    Attributes:
        format: Its format.
        beside: What else it is made of: scales and biases, with a row for each of its
            own, or scales and one for each expert.
    """

    format: Format
    beside: tuple[Parameter, ...]


@dataclass(frozen=True)
class Parameter:
    """One parameter of the model: where it comes from and what it becomes.

    Attributes:
        name: Its name in the model.
        tensor: The name of the checkpoint's tensor.
        source: Where that tensor lies.
        rows: Its rows that count.
        format: How it is packed now, None if it is cast, copied or unpacked.
        dtype: The type its values are cast to, before they are packed if they are.
        arrays: What is written: the values, or packed weights, scales and biases.
        num_weights: How many weights of the model it holds.
        packing: How it was packed, None if it is read as it is.
    """

    name: str
    tensor: str
    source: TensorInfo
    rows: Rows
    format: Format | None
    dtype: str
    arrays: tuple[Array, ...]
    num_weights: int
    packing: Packing | None = None

    @property
    def beside(self) -> tuple[Parameter, ...]:
        """What else is read for it."""
        return () if self.packing is None else self.packing.beside

    @property
    def num_source_bytes(self) -> int:
        """Bytes that are read for it."""
        num_values = self.rows.num_rows * self.rows.num_columns
        own = num_values * DTYPE_BITS[self.source.dtype] // 8
        return own + sum(parameter.num_source_bytes for parameter in self.beside)

    @property
    def num_bytes(self) -> int:
        """Bytes that are written for it."""
        return sum(array.num_bytes for array in self.arrays)


@dataclass(frozen=True)
class PartPlan:
    """What happens to one checkpoint.

    Attributes:
        part: ``TARGET`` or ``DRAFTER``.
        checkpoint: Where it comes from.
        parameters: Every parameter of the model, in the model's order.
        unused: Tensors that are left out, and why.
        formats: Module path to its format in the result, of quantized modules.
        is_stored: Whether it was quantized before and stays so.
        config: The result's ``config.json``.
    """

    part: str
    checkpoint: Checkpoint
    parameters: tuple[Parameter, ...]
    unused: dict[str, str]
    formats: dict[str, Format]
    is_stored: bool
    config: dict[str, Any]

    @property
    def num_weights(self) -> int:
        """Weights of the model."""
        return sum(parameter.num_weights for parameter in self.parameters)

    @property
    def num_source_bytes(self) -> int:
        """Bytes that are read."""
        return sum(parameter.num_source_bytes for parameter in self.parameters)

    @property
    def num_bytes(self) -> int:
        """Bytes that are written."""
        return sum(parameter.num_bytes for parameter in self.parameters)

    @property
    def arrays(self) -> Iterator[Array]:
        """Every array that is written, in order."""
        for parameter in self.parameters:
            yield from parameter.arrays
