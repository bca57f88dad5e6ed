"""One sequence to decode: what was asked for, and how far it has come.

It knows token ids and logits: nothing of models, caches or rounds.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Protocol

import mlx.core as mx

from ..models.config import MAX_DRAFT_TOKENS, SamplingParams
from ..sampling.host import HostRow, Judged, LogitsProcessor, Sampler
from .stats import RoundStats


@dataclass(frozen=True)
class Request:
    """One sequence to decode.

    Attributes:
        prompt: At least one token id.
        max_tokens: How many tokens to emit, 1 or more; None for no limit.
        sampling: How tokens are chosen.
        eos_token_ids: Tokens that end the sequence; the one that does is emitted.
        logits_processors: Called as mlx-lm does, with the histories of plain decoding.
            The row is then decided by equality, ``reproducible`` or not.
        sampler: Chooses the tokens in place of ``sampling``; mlx-lm's signature.
        num_logprobs: How many of the most likely tokens come with each token's
            log-probability; None for no log-probabilities.
        max_draft_tokens: How many drafts the row accepts in a round at most, 0 to 8.
        history: Tokens before the prompt that logits processors shall see.
        stop_sequences: Sequences of tokens that end the text; their last token is
            emitted. mlx-lm's ``StopSequences``.
        pauses: Numbers of the prompt's tokens after which reading it pauses, so that
            its caches can be had as they are there.
        keeps_cache: Whether the last emission brings the row's caches.
    """

    prompt: list[int]
    max_tokens: int | None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    eos_token_ids: frozenset[int] = frozenset()
    logits_processors: tuple[LogitsProcessor, ...] = ()
    sampler: Sampler | None = None
    num_logprobs: int | None = None
    max_draft_tokens: int = MAX_DRAFT_TOKENS
    history: tuple[int, ...] = ()
    stop_sequences: StopSequences | None = None
    pauses: tuple[int, ...] = ()
    keeps_cache: bool = False

    @property
    def is_host(self) -> bool:
        """Whether the host decides the row."""
        return bool(self.logits_processors) or self.sampler is not None

    @property
    def has_one_text(self) -> bool:
        """Whether the text is a function of the request, whatever K is."""
        if self.sampler is not None or self.sampling.temp <= 0:
            return True
        is_equal = self.sampling.reproducible or self.is_host
        return self.sampling.seed is not None and is_equal

    @property
    def rule(self) -> str:
        """The rule that judges the drafts, in words."""
        host = ["processors"] if self.logits_processors else []
        host += ["custom sampler"] if self.sampler is not None else []
        if host:
            return f"accept-if-equal: {', '.join(host)}"
        if self.sampling.temp <= 0:
            return "greedy"
        is_coupled = self.sampling.reproducible and self.sampling.seed is not None
        return "coupled (seed)" if is_coupled else "block verification"


class Matcher(Protocol):
    """A place in a text, as seen by sequences that end it; mlx-lm's."""

    def advance(self, token: int) -> bool:
        """Go on by a token; whether a sequence ends with it."""


class StopSequences(Protocol):
    """Sequences of tokens that end a text; mlx-lm's."""

    def matcher(self) -> Matcher:
        """One at the beginning of a text."""


@dataclass(eq=False)
class Row:
    """The host's knowledge of one row.

    Attributes:
        request: What was asked for, its sampling settled.
        index: How many rows the decoder was given before.
        num_cached: Tokens that came in caches, before the prompt.
        offset: Tokens in the slabs, as of the last report read.
        host: Decides it, where the host does.
        emitted: The tokens emitted so far.
        finish_reason: Why it has ended; None while it is live.
        stats: Counts of its rounds.
    """

    request: Request
    index: int
    num_cached: int
    offset: int
    host: HostRow | None
    emitted: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stats: RoundStats = field(default_factory=RoundStats)
    _matcher: Matcher | None = None

    @classmethod
    def of(cls, request: Request, *, index: int = 0, num_cached: int = 0) -> Row:
        """The row of a request."""
        request = _settled(request)
        host = None
        if request.is_host:
            host = HostRow(
                [*request.history, *request.prompt],
                processors=request.logits_processors,
                sampler=request.sampler,
                sampling=request.sampling,
                num_unseen=num_cached - len(request.history),
            )
        row = cls(request, index, num_cached, num_cached + len(request.prompt), host)
        row.stats.rule = request.rule
        if request.stop_sequences is not None:
            row._matcher = request.stop_sequences.matcher()
        return row

    @property
    def num_emitted(self) -> int:
        """Tokens emitted so far."""
        return len(self.emitted)

    @property
    def last_position(self) -> int | None:
        """The position behind the longest text it may have; None for no limit."""
        limit = self.request.max_tokens
        start = self.num_cached + len(self.request.prompt)
        return None if limit is None else start + limit

    @property
    def is_live(self) -> bool:
        """Whether it has not ended yet."""
        return self.finish_reason is None

    @property
    def num_left(self) -> int | None:
        """Tokens that may still be emitted; None for no limit."""
        limit = self.request.max_tokens
        return None if limit is None else limit - self.num_emitted

    def wants_more_than(self, num_tokens: int) -> bool:
        """Whether the row is live and its budget exceeds ``num_tokens`` more."""
        left = self.num_left
        return self.is_live and (left is None or left > num_tokens)

    def take(self, tokens: Sequence[int]) -> list[int]:
        """Cut a round's tokens at the request's end and count them."""
        taken = []
        ends = _Ends(self, self._matcher)
        for token in tokens:
            taken.append(token)
            self.finish_reason = ends.reason(token)
            if not self.is_live:
                break
        self.emitted += taken
        return taken

    def judge(self, logits: mx.array, drafts: Sequence[int]) -> Judged:
        """Decide a block on the host; see ``HostRow.judge``."""
        assert self.host is not None
        ends = _Ends(self, copy(self._matcher))  # take() goes over the same tokens
        return self.host.judge(
            logits,
            drafts[: self.request.max_draft_tokens],
            is_end=lambda token: ends.reason(token) is not None,
        )


class _Ends:
    """Where a row ends, asked of one token after the other.

    Args:
        row: The row, as it is before the first of them.
        matcher: Its place among its stop sequences; goes on with the tokens.
    """

    def __init__(self, row: Row, matcher: Matcher | None) -> None:
        self._request = row.request
        self._left = row.num_left
        self._matcher = matcher

    def reason(self, token: int) -> str | None:
        """Why the row ends with the next token; None where it does not."""
        if self._left is not None:
            self._left -= 1
        is_stop = self._matcher is not None and self._matcher.advance(token)
        if is_stop or token in self._request.eos_token_ids:
            return "stop"
        return "length" if self._left == 0 else None


def _settled(request: Request) -> Request:
    """The request with settings that its row can follow.

    A row that samples and brings no seed gets one of its own. Where the host decides,
    drafts are proposed for a decision by equality.
    """
    sampling = request.sampling
    if request.sampler is not None:
        sampling = SamplingParams()  # of the drafts: the sampler chooses the tokens
    if sampling.temp > 0 and sampling.seed is None:
        seed = secrets.randbits(64)  # of no meaning to anybody, so nothing is repeated
        sampling = replace(sampling, seed=seed, reproducible=False)
    if request.is_host:
        sampling = replace(sampling, reproducible=True)
    return replace(request, sampling=sampling)
