"""What a round decided of its rows, by the graph or by the host, and what rows emit.

It knows reports and rows: nothing of how rounds are run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx

from ..sampling.logprobs import TokenLogprobs, log_probabilities
from .sequence import Row
from .state import Outcome, Report


def outcomes_of(
    decided: Sequence[Outcome], report: Report, rows: Sequence[Row | None]
) -> list[Outcome]:
    """What was decided of every row; rows of the host's are decided here.

    Args:
        decided: What the report says of each row.
        report: The report.
        rows: Who sat where.
    """
    logprobs: list[list[TokenLogprobs]] = [[] for _ in decided]
    if report.logprobs is not None and any(_asks(row) for row in rows):
        logprobs = report.logprobs.listed()
    return [
        _judge(row, i, outcome.logits, outcome.tokens[:-1])
        if row is not None and row.host is not None and row.is_live
        else replace(outcome, logprobs=logprobs[i])
        for i, (row, outcome) in enumerate(zip(rows, decided, strict=True))
    ]


def emissions_of(
    rows: Sequence[Row | None], outcomes: Sequence[Outcome]
) -> list[Emission]:
    """What the live rows emit, cut at their ends; they are told."""
    return [
        _emission(row, place, outcome)
        for place, (row, outcome) in enumerate(zip(rows, outcomes, strict=True))
        if row is not None and row.is_live
    ]


def failure_of(row: Row, error: Exception) -> Emission:
    """The last emission of a row that cannot go on."""
    row.finish_reason = "error"
    return Emission(row, 0, [], 0, "error", mx.zeros((1, 1, 0)), error=error)


def _emission(row: Row, place: int, outcome: Outcome) -> Emission:
    """What one live row emits."""
    if outcome.error is not None:
        return failure_of(row, outcome.error)
    taken = row.take(outcome.tokens)
    count = row.request.num_logprobs
    logprobs = [] if count is None else outcome.logprobs[: len(taken)]
    return Emission(
        row=row,
        place=place,
        tokens=taken,
        num_from_draft=min(outcome.num_accepted, len(taken)),
        finish_reason=row.finish_reason,
        logits=outcome.logits,
        logprobs=[replace(entry, top=entry.top[:count]) for entry in logprobs],
    )


def _asks(row: Row | None) -> bool:
    """Whether a row wants log-probabilities."""
    return row is not None and row.is_live and row.request.num_logprobs is not None


def _judge(row: Row, place: int, logits: mx.array, drafts: list[int]) -> Outcome:
    """Let the host decide one row of the block's logits [B, K + 1, V]."""
    try:
        judged = row.judge(logits[place], drafts)
    except Exception as error:  # noqa: BLE001 (a caller's function: any may come)
        return Outcome(0, [], logits, error=error)
    logprobs: list[TokenLogprobs] = []
    count = row.request.num_logprobs
    if count is not None:
        tokens = mx.array([judged.tokens], dtype=mx.int32)
        (logprobs,) = log_probabilities(
            judged.logits, tokens, num_logprobs=count
        ).listed()
    # A view, so that [place, i] finds the row's own as in a round's logits.
    shape = (logits.shape[0], *judged.logits.shape[1:])
    logits = mx.broadcast_to(judged.logits, shape)
    mx.async_eval(logits)  # another thread may ask for log-probabilities
    return Outcome(judged.num_accepted, judged.tokens, logits, logprobs)


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

    def check(self) -> None:
        """Raise what a function of the row's own has raised."""
        if self.error is not None:
            raise self.error


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


@dataclass
class Step:
    """What one step has done so far: at most a round and a chunk of prompts.

    Attributes:
        emissions: What rows have emitted, in order.
        progress: How far prompts have been read.
        num_read: Tokens of prompts that were read.
    """

    emissions: list[Emission] = field(default_factory=list)
    progress: list[Progress] = field(default_factory=list)
    num_read: int = 0
