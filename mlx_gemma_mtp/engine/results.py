"""What a round decided of its sequences, and what they emit.

It knows reports and sequences: nothing of how rounds are run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx

from ..sampling.logprobs import TokenLogprobs, log_probabilities
from .sequence import TokenSequence
from .state import Decision, Report


def decisions_of(
    decided: Sequence[Decision],
    report: Report,
    sequences: Sequence[TokenSequence | None],
    errors: Mapping[TokenSequence, Exception],
) -> list[Decision]:
    """What was decided of every sequence; sequences of the host's are decided here.

    Args:
        decided: What the report says of each sequence.
        report: The report.
        sequences: Who sat where.
        errors: Why sequences cannot go on.
    """
    logprobs: list[list[TokenLogprobs]] = [[] for _ in decided]
    if report.logprobs is not None and any(_asks(sequence) for sequence in sequences):
        logprobs = report.logprobs.listed()
    decisions = []
    for i, (sequence, decision) in enumerate(zip(sequences, decided, strict=True)):
        if sequence is not None and sequence in errors:
            found = Decision(0, [], decision.logits, error=errors[sequence])
        elif sequence is not None and sequence.host is not None and sequence.is_live:
            found = _judge(sequence, i, decision)
        else:
            found = replace(decision, logprobs=logprobs[i])
        decisions.append(found)
    return decisions


def outputs_of(
    sequences: Sequence[TokenSequence | None], decisions: Sequence[Decision]
) -> list[SequenceOutput]:
    """What the live sequences emit, cut at their ends; they are told."""
    return [
        _output(sequence, place, decision)
        for place, (sequence, decision) in enumerate(
            zip(sequences, decisions, strict=True)
        )
        if sequence is not None and sequence.is_live
    ]


def failure_of(sequence: TokenSequence, error: Exception) -> SequenceOutput:
    """The last output of a sequence that cannot go on."""
    sequence.finish_reason = "error"
    return SequenceOutput(sequence, 0, [], 0, "error", mx.zeros((1, 1, 0)), error=error)


def _output(sequence: TokenSequence, place: int, decision: Decision) -> SequenceOutput:
    """What one live sequence emits."""
    if decision.error is not None:
        return failure_of(sequence, decision.error)
    taken = sequence.take(decision.tokens)
    count = sequence.request.num_logprobs
    logprobs = [] if count is None else decision.logprobs[: len(taken)]
    return SequenceOutput(
        sequence=sequence,
        place=place,
        tokens=taken,
        num_from_draft=min(decision.num_accepted, len(taken)),
        finish_reason=sequence.finish_reason,
        logits=decision.logits,
        logprobs=[replace(entry, top=entry.top[:count]) for entry in logprobs],
    )


def _asks(sequence: TokenSequence | None) -> bool:
    """Whether a sequence wants log-probabilities."""
    return (
        sequence is not None
        and sequence.is_live
        and sequence.request.num_logprobs is not None
    )


def _judge(sequence: TokenSequence, place: int, shown: Decision) -> Decision:
    """Let the host decide one sequence, of which it was shown all drafts."""
    logits = shown.logits  # of the block, [B, K + 1, V]
    try:
        judged = sequence.judge(logits[place], shown.tokens[:-1])
    except Exception as error:  # noqa: BLE001 (a caller's function: any may come)
        return Decision(0, [], logits, error=error)
    logprobs: list[TokenLogprobs] = []
    count = sequence.request.num_logprobs
    if count is not None:
        tokens = mx.array([judged.tokens], dtype=mx.int32)
        (logprobs,) = log_probabilities(
            judged.logits, tokens, num_logprobs=count
        ).listed()
    # A view, so that [place, i] finds the sequence's own as in a round's logits.
    shape = (logits.shape[0], *judged.logits.shape[1:])
    logits = mx.broadcast_to(judged.logits, shape)
    mx.async_eval(logits)  # another thread may ask for log-probabilities
    return replace(
        shown,
        num_accepted=judged.num_accepted,
        tokens=judged.tokens,
        logits=logits,
        logprobs=logprobs,
    )


@dataclass(frozen=True)
class SequenceOutput:
    """What one round, or the prefill, emitted for one sequence.

    Attributes:
        sequence: The sequence.
        place: Its index in ``logits``.
        tokens: The emitted tokens, at least one unless there is an error, cut at the
            end of the request.
        num_from_draft: How many of them, from the first on, had been proposed.
        finish_reason: ``"stop"`` at an end-of-sequence token or a stop sequence,
            ``"length"`` when the budget is used up, ``"error"``, else None.
        logits: The target's logits of the whole round: those behind ``tokens[i]`` are
            ``logits[place, i]``. Whole, because a slice made here would belong to the
            stream of the rounds, and its reader would wait for the one in flight.
            Of a sequence that the host decides they are the processed ones, of one with
            masks those behind the masks.
            [B, K + 1, V]
        logprobs: One entry per token; empty where the sequence does not ask.
        prompt_cache: mlx-lm's caches of the sequence, which hold its prompt and all its
            tokens; with the last output of a request that keeps its cache.
        error: What a processor, a sampler or the masks of the sequence raised.
    """

    sequence: TokenSequence
    place: int
    tokens: list[int]
    num_from_draft: int
    finish_reason: str | None
    logits: mx.array
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_cache: list[Any] | None = None
    error: Exception | None = None

    def check(self) -> None:
        """Raise what a function of the sequence's own has raised."""
        if self.error is not None:
            raise self.error


@dataclass(frozen=True)
class PromptProgress:
    """How far a prompt has been read.

    Attributes:
        sequence: Whose prompt.
        num_read: Its tokens that were read so far.
        num_tokens: All of them.
        is_paused: Whether reading has come to one of the request's pauses: until the
            next step the sequence's caches are those of this place.
    """

    sequence: TokenSequence
    num_read: int
    num_tokens: int
    is_paused: bool


@dataclass
class StepOutput:
    """What one step has done so far: at most a round and a chunk of prompts.

    Attributes:
        outputs: What sequences have emitted, in order.
        progress: How far prompts have been read.
        num_read: Tokens of prompts that were read.
    """

    outputs: list[SequenceOutput] = field(default_factory=list)
    progress: list[PromptProgress] = field(default_factory=list)
    num_read: int = 0
