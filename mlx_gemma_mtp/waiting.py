"""Rows that wait: for a seat, for memory, and for their prompts to be read.

First come, first served. A row is let in only where all rows fit into memory at their
longest, so none that runs is ever sent away. Knows nothing of rounds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from .cache import SlabLayout
from .errors import RequestError
from .prefill import Prefill
from .room import most_slots
from .row import Row
from .seats import seats_for


@dataclass(frozen=True)
class Waiting:
    """A row whose prompt was not read to its end."""

    row: Row
    prefill: Prefill


class WaitingRows:
    """The rows that wait, in order.

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
        self._entries: deque[Waiting] = deque()

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Waiting]:
        return iter(self._entries)

    def append(self, entries: Sequence[Waiting]) -> None:
        """Let rows wait behind the others: all of them, or none.

        Raises:
            RequestError: One could never fit into memory, even alone.
        """
        for entry in entries:
            self._check_fit(entry.row)
        self._entries.extend(entries)

    def find(self, row: Row) -> Waiting | None:
        """A row's entry; None where it does not wait."""
        return next((entry for entry in self._entries if entry.row is row), None)

    def remove(self, row: Row) -> None:
        """Let a row wait no longer."""
        self._entries = deque(entry for entry in self._entries if entry.row is not row)

    def clear(self) -> None:
        """Let nobody wait any longer."""
        self._entries.clear()

    def next(self, seated: Sequence[Row], paused: Collection[Row]) -> Waiting | None:
        """The row whose prompt is to be read next.

        Args:
            seated: The rows that decode.
            paused: Rows whose prompts are not to be read on for now.

        Returns:
            Its entry; None where there is none, or no seat or memory for it yet.
        """
        entries = [e for e in self._entries if e.row not in paused]
        if not entries or entries[0].prefill.num_read:  # it was let in before
            return entries[0] if entries else None
        inside = [*seated, *(e.row for e in self._entries if e.prefill.num_read)]
        if self._max_rows is not None and len(inside) >= self._max_rows:
            return None
        return entries[0] if self._fits([*inside, entries[0].row]) else None

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
