"""The host's side of decoding: prefill, the queue of rounds, budgets and ends.

A decoder keeps at most one round queued beyond the one whose report it reads (look-
ahead), so the device works while the host streams text. One small array is read per
round. Work past an end costs at most that one round and is dropped. While the host
decides a row (logits processors, a caller's sampler) nothing is queued ahead.

It knows token ids only: nothing of text, tokenizers or files.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import mlx.core as mx

from .acceptance import Accepted
from .cache import grow, insert_row, next_capacity
from .draft_length import DraftLength, FixedDraftLength
from .logprobs import TokenLogprobs, log_probabilities, reported_logprobs
from .room import Room
from .rounds import Rounds
from .route import ANY_ROUTE, Route
from .row import Request, Row
from .sampling import SamplingRule, choose_tokens
from .state import Report, RoundState, Verified, row_settings
from .stats import RoundStats, joined_rules
from .timing import RoundTimer

# MLX keeps freed buffers for reuse; let go of them now and then, as mlx-lm does.
_ROUNDS_PER_CACHE_CLEAR = 256

DEFAULT_PREFILL_STEP_SIZE = 2048


@dataclass(frozen=True)
class Emission:
    """What one round, or the prefill, emitted for one row.

    Attributes:
        row: Index of the request.
        tokens: The emitted tokens, at least one, cut at the end of the request.
        num_from_draft: How many of them, from the first on, the drafter proposed.
        finish_reason: ``"stop"`` at an end-of-sequence token, ``"length"`` when the
            budget is used up, else None.
        logits: The target's logits of the whole round: those behind ``tokens[i]`` are
            ``logits[row, i]``. Whole, because a slice made here would belong to the
            stream of the rounds, and its reader would wait for the one in flight.
            Of a row that the host decides they are the processed ones.
            [B, K + 1, V]
        logprobs: One entry per token; empty where nobody asks.
    """

    row: int
    tokens: list[int]
    num_from_draft: int
    finish_reason: str | None
    logits: mx.array
    logprobs: list[TokenLogprobs] = field(default_factory=list)


@dataclass(frozen=True)
class _Outcome:
    """What a round decided of one row: fields as in ``Report`` and ``Emission``."""

    num_accepted: int
    tokens: list[int]
    logits: mx.array
    logprobs: list[TokenLogprobs]
    near_ties: int | None = None


@dataclass
class _InFlight:
    """A round on the device.

    Attributes:
        report: What it will tell.
        num_draft_tokens: Its K.
        setup_s: What it took the host to trace it; None where it was traced before.
        seconds: Its time; None while it is not known.
    """

    report: Report
    num_draft_tokens: int
    setup_s: float | None
    seconds: float | None = None


class Decoder:
    """Decodes a set of requests together, one per row.

    Args:
        rounds: The target and its drafter.
        requests: One per row; they may differ in length and settings.
        num_draft_tokens: K, drafts per round, 0 for plain decoding; or who chooses it
            for every round.
        prefill_step_size: Most prompt tokens in one forward.
        look_ahead: Whether a round is queued before the last one's report is read.
        num_logprobs: How many of the most likely tokens come with each token's
            log-probability; None for no log-probabilities.
        route: How rounds are run and which numbers of drafts they may have.

    Attributes:
        stats: Counts of the rounds read so far.
    """

    def __init__(
        self,
        rounds: Rounds,
        requests: Sequence[Request],
        *,
        num_draft_tokens: int | DraftLength,
        prefill_step_size: int = DEFAULT_PREFILL_STEP_SIZE,
        look_ahead: bool = True,
        num_logprobs: int | None = None,
        route: Route = ANY_ROUTE,
    ) -> None:
        self._timer = RoundTimer()
        self.stats = RoundStats(
            rule=joined_rules(r.rule for r in requests),
            exactness=route.state,
            phases=self._timer.phases,
        )
        self._engine = rounds
        self._rows = [Row.of(r) for r in requests]
        self._draft_length = (
            FixedDraftLength(num_draft_tokens)
            if isinstance(num_draft_tokens, int)
            else num_draft_tokens
        )
        self._route = route
        # One row's growth can be fixed for nothing, whatever was proved.
        is_fixed = route.is_exact if len(self._rows) == 1 else route.has_fixed_growth
        self._room = Room(self._rows, is_fixed=is_fixed)
        self._prefill_step_size = prefill_step_size
        self._look_ahead = look_ahead
        self._in_flight: deque[_InFlight] = deque()
        self._num_queued = 0
        self._not_ready_key: tuple[SamplingRule, int] | None = None
        self._not_traced: set[int] = set()
        self._state: RoundState | None = None
        self._verified: Verified | None = None
        self._settings = row_settings(
            [row.request.sampling for row in self._rows],
            is_host=[row.request.is_host for row in self._rows],
            num_logprobs=num_logprobs,
            near_tie=route.near_tie,
        )
        if self._settings.rule.near_tie is not None:
            self.stats.near_ties = 0

    def run(self) -> Generator[list[Emission], None, None]:
        """Decode until every request has ended.

        Yields:
            After the prefill, and then after each round, the emissions of the rows
            that were live.
        """
        try:
            emissions = self._prefill()
            with self._timer.caller(is_idle=True):
                yield emissions
            while self._wants_round(0):
                while self._can_queue() and self._wants_round(len(self._in_flight)):
                    self._queue_round()
                emissions = self._read_round()
                with self._timer.caller(is_idle=not self._in_flight):
                    yield emissions
        finally:
            self._stop()

    def _prefill(self) -> list[Emission]:
        """Read every prompt into its row of the slabs and choose the first tokens."""
        target = self._engine.target
        layout = target.layout
        slabs = layout.allocate(len(self._rows), self._room.initial_capacity())
        logits, hidden = [], []
        with self._timer.prefill():
            for i, row in enumerate(self._rows):
                prompt = mx.array(row.request.prompt, dtype=mx.int32)
                filled = target.prefill(prompt, step_size=self._prefill_step_size)
                insert_row(slabs, layout, i, filled.caches)
                logits.append(filled.logits)
                hidden.append(filled.hidden)
        offset = mx.array([row.offset for row in self._rows], dtype=mx.int32)
        all_logits = mx.concatenate(logits, axis=0)  # [B, 1, V]
        rule = self._settings.rule
        tokens = mx.zeros((len(self._rows), 1), dtype=mx.int32)
        if rule.has_graph:
            tokens = choose_tokens(
                all_logits,
                self._settings.sampling,
                rule=rule,
                positions=offset[:, None],
            )
        logprobs = reported_logprobs(rule, all_logits, tokens)
        # A prefill's report has the form of a round without drafts.
        report = mx.concatenate([mx.zeros_like(tokens), tokens], axis=1)
        if rule.near_tie is not None:  # the prompt's pass is the same for all K
            report = mx.concatenate([report, mx.zeros_like(tokens)], axis=1)
        outcomes = self._outcomes(Report(report, all_logits, logprobs))
        if rule.has_host:
            tokens = mx.array([o.tokens[-1:] for o in outcomes], dtype=mx.int32)
        self._state = RoundState(slabs, tokens, mx.concatenate(hidden, axis=0), offset)
        mx.clear_cache()
        self._timer.start_rounds()
        return self._emit(outcomes)

    def _queue_round(self) -> None:
        """Queue one round on the device."""
        state, self._state = self._with_room(), None
        settings, min_rows = self._settings, self._route.min_rows
        capacity = self._engine.target.layout.capacity(state.slabs)
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
        self._in_flight.append(_InFlight(report, count, setup_s))
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
        left = [row.num_left for row in self._rows if row.is_live]
        limits = [n - len(self._in_flight) for n in left if n is not None]
        return self._draft_length.choose(
            self._room.allowed(self._route.allowed, capacity),
            not_ready=self._not_ready(capacity),
            tokens_left=max(limits) if len(limits) == len(left) else None,
        )

    def _not_ready(self, capacity: int) -> set[int]:
        """The numbers of drafts whose rounds were not traced before."""
        key = (self._settings.rule, capacity)
        if self._not_ready_key != key:
            self._not_ready_key = key
            self._not_traced = {
                count
                for count in self._route.allowed
                if not self._engine.is_ready(
                    self._settings.rule,
                    num_draft_tokens=count,
                    min_rows=self._route.min_rows,
                    num_rows=len(self._rows),
                    capacity=capacity,
                )
            }
        return self._not_traced

    def _read_round(self) -> list[Emission]:
        """Read the oldest report in flight, let the host decide, and count."""
        done = self._in_flight.popleft()
        outcomes = self._outcomes(done.report)
        self._measure(done)
        if self._verified is not None:
            self._commit(outcomes)
        accepted = []
        for row, outcome in zip(self._rows, outcomes, strict=True):
            if row.is_live:
                row.offset += outcome.num_accepted + 1
                accepted.append(outcome.num_accepted)
                self._count(done.num_draft_tokens, outcome)
        self._draft_length.observe(done.num_draft_tokens, accepted, done.seconds)
        return self._emit(outcomes)

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

    def _count(self, num_draft_tokens: int, outcome: _Outcome) -> None:
        """Count a live row's part of a round."""
        self.stats.add_round(drafted=num_draft_tokens, accepted=outcome.num_accepted)
        if outcome.near_ties is not None:
            self.stats.add_near_ties(outcome.near_ties)

    def _outcomes(self, report: Report) -> list[_Outcome]:
        """What was decided of every row, by the graph or now by the host."""
        with self._timer.wait():
            values = _read(report.tokens)  # the one read of the round
        near_ties: list[int | None] = [None] * len(values)
        if self._settings.rule.near_tie is not None:
            near_ties = [tokens.pop() for tokens in values]
        logprobs: list[list[TokenLogprobs]] = [[] for _ in values]
        if report.logprobs is not None:
            logprobs = report.logprobs.listed()
        return [
            self._judge(i, report.logits, tokens[:-1])
            if row.host is not None and row.is_live
            else _Outcome(
                num_accepted,
                tokens[: num_accepted + 1],
                report.logits,
                logprobs[i],
                near_ties[i],
            )
            for i, (row, (num_accepted, *tokens)) in enumerate(
                zip(self._rows, values, strict=True)
            )
        ]

    def _judge(self, i: int, logits: mx.array, drafts: list[int]) -> _Outcome:
        """Let the host decide row i of the block's logits [B, K + 1, V]."""
        judged = self._rows[i].judge(logits[i], drafts)
        logprobs: list[TokenLogprobs] = []
        count = self._settings.rule.num_logprobs
        if count is not None:
            tokens = mx.array([judged.tokens], dtype=mx.int32)
            (logprobs,) = log_probabilities(
                judged.logits, tokens, num_logprobs=count
            ).listed()
        # A view, so that [row, i] finds the row's own as in a round's logits.
        shape = (len(self._rows), *judged.logits.shape[1:])
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
        next_token = mx.array([o.tokens[-1:] for o in outcomes], dtype=mx.int32)
        self._state = self._engine.commit(
            verified, self._settings, accepted=Accepted(num_accepted, next_token)
        )

    def _emit(self, outcomes: list[_Outcome]) -> list[Emission]:
        """Turn what was decided into the live rows' emissions."""
        emissions = []
        for i, (row, outcome) in enumerate(zip(self._rows, outcomes, strict=True)):
            if not row.is_live:
                continue
            taken = row.take(outcome.tokens)
            emissions.append(
                Emission(
                    row=i,
                    tokens=taken,
                    num_from_draft=min(outcome.num_accepted, len(taken)),
                    finish_reason=row.finish_reason,
                    logits=outcome.logits,
                    logprobs=outcome.logprobs[: len(taken)],
                )
            )
        if any(e.finish_reason for e in emissions):
            is_live = [row.is_live for row in self._rows]
            has_host = any(row.is_live and row.host for row in self._rows)
            self._settings = replace(
                self._settings,
                rule=replace(self._settings.rule, has_host=has_host),
                is_active=mx.array(is_live),
            )
        return emissions

    def _can_queue(self) -> bool:
        """Whether a round may be queued beside those in flight."""
        if len(self._in_flight) >= (2 if self._can_look_ahead else 1):
            return False
        if not self._in_flight:
            return True
        assert self._state is not None  # a round in flight has left one
        capacity = self._engine.target.layout.capacity(self._state.slabs)
        return self._room.is_known(capacity, self._drafts_in_flight)

    @property
    def _can_look_ahead(self) -> bool:
        """Whether a round may be queued before the last one's report is read."""
        return self._look_ahead and not self._settings.rule.has_host

    @property
    def _drafts_in_flight(self) -> list[int]:
        return [queued.num_draft_tokens for queued in self._in_flight]

    def _wants_round(self, num_in_flight: int) -> bool:
        """Whether some row needs a round beyond those in flight.

        Each of them emits at least one token for every row.
        """
        return any(row.wants_more_than(num_in_flight) for row in self._rows)

    def _with_room(self) -> RoundState:
        """The state, its slabs grown when the next round might not fit."""
        state = self._state
        assert state is not None  # set by the prefill and by every queued round
        layout = self._engine.target.layout
        capacity = layout.capacity(state.slabs)
        if not self._room.must_grow(capacity, self._drafts_in_flight):
            return state
        slabs, self._state = list(state.slabs), None
        state = replace(state, slabs=[])
        grow(slabs, layout, next_capacity(capacity + 1, capacity))
        mx.clear_cache()
        self._timer.disturb()
        return replace(state, slabs=slabs)

    def _stop(self) -> None:
        """Wait for what is still running and let go of the slabs."""
        try:
            mx.eval([queued.report.tokens for queued in self._in_flight])
        finally:
            self._in_flight.clear()
            self._state = self._verified = None
            self._timer.stop()
            self._draft_length.finish()


def _read(report: mx.array) -> list[list[int]]:
    """Read a report: the only place where a round's result reaches the host."""
    return cast(list[list[int]], report.tolist())
