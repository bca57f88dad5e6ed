"""Which matrices of a model the kernel multiplies, of how many rows, and how.

A choice never changes what one number of rows gives beside another: the kernel's rows
have the same bits for every number of rows. So for a matrix there are three: MLX for
all rows, the kernel from two rows on (plain rounds of one row then stay MLX's, and
exact decoding fills them up to two), or the kernel for all.

This file knows nothing of modules, of machines or of time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ..kernels.matmul import (
    CHUNK,
    COLUMNS,
    MAX_ROWS,
    MAX_SUMS,
    Form,
    default_columns,
    parse_form,
)
from ..kernels.ways import STOCK_WAYS, Ways

DEFAULT_COLUMNS = tuple(default_columns(m) for m in range(1, MAX_ROWS + 1))


@dataclass(frozen=True)
class Shape:
    """What decides the speed of a matrix.

    Attributes:
        num_outputs: N.
        num_inputs: K.
        form: How its numbers are stored.
    """

    num_outputs: int
    num_inputs: int
    form: Form

    @property
    def is_known(self) -> bool:
        """Whether the kernel multiplies it."""
        return self.form.is_known and self.num_inputs % CHUNK == 0

    @property
    def num_bytes(self) -> int:
        """Bytes of a matrix, with scales and biases."""
        bits = self.form.bits + (
            32 / self.form.group_size if self.form.group_size else 0
        )
        return int(self.num_outputs * self.num_inputs * bits / 8)

    def __str__(self) -> str:
        """Its name where it is kept: "2560x10240 4bit_g64_bfloat16"."""
        return f"{self.num_outputs}x{self.num_inputs} {self.form}"

    @classmethod
    def parse(cls, name: str) -> Shape:
        """The shape of a name.

        Raises:
            ValueError: It is no such name.
        """
        sizes, _, form = name.partition(" ")
        num_outputs, num_inputs = map(int, sizes.split("x"))
        shape = cls(num_outputs, num_inputs, parse_form(form))
        if str(shape) != name:
            raise ValueError(f"a shape must be named as NxK form: got {name!r:.80}")
        return shape


@dataclass(frozen=True)
class Choice:
    """The kernel, for one matrix.

    Attributes:
        first_row: Fewest rows that it multiplies, 1 or 2.
        columns: R for M = 1 to 9.
    """

    first_row: int = 2
    columns: tuple[int, ...] = DEFAULT_COLUMNS

    def __post_init__(self) -> None:
        """Check it.

        Raises:
            ValueError: It is no choice.
        """
        if self.first_row not in (1, 2) or len(self.columns) != MAX_ROWS:
            raise ValueError(f"a choice must be of 1 or 2 rows to 9: got {self!r:.80}")
        for num_rows, columns in enumerate(self.columns, 1):
            if columns not in COLUMNS or num_rows * columns > MAX_SUMS:
                raise ValueError(f"columns must be those of a kernel: got {self!r:.80}")

    def takes(self, num_rows: int) -> bool:
        """Whether the kernel multiplies so many rows."""
        return self.first_row <= num_rows <= MAX_ROWS

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        return {"first_row": self.first_row, "columns": list(self.columns)}

    @classmethod
    def from_dict(cls, values: Any) -> Choice:
        """What ``to_dict`` gave.

        Raises:
            ValueError: It gave something else.
        """
        columns = values.get("columns") if isinstance(values, Mapping) else None
        first_row = values.get("first_row") if isinstance(values, Mapping) else None
        if not isinstance(columns, list) or not all(
            type(number) is int for number in (first_row, *columns)
        ):
            raise ValueError(f"a choice must be rows and columns: got {values!r:.80}")
        assert isinstance(first_row, int)
        return cls(first_row, tuple(columns))


@dataclass(frozen=True)
class Choices:
    """The matrices that the kernel multiplies, and how layers are run.

    MLX multiplies all others.

    Attributes:
        by_shape: The choice for each of them.
        ways: Ways to run layers that were faster.
    """

    by_shape: Mapping[Shape, Choice] = field(default_factory=dict)
    ways: Ways = STOCK_WAYS

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self.by_shape or self.ways)

    @property
    def forms(self) -> tuple[Form, ...]:
        """Of the matrices that the kernel multiplies."""
        return tuple(dict.fromkeys(shape.form for shape in self.by_shape))

    @property
    def named(self) -> dict[str, int]:
        """The fewest rows that the kernel takes of each, by the shapes' names."""
        return {str(s): choice.first_row for s, choice in self.by_shape.items()}

    @cached_property
    def digest(self) -> str:
        """A text that differs for other choices; empty where MLX multiplies all."""
        if not self:
            return ""
        named: dict[str, Any] = {
            str(s): choice.to_dict() for s, choice in self.by_shape.items()
        }
        if self.ways:
            named["ways"] = sorted(self.ways)
        return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()

    def only(self, shapes: set[Shape]) -> Choices:
        """The choices for these shapes alone."""
        own = {s: c for s, c in self.by_shape.items() if s in shapes}
        return Choices(own, self.ways)

    def with_way(self, way: str) -> Choices:
        """The same, with another way to run layers."""
        return Choices(self.by_shape, self.ways | {way})


# MLX multiplies everything.
STOCK = Choices()
