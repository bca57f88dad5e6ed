"""Which row sits where in the batch, and what the rounds must know of it.

A compiled round has a fixed number of seats. A row that has ended keeps its seat, which
is frozen, until another one needs it; an empty seat is computed and never seen. Knows
nothing of models, caches or rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx

from .row import Row
from .sampling import SamplingRule
from .state import RowSettings, row_settings
from .stats import joined_rules

# Few numbers of seats, so that few rounds are traced; beyond them multiples of 8.
_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)


def seats_for(num_rows: int) -> int:
    """The number of seats for so many rows."""
    return next((s for s in _SIZES if s >= num_rows), -(-num_rows // 8) * 8)


class Seats:
    """The seats of a batch.

    Args:
        near_tie: See ``SamplingRule``.

    Attributes:
        rows: Who sits where; None for a seat that was never taken.
        settings: What the next round must know of them.
    """

    settings: RowSettings

    def __init__(self, *, near_tie: float | None = None) -> None:
        self.rows: list[Row | None] = []
        self._first_positions: dict[Row, int] = {}
        self._near_tie = near_tie
        self._rule: SamplingRule | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def live(self) -> list[Row]:
        """The rows that have not ended."""
        return [row for row in self.rows if row is not None and row.is_live]

    @property
    def taken(self) -> list[int]:
        """The seats of the live rows."""
        return [i for i, row in enumerate(self.rows) if row is not None and row.is_live]

    @property
    def rule_names(self) -> str:
        """The rules of the live rows, in words."""
        return joined_rules(sorted({row.request.rule for row in self.live}))

    def free_seat(self) -> int | None:
        """A seat that nobody needs; None where there is none."""
        taken = set(self.taken)
        return next((i for i in range(len(self.rows)) if i not in taken), None)

    def seat_of(self, row: Row) -> int | None:
        """Where a row sits; None where it does not."""
        return self.rows.index(row) if row in self.rows else None

    def arrange(self, rows: Sequence[Row | None]) -> None:
        """Take other seats, as many as there are entries."""
        self.rows = list(rows)
        if self.live:
            self.update()

    def sit(self, row: Row, seat: int, *, first_position: int) -> None:
        """Let a row take a seat.

        Args:
            row: The row.
            seat: Which seat.
            first_position: The oldest position that its rings hold keys for.
        """
        self.rows[seat] = row
        self._first_positions[row] = first_position
        self.update()

    def first_position(self, row: Row) -> int:
        """The oldest position that a row's rings hold keys for."""
        return self._first_positions[row]

    def clear(self) -> None:
        """Send everybody away, and forget what they asked for."""
        self.rows, self._first_positions, self._rule = [], {}, None

    def update(self) -> None:
        """Let the settings follow the rows, after one has joined or ended."""
        present = [row for row in self.rows if row is not None]
        self._first_positions = {row: self._first_positions[row] for row in present}
        # An empty seat must ask for nothing that no row asks for.
        stand_in = next((row for row in present if row.is_live), present[0])
        rows = [stand_in if row is None else row for row in self.rows]
        counts = [row.request.num_logprobs for row in rows]
        settings = row_settings(
            [row.request.sampling for row in rows],
            is_host=[row.request.is_host for row in rows],
            num_logprobs=max((c for c in counts if c is not None), default=None),
            near_tie=self._near_tie,
            max_drafts=[row.request.max_draft_tokens for row in rows],
        )
        # Once asked for, an operation stays: as rows come and go, few rules are traced.
        rule = settings.rule if self._rule is None else settings.rule.joined(self._rule)
        rule = replace(rule, has_host=any(row.request.is_host for row in self.live))
        self._rule = rule
        self.settings = replace(
            settings,
            rule=rule,
            is_active=mx.array([r is not None and r.is_live for r in self.rows]),
            first_position=mx.array(
                [self._first_positions[row] for row in rows], dtype=mx.int32
            ),
        )
