"""Reads rows of a checkpoint's tensors with plain reads at their place.

Knows nothing of what becomes of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_gemma_mtp.checkpoints.checkpoint import DTYPE_BITS
from mlx_gemma_mtp.errors import CheckpointError

from .plan import Block, Parameter, PartPlan

_MAX_READ = 1 << 30  # a Mac refuses reads of 2 GB
FLOATS = {"F32": mx.float32, "BF16": mx.bfloat16, "F16": mx.float16}
# NumPy has no bfloat16, so values travel as words of their width.
WORDS: dict[int, Any] = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.int64}


class Reader:
    """A checkpoint's files, open. Reads may come from several threads.

    Args:
        descriptors: File to its descriptor.
    """

    def __init__(self, descriptors: dict[Path, int]) -> None:
        self._descriptors = descriptors

    def read_bytes(self, parameter: Parameter, block: Block) -> bytes:
        """Return the rows of a block as they are stored.

        Args:
            parameter: What to read of.
            block: Which of its rows.

        Raises:
            CheckpointError: The file cannot be read or is cut off.
        """
        source = parameter.source
        row_bytes = parameter.rows.num_columns * DTYPE_BITS[source.dtype] // 8
        start = source.offsets[0] + block.source_row * row_bytes
        num_bytes = block.num_rows * row_bytes
        try:
            data = _read_at(self._descriptors[source.file], num_bytes, start)
        except OSError as error:
            raise CheckpointError(
                f"{parameter.tensor} in {source.file} must be readable: got "
                f"{error.strerror}. Check the disk, or download it again."
            ) from error
        if len(data) < num_bytes:
            raise CheckpointError(
                f"{source.file} must hold all of {parameter.tensor}: got a file that "
                "is cut off. Download or copy it again."
            )
        return data

    def read_rows(self, parameter: Parameter, block: Block) -> mx.array:
        """Return the rows of a block, [num_rows, num_columns].

        Args:
            parameter: What to read of.
            block: Which of its rows.

        Raises:
            CheckpointError: The file cannot be read or is cut off.
        """
        dtype = parameter.source.dtype
        words = np.frombuffer(
            self.read_bytes(parameter, block), WORDS[DTYPE_BITS[dtype]]
        )
        values = mx.array(words)
        if dtype in FLOATS:
            values = values.view(FLOATS[dtype])
        return values.reshape(-1, parameter.rows.num_columns)

    def read(self, parameter: Parameter) -> mx.array:
        """Return a whole parameter in its own shape.

        Args:
            parameter: What to read; one that is not to be packed.

        Raises:
            CheckpointError: The file cannot be read or is cut off.
        """
        blocks = parameter.rows.blocks(max(1, parameter.rows.run_length))
        rows = [self.read_rows(parameter, block) for block in blocks]
        return mx.concatenate(rows).reshape(parameter.arrays[0].shape)


@contextmanager
def open_reader(plan: PartPlan) -> Iterator[Reader]:
    """Open the files that a plan reads.

    Args:
        plan: A part's plan.

    Raises:
        CheckpointError: One cannot be opened.
    """
    with ExitStack() as stack:
        descriptors = {}
        for path in {
            part.source.file for p in plan.parameters for part in (p, *p.beside)
        }:
            try:
                descriptors[path] = os.open(path, os.O_RDONLY)
            except OSError as error:
                raise CheckpointError(
                    f"{path} must be readable: got {error.strerror}. Check the path "
                    "and its permissions."
                ) from error
            stack.callback(os.close, descriptors[path])
        yield Reader(descriptors)


def _read_at(descriptor: int, num_bytes: int, start: int) -> bytes:
    """Read at a place of a file; fewer bytes only where the file ends."""
    parts: list[bytes] = []
    done = 0
    while done < num_bytes:  # a limit of the system can cut a read short
        part = os.pread(descriptor, min(num_bytes - done, _MAX_READ), start + done)
        if not part:
            break
        parts.append(part)
        done += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)
