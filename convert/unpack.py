"""Packed rows in full: what is read beside a block of them, and their values.

Knows nothing of files or of what becomes of the values.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from .plan import Block, Packing, Parameter
from .reader import Reader


def read_beside(reader: Reader, parameter: Parameter, block: Block) -> list[mx.array]:
    """Return what the rows of a packed block need beside their words.

    Args:
        reader: The files.
        parameter: Whose block; one that is not packed needs nothing.
        block: Rows of its words.

    Returns:
        Scales and biases of these rows, or scales and that of their expert, [1, 1].

    Raises:
        CheckpointError: The file cannot be read or is cut off.
    """
    found = []
    for part in parameter.beside:
        where = block
        if part.rows.num_rows < parameter.rows.num_rows:
            expert = block.row * part.rows.num_rows // parameter.rows.num_rows
            where = Block(expert, expert, 1)
        found.append(reader.read_rows(part, where))
    return found


def unpacked(words: mx.array, packing: Packing, beside: Sequence[mx.array]) -> mx.array:
    """Return the values of packed rows, [num_rows, num_columns], in MLX's own type.

    Args:
        words: Packed rows, uint32 [num_rows, num_words].
        packing: How they are packed.
        beside: As from ``read_beside()``.
    """
    packed, scales = packing.format, beside[0]
    last = beside[1] if len(beside) > 1 else None
    biases, global_scale = last, None
    if packed.has_global_scale and last is not None:
        biases, global_scale = None, last.reshape(())
    return mx.dequantize(
        words,
        scales,
        biases,
        packed.group_size,
        packed.bits,
        packed.mode,
        global_scale,
    )
