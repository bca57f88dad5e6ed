"""The host's side of decoding: sequences that join and leave, steps, ends.

Requests wait in order until there is a seat and memory for them; their prompts are read
a chunk at a time, between rounds. A decoder that is given its requests at first is no
other one: they all join before the first round, and it steps until all have ended.

It knows token ids only: nothing of text, tokenizers or files.
"""

from __future__ import annotations

import atexit
import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from ..distributed.ranks import Ranks, failure
from ..distributed.work import end_work
from ..drafting.policy import DraftPolicy
from ..errors import RanksError
from .batch import Batch
from .capacity import DEFAULT_MAX_ROWS, BatchPolicy, ClosedBatch, OpenBatch
from .control import Control, RanksControl
from .early_start import EarlyStart
from .extract import extracted, filled, with_cache
from .pipeline import RoundPipeline
from .prefill import DEFAULT_PREFILL_STEP_SIZE
from .prompt_reader import PromptReader
from .queue import RequestQueue
from .request import Request
from .results import PromptProgress, SequenceOutput, StepOutput, failure_of
from .rounds import Rounds
from .route import ANY_ROUTE, Route
from .sequence import TokenSequence
from .stats import RoundStats, joined_rules
from .timing import RoundTimer

logger = logging.getLogger("mlx_gemma_mtp")


class Decoder:
    """Decodes requests together, one per sequence.

    Given requests at first, it decodes just these (``run``): all prompts are read
    before the first round, and every sequence has a seat of its own. Given none,
    sequences join and leave (``add``, ``step``, ``remove``).

    Args:
        rounds: The target and its drafter.
        requests: One per sequence; they may differ in length and settings.
        num_draft_tokens: K, drafts per round, 0 for plain decoding; or who chooses it
            for every round.
        prefill_step_size: Most prompt tokens in one forward, and between two rounds.
        look_ahead: Whether a round is built before the last one's report is read.
        early_start: Decides whether it is started before that, too; None for one that
            has learnt nothing yet.
        route: How rounds are run and which numbers of drafts they may have.
        why_plain: Of the statistics, as are the seconds ``probe_s``.
        max_rows: See ``OpenBatch.max_sequences``; for sequences that join and leave.
        max_kv_bytes: See ``OpenBatch``; for sequences that join and leave.
        prompt_caches: mlx-lm's caches that hold what comes before each request's
            prompt; ``()`` for none.
        has_text: Whether drafts may come from the text itself.
        ranks: The machines that have a part of the target each, and decode the same
            requests; None for one. Only what is given at first is decoded.

    Attributes:
        stats: Counts of the rounds read so far.
        num_added: Requests that were added so far.
        min_rows: Rows that the target reads at least in a round.

    Raises:
        RequestError: A prompt cache is not the target's.
    """

    def __init__(
        self,
        rounds: Rounds,
        requests: Sequence[Request] = (),
        *,
        num_draft_tokens: int | DraftPolicy,
        prefill_step_size: int = DEFAULT_PREFILL_STEP_SIZE,
        look_ahead: bool = True,
        early_start: EarlyStart | None = None,
        route: Route = ANY_ROUTE,
        why_plain: str = "",
        probe_s: float = 0.0,
        max_rows: int = DEFAULT_MAX_ROWS,
        max_kv_bytes: int | None = None,
        prompt_caches: Sequence[Sequence[Any] | None] = (),
        has_text: bool = False,
        ranks: Ranks | None = None,
    ) -> None:
        self._rounds = rounds = rounds.own()
        if isinstance(num_draft_tokens, int):
            num_draft_tokens = DraftPolicy(num_draft_tokens)
        self._draft_policy = num_draft_tokens
        self._timer = RoundTimer()
        self.stats = RoundStats(
            exactness=route.state,
            why_plain=why_plain,
            probe_s=probe_s,
            max_difference=route.max_difference,
            matmuls=rounds.choices.named,
            phases=self._timer.phases,
        )
        self.num_added = 0
        self.min_rows = route.min_rows
        self._ranks = ranks
        self._control = Control() if ranks is None else RanksControl(ranks)
        self._is_closed = self._has_freed = False
        layout, policy = rounds.target.layout, _policy(requests, max_rows, max_kv_bytes)
        self._queue = RequestQueue(layout, policy, pads=route.pads_prompts)
        self._batch = Batch(layout, policy, has_text=has_text)
        self._reader = PromptReader(
            rounds.target,
            self._queue,
            self._batch,
            step_size=prefill_step_size,
            timer=self._timer,
            ranks=ranks,
        )
        self._pipeline = RoundPipeline(
            rounds,
            self._batch,
            draft_policy=self._draft_policy,
            route=route,
            look_ahead=look_ahead,
            early_start=early_start or EarlyStart(),
            stats=self.stats,
            timer=self._timer,
            control=self._control,
        )
        self._batch.expect(self._add(requests, prompt_caches or [None] * len(requests)))

    def add(
        self, request: Request, prompt_cache: Sequence[Any] | None = None
    ) -> TokenSequence:
        """Let a request wait for its turn; see ``add_all``."""
        (sequence,) = self.add_all([request], [prompt_cache])
        return sequence

    def add_all(
        self,
        requests: Sequence[Request],
        prompt_caches: Sequence[Sequence[Any] | None],
    ) -> list[TokenSequence]:
        """Let requests wait for their turn: all of them, or none where one may not.

        Args:
            requests: Checked ones.
            prompt_caches: mlx-lm's caches that hold what comes before each prompt; they
                are read, not written. None for none.

        Returns:
            The sequences that they become.

        Raises:
            RequestError: One could never fit into ``max_kv_bytes``, or the caches are
                not the target's.
        """
        assert isinstance(self._batch.policy, OpenBatch)
        self._rounds.refresh()  # prompts are read with the weights as they are
        return self._add(requests, prompt_caches)

    def _add(
        self,
        requests: Sequence[Request],
        prompt_caches: Sequence[Sequence[Any] | None],
    ) -> list[TokenSequence]:
        """Let requests wait; see ``add_all``."""
        entries = [
            self._reader.entry(request, caches, self.num_added + i)
            for i, (request, caches) in enumerate(
                zip(requests, prompt_caches, strict=True)
            )
        ]
        self._queue.append(entries)
        self.num_added += len(entries)
        rules = (request.accept_rule for request in requests)
        self.stats.rule = joined_rules([self.stats.rule, *rules])
        return [entry.sequence for entry in entries]

    def remove(self, sequence: TokenSequence) -> None:
        """Send a sequence away, wherever it is; nothing happens if it has ended."""
        if not sequence.is_live:
            return
        sequence.finish_reason = "removed"
        self._queue.remove(sequence)
        self._has_freed = True
        if not self._batch.live:
            self._rest()

    def extract(
        self,
        sequence: TokenSequence,
        *,
        num_emitted: int | None = None,
        into: Sequence[Any] | None = None,
    ) -> list[Any]:
        """A sequence's keys and values as mlx-lm's prompt cache; it goes on.

        Args:
            sequence: One that waits, is read or decodes, or has ended with the last
                step and not with its first token; while ``run`` goes on, any.
            num_emitted: How many of its tokens the cache shall hold after the prompt:
                all of them (None), or at least those before its last round.
            into: mlx-lm's cache objects to fill in place; None for new ones.

        Returns:
            The cache objects.

        Raises:
            RequestError: It has left, or the round that it was in has failed.
        """
        target, waiting = self._rounds.target, self._queue.find(sequence)
        if waiting is not None:
            return filled(target, waiting.prefill.caches, into=into)
        return extracted(
            target,
            self._batch,
            sequence,
            num_written=self._pipeline.num_written(sequence),
            num_emitted=num_emitted,
            into=into,
        )

    def tokens_of(self, sequence: TokenSequence) -> list[int]:
        """The tokens that a sequence's caches hold now, those before it included."""
        request, waiting = sequence.request, self._queue.find(sequence)
        num_read = len(request.prompt) if waiting is None else waiting.prefill.num_read
        return [*request.history, *request.prompt[:num_read], *sequence.emitted]

    @property
    def num_live(self) -> int:
        """Sequences that decode."""
        return len(self._batch.live)

    @property
    def num_waiting(self) -> int:
        """Sequences whose prompts were not read to their ends."""
        return len(self._queue)

    @property
    def is_idle(self) -> bool:
        """Whether a step would do nothing; the last one lets go of the slabs."""
        return not self._queue and not self._batch.sequences

    @property
    def kv_bytes(self) -> int:
        """Memory of the slabs."""
        return self._batch.num_bytes

    @property
    def prompt_bytes(self) -> int:
        """Memory of the caches of prompts that are read or wait."""
        return self._queue.num_bytes

    @property
    def longest_text(self) -> int | None:
        """Most tokens that one may have, its prompt included; None for any."""
        return self._queue.longest_text

    def run(
        self, on_progress: Callable[[PromptProgress], None] | None = None
    ) -> Generator[list[SequenceOutput], None, None]:
        """Decode until every request has ended, and close.

        Where something raises, the decoder is left as it is, for its caches.

        Args:
            on_progress: Called after each chunk of a prompt.

        Yields:
            After the prefill, and then after each round, what those emit that were
            live.
        """
        if self._ranks is not None:  # later Python can close nothing
            atexit.register(self.close)
        try:
            step = StepOutput()
            while self._queue:
                num_told = len(step.progress)
                with self._on_all():
                    self._reader.read(step, isolates=False)
                for progress in step.progress[num_told:]:
                    if on_progress is not None:
                        on_progress(progress)
            with self._timer.caller(is_idle=True):
                yield step.outputs
            while self._batch.live and not self._control.is_over:
                step = StepOutput()
                with self._on_all():
                    self._advance(step, isolates=False)
                with self._timer.caller(is_idle=self._pipeline.is_empty):
                    yield step.outputs
        except GeneratorExit:
            self.close()
            raise
        self.close()

    @contextmanager
    def _on_all(self) -> Iterator[None]:
        """What all ranks do inside; where one fails, the others hear no word of it."""
        try:
            yield
        except Exception:
            if self._ranks is not None:
                self._ranks.is_lost = True
            raise

    def step(self) -> StepOutput:
        """Run one round of those that decode, then read a chunk of prompts.

        Where that fails, sequences end with an error: one whose prompt could not be
        read, or whose caches could not be kept, by itself, else all that decode. The
        others go on, and so may new ones.
        """
        self._timer.add_caller(is_idle=self._pipeline.is_empty)
        step = StepOutput()
        if not self._batch.live:
            self._rest()  # not before: until now caches could be taken
        try:
            self._advance(step, isolates=True)
        except Exception as error:  # noqa: BLE001 (whatever MLX raises: nobody may hang)
            step.outputs += self._fail(error)
        self._timer.mark()
        return step

    def _advance(self, step: StepOutput, *, isolates: bool) -> None:
        """One round, its ends, and a chunk of prompts; what is done is added.

        Args:
            step: What has been done is added to it.
            isolates: See ``PromptReader.read``.
        """
        if self._has_freed:
            self._has_freed = False
            self._batch.free()
        if self._batch.live:
            outputs = self._pipeline.advance(is_awaited=bool(self._queue))
            step.outputs += [
                with_cache(output, partial(self.extract, output.sequence))
                for output in outputs
            ]
            if any(output.finish_reason for output in outputs):
                self._batch.free()
        self._reader.read(step, isolates=isolates)

    def _fail(self, error: Exception) -> list[SequenceOutput]:
        """End all that decode, or were about to, with an error."""
        logger.error("all sequences that decode have failed", exc_info=error)
        read = [entry.sequence for entry in self._queue if entry.prefill.is_done]
        for sequence in read:
            self._queue.remove(sequence)
        failed = dict.fromkeys([*self._batch.live, *read])
        self._pipeline.drop()  # their reports may fail as well
        self._rest()
        return [failure_of(sequence, error) for sequence in failed]

    def close(self) -> None:
        """Wait for what is still running and let go of everything."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._ranks is not None:
            atexit.unregister(self.close)
            # The others read on, or rank 0 decodes on: no word of this reaches them.
            is_failing = not self._ranks.is_first and failure() is not None
            self._ranks.is_lost |= bool(self._queue) or is_failing
        self._queue.clear()
        self._rest()
        self._timer.stop()
        self._draft_policy.finish()
        if self._ranks is not None:
            end_work(self._ranks)

    def _rest(self) -> None:
        """Wait for what is still running, which nobody wants, and let go of it."""
        try:
            self._pipeline.rest()
        except RanksError:
            logger.debug("ranks are lost, and with them what was in flight")
        except Exception as error:
            logger.warning("a round that was not needed has failed", exc_info=error)
            if self._ranks is not None:
                self._ranks.is_lost = True
        if not self._queue:
            self._rounds.let_go()


def _policy(
    requests: Sequence[Request], max_rows: int, max_kv_bytes: int | None
) -> BatchPolicy:
    """How many seats and slots there are."""
    if requests:
        return ClosedBatch(len(requests))
    return OpenBatch(max_rows, max_kv_bytes)
