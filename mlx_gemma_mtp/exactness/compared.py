"""What an exactness probe has compared so far.

A probe that has no time left goes on from here, in this process or in another one. What
is here is no verdict: that takes every comparison. It knows nothing of models, nor of
which comparisons there are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import mlx.core as mx

from ..drafting.saved_numbers import numbers
from .verdict import PLAIN_ROWS

_FORM = 2  # of the dictionary
_MOST = 1e9  # of any of its numbers; more is damage
_MOST_KEPT = 200  # of names and of times; a probe has some thirty
_TIMES_KEPT = 50  # a slow machine's probe goes through many processes


@dataclass(frozen=True)
class Decoded:
    """Logits and hidden states behind consecutive tokens, [B, n, V] and [B, n, H]."""

    logits: mx.array
    hidden: mx.array

    def has_bytes_of(self, other: Decoded) -> bool:
        """Whether both have the same bytes behind the tokens that both have."""
        pairs = ((self.logits, other.logits), (self.hidden, other.hidden))
        return all(_same_bytes(*_shared(a, b)) for a, b in pairs)

    def difference(self, other: Decoded) -> float:
        """Largest difference of a logit behind the tokens that both have."""
        a, b = _shared(self.logits, other.logits)
        difference = mx.abs(a.astype(mx.float32) - b.astype(mx.float32))
        return cast(float, difference.max().item())


@dataclass
class Compared:
    """What was compared, by the names of the comparisons.

    Attributes:
        equal: For each comparison the entries of ``PLAIN_ROWS`` whose plain rounds gave
            the same bytes.
        max_difference: Largest difference of a logit so far.
        plain_s: What plain rounds of so many rows took, seconds.
        num_passes: Forward passes of the target so far.
        seconds: What they took, compilation included.
        place: Where ``plain`` was decoded.
        plain: What blocks are compared with there, by rows of a plain round; it is in
            memory only.
    """

    equal: dict[str, tuple[int, ...]] = field(default_factory=dict)
    max_difference: float = 0.0
    plain_s: dict[int, list[float]] = field(
        default_factory=lambda: {rows: [] for rows in PLAIN_ROWS}
    )
    num_passes: int = 0
    seconds: float = 0.0
    place: str = ""
    plain: dict[int, Decoded] = field(default_factory=dict)

    def add(self, name: str, found: Decoded) -> None:
        """Compare what another way to decode gave with plain rounds.

        Args:
            name: Of the comparison.
            found: What it gave, at ``place``.
        """
        self.max_difference = max(self.max_difference, self.plain[1].difference(found))
        self.equal[name] = tuple(
            rows for rows, plain in self.plain.items() if plain.has_bytes_of(found)
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything but arrays, as JSON takes it."""
        return {
            "form": _FORM,
            "equal": {name: list(rows) for name, rows in dict(self.equal).items()},
            "max_difference": self.max_difference,
            "plain_s": {
                str(rows): times[-_TIMES_KEPT:] for rows, times in self.plain_s.items()
            },
            "num_passes": self.num_passes,
            "seconds": self.seconds,
        }

    @classmethod
    def from_dict(cls, values: Any) -> Compared:
        """What ``to_dict`` gave.

        Raises:
            ValueError: It gave something else.
        """
        numbers(values, "form", 1, low=_FORM, high=_FORM)
        (max_difference,) = numbers(values, "max_difference", 1, low=0, high=_MOST)
        (num_passes,) = numbers(values, "num_passes", 1, low=0, high=_MOST)
        (seconds,) = numbers(values, "seconds", 1, low=0, high=_MOST)
        equal = _equal(values.get("equal"))
        plain_s = {rows: _times(values.get("plain_s"), rows) for rows in PLAIN_ROWS}
        if equal and not all(plain_s.values()):
            raise ValueError("plain_s must be there for what was compared: got none")
        return cls(
            equal,
            max_difference,
            plain_s,
            int(num_passes),
            seconds,
        )


def _equal(values: object) -> dict[str, tuple[int, ...]]:
    """What comparisons found, as it was kept.

    Raises:
        ValueError: It is something else.
    """
    if not isinstance(values, dict) or len(values) > _MOST_KEPT:
        raise ValueError(f"equal must be rows by comparison: got {values!r:.80}")
    for rows in values.values():
        if not isinstance(rows, list) or not all(
            type(row) is int and row in PLAIN_ROWS for row in rows
        ):
            raise ValueError(f"equal must be rows by comparison: got {rows!r:.80}")
    return {str(name): tuple(rows) for name, rows in values.items()}


def _times(values: object, rows: int) -> list[float]:
    """What plain rounds took, as it was kept.

    Raises:
        ValueError: It is something else.
    """
    times = values.get(str(rows)) if isinstance(values, Mapping) else None
    if not isinstance(times, list) or len(times) > _MOST_KEPT:
        raise ValueError(f"plain_s must be times by rows: got {values!r:.80}")
    return [
        numbers({"plain_s": time}, "plain_s", 1, low=0, high=_MOST)[0] for time in times
    ]


def _shared(a: mx.array, b: mx.array) -> tuple[mx.array, mx.array]:
    """What stands behind the tokens that both have."""
    num_tokens = min(a.shape[1], b.shape[1])
    return a[:, :num_tokens], b[:, :num_tokens]


def _same_bytes(a: mx.array, b: mx.array) -> bool:
    words = {2: mx.uint16, 4: mx.uint32}[a.dtype.size]
    a, b = (mx.contiguous(array).view(words) for array in (a, b))
    return cast(bool, mx.array_equal(a, b).item())
