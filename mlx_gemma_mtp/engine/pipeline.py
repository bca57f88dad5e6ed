"""The rounds of a batch: queued one ahead, read one by one, timed and counted.

At most one round is queued beyond the one whose report is read (look-ahead), so the
device works while the host streams text. One small array is read per round. Work past
an end costs at most that one round and is dropped. While the host decides a sequence
(logits processors, a caller's sampler) nothing is queued ahead. Where rows have masks,
the next round's drafts are read with the last one's report: the masks between them and
the decision are made while the round runs.

This file alone knows what is in flight. It knows nothing of prompts, of who waits, or
of what is done with a sequence that has ended.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx

from ..cpu_kernels import clock
from ..drafting.policy import DraftPolicy, Way
from .batch import Batch
from .chooser import WayChooser
from .control import Control
from .early_start import EarlyStart
from .followed import Followed
from .results import SequenceOutput, outputs_of
from .rounds import Rounds
from .route import Route
from .runner import QueuedRound, RoundRunner
from .sequence import TokenSequence
from .shadows import Shadows
from .state import Decision, RoundState
from .stats import RoundStats
from .timing import RoundTimer

# MLX keeps freed buffers for reuse; let go of them now and then, as mlx-lm does.
_ROUNDS_PER_CACHE_CLEAR = 256


@dataclass
class _InFlight:
    """A round that was built.

    Attributes:
        queued: The round.
        policy: Who chose its number of drafts.
        setup_s: What it took the host to trace it; None where it was traced before.
        num_shadow_drafts: Drafts that were made beside it.
        context: Tokens of the longest sequence when it was chosen.
        matches: How long the match of each seat was when it was chosen.
        is_early: Whether it was started before the report of the one before was read.
        seconds: Its time; None while it is not known.
    """

    queued: QueuedRound
    policy: DraftPolicy
    setup_s: float | None
    num_shadow_drafts: int
    context: int
    matches: tuple[int, ...] = ()
    is_early: bool = False
    seconds: float | None = None


class RoundPipeline:
    """Runs the rounds of a batch.

    Args:
        rounds: The target and its drafter.
        batch: Who sits where, and the state between rounds.
        draft_policy: Chooses the number of drafts.
        route: How rounds are run and which numbers of drafts they may have.
        look_ahead: Whether a round is built before the last one's report is read.
        early_start: Decides whether it is started before that, too.
        stats: Counts of the rounds read so far.
        timer: Times them.
        control: What all machines agree on.
    """

    def __init__(
        self,
        rounds: Rounds,
        batch: Batch,
        *,
        draft_policy: DraftPolicy,
        route: Route,
        look_ahead: bool,
        early_start: EarlyStart,
        stats: RoundStats,
        timer: RoundTimer,
        control: Control,
    ) -> None:
        self._rounds = rounds
        self._batch = batch
        self._look_ahead = look_ahead
        self._early_start = early_start
        self._stats = stats
        self._timer = timer
        self._control = control
        self._in_flight: deque[_InFlight] = deque()
        self._num_queued = 0
        self._shadows = Shadows()
        self._followed = Followed()
        self._chooser = WayChooser(
            rounds, batch, policy=draft_policy, route=route, control=control
        )
        self._runner = RoundRunner(rounds, batch, min_rows=route.min_rows, timer=timer)

    @property
    def is_empty(self) -> bool:
        """Whether no round is in flight."""
        return not self._in_flight

    def num_written(self, sequence: TokenSequence) -> int:
        """How many of a sequence's tokens have keys and values in the batch's state."""
        # A round in flight has written the newest token of the one before.
        return sequence.offset + any(
            sequence in flight.queued.sequences for flight in self._in_flight
        )

    def advance(self, *, is_awaited: bool) -> list[SequenceOutput]:
        """Queue rounds, one ahead where that can be, and read the oldest.

        Args:
            is_awaited: Whether others wait for seats.

        Returns:
            What the live sequences emit.

        Raises:
            KernelError: A round failed; see ``Rounds.watched``.
        """
        self._skip_unwanted()
        # Drafts of which masks are made are read with the last round's report.
        is_early = self._batch.settings.graph.has_masks or self._early_start.is_early
        is_early |= not self._control.is_alone  # a round that is built is run by all
        with self._rounds.watched():
            while self._can_queue() and self._wants_another():
                is_first = self.is_empty
                self._build(is_awaited=is_awaited)
                if is_first or is_early:
                    self._start(is_early=not is_first)
                if is_first:
                    self._decide()
            outputs = self._read()
            self._decide()
            if self._batch.live:  # else what is in flight is dropped
                self._start(is_early=False)
        return outputs

    def drop(self) -> None:
        """Forget what is in flight, as it may have failed."""
        self._in_flight.clear()

    def rest(self) -> None:
        """Wait for what is still running, and let go of it and of the batch's slabs."""
        try:
            self._leave()
            with self._control.waiting():
                mx.eval([f.queued.started for f in self._in_flight])
        finally:
            self._in_flight.clear()
            self._shadows.clear()
            self._followed.clear()
            self._runner.clear()
            self._batch.clear()

    def _leave(self) -> None:
        """Go on with all machines until rank 0's leave is known to them."""
        control = self._control
        control.is_leaving = True
        if control.is_alone:
            return
        while self._batch.live and not (control.is_over or control.is_lost):
            self.advance(is_awaited=False)

    def _skip_unwanted(self) -> None:
        """Drop rounds whose sequences have all left since they were queued."""
        while self._in_flight and not any(
            s is not None and s.is_live for s in self._in_flight[0].queued.sequences
        ):
            self._in_flight.popleft()
            self._timer.disturb()

    def _can_queue(self) -> bool:
        """Whether a round may be queued beside those in flight."""
        if not self._control.may_build:
            return False
        if len(self._in_flight) >= (2 if self._can_look_ahead else 1):
            return False
        if self.is_empty:
            return True
        batch = self._batch
        return batch.capacity.is_known(batch.num_slots, self._drafts_in_flight)

    def _wants_another(self) -> bool:
        """Whether some sequence needs a round beyond those in flight.

        Each of them emits at least one token for everybody who sits in it.
        """
        return any(
            s.wants_more_than(sum(s in f.queued.sequences for f in self._in_flight))
            for s in self._batch.live
        )

    @property
    def _can_look_ahead(self) -> bool:
        """Whether a round may be queued before the last one's report is read."""
        return self._look_ahead and not self._batch.settings.graph.has_host

    @property
    def _last(self) -> QueuedRound | None:
        """The round that was built last, where one is in flight."""
        return None if self.is_empty else self._in_flight[-1].queued

    @property
    def _drafts_in_flight(self) -> list[int]:
        return [flight.queued.num_draft_tokens for flight in self._in_flight]

    def _build(self, *, is_awaited: bool) -> None:
        """Build the graph of one round; it is evaluated once it is started."""
        batch = self._batch
        if batch.reserve(self._drafts_in_flight, is_awaited=is_awaited):
            self._timer.disturb()
        chosen = self._chooser.choose(self._drafts_in_flight)
        policy, way = chosen.policy, chosen.way
        shape = (way, len(batch), batch.num_slots)
        are_traced = self._control.are_traced(shape, is_traced=chosen.is_traced)
        state = batch.take_state()
        num_shadow = self._queue_shadow(state, policy)
        start = clock()
        queued = self._runner.queue(state, way, self._last, chosen.word)
        setup_s = None if chosen.is_traced else clock() - start
        if not are_traced:
            self._control.meet()
        matches = tuple(s.match_length if s else 0 for s in batch.sequences)
        self._in_flight.append(
            _InFlight(queued, policy, setup_s, num_shadow, chosen.context, matches)
        )
        self._num_queued += 1
        if not chosen.is_traced:
            self._chooser.note_traced(way)
            self._stats.traced += 1
            self._timer.disturb()
        if self._num_queued % _ROUNDS_PER_CACHE_CLEAR == 0:
            mx.clear_cache()
            self._timer.disturb()

    def _start(self, *, is_early: bool) -> None:
        """Hand the round that was built last to the device, if that was not done."""
        if self.is_empty or not self._in_flight[-1].queued.waiting:
            return
        built = self._in_flight[-1]
        built.is_early = is_early
        start = clock()
        with self._control.waiting():
            self._runner.start(built.queued)
        if built.setup_s is not None:
            built.setup_s += clock() - start

    def _decide(self) -> None:
        """Let the round that was built last be decided, where it waits for masks."""
        if self.is_empty:
            return
        built = self._in_flight[-1]
        start = clock()
        self._runner.decide(built.queued)
        if built.setup_s is not None:
            built.setup_s += clock() - start

    def _queue_shadow(self, state: RoundState, policy: DraftPolicy) -> int:
        """Make drafts beside the next round, where they are asked for; how many."""
        count, settings = policy.num_shadow_drafts, self._batch.settings
        if count:
            settings = replace(settings, graph=settings.graph.by_equality)
            try:
                drafts = self._rounds.draft(
                    state,
                    settings,
                    num_draft_tokens=count,
                    proposals=self._runner.proposals(count, self._last),
                )
                with self._timer.queue():
                    mx.async_eval(drafts)
            except Exception:
                policy.observe_shadow(count, [])  # nothing will come
                raise
            self._shadows.add(
                drafts,
                self._batch.sequences,
                in_flight=[flight.queued.sequences for flight in self._in_flight],
                policy=policy,
            )
        return count

    def _read(self) -> list[SequenceOutput]:
        """Read the oldest report in flight, let the host decide, and count."""
        done = self._in_flight.popleft()
        with self._control.reading():
            decisions = self._runner.read(done.queued, self._last)
        assert done.queued.report is not None
        tokens = [decision.tokens for decision in decisions]
        self._control.read(done.queued.report.word, tokens)
        self._measure(done)
        self._runner.commit(decisions)
        self._learn(done, decisions)
        outputs = outputs_of(done.queued.sequences, decisions)
        self._shadows.compare()
        self._followed.compare()
        return outputs

    def _measure(self, done: _InFlight) -> None:
        """Let the interval that ends with a round's read tell what a round takes."""
        if done.setup_s is not None:
            self._timer.disturb()
            done.policy.observe_setup(done.setup_s + self._timer.waited_s)
        interval = self._timer.interval()
        if interval is None:
            return
        last = self._in_flight[-1] if self._in_flight else done
        running = done if last.queued.waiting else last
        (running if interval.is_queued else done).seconds = interval.seconds

    def _learn(self, done: _InFlight, decisions: Sequence[Decision]) -> None:
        """Count a round, and tell who chooses for the next ones how it went."""
        accepted, matches = [], []
        queued, num_drafts = done.queued, done.queued.num_draft_tokens
        for seat, (sequence, decision) in enumerate(
            zip(queued.sequences, decisions, strict=True)
        ):
            if sequence is None or not sequence.is_live or decision.error is not None:
                continue
            sequence.offset += decision.num_accepted + 1
            most = sequence.request.max_draft_tokens
            drafted = min(num_drafts, most)
            source, forced = queued.source_of(seat), queued.num_forced(seat)
            for stats in (self._stats, sequence.stats):
                stats.add_round(
                    drafted=drafted,
                    accepted=decision.num_accepted,
                    source=source,
                    forced=forced,
                )
            length = done.matches[seat]
            self._followed.note(sequence, length, policy=done.policy)
            if most >= num_drafts and source == queued.source:
                accepted.append(decision.num_accepted)
                matches.append(length)
        way = Way(num_drafts, queued.source)
        done.policy.observe(
            way,
            accepted,
            done.seconds,
            matches=matches,
            num_shadow_drafts=done.num_shadow_drafts,
            context=done.context,
        )
        can_be_late = self._can_look_ahead and done.queued.masks is None
        if done.seconds is not None and can_be_late:
            self._early_start.observe(way, done.seconds, is_early=done.is_early)
