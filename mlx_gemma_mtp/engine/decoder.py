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

import logging
import threading
from collections import deque
from collections.abc import (
    Callable,
    Collection,
    Generator,
    Iterable,
    Iterator,
    Sequence,
)
from dataclasses import dataclass, replace
from typing import Any, cast

import mlx.core as mx

from ..cache.mlx_lm_cache import (
    make_prompt_cache,
    read_prompt_cache,
    update_prompt_cache,
)
from ..cache.prompt import PrefillCache
from ..cpu_kernels import clock
from ..drafting.policy import DraftLength, DraftLengths, FixedDraftLength
from ..errors import RequestError
from ..models.target import Prefilled
from ..sampling.acceptance import Accepted
from ..sampling.distribution import SamplingRule, choose_tokens
from ..sampling.logprobs import reported_logprobs
from .batch import Seats
from .early_start import EarlyStart
from .prefill import DEFAULT_PREFILL_STEP_SIZE, Prefill, read_on
from .queue import Waiting, WaitingRows
from .request import Request
from .results import (
    Emission,
    Outcome,
    Progress,
    Step,
    emissions_of,
    failure_of,
    outcomes_of,
)
from .rounds import Rounds
from .route import ANY_ROUTE, Route
from .sequence import Row
from .shadows import Shadows
from .state import Report, RoundState, RowSettings, Verified, row_settings
from .stats import RoundStats, joined_rules
from .timing import RoundTimer

logger = logging.getLogger("mlx_gemma_mtp")

# MLX keeps freed buffers for reuse; let go of them now and then, as mlx-lm does.
_ROUNDS_PER_CACHE_CLEAR = 256

DEFAULT_MAX_ROWS = 32
# A short prompt takes hardly less time than this many tokens: the weights are read for
# either. So few of them are read between two rounds.
_SMALLEST_CHUNK = 256


@dataclass
class _InFlight:
    """A round on the device.

    Attributes:
        report: What it will tell.
        rows: Who sat where when it was queued.
        num_draft_tokens: Its K.
        chooser: Who chose K.
        setup_s: What it took the host to trace it; None where it was traced before.
        has_near_ties: Whether the report counts near ties.
        num_shadow_drafts: Drafts that were made beside it.
        waiting: Arrays that are still to be evaluated: it has not been started.
        is_early: Whether it was started before the report of the one before was read.
        seconds: Its time; None while it is not known.
    """

    report: Report
    rows: tuple[Row | None, ...]
    num_draft_tokens: int
    chooser: DraftLength
    setup_s: float | None
    has_near_ties: bool
    num_shadow_drafts: int
    waiting: list[mx.array]
    is_early: bool = False
    seconds: float | None = None


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
        look_ahead: Whether a round is built before the last one's report is read.
        early_start: Decides whether it is started before that, too; None for one that
            has learnt nothing yet.
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
        num_draft_tokens: int | DraftLengths,
        prefill_step_size: int = DEFAULT_PREFILL_STEP_SIZE,
        look_ahead: bool = True,
        early_start: EarlyStart | None = None,
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
        self.num_added = 0
        self._engine = rounds
        self._draft_lengths = (
            FixedDraftLength(num_draft_tokens)
            if isinstance(num_draft_tokens, int)
            else num_draft_tokens
        )
        self._is_open = not requests
        self._is_closed = False
        self._route = route
        self._prefill_step_size = prefill_step_size
        self._look_ahead = look_ahead
        self._early_start = early_start or EarlyStart()
        self._in_flight: deque[_InFlight] = deque()
        self._num_queued = 0
        self._shadows = Shadows()
        self._not_ready_key: tuple[SamplingRule, int, int, int] | None = None
        self._not_traced: set[int] = set()
        self._verified: Verified | None = None
        layout = rounds.target.layout
        self._waiting = WaitingRows(
            layout,
            max_rows=None if requests else max_rows,
            max_kv_bytes=max_kv_bytes,
        )
        rows = self._add(requests, prompt_caches or [None] * len(requests))
        # One row's growth can be fixed for nothing, whatever was proved.
        is_fixed = route.is_exact if len(rows) == 1 else route.has_fixed_growth
        self._seats = Seats(
            layout,
            reserved=rows,
            is_fixed=is_fixed and bool(rows),
            near_tie=route.near_tie,
            max_kv_bytes=max_kv_bytes,
        )
        self._chooser = self._draft_lengths.seat(
            len(rows),
            rule=self.stats.rule,
            context=max((row.offset for row in rows), default=0),
        )

    def add(self, request: Request, prompt_cache: Sequence[Any] | None = None) -> Row:
        """Let a request wait for its turn; see ``add_all``."""
        (row,) = self.add_all([request], [prompt_cache])
        return row

    def add_all(
        self,
        requests: Sequence[Request],
        prompt_caches: Sequence[Sequence[Any] | None],
    ) -> list[Row]:
        """Let requests wait for their turn: all of them, or none where one may not.

        Args:
            requests: Checked ones.
            prompt_caches: mlx-lm's caches that hold what comes before each prompt; they
                are read, not written. None for none.

        Returns:
            The rows that they become.

        Raises:
            RequestError: One could never fit into ``max_kv_bytes``, or the caches are
                not the target's.
        """
        assert self._is_open  # the others' seats and slots are counted
        self._engine.refresh()  # prompts are read with the weights as they are
        return self._add(requests, prompt_caches)

    def _add(
        self,
        requests: Sequence[Request],
        prompt_caches: Sequence[Sequence[Any] | None],
    ) -> list[Row]:
        """Let requests wait; see ``add_all``."""
        entries = [
            self._entry(request, caches, self.num_added + i)
            for i, (request, caches) in enumerate(
                zip(requests, prompt_caches, strict=True)
            )
        ]
        self._waiting.append(entries)
        self.num_added += len(entries)
        return [entry.row for entry in entries]

    def _entry(
        self, request: Request, prompt_cache: Sequence[Any] | None, index: int
    ) -> Waiting:
        """A row and its prompt, yet to be read."""
        target, caches = self._engine.target, None
        if prompt_cache is not None:
            caches = read_prompt_cache(target.layout, prompt_cache)
        num_cached = caches[0].offset if caches else 0
        row = Row.of(request, index=index, num_cached=num_cached)
        prefill = Prefill(target, request.prompt, caches=caches, stops=request.pauses)
        return Waiting(row, prefill)

    def remove(self, row: Row) -> None:
        """Send a row away, wherever it is; for one that has ended nothing happens."""
        if row.is_live:
            row.finish_reason = "removed"
            self._waiting.remove(row)
            self._leave()
            if not self._seats.live:
                self._rest()

    def extract(
        self,
        row: Row,
        *,
        num_emitted: int | None = None,
        into: Sequence[Any] | None = None,
    ) -> list[Any]:
        """A row's keys and values as mlx-lm's prompt cache; the row goes on.

        Args:
            row: A row that waits, is read or decodes, or has ended with the last step
                and not with its first token; while ``run`` goes on, any row.
            num_emitted: How many of its tokens the cache shall hold after the prompt:
                all of them (None), or at least those before its last round.
            into: mlx-lm's cache objects to fill in place; None for new ones.

        Returns:
            The cache objects.

        Raises:
            RequestError: The row has left, or the round that it was in has failed.
        """
        waiting = self._waiting.find(row)
        if waiting is not None:
            return self._filled(waiting.prefill.caches, into=into)
        caches, missing = self._taken(row, num_emitted)
        return self._filled(caches, missing, into=into)

    def tokens_of(self, row: Row) -> list[int]:
        """The tokens that a row's caches hold now, those of its history included."""
        request, waiting = row.request, self._waiting.find(row)
        num_read = len(request.prompt) if waiting is None else waiting.prefill.num_read
        return [*request.history, *request.prompt[:num_read], *row.emitted]

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
        """Whether a step would do nothing; the last one lets go of the slabs."""
        return not self._waiting and not self._seats.rows

    @property
    def kv_bytes(self) -> int:
        """Memory of the slabs."""
        return self._seats.num_bytes

    @property
    def prompt_bytes(self) -> int:
        """Memory of the caches of prompts that are read or wait."""
        return self._waiting.num_bytes

    @property
    def longest_text(self) -> int | None:
        """Most tokens that a row may have, its prompt included; None for any."""
        return self._waiting.longest_text

    def run(
        self, on_progress: Callable[[Progress], None] | None = None
    ) -> Generator[list[Emission], None, None]:
        """Decode until every request has ended, and close.

        Where something raises, the decoder is left as it is, for its caches.

        Args:
            on_progress: Called after each chunk of a prompt.

        Yields:
            After the prefill, and then after each round, the emissions of the rows
            that were live.
        """
        try:
            emissions = self._read_all(on_progress)
            with self._timer.caller(is_idle=True):
                yield emissions
            while self._wants_round():
                emissions = self._round()
                with self._timer.caller(is_idle=not self._in_flight):
                    yield emissions
        except GeneratorExit:
            self.close()
            raise
        self.close()

    def step(self) -> Step:
        """Run one round of the rows that decode, then read a chunk of prompts.

        Where that fails, the rows end with an error: a row whose prompt could not be
        read by itself, else all that decode. The others go on, and so may new ones.
        """
        self._timer.add_caller(is_idle=not self._in_flight)
        if not self._seats.live:
            self._rest()  # not before: until now caches could be taken
        emissions: list[Emission] = []
        read = Step()
        try:
            if self._wants_round():
                emissions += self._round()
            read = self._read_chunk()
        except Exception as error:  # noqa: BLE001 (whatever MLX raises: no row may hang)
            emissions += self._fail(error)
        self._timer.mark()
        return replace(read, emissions=[*emissions, *read.emissions])

    def _fail(self, error: Exception) -> list[Emission]:
        """End all rows that decode, or were about to, with an error."""
        logger.error("all rows that decode have failed", exc_info=error)
        read = [entry.row for entry in self._waiting if entry.prefill.is_done]
        for row in read:
            self._waiting.remove(row)
        failed = dict.fromkeys([*self._seats.live, *read])
        self._in_flight.clear()  # their reports may fail as well
        self._rest()
        return [failure_of(row, error) for row in failed]

    def close(self) -> None:
        """Wait for what is still running and let go of everything."""
        if self._is_closed:
            return
        self._is_closed = True
        try:
            self._rest()
        finally:
            self._waiting.clear()
            self._timer.stop()
            self._draft_lengths.finish()

    def _rest(self) -> None:
        """Wait for what is still running and let go of the slabs."""
        try:
            mx.eval([q.report.tokens for q in self._in_flight if not q.waiting])
        finally:
            self._in_flight.clear()
            self._shadows.clear()
            self._verified = None
            self._seats.clear()

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
        return emissions

    def _read_chunk(self) -> Step:
        """Read a chunk of the prompts that wait, as far as rows are let in."""
        emissions: list[Emission] = []
        reports: list[Progress] = []
        paused: set[Row] = set()
        num_read, budget = 0, self._prefill_step_size
        while budget > 0 and (entry := self._waiting.next(self._seats.live, paused)):
            row, prefill = entry.row, entry.prefill
            before, outcome = prefill.num_read, None
            try:
                outcome = self._read(entry, budget)
            except Exception as error:
                if not self._is_open:
                    raise
                self._waiting.remove(row)
                emissions.append(failure_of(row, error))
                break
            size = prefill.num_read - before
            num_read += size
            budget -= max(size, _SMALLEST_CHUNK)
            is_paused = prefill.is_stopped and not prefill.is_done
            reports.append(
                Progress(row, prefill.num_read, prefill.num_tokens, is_paused)
            )
            if outcome is not None:
                emissions.append(self._begin(row, prefill.filled, outcome))
                self._waiting.remove(row)
            elif is_paused:
                paused.add(row)  # for the caller to take the caches
        return Step(emissions, reports, num_read)

    def _read(self, entry: Waiting, budget: int) -> Outcome | None:
        """Read a chunk of a prompt; its first token, where that was the last one."""
        self._timer.disturb()
        with self._timer.prefill():
            entry.prefill.read(budget)
        if not entry.prefill.is_done:
            return None
        return self._first(entry.row, entry.prefill.filled)

    def _begin(self, row: Row, filled: Prefilled, outcome: Outcome) -> Emission:
        """Give a seat to a row whose prompt was read."""
        (emission,) = emissions_of((row,), [outcome])
        self.stats.rule = joined_rules([self.stats.rule, row.request.rule])
        if self._is_open and not row.is_live:  # it needs no seat
            return self._with_cache(emission, filled.caches)
        self._seats.sit(row, filled, (outcome.tokens or [0])[-1])
        if self._seats.settings.rule.near_tie is not None:
            self.stats.add_near_ties(0)
        if not row.is_live:
            self._seats.leave()
        self._seat_drafts()
        return emission

    def _first(self, row: Row, filled: Prefilled) -> Outcome:
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

    def _leave(self) -> None:
        """Some rows have ended."""
        self._seats.leave()
        self._seat_drafts()

    def _seat_drafts(self) -> None:
        """Let the choice of drafts follow the rows."""
        live = self._seats.live
        if live and self._is_open:
            self._chooser = self._draft_lengths.seat(
                len(self._seats),
                rule=self._seats.rule_names,
                context=max(row.offset for row in live),
            )

    def _taken(
        self, row: Row, num_emitted: int | None
    ) -> tuple[Iterator[PrefillCache], list[int]]:
        """A seated row's caches, and those of its tokens that they do not hold yet."""
        tokens = row.emitted if num_emitted is None else row.emitted[:num_emitted]
        start = row.num_cached + len(row.request.prompt)
        # A round in flight has written the newest token of the one before.
        num_written = row.offset + any(row in queued.rows for queued in self._in_flight)
        num_tokens = min(start + len(tokens), num_written)
        caches = self._seats.take(row, num_tokens)
        if caches is None:
            raise RequestError(
                "the caches of a row must be taken while it has its seat: got one "
                "that has left. Set keeps_cache in its request."
            )
        return caches, tokens[num_tokens - start :]

    def _filled(
        self,
        caches: Iterable[PrefillCache],
        missing: Sequence[int] = (),
        *,
        into: Sequence[Any] | None = None,
    ) -> list[Any]:
        """mlx-lm's cache objects that hold what caches hold, and tokens behind it.

        Args:
            caches: Each layer's; made one by one, they are never held all at once.
            missing: Tokens that no round has written.
            into: The objects; None for new ones.
        """
        target = self._engine.target
        made = make_prompt_cache(target.layout) if into is None else list(into)
        update_prompt_cache(target.layout, made, caches)
        if missing:
            read_on(target, made, missing)
        return made

    def _round(self) -> list[Emission]:
        """Queue rounds, one ahead where that can be, and read the oldest."""
        while self._in_flight and not any(
            row is not None and row.is_live for row in self._in_flight[0].rows
        ):
            self._in_flight.popleft()  # everybody has left since it was queued
            self._timer.disturb()
        while self._can_queue() and self._wants_round(ahead=True):
            is_first = not self._in_flight
            self._build_round()
            if is_first or self._early_start.is_early:
                self._start_round(is_early=not is_first)
        emissions = self._read_round()
        if self._seats.live:  # else what is in flight is dropped
            self._start_round(is_early=False)
        return emissions

    def _build_round(self) -> None:
        """Build the graph of one round; it is evaluated once it is started."""
        if self._seats.fit(self._drafts_in_flight, may_shrink=not self._waiting):
            self._timer.disturb()
            self._seat_drafts()
        capacity, settings = self._seats.capacity, self._seats.settings
        state, self._seats.state = self._seats.state, None
        assert state is not None
        min_rows = self._route.min_rows
        count = self._choose_drafts(capacity)
        is_ready = count not in self._not_ready(capacity)
        num_shadow = self._queue_shadow(state, settings)
        start = clock()
        if settings.rule.has_host:
            self._verified, report = self._engine.verify(
                state, settings, num_draft_tokens=count, min_rows=min_rows
            )
            queued = self._verified.arrays
        else:
            self._seats.state, report = self._engine.run(
                state, settings, num_draft_tokens=count, min_rows=min_rows
            )
            queued = self._seats.state.arrays
        setup_s = None if is_ready else clock() - start
        rows = tuple(self._seats.rows)
        has_near_ties = settings.rule.near_tie is not None
        self._in_flight.append(
            _InFlight(
                report,
                rows,
                count,
                self._chooser,
                setup_s,
                has_near_ties,
                num_shadow,
                [*report.arrays, *queued],
            )
        )
        self._num_queued += 1
        if not is_ready:
            self._not_traced.discard(count)
            self.stats.traced += 1
            self._timer.disturb()
        if self._num_queued % _ROUNDS_PER_CACHE_CLEAR == 0:
            mx.clear_cache()
            self._timer.disturb()

    def _start_round(self, *, is_early: bool) -> None:
        """Hand the round that was built last to the device, if that was not done.

        Nobody has a reference to the slabs before it by now: they are written in place.
        """
        if not self._in_flight or not self._in_flight[-1].waiting:
            return
        built = self._in_flight[-1]
        arrays, built.waiting, built.is_early = built.waiting, [], is_early
        start = clock()
        with self._timer.queue():
            mx.async_eval(*arrays)
        if built.setup_s is not None:
            built.setup_s += clock() - start

    def _queue_shadow(self, state: RoundState, settings: RowSettings) -> int:
        """Make drafts beside the next round, where they are asked for; how many."""
        count = self._chooser.num_shadow_drafts
        if count:
            settings = replace(settings, rule=settings.rule.by_equality)
            try:
                drafts = self._engine.draft(state, settings, num_draft_tokens=count)
                with self._timer.queue():
                    mx.async_eval(drafts)
            except Exception:
                self._chooser.observe_shadow(count, [])  # nothing will come
                raise
            self._shadows.add(
                drafts,
                self._seats.rows,
                in_flight=[queued.rows for queued in self._in_flight],
                chooser=self._chooser,
            )
        return count

    def _choose_drafts(self, capacity: int) -> int:
        """K of the next round."""
        live = self._seats.live
        left = [row.num_left for row in live]
        limits = [n - len(self._in_flight) for n in left if n is not None]
        allowed = self._seats.room.allowed(self._route.allowed, capacity)
        most = max(row.request.max_draft_tokens for row in live)
        return self._chooser.choose(
            [k for k in allowed if k <= most],
            not_ready=self._not_ready(capacity),
            tokens_left=max(limits) if len(limits) == len(left) else None,
            can_shadow=self._can_shadow,
        )

    def _not_ready(self, capacity: int) -> Collection[int]:
        """The numbers of drafts whose rounds were not traced before."""
        num_seats = len(self._seats)
        thread = threading.get_ident()  # every thread has traces of its own
        key = (self._seats.settings.rule, capacity, num_seats, thread)
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
            done.report, done.rows, has_near_ties=done.has_near_ties
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
        done.chooser.observe(
            done.num_draft_tokens,
            accepted,
            done.seconds,
            num_shadow_drafts=done.num_shadow_drafts,
        )
        if done.seconds is not None and self._can_look_ahead:
            self._early_start.observe(
                done.num_draft_tokens, done.seconds, is_early=done.is_early
            )
        emissions = self._emit(done.rows, outcomes)
        self._shadows.compare()
        return emissions

    def _measure(self, done: _InFlight) -> None:
        """Let the interval that ends with a round's read tell what a round takes."""
        if done.setup_s is not None:
            self._timer.disturb()
            done.chooser.observe_setup(done.setup_s + self._timer.waited_s)
        interval = self._timer.interval()
        if interval is None:
            return
        last = self._in_flight[-1] if self._in_flight else done
        queued = done if last.waiting else last
        (queued if interval.is_queued else done).seconds = interval.seconds

    def _count(self, row: Row, num_draft_tokens: int, outcome: Outcome) -> None:
        """Count a live row's part of a round."""
        drafted = min(num_draft_tokens, row.request.max_draft_tokens)
        for stats in (self.stats, row.stats):
            stats.add_round(drafted=drafted, accepted=outcome.num_accepted)
            if outcome.near_ties is not None:
                stats.add_near_ties(outcome.near_ties)

    def _outcomes(
        self, report: Report, rows: Sequence[Row | None], *, has_near_ties: bool
    ) -> list[Outcome]:
        """What was decided of every row, by the graph or now by the host."""
        with self._timer.wait():
            values = _read(report.tokens)  # the one read of the round
        return outcomes_of(values, report, rows, has_near_ties=has_near_ties)

    def _commit(self, outcomes: list[Outcome]) -> None:
        """End the round that waits for the host."""
        verified, self._verified = self._verified, None
        assert verified is not None
        # A row that has ended is not committed; its number only has to be one.
        num_accepted = mx.array([o.num_accepted for o in outcomes], dtype=mx.int32)
        next_token = mx.array(
            [(o.tokens or [0])[-1:] for o in outcomes], dtype=mx.int32
        )
        self._seats.state = self._engine.commit(
            verified, self._seats.settings, accepted=Accepted(num_accepted, next_token)
        )
        mx.async_eval(self._seats.state.arrays)  # another thread may go on

    def _emit(
        self,
        rows: Sequence[Row | None],
        outcomes: Sequence[Outcome],
    ) -> list[Emission]:
        """Turn what was decided into the live rows' emissions."""
        emissions = emissions_of(rows, outcomes)
        if any(e.finish_reason for e in emissions):
            emissions = [self._with_cache(e) for e in emissions]
            self._leave()
        return emissions

    def _with_cache(
        self, emission: Emission, caches: list[PrefillCache] | None = None
    ) -> Emission:
        """A row's last emission, with its caches where it keeps them.

        Args:
            emission: The emission.
            caches: Those of its prompt, where it has no seat.
        """
        row = emission.row
        if not row.request.keeps_cache or emission.finish_reason in (None, "error"):
            return emission
        made = (
            self.extract(row) if caches is None else self._filled(caches, row.emitted)
        )
        return replace(emission, prompt_cache=made)

    def _can_queue(self) -> bool:
        """Whether a round may be queued beside those in flight."""
        if len(self._in_flight) >= (2 if self._can_look_ahead else 1):
            return False
        if not self._in_flight:
            return True
        return self._seats.room.is_known(self._seats.capacity, self._drafts_in_flight)

    @property
    def _can_look_ahead(self) -> bool:
        """Whether a round may be queued before the last one's report is read."""
        return self._look_ahead and not self._seats.settings.rule.has_host

    @property
    def _can_shadow(self) -> bool:
        """Whether drafts beside a plain round say something, and of which place."""
        if self._seats.settings.rule.has_host or any(self._drafts_in_flight):
            return False
        return any(row.request.max_draft_tokens for row in self._seats.live)

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


def _read(report: mx.array) -> list[list[int]]:
    """Read a report: the only place where a round's result reaches the host."""
    return cast(list[list[int]], report.tolist())
