"""Reading saved numbers back. Knows nothing of what they mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def numbers(data: Any, key: str, count: int, *, low: float, high: float) -> list[float]:
    """The numbers that a mapping has under a key, as a list; a lone one bare.

    Raises:
        ValueError: There are not `count` of them, all within low..high.
    """
    value = data.get(key) if isinstance(data, Mapping) else None
    values = [value] if count == 1 else value
    if not isinstance(values, list) or len(values) != count:
        raise ValueError(f"{key} must be {count} numbers: got {value!r:.80}")
    for number in values:
        is_number = isinstance(number, (int, float)) and not isinstance(number, bool)
        if not (is_number and low <= number <= high):
            raise ValueError(f"{key} must be within {low}..{high}: got {number!r:.80}")
    return [float(number) for number in values]
