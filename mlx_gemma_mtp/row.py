"""One sequence to decode: what was asked for, and how far it has come.

It knows token ids and logits: nothing of models, caches or rounds.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import mlx.core as mx

from .config import SamplingParams
from .processing import HostRow, Judged, LogitsProcessor, Sampler


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
    """

    prompt: list[int]
    max_tokens: int | None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    eos_token_ids: frozenset[int] = frozenset()
    logits_processors: tuple[LogitsProcessor, ...] = ()
    sampler: Sampler | None = None

    @property
    def is_host(self) -> bool:
        """Whether the host decides the row."""
        return bool(self.logits_processors) or self.sampler is not None

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


@dataclass
class Row:
    """The host's knowledge of one row.

    Attributes:
        request: What was asked for, its sampling settled.
        offset: Tokens in the slabs, as of the last report read.
        host: Decides it, where the host does.
        num_emitted: Tokens emitted so far.
        finish_reason: Why it has ended; None while it is live.
    """

    request: Request
    offset: int
    host: HostRow | None
    num_emitted: int = 0
    finish_reason: str | None = None

    @classmethod
    def of(cls, request: Request) -> Row:
        """The row of a request."""
        request = _settled(request)
        host = None
        if request.is_host:
            host = HostRow(
                request.prompt,
                processors=request.logits_processors,
                sampler=request.sampler,
                sampling=request.sampling,
            )
        return cls(request, len(request.prompt), host)

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

    def end_at(self, token: int, num_tokens: int) -> str | None:
        """Why the row ends with a token, the ``num_tokens``-th from here; or None."""
        if token in self.request.eos_token_ids:
            return "stop"
        is_last = self.num_emitted + num_tokens == self.request.max_tokens
        return "length" if is_last else None

    def take(self, tokens: Sequence[int]) -> list[int]:
        """Cut a round's tokens at the request's end and count them."""
        taken = []
        for token in tokens:
            taken.append(token)
            self.finish_reason = self.end_at(token, len(taken))
            if not self.is_live:
                break
        self.num_emitted += len(taken)
        return taken

    def judge(self, logits: mx.array, drafts: Sequence[int]) -> Judged:
        """Decide a block on the host; see ``HostRow.judge``."""
        assert self.host is not None
        return self.host.judge(
            logits, drafts, is_end=lambda *end: self.end_at(*end) is not None
        )


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
