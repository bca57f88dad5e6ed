"""One round of a batch, from its drafts to its commit, with what the host does between.

Most rounds are one graph. Where rows have masks, a round stands before its decision
until the host has read the drafts and made the masks; the device verifies meanwhile.
Where the host decides rows, a round stands before its commit until it has done so.

Knows nothing of how many rounds are in flight, nor of what a round takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from ..constants import DRAFTER, LOOKUP
from ..drafting.policy import Way
from ..sampling.acceptance import Accepted
from .batch import Batch
from .masked import RoundMasks, proposed_tokens
from .results import decisions_of
from .round import commit
from .rounds import Rounds
from .sequence import TokenSequence
from .sources import looking_up, round_source
from .state import Begun, Decision, Proposals, Report, RoundState, Verified
from .timing import RoundTimer


@dataclass
class QueuedRound:
    """A round that was built.

    Attributes:
        sequences: Who sat where when it was built.
        num_draft_tokens: Its K.
        source: Where its drafts come from, see ``RoundShape``.
        looking_up: Which seats look up, see ``RowSettings``.
        report: What it will tell; None while it stands before its decision.
        begun: The round where it stands before its decision.
        drafts: Of each seat, once they were read.
        masks: What its rows may choose; None for anything.
        waiting: Arrays that are still to be evaluated, in this order: it has not been
            started.
    """

    sequences: Sequence[TokenSequence | None]
    num_draft_tokens: int
    source: str = DRAFTER
    looking_up: Sequence[bool] = ()
    report: Report | None = None
    begun: Begun | None = None
    drafts: list[list[int]] | None = None
    masks: RoundMasks | None = None
    waiting: list[list[mx.array]] = field(default_factory=list)

    @property
    def started(self) -> list[mx.array]:
        """Arrays whose end is that of all that was handed to the device."""
        if self.waiting:
            return []
        if self.report is not None:
            return [self.report.tokens]
        return [] if self.begun is None else [self.begun.logits]

    def source_of(self, seat: int) -> str:
        """Where the drafts of a row came from."""
        return LOOKUP if self.looking_up[seat] else self.source

    def num_forced(self, seat: int) -> int:
        """How many drafts of a row, from the first on, its masks have forced."""
        sequence = self.sequences[seat]
        if self.masks is None or self.drafts is None or sequence is None:
            return 0
        forced = self.masks.forced.get(sequence, ())
        count = 0
        for draft, run in zip(self.drafts[seat], forced, strict=False):
            if list(run[:1]) != [draft]:
                break
            count += 1
        return count

    def read_drafts(self) -> None:
        """Wait for the drafts of a round that stands before its decision."""
        if self.drafts is None and self.begun is not None:
            self.drafts = self.begun.read_drafts()


class RoundRunner:
    """Runs the rounds of a batch.

    Args:
        rounds: The target and its drafter.
        batch: Who sits where, and the state between rounds.
        min_rows: Rows that the target reads at least.
        timer: Times them.
    """

    def __init__(
        self, rounds: Rounds, batch: Batch, *, min_rows: int, timer: RoundTimer
    ) -> None:
        self._rounds = rounds
        self._batch = batch
        self._min_rows = min_rows
        self._timer = timer
        self._verified: Verified | None = None

    def queue(
        self,
        state: RoundState,
        way: Way,
        last: QueuedRound | None,
        word: mx.array | None = None,
    ) -> QueuedRound:
        """Let a round follow a state; nothing of it is evaluated here.

        Args:
            state: The batch's, taken out of it.
            way: How it drafts.
            last: The round in flight.
            word: See control.py; None where there is one machine.
        """
        settings, num_draft_tokens = self._batch.settings, way.num_draft_tokens
        sequences = tuple(self._batch.sequences)
        rows = (
            looking_up(sequences) if self._batch.has_text else (False,) * len(sequences)
        )
        shape: dict[str, Any] = {
            "num_draft_tokens": num_draft_tokens,
            "min_rows": self._min_rows,
            "source": round_source(way.source, rows),
        }
        queued = QueuedRound(sequences, num_draft_tokens, way.source, rows)
        if settings.graph.has_masks:
            proposals = self.proposals(num_draft_tokens, last)
            begun = self._rounds.begin(state, settings, proposals=proposals, **shape)
            queued.begun = begun
            # The drafts come first: masks are made of them while the rest runs.
            drafts = [begun.draft.tokens] if num_draft_tokens else []
            queued.waiting = [drafts, [begun.logits, begun.hidden, *begun.slabs]]
        elif settings.graph.has_host:
            self._verified, report = self._rounds.verify(state, settings, **shape)
            queued.report = report
            queued.waiting = [[*report.arrays, *self._verified.arrays]]
        else:
            self._batch.state, report = self._rounds.run(
                state, settings, word=word, **shape
            )
            queued.report = report
            queued.waiting = [[*report.arrays, *self._batch.state.arrays]]
        return queued

    def start(self, queued: QueuedRound) -> None:
        """Hand a round to the device.

        Nobody has a reference to the slabs before it by now: they are written in place.
        """
        waiting, queued.waiting = queued.waiting, []
        with self._timer.queue():
            for arrays in waiting:
                mx.async_eval(*arrays)

    def decide(self, queued: QueuedRound) -> None:
        """Make the masks of a round that stands before its decision, which follows."""
        if queued.begun is None:
            return
        with self._timer.wait():
            queued.read_drafts()
        begun, queued.begun = queued.begun, None
        queued.masks = RoundMasks.of(
            queued.sequences, queued.drafts or [], begun.logits.shape[-1]
        )
        left, queued.report = self._rounds.finish(
            begun, self._batch.settings, queued.masks.words
        )
        arrays = [*queued.report.arrays]
        if isinstance(left, Verified):
            self._verified = left
        else:
            self._batch.state = left
            arrays += left.small.values()
        with self._timer.queue():
            mx.async_eval(*arrays)

    def read(self, queued: QueuedRound, ahead: QueuedRound | None) -> list[Decision]:
        """Wait for a round's report; the host decides what it leaves to it.

        Args:
            queued: The round.
            ahead: The one behind it. Its drafts, where masks are made of them, come
                last and are waited for first: once for both.
        """
        assert queued.report is not None
        with self._timer.wait():
            if ahead is not None:
                ahead.read_drafts()
            decided = queued.report.read()
        errors = {} if queued.masks is None else queued.masks.errors
        return decisions_of(decided, queued.report, queued.sequences, errors)

    def commit(self, decisions: Sequence[Decision]) -> None:
        """End a round that stands before its commit."""
        verified, self._verified = self._verified, None
        if verified is None:
            return
        # One that has ended is not committed; its number only has to be one.
        num_accepted = mx.array([o.num_accepted for o in decisions], dtype=mx.int32)
        next_token = mx.array(
            [(o.tokens or [0])[-1:] for o in decisions], dtype=mx.int32
        )
        self._batch.state = commit(
            verified, self._batch.settings, Accepted(num_accepted, next_token)
        )
        mx.async_eval(self._batch.state.arrays)  # another thread may go on

    def clear(self) -> None:
        """Let go of what stands before its commit."""
        self._verified = None

    def proposals(
        self, num_draft_tokens: int, last: QueuedRound | None
    ) -> Proposals | None:
        """Forced tokens to propose in place of drafts; None where no row has masks.

        Args:
            num_draft_tokens: K.
            last: The round in flight.
        """
        if not num_draft_tokens or not self._batch.settings.graph.has_masks:
            return None
        sequences = self._batch.sequences
        num_accepted = mx.zeros((len(sequences),), dtype=mx.int32)
        before: Sequence[TokenSequence | None] = ()
        masks = None
        if last is not None:
            before, masks = last.sequences, last.masks
            assert last.report is not None  # it was decided before another one begins
            if len(before) == len(sequences):
                num_accepted = last.report.tokens[:, 0]
        tokens = proposed_tokens(
            sequences,
            num_draft_tokens,
            vocab_size=self._rounds.target.vocab_size,
            before=before,
            forced={} if masks is None else masks.forced,
        )
        return Proposals(num_accepted, tokens)
