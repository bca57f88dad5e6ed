"""The batch: which sequence sits where, its slabs, what rounds must know of it.

A compiled round has a fixed number of seats. A sequence that has ended keeps its seat,
which is frozen, until another one needs it; an empty seat is computed and never seen.
Knows nothing of drafts, of rounds or of when sequences come and go.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

import mlx.core as mx

from ..cache.prompt import PrefillCache, insert_row, oldest_kept, take_row
from ..cache.slabs import SlabLayout, resize
from ..constants import DRAFTER
from ..models.target import Prefilled
from ..sampling.graph import SamplingGraph
from .capacity import BatchPolicy, Capacity
from .lookup import empty_text, resized_text, searched_places
from .sequence import TokenSequence
from .sources import looking_up
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


class Batch:
    """The seats of sequences that are decoded together.

    Args:
        layout: Of the slabs.
        policy: How many seats and slots there are.
        has_text: Whether the tokens of every row stand beside its keys and values.

    Attributes:
        sequences: Who sits where; None for a seat that was never taken.
        state: What the last round left; None where nobody sits, and while a round
            stands before its commit. Whoever goes on from it takes it out: see
            ``take_state``.
        settings: What the next round must know of the sequences.
        rules: The rules that judge their drafts, in words.
        capacity: How many slots there must be.
        policy: As given.
        has_text: As given.
    """

    settings: RowSettings

    def __init__(
        self, layout: SlabLayout, policy: BatchPolicy, *, has_text: bool = False
    ) -> None:
        self.policy = policy
        self.has_text = has_text
        self.sequences: list[TokenSequence | None] = []
        self.state: RoundState | None = None
        self.rules = ""
        self.capacity = Capacity(policy)
        self._layout = layout
        self._expected: Sequence[TokenSequence] = ()
        self._first_positions: dict[TokenSequence, int] = {}
        self._graph: SamplingGraph | None = None
        self._has_freed = False  # seats, since they were last counted
        self._num_searched = 0  # places of each text before its first token

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def live(self) -> list[TokenSequence]:
        """The sequences that have not ended."""
        return [s for s in self.sequences if s is not None and s.is_live]

    @property
    def num_slots(self) -> int:
        """Slots of the full layers."""
        assert self.state is not None
        return self._layout.capacity(self.state.slabs)

    @property
    def num_bytes(self) -> int:
        """Memory of the slabs."""
        if self.state is None:
            return 0
        text = 0 if self.state.text is None else self.state.text.nbytes
        return self._layout.num_bytes(len(self), self.num_slots) + text

    def expect(self, sequences: Sequence[TokenSequence]) -> None:
        """These will sit here, and nobody else.

        There are slots for all of them from the start, and rounds are named by all of
        their rules to the end.
        """
        self._expected = sequences

    def take_state(self) -> RoundState:
        """What the last round left, for the one who goes on from it.

        The batch has no reference to it any more: the slabs are written in place, once
        the caller has dropped its own.
        """
        state, self.state = self.state, None
        assert state is not None  # no round is between verify and commit
        return state

    def clear(self) -> None:
        """Send everybody away, and forget what they asked for."""
        if self.state is not None:
            self.state = None
            mx.clear_cache()
        self.sequences, self._first_positions, self._graph = [], {}, None
        self.capacity.sequences = self._expected = ()

    def insert(
        self, sequence: TokenSequence, filled: Prefilled, last_token: int
    ) -> None:
        """Give a seat to a sequence whose prompt was read.

        Args:
            sequence: The sequence.
            filled: What reading its prompt gave; the caches are emptied.
            last_token: The token that was chosen behind it.
        """
        first_position = oldest_kept(filled.caches, self._layout)
        if self.has_text and sequence.request.draft_source != DRAFTER:
            sequence.look_up()
        seat = self._free_seat(sequence, filled.hidden)
        state = self.take_state()
        insert_row(state.slabs, self._layout, seat, filled.caches)
        self.state = with_row(
            state,
            seat,
            last_token=last_token,
            hidden=filled.hidden,
            offset=sequence.offset,
            tokens=sequence.known,
            before=sequence.searched,
        )
        self.sequences[seat] = sequence
        self._first_positions[sequence] = first_position
        self.update()
        self._start()
        mx.clear_cache()

    def free(self) -> None:
        """Some have ended: let settings and capacity follow.

        A round that was queued before that was known has moved them on. They go back,
        so that all later rounds write where that one did, over no key of their windows.
        """
        self._has_freed = True
        if not self.live:
            return
        if self.state is not None:
            self.state = with_ends(
                self.state,
                {
                    seat: ((sequence.emitted or [0])[-1], sequence.offset)
                    for seat, sequence in enumerate(self.sequences)
                    if sequence is not None and not sequence.is_live
                },
            )
            self._start()
        self.update()

    def reserve(self, in_flight: Collection[int], *, is_awaited: bool) -> bool:
        """Before a round is queued: no slot too few, and none too many for long.

        Args:
            in_flight: Drafts of each round in flight.
            is_awaited: Whether others wait for seats: none is given up then.

        Returns:
            Whether something has changed.
        """
        num_seats, num_slots = len(self), self.num_slots
        if self.policy.may_shrink and self._has_freed and not is_awaited:
            num_seats, num_slots = self._shrunk(num_seats, num_slots)
            self._has_freed = False
        if self.capacity.must_grow(num_slots, in_flight):
            num_slots = self.capacity.grown(num_slots)
        return self._resize(num_seats, num_slots)

    def extract(
        self, sequence: TokenSequence, num_tokens: int
    ) -> Iterator[PrefillCache] | None:
        """Caches that hold a sequence's first tokens; None where it has no seat.

        Args:
            sequence: The sequence.
            num_tokens: How many tokens; the newest of them must have been written
                within the last two rounds in which it was live, or since.
        """
        if sequence not in self.sequences or self.state is None:
            return None
        return take_row(
            self.state.slabs,
            self._layout,
            self.sequences.index(sequence),
            num_tokens=num_tokens,
            first_position=self._first_positions[sequence],
        )

    def update(self) -> None:
        """Let settings and capacity follow the sequences."""
        present = [s for s in self.sequences if s is not None]
        self._first_positions = {s: self._first_positions[s] for s in present}
        # An empty seat must ask for nothing that no sequence asks for.
        stand_in = next((s for s in present if s.is_live), present[0])
        seated = [stand_in if s is None else s for s in self.sequences]
        counts = [s.request.num_logprobs for s in seated]
        settings = row_settings(
            [s.request.sampling for s in seated],
            is_host=[s.request.is_host for s in seated],
            num_logprobs=max((c for c in counts if c is not None), default=None),
            max_drafts=[s.request.max_draft_tokens for s in seated],
            looks_up=looking_up(seated),
            text_start=[len(s.searched) for s in seated],
        )
        # What costs little stays: as sequences come and go, few graphs are traced.
        graph = settings.graph
        if self._graph is not None:
            graph = graph.joined(self._graph)
        graph = replace(
            graph,
            has_host=any(s.request.is_host for s in self.live),
            has_masks=any(s.masks is not None for s in self.live),
        )
        self._graph = graph
        self.settings = replace(
            settings,
            graph=graph,
            is_active=mx.array([s is not None and s.is_live for s in self.sequences]),
            first_position=mx.array(
                [self._first_positions[s] for s in seated], dtype=mx.int32
            ),
        )
        members = self._expected or self.live
        self.rules = joined_rules(sorted({s.request.accept_rule for s in members}))
        self.capacity.sequences = self.live

    def _free_seat(self, sequence: TokenSequence, hidden: mx.array) -> int:
        """A seat for a sequence, and slots enough; there may be none yet of either."""
        self.capacity.sequences = [*self.live, sequence, *self._expected]
        if self.state is None:
            num_seats = self.policy.seats(1)
            num_slots = self.capacity.initial()
            slabs = self._layout.allocate(num_seats, num_slots)
            text = empty_text(num_seats, num_slots) if self.has_text else None
            self._num_searched = 0
            self.state = empty_state(slabs, hidden, text=text)
            self.sequences = [None] * num_seats
        elif self.policy.may_shrink:
            num_seats = self.policy.seats(len(self.capacity.sequences))
            needed = self.capacity.initial()
            self._resize(max(len(self), num_seats), max(self.num_slots, needed))
        self._make_room(len(sequence.searched))
        free = [i for i, s in enumerate(self.sequences) if s is None or not s.is_live]
        # The caches of one that has ended can be had as long as it keeps its seat.
        return min(free, key=lambda seat: self.sequences[seat] is not None)

    def _make_room(self, num_searched: int) -> None:
        """Let so many tokens stand before any text."""
        state = self.state
        if num_searched <= self._num_searched or state is None or state.text is None:
            return
        self._num_searched = searched_places(num_searched)
        text = resized_text(state.text, self.num_slots + self._num_searched)
        self.state = replace(state, text=text)

    def _shrunk(self, num_seats: int, num_slots: int) -> tuple[int, int]:
        """Seats and slots where some have left: the same, unless half is enough.

        Every other number is a copy of the slabs, and perhaps a trace.
        """
        seats, needed = self.policy.seats(len(self.live)), self.capacity.initial()
        return (
            seats if 2 * seats <= num_seats else num_seats,
            needed if 2 * needed <= num_slots else num_slots,
        )

    def _within_budget(self, num_seats: int, num_slots: int) -> tuple[int, int]:
        """Seats and slots; no more than needed where there is no memory for more."""
        most = self.policy.max_kv_bytes
        if most is None or self._layout.num_bytes(num_seats, num_slots) <= most:
            return num_seats, num_slots
        num_seats = self.policy.seats(len(self.capacity.sequences))
        return num_seats, self.capacity.initial()

    def _resize(self, num_seats: int, num_slots: int) -> bool:
        """Change seats and slots; live sequences keep what they have.

        Returns:
            Whether something has changed.
        """
        num_seats, num_slots = self._within_budget(num_seats, num_slots)
        if (num_seats, num_slots) == (len(self), self.num_slots):
            return False
        state, taken = self.take_state(), None
        if self.policy.may_shrink:
            taken = self._taken(num_seats)
            state = with_rows(state, taken)
        slabs = list(state.slabs)
        text = state.text
        if text is not None:
            text = resized_text(text, num_slots + self._num_searched)
        state = replace(state, slabs=[], text=text)
        resize(slabs, self._layout, num_slots, rows=taken)
        mx.clear_cache()
        self.state = replace(state, slabs=slabs)
        if self.live:
            self.update()
        self._start()
        return True

    def _taken(self, num_seats: int) -> list[int]:
        """For each new seat the old one whose sequence it takes: the live ones first.

        An empty seat goes on as a copy of the first: any will do.
        """
        live = [i for i, s in enumerate(self.sequences) if s is not None and s.is_live]
        num_empty = num_seats - len(live)
        self.sequences = [*(self.sequences[i] for i in live), *[None] * num_empty]
        return [*live, *[*live, 0][:1] * num_empty]

    def _start(self) -> None:
        """Begin to compute the state: whoever goes on may be another thread.

        What is lazy can only be evaluated by the thread that has asked for it.
        """
        assert self.state is not None
        mx.async_eval(self.state.arrays)
