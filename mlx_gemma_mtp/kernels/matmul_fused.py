"""A few rows times several matrices in one launch, by the body of ``matmul``.

``gate_up`` has a matrix of gates beside one of values: a simdgroup computes the same
outputs of both and stores gelu(gate) * up. ``gather_gate_up`` is that for experts: each
row has chosen some of the matrices. ``gate_by`` has a gate alone, for values that are
there. ``qkv`` has up to three matrices one behind the other: a threadgroup has
outputs of one of them. A sum is added up as ``multiply`` adds it, bit by bit, so a
row's bits depend on neither M nor R here too.

This file knows nothing of the text.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from . import common, matmul
from .common import Kernel
from .matmul import (
    APART,
    GATED,
    GATED_BY,
    GATHERED,
    Form,
    default_columns,
    groups_of,
    kernel,
)

Matrix = tuple[mx.array, ...]  # weight, and scales and biases of a quantized one

GATED_COLUMNS = (1, 2)  # R that ``gate_up`` has kernels for
_MOST_ROWS_OF_TWO = 6  # beyond, registers hold one output of each matrix, modelled


def default_gated_columns(num_rows: int) -> int:
    """R of ``gate_up`` for M rows, modelled."""
    return 2 if num_rows <= _MOST_ROWS_OF_TWO else 1


def gate_up(
    x: mx.array,
    gate: Matrix,
    up: Matrix,
    *,
    form: Form,
    num_columns: int | None = None,
) -> mx.array:
    """Multiply rows by two matrices: gelu of the first product times the second.

    Products, and each result of ``nn.gelu_approx``, are rounded to the form's type, as
    MLX's operations round them one after the other.

    Args:
        x: [..., K], 1 to 9 rows in all, as for ``multiply``.
        gate: The arrays of a matrix [N, K], as for ``multiply``.
        up: Those of a matrix of the same shape.
        form: How both are stored, one that is known.
        num_columns: R of each matrix, one of ``GATED_COLUMNS``; None for the default.
            It changes no bit.

    Returns:
        [..., N] of the form's type.
    """
    rows = x.reshape(-1, x.shape[-1])
    num_rows, num_outputs = len(rows), gate[0].shape[0]
    columns = default_gated_columns(num_rows) if num_columns is None else num_columns
    assert gate[0].shape == up[0].shape, (gate[0].shape, up[0].shape)
    (y,) = matmul.launch(
        kernel(form, num_rows, 2 * columns, GATED, 2),
        [rows, *gate, *up],
        form=form,
        num_groups=groups_of(num_outputs, columns),
        output_shapes=[(num_rows, num_outputs)],
    )
    return y.reshape(*x.shape[:-1], num_outputs)


def gather_gate_up(
    x: mx.array, gate: Matrix, up: Matrix, experts: mx.array, *, form: Form
) -> mx.array:
    """Multiply each row by the matrices that it has chosen: ``gate_up`` of each.

    Rows that have chosen the same one read it one after the other.

    Args:
        x: [..., K], any number of rows; K a multiple of 8.
        gate: The arrays of matrices [E, N, K], as MLX packs them.
        up: Those of matrices of the same shape.
        experts: Which each row has chosen, uint32 [..., C], below E.
        form: How both are stored, one that is known.

    Returns:
        [..., C, N] of the form's type.
    """
    num_outputs, num_chosen = gate[0].shape[1], experts.shape[-1]
    columns = default_gated_columns(1)
    assert gate[0].shape == up[0].shape, (gate[0].shape, up[0].shape)
    (y,) = matmul.launch(
        kernel(form, 1, 2 * columns, GATHERED, 2),
        [x, *gate, *up, common.padded(experts)],
        form=form,
        num_groups=experts.size * groups_of(num_outputs, columns),
        output_shapes=[(*experts.shape, num_outputs)],
        numbers={"CHOSEN": num_chosen},
    )
    return y


def gate_by(
    x: mx.array,
    gate: Matrix,
    values: mx.array,
    *,
    form: Form,
    num_columns: int | None = None,
) -> mx.array:
    """Multiply rows by a matrix: gelu of the product times values.

    Rounded as ``gate_up`` rounds.

    Args:
        x: [..., K], 1 to 9 rows in all, as for ``multiply``.
        gate: The arrays of a matrix [N, K], as for ``multiply``.
        values: [..., N] of the form's type, 8 or more. Where they do not lie in memory
            row by row they are copied first.
        form: How the matrix is stored, one that is known.
        num_columns: R, one of ``matmul.COLUMNS``; None for the default. It changes no
            bit.

    Returns:
        [..., N] of the form's type.
    """
    rows = x.reshape(-1, x.shape[-1])
    num_rows, num_outputs = len(rows), gate[0].shape[0]
    columns = default_columns(num_rows) if num_columns is None else num_columns
    assert values.shape == (*x.shape[:-1], num_outputs), (values.shape, x.shape)
    (y,) = matmul.launch(
        kernel(form, num_rows, columns, GATED_BY),
        [rows, *gate, values],
        form=form,
        num_groups=groups_of(num_outputs, columns),
        output_shapes=[(num_rows, num_outputs)],
    )
    return y.reshape(values.shape)


def qkv(
    x: mx.array,
    matrices: Sequence[Matrix],
    *,
    form: Form,
    num_columns: int | None = None,
) -> list[mx.array]:
    """Multiply rows by two or three matrices of one width.

    Args:
        x: [..., K], 1 to 9 rows in all, as for ``multiply``.
        matrices: The arrays of each matrix [N, K], as for ``multiply``; N may differ.
        form: How all are stored, one that is known.
        num_columns: R, one of ``matmul.COLUMNS``; None for the default. It changes no
            bit.

    Returns:
        [..., N] for each matrix, of the form's type.
    """
    rows = x.reshape(-1, x.shape[-1])
    num_rows = len(rows)
    columns = default_columns(num_rows) if num_columns is None else num_columns
    sizes = [matrix[0].shape[0] for matrix in matrices]
    assert {matrix[0].shape[1] for matrix in matrices} == {matrices[0][0].shape[1]}
    outputs = matmul.launch(
        kernel(form, num_rows, columns, APART, len(matrices)),
        [rows, *(array for matrix in matrices for array in matrix)],
        form=form,
        num_groups=sum(groups_of(size, columns) for size in sizes),
        output_shapes=[(num_rows, size) for size in sizes],
    )
    return [
        y.reshape(*x.shape[:-1], size) for y, size in zip(outputs, sizes, strict=True)
    ]


def kernels(form: Form, num_rows: int) -> list[Kernel]:
    """Those that rounds take for M rows; of experts for one row each."""
    columns = default_columns(num_rows)
    gathered = [kernel(form, 1, 2 * default_gated_columns(1), GATHERED, 2)]
    return [
        *(gathered if num_rows == 1 else []),
        kernel(form, num_rows, 2 * default_gated_columns(num_rows), GATED, 2),
        kernel(form, num_rows, columns, GATED_BY),
        *(kernel(form, num_rows, columns, APART, count) for count in (2, 3)),
    ]
