"""The batch: which row sits where, its slabs, and what rounds must know of it.

A compiled round has a fixed number of seats. A row that has ended keeps its seat, which
is frozen, until another row needs it; an empty seat is computed and never seen. Knows
nothing of drafts, of rounds or of when rows come and go.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import mlx.core as mx

from ..cache.prompt import PrefillCache, insert_row, oldest_kept, take_row
from ..cache.slabs import SlabLayout, resize
from ..models.target import Prefilled
from ..sampling.graph import SamplingGraph
from .capacity import Room
from .sequence import Row
from .state import (
    RoundState,
    RowSettings,
    empty_state,
    row_settings,
    with_ends,
    with_row,
    with_rows,
)
from .stats import joined_rules

# Few numbers of seats, so that few rounds are traced; beyond them multiples of 8.
_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)


def seats_for(num_rows: int) -> int:
    """The number of seats for so many rows."""
    return next((s for s in _SIZES if s >= num_rows), -(-num_rows // 8) * 8)


class Seats:
    """The seats of a batch.

    Args:
        layout: Of the slabs.
        reserved: Rows that have a seat each from the start; ``()`` where rows come and
            go.
        is_fixed: See ``Room``.
        max_kv_bytes: Most memory of the slabs of rows that come and go, in which those
            that are let in fit at their longest; None for no limit.

    Attributes:
        rows: Who sits where; None for a seat that was never taken.
        state: What the last round left; None where nobody sits, and while a round
            stands before its commit. Whoever runs a round takes it out, so that slabs
            are written in place.
        settings: What the next round must know of the rows.
        room: How many slots there must be.
    """

    settings: RowSettings

    def __init__(
        self,
        layout: SlabLayout,
        *,
        reserved: Sequence[Row] = (),
        is_fixed: bool = False,
        max_kv_bytes: int | None = None,
    ) -> None:
        self.rows: list[Row | None] = []
        self.state: RoundState | None = None
        self.room = Room(list(reserved), is_fixed=is_fixed, is_open=not reserved)
        self._max_kv_bytes = max_kv_bytes
        self._layout = layout
        self._num_reserved = len(reserved)
        self._first_positions: dict[Row, int] = {}
        self._graph: SamplingGraph | None = None
        self._has_left = False  # rows, since seats were last counted

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def live(self) -> list[Row]:
        """The rows that have not ended."""
        return [row for row in self.rows if row is not None and row.is_live]

    @property
    def rule_names(self) -> str:
        """The rules of the live rows, in words."""
        return joined_rules(sorted({row.request.accept_rule for row in self.live}))

    @property
    def capacity(self) -> int:
        """Slots of the full layers."""
        assert self.state is not None
        return self._layout.capacity(self.state.slabs)

    @property
    def num_bytes(self) -> int:
        """Memory of the slabs."""
        if self.state is None:
            return 0
        return self._layout.num_bytes(len(self), self.capacity)

    def clear(self) -> None:
        """Send everybody away, and forget what they asked for."""
        if self.state is not None:
            self.state = None
            mx.clear_cache()
        self.rows, self._first_positions, self._graph = [], {}, None
        self.room.rows = []

    def sit(self, row: Row, filled: Prefilled, last_token: int) -> None:
        """Give a seat to a row whose prompt was read.

        Args:
            row: The row.
            filled: What reading its prompt gave; the caches are emptied.
            last_token: The token that was chosen behind it.
        """
        first_position = oldest_kept(filled.caches, self._layout)
        seat = self._free_seat(row, filled.hidden)
        state, self.state = self.state, None
        assert state is not None
        insert_row(state.slabs, self._layout, seat, filled.caches)
        self.state = with_row(
            state,
            seat,
            last_token=last_token,
            hidden=filled.hidden,
            offset=row.offset,
        )
        self.rows[seat] = row
        self._first_positions[row] = first_position
        self.update()
        self._start()
        mx.clear_cache()

    def leave(self) -> None:
        """Some rows have ended: let settings and room follow.

        A round that was queued before that was known has moved them on. They go back,
        so that all later rounds write where that one did, over no key of their windows.
        """
        self._has_left = True
        if not self.live:
            return
        if self.state is not None:
            self.state = with_ends(
                self.state,
                {
                    seat: ((row.emitted or [0])[-1], row.offset)
                    for seat, row in enumerate(self.rows)
                    if row is not None and not row.is_live
                },
            )
            self._start()
        self.update()

    def fit(self, in_flight: Sequence[int], *, may_shrink: bool) -> bool:
        """Before a round is queued: no slot too few and, if asked, none too many.

        Args:
            in_flight: Drafts of each round in flight.
            may_shrink: Whether seats and slots that nobody needs are given up.

        Returns:
            Whether something has changed.
        """
        num_seats, capacity = len(self), self.capacity
        if may_shrink and self._has_left and not self._num_reserved:
            num_seats, capacity = self._shrunk(num_seats, capacity)
            self._has_left = False
        if self.room.must_grow(capacity, in_flight):
            capacity = self.room.grown(capacity)
        return self._resize(num_seats, capacity)

    def take(self, row: Row, num_tokens: int) -> Iterator[PrefillCache] | None:
        """Caches that hold a row's first tokens; None where it does not sit here.

        Args:
            row: The row.
            num_tokens: How many tokens; the newest of them must have been written
                within the last two rounds in which the row was live, or since.
        """
        if row not in self.rows or self.state is None:
            return None
        return take_row(
            self.state.slabs,
            self._layout,
            self.rows.index(row),
            num_tokens=num_tokens,
            first_position=self._first_positions[row],
        )

    def update(self) -> None:
        """Let settings and room follow the rows."""
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
            max_drafts=[row.request.max_draft_tokens for row in rows],
        )
        # What costs little stays: as rows come and go, few graphs are traced.
        graph = settings.graph
        if self._graph is not None:
            graph = graph.joined(self._graph)
        graph = replace(graph, has_host=any(row.request.is_host for row in self.live))
        self._graph = graph
        self.settings = replace(
            settings,
            graph=graph,
            is_active=mx.array([r is not None and r.is_live for r in self.rows]),
            first_position=mx.array(
                [self._first_positions[row] for row in rows], dtype=mx.int32
            ),
        )
        if not self._num_reserved:
            self.room.rows = self.live

    def _free_seat(self, row: Row, hidden: mx.array) -> int:
        """A seat for a row, and slots enough; there may be none yet of either."""
        if not self._num_reserved:
            self.room.rows = [*self.live, row]
        needed = self.room.initial_capacity()
        if self.state is None:
            num_seats = self._num_reserved or seats_for(1)
            slabs = self._layout.allocate(num_seats, needed)
            self.state = empty_state(slabs, hidden)
            self.rows = [None] * num_seats
        elif not self._num_reserved:
            num_seats = max(len(self), seats_for(len(self.room.rows)))
            self._resize(num_seats, max(self.capacity, needed))
        free = [i for i, r in enumerate(self.rows) if r is None or not r.is_live]
        # The caches of a row that has ended can be had as long as it keeps its seat.
        return min(free, key=lambda seat: self.rows[seat] is not None)

    def _shrunk(self, num_seats: int, capacity: int) -> tuple[int, int]:
        """Seats and slots where rows have left: the same, unless half is enough.

        Every other number is a copy of the slabs, and perhaps a trace.
        """
        seats, needed = seats_for(len(self.live)), self.room.initial_capacity()
        return (
            seats if 2 * seats <= num_seats else num_seats,
            needed if 2 * needed <= capacity else capacity,
        )

    def _within_budget(self, num_seats: int, capacity: int) -> tuple[int, int]:
        """Seats and slots; no more than rows need where there is no memory for more."""
        most = self._max_kv_bytes
        if most is None or self._layout.num_bytes(num_seats, capacity) <= most:
            return num_seats, capacity
        return seats_for(len(self.room.rows)), self.room.initial_capacity()

    def _resize(self, num_seats: int, capacity: int) -> bool:
        """Change seats and slots; live rows keep what they have.

        Returns:
            Whether something has changed.
        """
        if not self._num_reserved:
            num_seats, capacity = self._within_budget(num_seats, capacity)
        if (num_seats, capacity) == (len(self), self.capacity):
            return False
        state, self.state = self.state, None
        assert state is not None  # no round is between verify and commit
        taken = None
        if not self._num_reserved:
            taken = [i for i, r in enumerate(self.rows) if r is not None and r.is_live]
            num_empty = num_seats - len(taken)
            self.rows = [*(self.rows[i] for i in taken), *[None] * num_empty]
            # An empty seat goes on as a copy of the first: any row will do.
            taken += [*taken, 0][:1] * num_empty
            state = with_rows(state, taken)
        slabs = list(state.slabs)
        state = replace(state, slabs=[])
        resize(slabs, self._layout, capacity, rows=taken)
        mx.clear_cache()
        self.state = replace(state, slabs=slabs)
        if self.live:
            self.update()
        self._start()
        return True

    def _start(self) -> None:
        """Begin to compute the state: whoever goes on may be another thread.

        What is lazy can only be evaluated by the thread that has asked for it.
        """
        assert self.state is not None
        mx.async_eval(self.state.arrays)
