"""How far two sequences begin alike. Knows nothing of what they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def num_common(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many elements two sequences begin with in common.

    Halves are compared as wholes: of two long prompts that takes no loop in Python.

    Args:
        one: A list or a text.
        other: Of the same type.
    """
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
