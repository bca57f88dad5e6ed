"""The host's side of decoding: rows that join and leave, the queue of rounds, ends.

Rows wait in order until there is a seat and memory for them; their prompts are read a
chunk at a time, between rounds, so that no running row waits longer than for a chunk.
A decoder keeps at most one round queued beyond the one whose report it reads (look-
ahead), so the device works while the host streams text. One small array is read per
round. Work past an end costs at most that one round and is dropped. While the host
decides a row (logits processors, a caller's sampler) nothing is queued ahead.

It knows token ids only: nothing of text, tokenizers or files.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import mlx.core as mx

from .acceptance import Accepted
from .cache import (
    PrefillCache,
    insert_row,
    oldest_kept,
    resize,
    take_row,
)
from .draft_length import DraftLength, FixedDraftLength
from .errors import RequestError
from .logprobs import TokenLogprobs, log_probabilities, reported_logprobs
from .prefill import DEFAULT_PREFILL_STEP_SIZE, Prefill
from .prompt_cache import (
    make_prompt_cache,
    read_prompt_cache,
    update_prompt_cache,
)
from .room import Room, most_slots
from .rounds import Rounds
from .route import ANY_ROUTE, Route
from .row import Request, Row
from .sampling import SamplingRule, choose_tokens
from .seats import Seats, seats_for
from .state import (
    Report,
    RoundState,
    Verified,
    empty_state,
    row_settings,
    with_row,
    with_rows,
)
from .stats import RoundStats, joined_rules
from .target import Prefilled
from .timing import RoundTimer

# MLX keeps freed buffers for reuse; let go of them now and then, as mlx-lm does.
_ROUNDS_PER_CACHE_CLEAR = 256

DEFAULT_MAX_ROWS = 32
# A short prompt takes hardly less time than this many tokens: the weights are read for
# either. So few of them are read between two rounds.
_SMALLEST_CHUNK = 256


@dataclass(frozen=True)
class Emission:
    """What one round, or the prefill, emitted for one row.

    Attributes:
        row: The row.
        place: Its index in ``logits``.
        tokens: The emitted tokens, at least one unless there is an error, cut at the
            end of the request.
        num_from_draft: How many of them, from the first on, the drafter proposed.
        finish_reason: ``"stop"`` at an end-of-sequence token or a stop sequence,
            ``"length"`` when the budget is used up, ``"error"``, else None.
        logits: The target's logits of the whole round: those behind ``tokens[i]`` are
            ``logits[place, i]``. Whole, because a slice made here would belong to the
            stream of the rounds, and its reader would wait for the one in flight.
            Of a row that the host decides they are the processed ones.
            [B, K + 1, V]
        logprobs: One entry per token; empty where the row does not ask.
        prompt_cache: mlx-lm's caches of the row, which hold its prompt and all its
            tokens; with the last emission of a request that keeps its cache.
        error: What a processor or sampler of the row raised.
    """

    row: Row
    place: int
    tokens: list[int]
    num_from_draft: int
    finish_reason: str | None
    logits: mx.array
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_cache: list[Any] | None = None
    error: Exception | None = None


@dataclass(frozen=True)
class Progress:
    """How far a prompt has been read.

    Attributes:
        row: Whose prompt.
        num_read: Its tokens that were read so far.
        num_tokens: All of them.
        is_paused: Whether reading has come to one of the request's pauses: until the
            next step the row's caches are those of this place.
    """

    row: Row
    num_read: int
    num_tokens: int
    is_paused: bool


@dataclass(frozen=True)
class Step:
    """What one step has done: at most a round and a chunk of prompts.

    Attributes:
        emissions: What rows have emitted, in order.
        progress: How far prompts have been read.
        num_read: Tokens of prompts that were read.
    """

    emissions: list[Emission] = field(default_factory=list)
    progress: list[Progress] = field(default_factory=list)
    num_read: int = 0


@dataclass(frozen=True)
class _Outcome:
    """What a round decided of one row: fields as in ``Report`` and ``Emission``."""

    num_accepted: int
    tokens: list[int]
    logits: mx.array
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    near_ties: int | None = None
    error: Exception | None = None


@dataclass
class _InFlight:
    """A round on the device.

    Attributes:
        report: What it will tell.
        rows: Who sat where when it was queued.
        num_draft_tokens: Its K.
        setup_s: What it took the host to trace it; None where it was traced before.
        seconds: Its time; None while it is not known.
    """

    report: Report
    rows: tuple[Row | None, ...]
    num_draft_tokens: int
    setup_s: float | None
    seconds: float | None = None


@dataclass(frozen=True)
class _Waiting:
    """A row whose prompt was not read to its end."""

    row: Row
    prefill: Prefill


class Decoder:
    """Decodes requests together, one per row.

    Given requests at first, it decodes just these (``run``): all prompts are read
    before the first round, and every row has a seat of its own. Given none, rows join
    and leave (``add``, ``step``, ``remove``).

    Args:
        rounds: The target and its drafter.
        requests: One per row; they may differ in length and settings.
        num_draft_tokens: K, drafts per round, 0 for plain decoding; or who chooses it
            for every round.
        prefill_step_size: Most prompt tokens in one forward, and between two rounds.
        look_ahead: Whether a round is queued before the last one's report is read.
        route: How rounds are run and which numbers of drafts they may have.
        max_rows: Most rows that are decoded together; others wait.
        max_kv_bytes: Most memory of the slabs; None for no limit. A row is let in only
            where all rows fit at their longest, so none is ever sent away.
        prompt_caches: mlx-lm's caches that hold what comes before each request's
            prompt; ``()`` for none.

    Attributes:
        stats: Counts of the rounds read so far.
        num_added: Requests that were added so far.

    Raises:
        RequestError: A prompt cache is not the target's.
    """

    def __init__(
        self,
        rounds: Rounds,
        requests: Sequence[Request] = (),
        *,
        num_draft_tokens: int | DraftLength,
        prefill_step_size: int = DEFAULT_PREFILL_STEP_SIZE,
        look_ahead: bool = True,
        route: Route = ANY_ROUTE,
        max_rows: int = DEFAULT_MAX_ROWS,
        max_kv_bytes: int | None = None,
        prompt_caches: Sequence[Sequence[Any] | None] = (),
    ) -> None:
        self._timer = RoundTimer()
        self.stats = RoundStats(
            rule=joined_rules(r.rule for r in requests),
            exactness=route.state,
            phases=self._timer.phases,
        )
        self._engine = rounds
        self._layout = rounds.target.layout
        self._draft_length = (
            FixedDraftLength(num_draft_tokens)
            if isinstance(num_draft_tokens, int)
            else num_draft_tokens
        )
        self._route = route
        self._prefill_step_size = prefill_step_size
        self._look_ahead = look_ahead
        self._max_rows = max_rows
        self._max_kv_bytes = max_kv_bytes
        self.num_added = 0
        self._waiting: deque[_Waiting] = deque()
        self._seats = Seats(near_tie=route.near_tie)
        self._in_flight: deque[_InFlight] = deque()
        self._num_queued = 0
        self._not_ready_key: tuple[SamplingRule, int, int] | None = None
        self._not_traced: set[int] = set()
        self._state: RoundState | None = None
        self._verified: Verified | None = None
        self._has_left = False  # rows, since seats were last counted
        self._num_seats = len(requests)  # fixed; 0 where rows come and go
        caches = prompt_caches or [None] * len(requests)
        rows = [self.add(r, c) for r, c in zip(requests, caches, strict=True)]
        # One row's growth can be fixed for nothing, whatever was proved.
        is_fixed = route.is_exact if len(rows) == 1 else route.has_fixed_growth
        self._room = Room(rows, is_fixed=is_fixed and bool(rows))

    # --- rows ---------------------------------------------------------------------

    def add(self, request: Request, prompt_cache: Sequence[Any] | None = None) -> Row:
        """Let a request wait for its turn.

        Args:
            request: A checked one.
            prompt_cache: mlx-lm's caches that hold what comes before the prompt; they
                are read, not written.

        Returns:
            The row that it becomes.

        Raises:
            RequestError: It could never fit into ``max_kv_bytes``, or the caches are
                not the target's.
        """
        caches = None
        if prompt_cache is not None:
            caches = read_prompt_cache(self._layout, prompt_cache)
        num_cached = caches[0].offset if caches else 0
        row = Row.of(request, index=self.num_added, num_cached=num_cached)
        self._check_fit(row)
        prefill = Prefill(
            self._engine.target,
            request.prompt,
            caches=caches,
            stops=request.pauses,
        )
        self.num_added += 1
        self._waiting.append(_Waiting(row, prefill))
        return row

    def add_all(
        self,
        requests: Sequence[Request],
        prompt_caches: Sequence[Sequence[Any] | None],
    ) -> list[Row]:
        """``add`` for several requests: all of them, or none where one raises."""
        waiting = self._waiting.copy(), self.num_added
        try:
            return [
                self.add(request, caches)
                for request, caches in zip(requests, prompt_caches, strict=True)
            ]
        except RequestError:
            self._waiting, self.num_added = waiting
            raise

    def tokens_of(self, row: Row) -> list[int]:
        """The tokens that a row's caches hold now, those of its history included."""
        request = row.request
        waiting = next((w for w in self._waiting if w.row is row), None)
        num_read = len(request.prompt) if waiting is None else waiting.prefill.num_read
        return [*request.history, *request.prompt[:num_read], *row.emitted]

    def remove(self, row: Row) -> None:
        """Send a row away, wherever it is; for one that has ended nothing happens."""
        if row.is_live:
            row.finish_reason = "removed"
            self._has_left = True
            self._waiting = deque(w for w in self._waiting if w.row is not row)
            self._update_seats()

    def extract(
        self,
        row: Row,
        *,
        num_emitted: int | None = None,
        into: Sequence[Any] | None = None,
    ) -> Sequence[Any]:
        """A row's keys and values as mlx-lm's prompt cache; the row goes on.

        Args:
            row: A row that waits, is read or decodes, or has ended with the last step.
            num_emitted: How many of its tokens the cache shall hold after the prompt:
                all of them (None), or at least those before its last round.
            into: mlx-lm's cache objects to fill in place; None for new ones.

        Returns:
            The cache objects.

        Raises:
            RequestError: The row has left.
        """
        waiting = next((w for w in self._waiting if w.row is row), None)
        if waiting is not None:
            caches = [cache.copy() for cache in waiting.prefill.caches]
        else:
            caches = self._taken(row, num_emitted)
        if into is None:
            return make_prompt_cache(self._layout, caches)
        update_prompt_cache(self._layout, into, caches)
        return into

    @property
    def rows(self) -> list[Row]:
        """The rows that wait, in order, and before them those that decode."""
        return [*self._seats.live, *(w.row for w in self._waiting)]

    @property
    def num_live(self) -> int:
        """Rows that decode."""
        return len(self._seats.live)

    @property
    def num_waiting(self) -> int:
        """Rows whose prompts were not read to their end."""
        return len(self._waiting)

    @property
    def is_idle(self) -> bool:
        """Whether a step would do nothing."""
        return not self._waiting and not self._seats.live

    @property
    def kv_bytes(self) -> int:
        """Memory of the slabs."""
        if self._state is None:
            return 0
        capacity = self._layout.capacity(self._state.slabs)
        return self._layout.num_bytes(len(self._seats), capacity)

    # --- running ------------------------------------------------------------------

    def run(
        self, on_progress: Callable[[Progress], None] | None = None
    ) -> Generator[list[Emission], None, None]:
        """Decode until every request has ended.

        Args:
            on_progress: Called after each chunk of a prompt.

        Yields:
            After the prefill, and then after each round, the emissions of the rows
            that were live.

        Raises:
            Exception: What a processor or a sampler raised.
        """
        try:
            emissions = self._read_all(on_progress)
            with self._timer.caller(is_idle=True):
                yield emissions
            while self._wants_round():
                emissions = _checked(self._round())
                with self._timer.caller(is_idle=not self._in_flight):
                    yield emissions
        finally:
            self.close()

    def step(self) -> Step:
        """Run one round of the rows that decode, then read a chunk of prompts."""
        emissions = self._round() if self._wants_round() else []
        if not self._seats.live:
            self._rest()
        read = self._read_chunk()
        return replace(read, emissions=[*emissions, *read.emissions])

    def close(self) -> None:
        """Wait for what is still running and let go of everything."""
        try:
            self._rest()
        finally:
            self._waiting.clear()
            self._timer.stop()
            self._draft_length.finish()

    def _rest(self) -> None:
        """Wait for what is still running and let go of the slabs."""
        try:
            mx.eval([queued.report.tokens for queued in self._in_flight])
        finally:
            self._in_flight.clear()
            self._state = self._verified = None
            self._seats.clear()

    # --- prompts ------------------------------------------------------------------

    def _read_all(
        self, on_progress: Callable[[Progress], None] | None
    ) -> list[Emission]:
        """Read every prompt and choose the first tokens."""
        emissions = []
        while self._waiting:
            step = self._read_chunk()
            emissions += step.emissions
            if on_progress is not None:
                for progress in step.progress:
                    on_progress(progress)
        self._timer.start_rounds()
        return _checked(emissions)

    def _read_chunk(self) -> Step:
        """Read a chunk of the prompts that wait, first come, first served."""
        emissions: list[Emission] = []
        reports: list[Progress] = []
        num_read, budget = 0, self._prefill_step_size
        while budget > 0 and self._waiting and self._lets_in(self._waiting[0]):
            waiting = self._waiting[0]
            prefill = waiting.prefill
            with self._timer.prefill():
                size = prefill.read(budget)
            num_read += size
            budget -= max(size, _SMALLEST_CHUNK)
            self._timer.disturb()
            reports.append(
                Progress(
                    waiting.row,
                    prefill.num_read,
                    prefill.num_tokens,
                    prefill.is_stopped and not prefill.is_done,
                )
            )
            if prefill.is_done:
                self._waiting.popleft()
                emissions += self._seat(waiting.row, prefill.filled)
            elif prefill.is_stopped:
                break  # for the caller to take the caches
        return Step(emissions, reports, num_read)

    def _lets_in(self, waiting: _Waiting) -> bool:
        """Whether there is a seat and memory for a row, or it is being read already."""
        if waiting.prefill.num_read or self._num_seats:
            return True
        live = self._seats.live
        if len(live) >= self._max_rows:
            return False
        return self._max_kv_bytes is None or (
            self._most_bytes([*live, waiting.row]) <= self._max_kv_bytes
        )

    def _check_fit(self, row: Row) -> None:
        """Raise if a row does not fit into memory, even alone."""
        if self._max_kv_bytes is None:
            return
        needed = self._most_bytes([row])
        if needed > self._max_kv_bytes:
            length = row.last_position
            raise RequestError(
                f"a request must fit into {self._max_kv_bytes / 1e6:.0f} MB of keys "
                f"and values: got {needed / 1e6:.0f} MB for "
                f"{'no limit' if length is None else f'{length} tokens'}, prompt "
                "included. Ask for fewer tokens, or allow more memory."
            )

    def _most_bytes(self, rows: Sequence[Row]) -> float:
        """The most memory that rows can come to need together."""
        slots = most_slots(rows)
        if slots is None:
            return float("inf")
        return self._layout.num_bytes(seats_for(len(rows)), slots)

    def _seat(self, row: Row, filled: Prefilled) -> list[Emission]:
        """Choose the first token of a prompt that was read, and give it a seat."""
        outcome = self._first(row, filled)
        (emission,) = self._emit((row,), [outcome], keep=False)
        first_position = oldest_kept(filled.caches, self._layout)
        seat = self._free_seat(row, filled.hidden)
        state, self._state = self._state, None
        assert state is not None
        insert_row(state.slabs, self._layout, seat, filled.caches)
        self._state = with_row(
            state,
            seat,
            last_token=(outcome.tokens or [0])[-1],
            hidden=filled.hidden,
            offset=row.offset,
        )
        self._seats.sit(row, seat, first_position=first_position)
        if self._seats.settings.rule.near_tie is not None:
            self.stats.add_near_ties(0)
        self._update_seats()
        mx.clear_cache()
        return [self._with_cache(emission)]

    def _first(self, row: Row, filled: Prefilled) -> _Outcome:
        """Choose the token behind a prompt."""
        settings = row_settings(
            [row.request.sampling],
            is_host=[row.request.is_host],
            num_logprobs=row.request.num_logprobs,
        )
        tokens = mx.zeros((1, 1), dtype=mx.int32)
        if settings.rule.has_graph:
            tokens = choose_tokens(
                filled.logits,
                settings.sampling,
                rule=settings.rule,
                positions=mx.array([[row.offset]], dtype=mx.int32),
            )
        logprobs = reported_logprobs(settings.rule, filled.logits, tokens)
        # Its report has the form of a round without drafts.
        report = mx.concatenate([mx.zeros_like(tokens), tokens], axis=1)
        (outcome,) = self._outcomes(
            Report(report, filled.logits, logprobs), (row,), has_near_ties=False
        )
        return outcome

    # --- seats --------------------------------------------------------------------

    def _free_seat(self, row: Row, hidden: mx.array) -> int:
        """A seat for a row, and slots enough; there may be none yet of either."""
        if not self._num_seats:
            self._room.rows = [*self._seats.live, row]
        needed = self._room.initial_capacity()
        if self._state is None:
            num_seats = self._num_seats or seats_for(1)
            slabs = self._layout.allocate(num_seats, needed)
            self._state = empty_state(slabs, hidden)
            self._seats.arrange([None] * num_seats)
        elif not self._num_seats:
            capacity = self._capacity
            if self._seats.free_seat() is None:
                self._resize(max(capacity, needed), seats_for(len(self._room.rows)))
            elif needed > capacity:
                self._resize(max(needed, self._room.grown(capacity)), len(self._seats))
        seat = self._seats.free_seat()
        assert seat is not None
        return seat

    def _update_seats(self) -> None:
        """Let settings and room follow the rows, after some have joined or ended."""
        live = self._seats.live
        if not live:
            return
        self._seats.update()
        if not self._num_seats:
            self._room.rows = live
            self._draft_length.seat(
                len(self._seats),
                rule=self._seats.rule_names,
                context=max(row.offset for row in live),
            )

    def _shrink(self) -> None:
        """Give up seats and slots that the rows that are left do not need."""
        self._has_left = False
        num_seats, capacity = seats_for(len(self._seats.live)), self._capacity
        needed = self._room.initial_capacity()
        is_roomy = 2 * needed <= capacity
        if num_seats < len(self._seats) or is_roomy:
            self._resize(needed if is_roomy else capacity, num_seats)
            self._update_seats()

    def _resize(self, capacity: int, num_seats: int) -> None:
        """Change slots and seats; live rows keep what they have."""
        state, self._state = self._state, None
        assert state is not None
        assert self._verified is None  # no round is between verify and commit
        rows = None
        if not self._num_seats:
            taken = self._seats.taken
            # An empty seat goes on as a copy of the first: any row will do.
            rows = [*taken, *[taken[0]] * (num_seats - len(taken))]
            seated = [self._seats.rows[i] for i in taken]
            self._seats.arrange([*seated, *[None] * (num_seats - len(taken))])
            state = with_rows(state, rows)
        slabs = list(state.slabs)
        state = replace(state, slabs=[])
        resize(slabs, self._layout, capacity, rows=rows)
        mx.clear_cache()
        self._timer.disturb()
        self._state = replace(state, slabs=slabs)

    @property
    def _capacity(self) -> int:
        """Slots of the full layers."""
        assert self._state is not None
        return self._layout.capacity(self._state.slabs)

    def _taken(self, row: Row, num_emitted: int | None) -> list[PrefillCache]:
        """Caches that hold a seated row's prompt and so many of its tokens."""
        seat, state = self._seats.seat_of(row), self._state
        if seat is None or state is None:
            raise RequestError(
                "the caches of a row must be taken while it has its seat: got one "
                "that has left. Set keeps_cache in its request."
            )
        tokens = row.emitted if num_emitted is None else row.emitted[:num_emitted]
        start = row.num_cached + len(row.request.prompt)
        # A round in flight has written the newest token of the one before.
        num_written = row.offset + any(row in queued.rows for queued in self._in_flight)
        num_tokens = min(start + len(tokens), num_written)
        caches = take_row(
            state.slabs,
            self._layout,
            seat,
            num_tokens=num_tokens,
            first_position=self._seats.first_position(row),
        )
        if missing := tokens[num_tokens - start :]:
            rest = Prefill(self._engine.target, missing, caches=caches)
            while not rest.is_done:
                rest.read(self._prefill_step_size)
        return caches

    # --- rounds -------------------------------------------------------------------

    def _round(self) -> list[Emission]:
        """Queue rounds, one ahead where that can be, and read the oldest."""
        while self._can_queue() and self._wants_round(ahead=True):
            self._queue_round()
        return self._read_round()

    def _queue_round(self) -> None:
        """Queue one round on the device."""
        self._fit()
        state, self._state = self._state, None
        assert state is not None
        settings, min_rows = self._seats.settings, self._route.min_rows
        capacity = self._layout.capacity(state.slabs)
        count = self._choose_drafts(capacity)
        is_ready = count not in self._not_ready(capacity)
        start = time.perf_counter()
        if settings.rule.has_host:
            self._verified, report = self._engine.verify(
                state, settings, num_draft_tokens=count, min_rows=min_rows
            )
            queued = self._verified.arrays
        else:
            self._state, report = self._engine.run(
                state, settings, num_draft_tokens=count, min_rows=min_rows
            )
            queued = self._state.arrays
        # The last reference to the old slabs, which are then written in place.
        del state
        with self._timer.queue():
            mx.async_eval(*report.arrays, *queued)
        setup_s = None if is_ready else time.perf_counter() - start
        rows = tuple(self._seats.rows)
        self._in_flight.append(_InFlight(report, rows, count, setup_s))
        self._num_queued += 1
        if not is_ready:
            self._not_traced.discard(count)
            self.stats.traced += 1
            self._timer.disturb()
        if self._num_queued % _ROUNDS_PER_CACHE_CLEAR == 0:
            mx.clear_cache()
            self._timer.disturb()

    def _choose_drafts(self, capacity: int) -> int:
        """K of the next round."""
        live = self._seats.live
        left = [row.num_left for row in live]
        limits = [n - len(self._in_flight) for n in left if n is not None]
        allowed = self._room.allowed(self._route.allowed, capacity)
        most = max(row.request.max_draft_tokens for row in live)
        return self._draft_length.choose(
            [k for k in allowed if k <= most],
            not_ready=self._not_ready(capacity),
            tokens_left=max(limits) if len(limits) == len(left) else None,
        )

    def _not_ready(self, capacity: int) -> Collection[int]:
        """The numbers of drafts whose rounds were not traced before."""
        num_seats = len(self._seats)
        key = (self._seats.settings.rule, capacity, num_seats)
        if self._not_ready_key != key:
            self._not_ready_key = key
            self._not_traced = {
                count
                for count in self._route.allowed
                if not self._engine.is_ready(
                    self._seats.settings.rule,
                    num_draft_tokens=count,
                    min_rows=self._route.min_rows,
                    num_rows=num_seats,
                    capacity=capacity,
                )
            }
        return self._not_traced

    def _read_round(self) -> list[Emission]:
        """Read the oldest report in flight, let the host decide, and count."""
        done = self._in_flight.popleft()
        outcomes = self._outcomes(
            done.report,
            done.rows,
            has_near_ties=self._seats.settings.rule.near_tie is not None,
        )
        self._measure(done)
        if self._verified is not None:
            self._commit(outcomes)
        accepted = []
        for row, outcome in zip(done.rows, outcomes, strict=True):
            if row is not None and row.is_live and outcome.error is None:
                row.offset += outcome.num_accepted + 1
                self._count(row, done.num_draft_tokens, outcome)
                if row.request.max_draft_tokens >= done.num_draft_tokens:
                    accepted.append(outcome.num_accepted)
        self._draft_length.observe(done.num_draft_tokens, accepted, done.seconds)
        return self._emit(done.rows, outcomes)

    def _measure(self, done: _InFlight) -> None:
        """Let the interval that ends with a round's read tell what a round takes."""
        if done.setup_s is not None:
            self._timer.disturb()
            self._draft_length.observe_setup(done.setup_s + self._timer.waited_s)
        interval = self._timer.interval()
        if interval is not None and interval.is_queued and self._in_flight:
            self._in_flight[-1].seconds = interval.seconds
        elif interval is not None:
            done.seconds = interval.seconds

    def _count(self, row: Row, num_draft_tokens: int, outcome: _Outcome) -> None:
        """Count a live row's part of a round."""
        drafted = min(num_draft_tokens, row.request.max_draft_tokens)
        for stats in (self.stats, row.stats):
            stats.add_round(drafted=drafted, accepted=outcome.num_accepted)
            if outcome.near_ties is not None:
                stats.add_near_ties(outcome.near_ties)

    def _outcomes(
        self, report: Report, rows: Sequence[Row | None], *, has_near_ties: bool
    ) -> list[_Outcome]:
        """What was decided of every row, by the graph or now by the host."""
        with self._timer.wait():
            values = _read(report.tokens)  # the one read of the round
        near_ties: list[int | None] = [None] * len(values)
        if has_near_ties:
            near_ties = [tokens.pop() for tokens in values]
        logprobs: list[list[TokenLogprobs]] = [[] for _ in values]
        if report.logprobs is not None:
            logprobs = report.logprobs.listed()
        return [
            self._judge(row, i, report.logits, tokens[:-1])
            if row is not None and row.host is not None and row.is_live
            else _Outcome(
                num_accepted,
                tokens[: num_accepted + 1],
                report.logits,
                logprobs[i],
                near_ties[i],
            )
            for i, (row, (num_accepted, *tokens)) in enumerate(
                zip(rows, values, strict=True)
            )
        ]

    def _judge(
        self, row: Row, place: int, logits: mx.array, drafts: list[int]
    ) -> _Outcome:
        """Let the host decide one row of the block's logits [B, K + 1, V]."""
        try:
            judged = row.judge(logits[place], drafts)
        except Exception as error:  # noqa: BLE001 (a caller's function: any may come)
            return _Outcome(0, [], logits, error=error)
        logprobs: list[TokenLogprobs] = []
        count = row.request.num_logprobs
        if count is not None:
            tokens = mx.array([judged.tokens], dtype=mx.int32)
            (logprobs,) = log_probabilities(
                judged.logits, tokens, num_logprobs=count
            ).listed()
        # A view, so that [place, i] finds the row's own as in a round's logits.
        shape = (logits.shape[0], *judged.logits.shape[1:])
        return _Outcome(
            judged.num_accepted,
            judged.tokens,
            mx.broadcast_to(judged.logits, shape),
            logprobs,
        )

    def _commit(self, outcomes: list[_Outcome]) -> None:
        """End the round that waits for the host."""
        verified, self._verified = self._verified, None
        assert verified is not None
        # A row that has ended is not committed; its number only has to be one.
        num_accepted = mx.array([o.num_accepted for o in outcomes], dtype=mx.int32)
        next_token = mx.array(
            [(o.tokens or [0])[-1:] for o in outcomes], dtype=mx.int32
        )
        self._state = self._engine.commit(
            verified, self._seats.settings, accepted=Accepted(num_accepted, next_token)
        )

    def _emit(
        self,
        rows: Sequence[Row | None],
        outcomes: Sequence[_Outcome],
        *,
        keep: bool = True,
    ) -> list[Emission]:
        """Turn what was decided into the live rows' emissions."""
        emissions = list(_emissions(rows, outcomes))
        if keep and any(e.finish_reason for e in emissions):
            emissions = [self._with_cache(e) for e in emissions]
            self._has_left = True
            self._update_seats()
        return emissions

    def _with_cache(self, emission: Emission) -> Emission:
        """A row's last emission, with its caches where it keeps them."""
        row = emission.row
        if not row.request.keeps_cache or emission.finish_reason in (None, "error"):
            return emission
        return replace(emission, prompt_cache=list(self.extract(row)))

    def _can_queue(self) -> bool:
        """Whether a round may be queued beside those in flight."""
        if len(self._in_flight) >= (2 if self._can_look_ahead else 1):
            return False
        if not self._in_flight:
            return True
        return self._room.is_known(self._capacity, self._drafts_in_flight)

    @property
    def _can_look_ahead(self) -> bool:
        """Whether a round may be queued before the last one's report is read."""
        return self._look_ahead and not self._seats.settings.rule.has_host

    @property
    def _drafts_in_flight(self) -> list[int]:
        return [queued.num_draft_tokens for queued in self._in_flight]

    def _wants_round(self, *, ahead: bool = False) -> bool:
        """Whether some row needs a round; ahead: beyond those in flight.

        Each of them emits at least one token for every row that sits in it.
        """
        in_flight = self._in_flight if ahead else ()
        return any(
            row.wants_more_than(sum(row in queued.rows for queued in in_flight))
            for row in self._seats.live
        )

    def _fit(self) -> None:
        """Before a round is queued: no seat too many, and no slot too few."""
        if self._has_left and not self._num_seats and not self._waiting:
            self._shrink()
        capacity = self._capacity
        if self._room.must_grow(capacity, self._drafts_in_flight):
            self._resize(self._room.grown(capacity), len(self._seats))


def _emissions(
    rows: Sequence[Row | None], outcomes: Sequence[_Outcome]
) -> Iterator[Emission]:
    """The emissions of the rows that are live."""
    for place, (row, outcome) in enumerate(zip(rows, outcomes, strict=True)):
        if row is None or not row.is_live:
            continue
        if outcome.error is not None:
            row.finish_reason = "error"
        taken = row.take(outcome.tokens)
        count = row.request.num_logprobs
        logprobs = [] if count is None else outcome.logprobs[: len(taken)]
        yield Emission(
            row=row,
            place=place,
            tokens=taken,
            num_from_draft=min(outcome.num_accepted, len(taken)),
            finish_reason=row.finish_reason,
            logits=outcome.logits,
            logprobs=[replace(p, top=p.top[:count]) for p in logprobs],
            error=outcome.error,
        )


def _checked(emissions: list[Emission]) -> list[Emission]:
    """The emissions, unless a row's own function has raised."""
    for emission in emissions:
        if emission.error is not None:
            raise emission.error
    return emissions


def _read(report: mx.array) -> list[list[int]]:
    """Read a report: the only place where a round's result reaches the host."""
    return cast(list[list[int]], report.tolist())
