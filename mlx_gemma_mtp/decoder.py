"""The host's side of decoding: prefill, the queue of rounds, budgets and ends.

A decoder keeps at most one round queued beyond the one whose report it reads (look-
ahead), so the device works while the host streams text. One small array is read per
round. Work past an end costs at most that one round and is dropped.

It knows token ids only: nothing of text, tokenizers or files.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import mlx.core as mx

from .cache import MAX_DRAFT_TOKENS, grow, insert_row, next_capacity
from .config import SamplingParams
from .rounds import Report, Rounds, RoundState, row_settings
from .sampling import choose_tokens
from .stats import RoundStats

# Slabs for a request are reserved up to this many tokens ahead, so that an ordinary
# one never grows; a longer one grows as it goes.
RESERVED_TOKENS = 1024

# MLX keeps freed buffers for reuse; let go of them now and then, as mlx-lm does.
_ROUNDS_PER_CACHE_CLEAR = 256

DEFAULT_PREFILL_STEP_SIZE = 2048


@dataclass(frozen=True)
class Request:
    """One sequence to decode.

    Attributes:
        prompt: At least one token id.
        max_tokens: How many tokens to emit, 1 or more; None for no limit.
        sampling: How tokens are chosen.
        eos_token_ids: Tokens that end the sequence; the one that does is emitted.
    """

    prompt: list[int]
    max_tokens: int | None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    eos_token_ids: frozenset[int] = frozenset()


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
            [B, K + 1, V]
    """

    row: int
    tokens: list[int]
    num_from_draft: int
    finish_reason: str | None
    logits: mx.array


@dataclass
class _Row:
    """The host's knowledge of one row."""

    request: Request
    offset: int  # tokens in the slabs, as of the last report read
    num_emitted: int = 0
    finish_reason: str | None = None

    @property
    def is_live(self) -> bool:
        return self.finish_reason is None

    def wants_more_than(self, num_tokens: int) -> bool:
        """Whether the row is live and its budget exceeds ``num_tokens`` more."""
        limit = self.request.max_tokens
        return self.is_live and (limit is None or limit - self.num_emitted > num_tokens)

    def take(self, tokens: Sequence[int]) -> list[int]:
        """Cut a round's tokens at the request's end and count them."""
        taken = []
        for token in tokens:
            taken.append(token)
            self.num_emitted += 1
            if token in self.request.eos_token_ids:
                self.finish_reason = "stop"
            elif self.num_emitted == self.request.max_tokens:
                self.finish_reason = "length"
            if not self.is_live:
                break
        return taken


class Decoder:
    """Decodes a set of requests together, one per row.

    Args:
        rounds: The target and its drafter.
        requests: One per row; they may differ in length and settings.
        num_draft_tokens: K, drafts per round; 0 is plain decoding.
        prefill_step_size: Most prompt tokens in one forward.
        look_ahead: Whether a round is queued before the last one's report is read.

    Attributes:
        stats: Counts of the rounds read so far.
    """

    def __init__(
        self,
        rounds: Rounds,
        requests: Sequence[Request],
        *,
        num_draft_tokens: int,
        prefill_step_size: int = DEFAULT_PREFILL_STEP_SIZE,
        look_ahead: bool = True,
    ) -> None:
        self.stats = RoundStats()
        self._engine = rounds
        self._rows = [_Row(_seeded(r), offset=len(r.prompt)) for r in requests]
        self._num_draft_tokens = num_draft_tokens
        self._prefill_step_size = prefill_step_size
        self._max_in_flight = 2 if look_ahead else 1
        self._in_flight: deque[Report] = deque()
        self._num_queued = 0
        self._state: RoundState | None = None
        self._settings = row_settings([row.request.sampling for row in self._rows])

    def run(self) -> Generator[list[Emission], None, None]:
        """Decode until every request has ended.

        Yields:
            After the prefill, and then after each round, the emissions of the rows
            that were live.
        """
        try:
            yield self._prefill()
            while self._wants_round(0):
                while len(self._in_flight) < self._max_in_flight and self._wants_round(
                    len(self._in_flight)
                ):
                    self._queue_round()
                yield self._read_round()
        finally:
            self._stop()

    def _prefill(self) -> list[Emission]:
        """Read every prompt into its row of the slabs and choose the first tokens."""
        target = self._engine.target
        layout = target.layout
        slabs = layout.allocate(len(self._rows), self._initial_capacity())
        logits, hidden = [], []
        for i, row in enumerate(self._rows):
            prompt = mx.array(row.request.prompt, dtype=mx.int32)
            filled = target.prefill(prompt, step_size=self._prefill_step_size)
            insert_row(slabs, layout, i, filled.caches)
            logits.append(filled.logits)
            hidden.append(filled.hidden)
        offset = mx.array([row.offset for row in self._rows], dtype=mx.int32)
        all_logits = mx.concatenate(logits, axis=0)  # [B, 1, V]
        tokens = choose_tokens(
            all_logits,
            self._settings.sampling,
            rule=self._settings.rule,
            positions=offset[:, None],
        )
        self._state = RoundState(slabs, tokens, mx.concatenate(hidden, axis=0), offset)
        # A prefill's report has the form of a round without drafts.
        report = mx.concatenate([mx.zeros_like(tokens), tokens], axis=1)
        mx.clear_cache()
        return self._emit(_read(report), all_logits)

    def _queue_round(self) -> None:
        """Queue one round on the device."""
        state, self._state = self._with_room(), None
        state, report = self._engine.run(
            state, self._settings, num_draft_tokens=self._num_draft_tokens
        )
        # No reference to the old slabs is left: they are written in place.
        mx.async_eval(
            report.tokens, state.last_token, state.hidden, state.offset, *state.slabs
        )
        self._state = state
        self._in_flight.append(report)
        self._num_queued += 1
        if self._num_queued % _ROUNDS_PER_CACHE_CLEAR == 0:
            mx.clear_cache()

    def _read_round(self) -> list[Emission]:
        """Read the oldest report in flight and count it."""
        report = self._in_flight.popleft()
        values = _read(report.tokens)  # the one read of the round
        for row, (num_accepted, *_) in zip(self._rows, values, strict=True):
            if row.is_live:
                row.offset += num_accepted + 1
                self.stats.add_round(
                    drafted=self._num_draft_tokens, accepted=num_accepted
                )
        return self._emit(values, report.logits)

    def _emit(self, values: list[list[int]], logits: mx.array) -> list[Emission]:
        """Turn a report's rows into the live rows' emissions."""
        emissions = []
        for i, (num_accepted, *tokens) in enumerate(values):
            row = self._rows[i]
            if not row.is_live:
                continue
            taken = row.take(tokens[: num_accepted + 1])
            emissions.append(
                Emission(
                    row=i,
                    tokens=taken,
                    num_from_draft=min(num_accepted, len(taken)),
                    finish_reason=row.finish_reason,
                    logits=logits,
                )
            )
        if any(e.finish_reason for e in emissions):
            is_active = mx.array([row.is_live for row in self._rows])
            self._settings = replace(self._settings, is_active=is_active)
        return emissions

    def _wants_round(self, num_in_flight: int) -> bool:
        """Whether some row needs a round beyond those in flight.

        Each of them emits at least one token for every row.
        """
        return any(row.wants_more_than(num_in_flight) for row in self._rows)

    def _with_room(self) -> RoundState:
        """The state, its slabs grown when the next round might not fit."""
        state = self._state
        assert state is not None  # set by the prefill and by every queued round
        block = self._num_draft_tokens + 1
        offset = max(row.offset for row in self._rows) + len(self._in_flight) * block
        layout = self._engine.target.layout
        capacity = layout.capacity(state.slabs)
        if offset + block <= capacity:
            return state
        slabs, self._state = list(state.slabs), None
        state = replace(state, slabs=[])
        grow(slabs, layout, next_capacity(offset + block, capacity))
        mx.clear_cache()
        return replace(state, slabs=slabs)

    def _initial_capacity(self) -> int:
        """Slots for the longest row: its prompt, its tokens, rounds in flight."""
        # The same for every K: unfused attention may round by the capacity.
        margin = 2 * (MAX_DRAFT_TOKENS + 1)
        needed = 0
        for row in self._rows:
            limit = row.request.max_tokens
            ahead = RESERVED_TOKENS if limit is None else min(limit, RESERVED_TOKENS)
            needed = max(needed, row.offset + ahead + margin)
        return next_capacity(needed)

    def _stop(self) -> None:
        """Wait for what is still running and let go of the slabs."""
        for report in self._in_flight:
            mx.eval(report.tokens)
        self._in_flight.clear()
        self._state = None


def _read(report: mx.array) -> list[list[int]]:
    """Read a report: the only place where a round's result reaches the host."""
    return cast(list[list[int]], report.tolist())


def _seeded(request: Request) -> Request:
    """The request with a seed of its own where it samples and brings none."""
    if request.sampling.temp > 0 and request.sampling.seed is None:
        seed = secrets.randbits(64)  # of no meaning to anybody, so nothing is repeated
        sampling = replace(request.sampling, seed=seed, reproducible=False)
        return replace(request, sampling=sampling)
    return request
