"""Rows that wait: for a seat, for memory, and for their prompts to be read.

Rows are let in in the order they came, and only where all rows fit into memory at their
longest, so none that runs is ever sent away. Prompts that were begun are read in turn,
and short ones pass long ones. Knows nothing of rounds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from ..cache.slabs import SlabLayout
from ..errors import RequestError
from .batch import seats_for
from .capacity import longest_text, most_slots
from .prefill import Prefill
from .sequence import Row

# Prompts that are read side by side; each holds the caches of what was read of it.
# Short ones hold next to nothing and are not counted.
_MAX_READING = 8
SHORT = 256  # tokens still to be read; they take hardly longer than one
# Short prompts that may pass before one is read in turn: half of a chunk.
MAX_PASSING = 4


@dataclass(frozen=True, eq=False)
class Waiting:
    """A row whose prompt was not read to its end."""

    row: Row
    prefill: Prefill

    @property
    def is_short(self) -> bool:
        """Whether reading the rest takes hardly longer than one token."""
        return self.prefill.num_tokens - self.prefill.num_read <= SHORT


class WaitingRows:
    """The rows that wait.

    Args:
        layout: Of the slabs.
        max_rows: Most rows that decode together; None for as many as there are.
        max_kv_bytes: Most memory of their slabs; None for no limit.
    """

    def __init__(
        self, layout: SlabLayout, *, max_rows: int | None, max_kv_bytes: int | None
    ) -> None:
        self._layout = layout
        self._max_rows = max_rows
        self._max_kv_bytes = max_kv_bytes
        self._reading: deque[Waiting] = deque()
        self._outside: deque[Waiting] = deque()
        self._num_passed = 0  # since one was read in turn

    def __len__(self) -> int:
        return len(self._reading) + len(self._outside)

    def __iter__(self) -> Iterator[Waiting]:
        yield from self._reading
        yield from self._outside

    @property
    def num_bytes(self) -> int:
        """Memory of the prompts' caches, those that came with requests included."""
        caches = (cache for entry in self for cache in entry.prefill.caches)
        return sum(array.nbytes for cache in caches for array in cache.state)

    @property
    def longest_text(self) -> int | None:
        """Most tokens that one row may have, its prompt included; None for any."""
        if self._max_kv_bytes is None:
            return None
        return longest_text(self._layout, self._max_kv_bytes)

    def append(self, entries: Sequence[Waiting]) -> None:
        """Let rows wait behind the others: all of them, or none.

        Raises:
            RequestError: One could never fit into memory, even alone.
        """
        for entry in entries:
            self._check_fit(entry.row)
        self._outside.extend(entries)

    def find(self, row: Row) -> Waiting | None:
        """A row's entry; None where it does not wait."""
        return next((entry for entry in self if entry.row is row), None)

    def remove(self, row: Row) -> None:
        """Let a row wait no longer."""
        self._reading = deque(entry for entry in self._reading if entry.row is not row)
        self._outside = deque(entry for entry in self._outside if entry.row is not row)

    def clear(self) -> None:
        """Let nobody wait any longer."""
        self._reading.clear()
        self._outside.clear()

    def next(self, seated: Sequence[Row], paused: Collection[Row]) -> Waiting | None:
        """The row whose prompt is to be read next.

        Args:
            seated: The rows that decode.
            paused: Rows whose prompts are not to be read on for now.

        Returns:
            Its entry; None where there is none, or no seat or memory for it yet.
        """
        self._let_in(seated)
        entries = [entry for entry in self._reading if entry.row not in paused]
        short = next((entry for entry in entries if entry.is_short), None)
        long = next((entry for entry in entries if not entry.is_short), None)
        if long is None or (short is not None and self._num_passed < MAX_PASSING):
            self._num_passed += 1
            return short
        self._num_passed = 0
        self._reading.remove(long)
        self._reading.append(long)
        return long

    def _let_in(self, seated: Sequence[Row]) -> None:
        """Let rows in for which there is a seat and memory."""
        while (entry := self._next_outside()) is not None:
            inside = [*seated, *(entry.row for entry in self._reading)]
            if self._max_rows is not None and len(inside) >= self._max_rows:
                return
            if not self._fits([*inside, entry.row]):
                return
            self._outside.remove(entry)
            self._reading.append(entry)

    def _next_outside(self) -> Waiting | None:
        """The next row to let in: the first one, or the first short one."""
        num_long = sum(not entry.is_short for entry in self._reading)
        may = (e for e in self._outside if e.is_short or num_long < _MAX_READING)
        return next(may, None)

    def _fits(self, rows: Sequence[Row]) -> bool:
        """Whether rows fit into memory together, however long they become."""
        return (
            self._max_kv_bytes is None or self._most_bytes(rows) <= self._max_kv_bytes
        )

    def _most_bytes(self, rows: Sequence[Row]) -> float:
        """The most memory that rows can come to need together."""
        slots = most_slots(rows)
        if slots is None:
            return float("inf")
        return self._layout.num_bytes(seats_for(len(rows)), slots)

    def _check_fit(self, row: Row) -> None:
        """Raise if a row does not fit into memory, even alone."""
        if self._fits([row]):
            return
        assert self._max_kv_bytes is not None
        length, needed = row.last_position, self._most_bytes([row])
        size = f"{needed / 1e6:.1f} MB for {length} tokens, the prompt included"
        raise RequestError(
            "a request's keys and values must fit into "
            f"{self._max_kv_bytes / 1e6:.1f} MB: got "
            f"{'no limit of tokens' if length is None else size}. Ask for fewer "
            "tokens, or allow more memory."
        )
