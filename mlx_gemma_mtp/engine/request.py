"""What is asked for of one sequence of tokens."""

from __future__ import annotations

import secrets
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from ..constants import AUTO, MAX_DRAFT_TOKENS
from ..sampling.host import LogitsProcessor, Sampler
from ..sampling.masks import BlockMasks
from ..sampling.params import SamplingParams


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
        constraint: What the text must be. It gives the row masks; beside processors or
            a sampler it is one processor more, the last one.
        sampler: Chooses the tokens in place of ``sampling``; mlx-lm's signature.
        num_logprobs: How many of the most likely tokens come with each token's
            log-probability; None for no log-probabilities.
        max_draft_tokens: How many drafts the row accepts in a round at most, 0 to 8.
        draft_source: Where the row's drafts may come from: the drafter, the text
            (``"lookup"``), or either (``"auto"``).
        history: Tokens before the prompt that logits processors shall see.
        cached: Tokens in the caches before the prompt, where drafts may come from them
            and ``history`` does not say them.
        prediction: Tokens that the text may have, for drafts from the text to come from
            them too.
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
    constraint: RowConstraint | None = None
    sampler: Sampler | None = None
    num_logprobs: int | None = None
    max_draft_tokens: int = MAX_DRAFT_TOKENS
    draft_source: str = AUTO
    history: tuple[int, ...] = ()
    cached: tuple[int, ...] = ()
    prediction: tuple[int, ...] = ()
    stop_sequences: StopSequences | None = None
    pauses: tuple[int, ...] = ()
    keeps_cache: bool = False

    @property
    def is_host(self) -> bool:
        """Whether the host decides the row."""
        return bool(self.logits_processors) or self.sampler is not None

    @property
    def is_masked(self) -> bool:
        """Whether the row has masks."""
        return self.constraint is not None and not self.is_host

    @property
    def has_one_text(self) -> bool:
        """Whether the text is a function of the request, whatever K is."""
        if self.sampler is not None or self.sampling.temp <= 0:
            return True
        is_equal = self.sampling.reproducible or self.is_host
        return self.sampling.seed is not None and is_equal

    @property
    def accept_rule(self) -> str:
        """The rule that judges the drafts, in words."""
        if self.is_host:
            host = ["processors"] if self.logits_processors else []
            host += ["constraint"] if self.constraint is not None else []
            host += ["custom sampler"] if self.sampler is not None else []
            return f"accept-if-equal: {', '.join(host)}"
        rule = "block verification"
        if self.sampling.temp <= 0:
            rule = "greedy"
        elif self.sampling.reproducible and self.sampling.seed is not None:
            rule = "coupled (seed)"
        return f"{rule}, masked" if self.is_masked else rule


class RowMasks(Protocol):
    """What a row may choose; it follows the row's tokens."""

    def advance(self, token: int) -> None:
        """Follow a token of the row that does not end it.

        Raises:
            RequestError: The row cannot go on.
        """

    def block(self, drafts: Sequence[int]) -> BlockMasks:
        """The masks of a block of drafts; the row itself does not go on.

        Raises:
            RequestError: The row cannot go on.
        """


class RowConstraint(Protocol):
    """What a text must be; ``structure`` makes them."""

    def row(self, prompt: Sequence[int], ends: Collection[int]) -> RowMasks:
        """The masks of one row.

        Args:
            prompt: All tokens before it.
            ends: The tokens that end the row.
        """

    def processor(
        self, prompt: Sequence[int], ends: Collection[int]
    ) -> LogitsProcessor:
        """What bans tokens from one row's logits.

        Args:
            prompt: All tokens that it sees as the history of its first call.
            ends: The tokens that end the row.
        """


class Matcher(Protocol):
    """A place in a text, as seen by sequences that end it; mlx-lm's."""

    def advance(self, token: int) -> bool:
        """Go on by a token; whether a sequence ends with it."""


class StopSequences(Protocol):
    """Sequences of tokens that end a text; mlx-lm's."""

    def matcher(self) -> Matcher:
        """One at the beginning of a text."""


def settled(request: Request) -> Request:
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
