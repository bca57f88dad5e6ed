"""mlx-lm's ``BatchGenerator`` over this package's decoder: requests join and leave.

Rows keep their own acceptance, so a call of ``next`` may give several responses of one
request.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from itertools import accumulate
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import (
    GenerationBatch,
    PromptProcessingBatch,
    StopSequences,
    generation_stream,
)
from mlx_lm.generate_utils import BatchCounters, BatchCountersSnapshot, BatchStats

from ..constants import AUTO
from ..cpu_kernels import clock
from ..engine.capacity import DEFAULT_MAX_ROWS
from ..engine.prefill import DEFAULT_PREFILL_STEP_SIZE
from ..engine.request import Request
from ..engine.results import PromptProgress, SequenceOutput, StepOutput
from ..engine.sequence import TokenSequence
from ..engine.stats import DraftTally
from ..errors import RequestError
from ..generation.requests import make_request
from ..generation.tokens import make_batch_decoder
from ..pair.pair import pair_of
from ..sampling.host import LogitsProcessor, Sampler
from ..sampling.logprobs import whole_logprobs
from ..sampling.params import SamplingParams


class BatchGenerator:
    """Decodes requests that join and leave, with the model's drafter.

    The interface is that of mlx-lm's class of this name; what is not described here is
    as there.

    Args:
        model: A Gemma 4 of mlx-lm; its drafter travels inside, see ``load``.
        max_tokens: Tokens of a request that does not say.
        stop_tokens: Sequences of tokens that end a request that does not say.
        sampler: For requests that bring none; greedy by default.
        logits_processors: For requests that bring none.
        completion_batch_size: Most requests that are decoded together.
        prefill_batch_size: No fewer requests than this are decoded together. Prompts
            are read in turn, up to ``prefill_step_size`` of their tokens between two
            rounds.
        prefill_step_size: Most prompt tokens in one forward, and between two rounds.
        max_kv_size: Of no effect, as in mlx-lm for models that make their own caches.
        stream: What ``stream`` returns; rounds run on the thread's own stream.
        num_draft_tokens: Most drafts per round, 0 to 8, or "auto".
        draft_source: Where they come from: "drafter", "lookup" or "auto", see
            ``GenerationSettings``.
        max_kv_bytes: Most memory of the keys and values of requests that decode; None
            for what the machine has beside the weights. Requests wait for it. One that
            asks for more tokens than fit ends where they do, with "length".
        draw_seed: Draws a seed for each request that brings none, given its sampler;
            where it is None, or gives None, text is not reproducible and more drafts
            stand.
        tally: Counts the tokens.

    Raises:
        RequestError: A setting is outside its range.
        PairingError: The model is not a Gemma 4 of mlx-lm.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        max_tokens: int = 128,
        stop_tokens: Sequence[Sequence[int]] | None = None,
        sampler: Sampler | None = None,
        logits_processors: Sequence[LogitsProcessor] | None = None,
        completion_batch_size: int = DEFAULT_MAX_ROWS,
        prefill_batch_size: int = 8,
        prefill_step_size: int = DEFAULT_PREFILL_STEP_SIZE,
        max_kv_size: int | None = None,
        stream: Any = None,
        num_draft_tokens: int | str | None = None,
        draft_source: str = AUTO,
        max_kv_bytes: int | None = None,
        draw_seed: Callable[[Sampler | None], int | None] | None = None,
        tally: DraftTally | None = None,
    ) -> None:
        self.model = model
        self.max_tokens = max_tokens
        self.sampler = sampler
        self.logits_processors = list(logits_processors or ())
        self.stream = stream or generation_stream
        self._sequences: dict[int, TokenSequence] = {}
        self._resources = ExitStack()
        self._pair = pair_of(model)
        self._decoder = make_batch_decoder(
            self._pair,
            num_draft_tokens=num_draft_tokens,
            draft_source=draft_source,
            max_rows=max(completion_batch_size, prefill_batch_size),
            max_kv_bytes=max_kv_bytes,
            prefill_step_size=prefill_step_size,
        )
        self._stop_sequences = StopSequences(stop_tokens or None)
        self._draft_source = draft_source
        self._draw_seed = draw_seed
        self._tally = tally or DraftTally()
        self._counters = BatchCounters()
        self._error: Exception | None = None
        self._resources.enter_context(self._pair.wired())
        self._resources.callback(self._decoder.close)

    def close(self) -> None:
        """End all requests and let go of what they hold."""
        self._sequences.clear()
        self._resources.close()

    def __del__(self) -> None:
        self.close()

    @contextmanager
    def stats(self) -> Iterator[BatchStats]:
        """The work done while the block runs."""
        stats = BatchStats()
        start = BatchCountersSnapshot(**asdict(self._counters))
        try:
            yield stats
        finally:
            end = BatchCountersSnapshot(**asdict(self._counters))
            stats += BatchCountersSnapshot.between(start, end)

    def insert(
        self, prompts: Sequence[Sequence[int]], *args: Any, **options: Any
    ) -> list[int]:
        """Let prompts wait for their turn; see ``insert_segments``.

        Prompts are read without a pause: caches cannot be had before their ends.
        """
        segments = [[p] for p in prompts]
        return self.insert_segments(segments, *args, **options, pauses=False)

    def insert_segments(
        self,
        segments: Sequence[Sequence[Sequence[int]]],
        max_tokens: Sequence[int] | None = None,
        caches: Sequence[Sequence[Any] | None] | None = None,
        all_tokens: Sequence[Sequence[int]] | None = None,
        samplers: Sequence[Sampler | None] | None = None,
        logits_processors: Sequence[Sequence[LogitsProcessor]] | None = None,
        stop_sequences: Sequence[Any] | None = None,
        seeds: Sequence[int | None] | None = None,
        *,
        pauses: bool = True,
    ) -> list[int]:
        """Let prompts wait for their turn.

        Args:
            segments: For each request the parts of its prompt; after each of them its
                cache can be extracted.
            max_tokens: Most tokens of each.
            caches: mlx-lm's prompt caches of what comes before each; not changed.
            all_tokens: The tokens that these caches hold.
            samplers: Of each, None for the generator's.
            logits_processors: Of each.
            stop_sequences: mlx-lm's ``StopSequences`` of each.
            seeds: Of each, None for none; a request with one stays in the batch.
            pauses: Whether reading pauses at the parts' ends.

        Returns:
            A number for each request, its uid.

        Raises:
            RequestError: A prompt or a setting is outside its range, or a request could
                never fit into memory; then none is inserted.
        """
        count = len(segments)
        options = {
            "max_tokens": max_tokens or [self.max_tokens] * count,
            "caches": caches or [None] * count,
            "all_tokens": all_tokens or [[]] * count,
            "samplers": samplers or [None] * count,
            "logits_processors": logits_processors or [self.logits_processors] * count,
            "stop_sequences": stop_sequences or [self._stop_sequences] * count,
            "seeds": seeds or [None] * count,
            "pauses": [pauses] * count,
        }
        for name, values in options.items():
            if len(values) != count:
                raise RequestError(
                    f"Option {name} must have one entry per segment: expected {count}, "
                    f"got {len(values)}. None takes the generator's own."
                )
        first = self._decoder.num_added
        requests = [
            self._request(first + i, parts, {n: v[i] for n, v in options.items()})
            for i, parts in enumerate(segments)
        ]
        sequences = self._decoder.add_all(requests, options["caches"])
        self._sequences.update((sequence.index, sequence) for sequence in sequences)
        return [sequence.index for sequence in sequences]

    def next(self) -> tuple[list[Any], list[Any]]:
        """Run one round and read a chunk of prompts.

        Returns:
            mlx-lm's responses: of prompts, and of generated tokens, in order; there may
            be several of one request.

        Raises:
            Exception: What a processor or sampler of a request has raised, which ends
                that one; what the others have said comes first.
        """
        if self._error is None:
            step = self._step()
            prompts = [self._prompt_response(p) for p in step.progress]
            generated = [r for e in step.outputs for r in self._responses(e)]
            errors = [e.error for e in step.outputs if e.error is not None]
            self._error = errors[0] if errors else None
            if prompts or generated or self._error is None:
                return prompts, generated
        error, self._error = self._error, None
        assert error is not None
        raise error

    def next_generated(self) -> list[Any]:
        """Run rounds until tokens come; an empty list where nobody waits any more."""
        while self._error is not None or not self._decoder.is_idle:
            _, generated = self.next()
            if generated:
                return generated
        return []

    def extract_cache(self, uids: Sequence[int]) -> dict[int, tuple[Any, list[int]]]:
        """The prompt caches of requests as they are now, and the tokens they hold."""
        sequences = [
            (uid, self._sequences[uid]) for uid in uids if uid in self._sequences
        ]
        return {
            uid: (self._decoder.extract(sequence), self._decoder.tokens_of(sequence))
            for uid, sequence in sequences
        }

    def remove(
        self, uids: Sequence[int], return_prompt_caches: bool = False
    ) -> dict[int, tuple[Any, list[int]]]:
        """Send requests away; those that have ended already do not matter."""
        caches = self.extract_cache(uids) if return_prompt_caches else {}
        for uid in uids:
            sequence = self._sequences.pop(uid, None)
            if sequence is not None:
                self._decoder.remove(sequence)
        return caches

    @property
    def prompt_cache_nbytes(self) -> int:
        """Memory of the keys and values of all requests, bytes."""
        return self._decoder.kv_bytes + self._decoder.prompt_bytes

    def _request(
        self, uid: int, parts: Sequence[Sequence[int]], options: dict[str, Any]
    ) -> Request:
        """Check one request."""
        parts = [list(part) for part in parts if len(part)]
        if not parts:
            raise RequestError(
                f"Sequence {uid} has an empty prompt: expected at least one token."
            )
        if options["max_tokens"] <= 0:
            raise RequestError(
                f"Sequence {uid}'s max_tokens must be > 0: got {options['max_tokens']}."
            )
        prompt = [token for part in parts for token in part]
        max_tokens = options["max_tokens"]
        if self._decoder.longest_text is not None:
            # Many ask for a huge number where they want no limit.
            num_cached = len(options["all_tokens"])
            left = self._decoder.longest_text - num_cached - len(prompt)
            max_tokens = min(max_tokens, max(left, 1))
        sampler = options["samplers"] or self.sampler
        seed = options["seeds"]
        if seed is None and self._draw_seed is not None:
            seed = self._draw_seed(sampler)
        return make_request(
            self._pair,
            prompt,
            max_tokens=max_tokens,
            sampling=SamplingParams(seed=seed),
            eos=frozenset(),
            logits_processors=options["logits_processors"],
            sampler=sampler,
            history=tuple(options["all_tokens"]),
            draft_source=self._draft_source,
            stop_sequences=options["stop_sequences"],
            pauses=_ends(parts) if options["pauses"] else (),
            keeps_cache=True,
        )

    def _step(self) -> StepOutput:
        """One step, counted."""
        start = clock()
        prefill_s = self._decoder.stats.phases.prefill_s
        step = self._decoder.step()
        prefill_s = self._decoder.stats.phases.prefill_s - prefill_s
        counters = self._counters
        counters.prompt_time += prefill_s
        counters.prompt_tokens += step.num_read
        num_tokens = sum(len(e.tokens) for e in step.outputs)
        counters.generation_tokens += num_tokens
        self._tally.add(num_tokens, sum(e.num_from_draft for e in step.outputs))
        self._tally.why_none = self._decoder.stats.why_not_engaged
        if step.outputs:
            counters.generation_steps += 1
            counters.decode_time += clock() - start - prefill_s
        return step

    def _prompt_response(self, progress: PromptProgress) -> Any:
        """mlx-lm's word for a chunk of a prompt that was read."""
        is_end = progress.num_read == progress.num_tokens
        return PromptProcessingBatch.Response(
            uid=progress.sequence.index,
            progress=(progress.num_read, progress.num_tokens),
            end_of_segment=progress.is_paused or is_end,
            end_of_prompt=is_end,
        )

    def _responses(self, output: SequenceOutput) -> Iterator[Any]:
        """mlx-lm's word for each token."""
        sequence = output.sequence
        is_end = output.finish_reason is not None
        if is_end:
            self._sequences.pop(sequence.index, None)
        for i, token in enumerate(output.tokens):
            is_last = is_end and i == len(output.tokens) - 1
            yield _Response(
                uid=sequence.index,
                token=token,
                logprobs=output.logits,
                place=output.place,
                index=i,
                finish_reason=output.finish_reason if is_last else None,
                prompt_cache=output.prompt_cache if is_last else None,
                all_tokens=self._decoder.tokens_of(sequence) if is_last else None,
            )


class _Response(GenerationBatch.Response):
    """mlx-lm's word for a token; its log-probabilities are computed when asked for.

    Args:
        logprobs: The logits of its round, [B, K + 1, V].
        place: Which row of them.
        index: Which token of the sequence.
        fields: mlx-lm's others.
    """

    def __init__(
        self, *, logprobs: mx.array, place: int, index: int, **fields: Any
    ) -> None:
        self._place, self._index = place, index
        super().__init__(logprobs=logprobs, **fields)

    @property
    def logprobs(self) -> mx.array:
        """Log-probabilities of the target behind the token, [V]."""
        return whole_logprobs(self._logits, self._place, self._index)

    @logprobs.setter
    def logprobs(self, logits: mx.array) -> None:
        self._logits = logits


def _ends(parts: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Where a prompt's parts end, the last one before its last token, as in mlx-lm."""
    ends = list(accumulate(len(part) for part in parts))
    return tuple(sorted({min(end, ends[-1] - 1) for end in ends} - {0}))
