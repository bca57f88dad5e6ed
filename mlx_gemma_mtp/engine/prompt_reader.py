"""Reads prompts a chunk at a time, and seats those that were read to their ends.

Short ones are read together, where the queue says so; all else is each one's own.

No running sequence waits longer than for one chunk. Knows nothing of rounds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import mlx.core as mx

from ..cache.mlx_lm_cache import read_prompt_cache
from ..distributed.ranks import Ranks
from ..models.target import Prefilled
from ..sampling.acceptance import Accepted
from ..sampling.distribution import choose_tokens
from ..sampling.masks import allow
from .batch import Batch
from .extract import filled, with_cache
from .masked import RoundMasks
from .prefill import Prefill, Reader, read_together
from .queue import SHORT, RequestQueue, Waiting
from .request import Request
from .results import (
    Decision,
    PromptProgress,
    SequenceOutput,
    StepOutput,
    decisions_of,
    failure_of,
    outputs_of,
)
from .sequence import TokenSequence
from .state import Report, row_settings
from .timing import RoundTimer


class PromptReader:
    """Reads the prompts of a queue into a batch.

    Args:
        target: Reads.
        queue: Who waits.
        batch: Where those sit whose prompts were read.
        step_size: Most tokens in one forward, and of one call of ``read``.
        timer: Times the reading.
        ranks: The machines that read together; None for one.
    """

    def __init__(
        self,
        target: Reader,
        queue: RequestQueue,
        batch: Batch,
        *,
        step_size: int,
        timer: RoundTimer,
        ranks: Ranks | None = None,
    ) -> None:
        self._ranks = ranks
        self._target = target
        self._queue = queue
        self._batch = batch
        self._step_size = step_size
        self._timer = timer

    def entry(
        self, request: Request, prompt_cache: Sequence[Any] | None, index: int
    ) -> Waiting:
        """A sequence and its prompt, yet to be read.

        Args:
            request: What is asked for.
            prompt_cache: mlx-lm's caches that hold what comes before the prompt.
            index: How many sequences came before.

        Raises:
            RequestError: The caches are not the target's.
        """
        caches = None
        if prompt_cache is not None:
            caches = read_prompt_cache(self._target.layout, prompt_cache)
        num_cached = caches[0].offset if caches else 0
        sequence = TokenSequence.of(request, index=index, num_cached=num_cached)
        return Waiting(
            sequence,
            Prefill(self._target, request.prompt, caches=caches, stops=request.pauses),
        )

    def read(self, step: StepOutput, *, isolates: bool) -> None:
        """Read a chunk of the prompts that wait, as far as sequences are let in.

        Args:
            step: What has been done is added to it.
            isolates: Whether a sequence whose prompt cannot be read ends by itself;
                else what is raised goes on to the caller.
        """
        paused: set[TokenSequence] = set()
        budget = self._step_size
        while budget > 0:
            entries = self._queue.next(self._batch.live, paused, most=budget)
            if not entries:
                return
            before = [entry.prefill.num_read for entry in entries]
            errors = self._read_chunks(entries, budget)
            for entry, start, error in zip(entries, before, errors, strict=True):
                try:
                    decision = self._decision(entry, error)
                except Exception as failure:
                    if not isolates:
                        raise
                    self._queue.remove(entry.sequence)
                    step.outputs.append(failure_of(entry.sequence, failure))
                    budget = 0
                    continue
                size = entry.prefill.num_read - start
                step.num_read += size
                # As if it was read alone: who decodes waits no longer than then.
                budget -= max(size, SHORT)
                self._take(entry, decision, step, paused)

    def _read_chunks(
        self, entries: Sequence[Waiting], budget: int
    ) -> list[Exception | None]:
        """Read a chunk of each of some prompts; what each has failed with."""
        self._timer.disturb()
        try:
            with self._timer.prefill(), self._waiting(entries, budget):
                read_together(self._target, [e.prefill for e in entries], budget)
        except Exception as error:  # noqa: BLE001 (whatever MLX raises)
            if len(entries) == 1 or self._ranks is not None:
                return [error] * len(entries)  # other machines read nothing again
            # Whichever of them it was: alone it fails, and the others do not.
            return [e for entry in entries for e in self._read_chunks([entry], budget)]
        return [None] * len(entries)

    def _waiting(
        self, entries: Sequence[Waiting], budget: int
    ) -> AbstractContextManager[None]:
        """Around what waits for other machines, where there are any."""
        if self._ranks is None:
            return nullcontext()
        longest = max(entry.prefill.next_size(budget) for entry in entries)
        num_tokens = len(entries) * longest
        return self._ranks.long_exchange("a prompt", num_tokens, self._target)

    def _decision(self, entry: Waiting, error: Exception | None) -> Decision | None:
        """The token behind a prompt, where the chunk that was read is its last one.

        Raises:
            Exception: What it has failed with, then or now.
        """
        if error is not None:
            raise error
        if not entry.prefill.is_done:
            return None
        return self._first(entry.sequence, entry.prefill.filled)

    def _take(
        self,
        entry: Waiting,
        decision: Decision | None,
        step: StepOutput,
        paused: set[TokenSequence],
    ) -> None:
        """Tell of a chunk that was read; one whose prompt that ends is seated."""
        sequence, prefill = entry.sequence, entry.prefill
        is_paused = prefill.is_stopped and not prefill.is_done
        step.progress.append(
            PromptProgress(sequence, prefill.num_read, prefill.num_tokens, is_paused)
        )
        if decision is not None:
            step.outputs.append(self._begin(sequence, prefill.filled, decision))
            self._queue.remove(sequence)
        elif is_paused:
            paused.add(sequence)  # for the caller to take the caches

    def _first(self, sequence: TokenSequence, read_prompt: Prefilled) -> Decision:
        """Choose the token behind a prompt."""
        logits = read_prompt.logits
        errors: Mapping[TokenSequence, Exception] = {}
        if sequence.masks is not None:
            masks = RoundMasks.of((sequence,), [[]], logits.shape[-1])
            logits, errors = allow(logits, masks.words), masks.errors
        settings = row_settings(
            [sequence.request.sampling],
            is_host=[sequence.request.is_host],
            num_logprobs=sequence.request.num_logprobs,
        )
        token = mx.zeros((1, 1), dtype=mx.int32)
        if settings.graph.has_graph:
            token = choose_tokens(
                logits,
                settings.sampling,
                graph=settings.graph,
                positions=mx.array([[sequence.offset]], dtype=mx.int32),
            )
        report = Report.of(  # as of a round without drafts
            mx.zeros((1, 0), dtype=mx.int32),
            Accepted(mx.zeros((1,), dtype=mx.int32), token),
            logits,
            settings.graph,
        )
        with self._timer.wait():
            decided = report.read()
        (decision,) = decisions_of(decided, report, (sequence,), errors)
        if self._ranks is not None:
            decision = replace(decision, tokens=self._ranks.share(decision.tokens))
        return decision

    def _begin(
        self, sequence: TokenSequence, read_prompt: Prefilled, decision: Decision
    ) -> SequenceOutput:
        """Give a seat to a sequence whose prompt was read, if it goes on."""
        (output,) = outputs_of((sequence,), [decision])
        target, caches = self._target, read_prompt.caches
        output = with_cache(output, partial(filled, target, caches, sequence.emitted))
        if sequence.is_live or not self._batch.policy.may_shrink:
            self._batch.insert(sequence, read_prompt, (decision.tokens or [0])[-1])
            if not sequence.is_live:
                self._batch.free()
        return output
