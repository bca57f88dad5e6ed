"""Which part of a layer each of several machines holds: whole numbers, no arrays.

A machine is a rank of ``size`` ranks, 0 to size - 1. Every part is contiguous and the
parts tile the whole, in the order of ranks. Widths are cut between groups of quantized
weights, so that no group is on two machines. Heads of queries stay with the head of
keys that they read.

Knows nothing of weights, of files or of MLX.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise

from ..errors import RequestError

SIZES = (1, 2, 4)  # machines that a target is split over
_UNIT = 64  # columns that stay together in wide matrices that are not quantized


@dataclass(frozen=True)
class Heads:
    """The heads of a layer that a rank holds.

    Attributes:
        queries: Heads of queries, and of what the output projection reads.
        kv: Heads of keys and values that these queries read.
    """

    queries: range
    kv: range


def check_size(size: int) -> None:
    """Check a number of machines.

    Raises:
        RequestError: A target is not split over so many.
    """
    if size not in SIZES:
        raise RequestError(
            f"number of machines must be 1, 2 or 4: got {size}. Launch so many."
        )


def split(width: int, size: int, unit: int = 1) -> tuple[range, ...]:
    """Cut a width into a part for each rank.

    Where units do not divide, the first ranks hold one more: 11 units over 4 ranks are
    3, 3, 3 and 2.

    Args:
        width: Rows or columns of a matrix, a multiple of ``unit``.
        size: Number of ranks.
        unit: What stays whole, such as a group of quantized weights.

    Returns:
        The rows or columns of rank 0, of rank 1 and so on.

    Raises:
        RequestError: No such number of machines, the width is no multiple, or there is
            not a unit for each rank.
    """
    check_size(size)
    units, rest = divmod(width, unit)
    if rest:
        raise RequestError(
            f"a width to split must be a multiple of {unit}: got {width}. Use one "
            "machine, or other groups."
        )
    if units < size:
        raise RequestError(
            f"number of machines must be at most {units}, as a width of {width} has "
            f"{units} parts of {unit}: got {size}. Use fewer."
        )
    each, more = divmod(units, size)
    sizes = (unit * (each + (rank < more)) for rank in range(size))
    return tuple(
        range(start, stop) for start, stop in pairwise(accumulate(sizes, initial=0))
    )


def unit_of(width: int, size: int, group_size: int | None = None) -> int:
    """How many rows or columns of a width stay together.

    Args:
        width: Rows or columns of a matrix.
        size: Number of ranks.
        group_size: Quantized weights with one scale along the width; None for a matrix
            that is not quantized.
    """
    if group_size is not None:
        return group_size
    units, rest = divmod(width, _UNIT)
    return _UNIT if units >= size and not rest else 1


def check_groups(width: int, group_size: int | None) -> None:
    """Check that heads of a rank are whole groups of the matrix behind them.

    Args:
        width: Columns of the matrix that a rank holds, the same on every rank.
        group_size: As of ``unit_of``.

    Raises:
        RequestError: A group is on two machines.
    """
    if group_size is not None and width % group_size:
        raise RequestError(
            f"a machine's heads must be whole groups of {group_size} columns: got "
            f"{width}. Use fewer machines, or smaller groups."
        )


def heads(num_heads: int, num_kv_heads: int, rank: int, size: int) -> Heads:
    """The heads of a layer that a rank holds.

    Heads of keys are split where they divide. Where there are fewer than ranks, several
    ranks hold the same one.

    Args:
        num_heads: Heads of queries, a multiple of ``num_kv_heads``.
        num_kv_heads: Heads of keys and values.
        rank: Which rank.
        size: Number of ranks.

    Raises:
        RequestError: No such number of machines, or the heads do not split evenly.
    """
    check_size(size)
    if num_heads % size:
        raise RequestError(
            f"number of machines must divide the {num_heads} heads of queries: got "
            f"{size}. Use fewer."
        )
    each = num_heads // size
    queries = range(rank * each, (rank + 1) * each)
    if num_kv_heads % size == 0:
        kv_each = num_kv_heads // size
        return Heads(queries, range(rank * kv_each, (rank + 1) * kv_each))
    if size % num_kv_heads:
        raise RequestError(
            f"number of machines must divide the {num_kv_heads} heads of keys, or be a "
            f"multiple of them: got {size}. Use fewer."
        )
    first = rank * num_kv_heads // size
    return Heads(queries, range(first, first + 1))
