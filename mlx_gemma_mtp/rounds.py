"""A round: draft K tokens, verify K + 1 rows, accept a prefix, commit.

The round is one lazily evaluated graph whose state stays on the device: the next round
can be queued before the host has read this one's report. Shapes are fixed by (B, K,
capacity), so the whole round is one compiled function per K. Plain decoding is the same
round with K = 0.

It knows nothing of text, tokenizers, files or of when to stop: see decoder.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import mlx.core as mx

from .acceptance import Accepted, Draft, accept_block
from .cache import SlabLayout, draft_masks
from .config import SamplingParams
from .decision import Verification, decide, joined, propose
from .drafter import DraftOutput, SharedKV
from .sampling import SamplingRule, sampling_rows, sampling_rule
from .target import Prefilled, TargetOutput


class TargetLike(Protocol):
    """What a round asks of a target; see target.py for the shapes."""

    layout: SlabLayout
    vocab_size: int

    def embed(self, tokens: mx.array) -> mx.array:
        """Scaled embeddings of tokens."""

    def prefill(self, prompt: mx.array, *, step_size: int) -> Prefilled:
        """Read a prompt."""

    def verify(
        self,
        tokens: mx.array,
        slabs: list[mx.array],
        *,
        offset: mx.array,
        first_position: mx.array,
    ) -> TargetOutput:
        """Run a block of tokens over the slabs."""


class DrafterLike(Protocol):
    """What a round asks of a drafter; see drafter.py for the shapes."""

    @property
    def layer_types(self) -> tuple[str, ...]:
        """The types of the drafter's layers."""

    def __call__(
        self,
        embedding: mx.array,
        hidden: mx.array,
        shared_kv: Mapping[str, SharedKV],
        *,
        position: mx.array,
    ) -> DraftOutput:
        """Run one draft step."""


@dataclass(frozen=True)
class RoundState:
    """What one round leaves for the next; every field lives on the device.

    Attributes:
        slabs: Keys and values of each layer in turn.
        last_token: The newest token, whose K/V is not in the slabs yet, int32 [B, 1].
        hidden: The target's post-norm row that predicted it, [B, 1, H].
        offset: Tokens in the slabs, and so the last token's position, int32 [B].
    """

    slabs: list[mx.array]
    last_token: mx.array
    hidden: mx.array
    offset: mx.array


@dataclass(frozen=True)
class RowSettings:
    """What the host sets for each row.

    Attributes:
        rule: The part of the sampling settings that shapes the graph.
        sampling: The numbers of ``sampling.sampling_rows``.
        is_active: False freezes a finished or empty row, bool [B].
        first_position: The oldest position the row holds keys for, int32 [B].
    """

    rule: SamplingRule
    sampling: dict[str, mx.array]
    is_active: mx.array
    first_position: mx.array


def row_settings(params: Sequence[SamplingParams]) -> RowSettings:
    """The settings of rows that are all active and hold their keys from position 0.

    Args:
        params: One entry per row; a row that samples has a seed.
    """
    return RowSettings(
        rule=sampling_rule(params),
        sampling=sampling_rows(params),
        is_active=mx.array([True] * len(params)),
        first_position=mx.zeros((len(params),), dtype=mx.int32),
    )


@dataclass(frozen=True)
class Report:
    """What a round tells the host.

    Attributes:
        tokens: num_accepted, then K + 1 tokens, of which the first num_accepted + 1
            are the round's, int32 [B, K + 2].
        logits: The target's logits behind those tokens, [B, K + 1, V].
    """

    tokens: mx.array
    logits: mx.array


class Rounds:
    """Runs rounds of one target with one drafter.

    Args:
        target: The target.
        drafter: Its drafter; None allows only K = 0.
        verification: How drafts that were drawn from a distribution are judged.
        use_compile: Whether rounds go through ``mx.compile``.
    """

    def __init__(
        self,
        target: TargetLike,
        drafter: DrafterLike | None = None,
        *,
        verification: Verification = accept_block,
        use_compile: bool = True,
    ) -> None:
        self.target = target
        self.drafter = drafter
        self._verification = verification
        self._use_compile = use_compile
        self._compiled: dict[tuple[int, SamplingRule], Callable[..., Any]] = {}

    def run(
        self, state: RoundState, settings: RowSettings, *, num_draft_tokens: int
    ) -> tuple[RoundState, Report]:
        """Queue one round; nothing is evaluated here.

        The caller must drop its own reference to ``state`` before anything is
        evaluated: only then are the slabs written in place.

        Args:
            state: The state after the round before.
            settings: Each row's settings.
            num_draft_tokens: K, the same for all rows.

        Returns:
            The new state and the round's report.
        """
        function = self._round(num_draft_tokens, settings.rule)
        slabs, last_token, hidden, offset, tokens, logits = function(
            state.slabs,
            state.last_token,
            state.hidden,
            state.offset,
            settings.sampling,
            settings.is_active,
            settings.first_position,
        )
        return RoundState(slabs, last_token, hidden, offset), Report(tokens, logits)

    def draft(
        self, state: RoundState, settings: RowSettings, *, num_draft_tokens: int
    ) -> mx.array:
        """Only the drafts of the round that would follow, int32 [B, K]."""
        return _draft(
            self.target, self.drafter, state, settings, num_draft_tokens
        ).tokens

    def _round(self, num_draft_tokens: int, rule: SamplingRule) -> Callable[..., Any]:
        """The compiled round for K and a rule; traced again when shapes change."""
        key = (num_draft_tokens, rule)
        if key not in self._compiled:
            function = partial(
                _round,
                self.target,
                self.drafter,
                self._verification,
                rule,
                num_draft_tokens,
            )
            self._compiled[key] = (
                mx.compile(function) if self._use_compile else function
            )
        return self._compiled[key]


def _round(
    target: TargetLike,
    drafter: DrafterLike | None,
    verification: Verification,
    rule: SamplingRule,
    num_draft_tokens: int,
    slabs: list[mx.array],
    last_token: mx.array,
    hidden: mx.array,
    offset: mx.array,
    sampling: dict[str, mx.array],
    is_active: mx.array,
    first_position: mx.array,
) -> tuple[Any, ...]:
    """One round on plain arrays, as ``mx.compile`` takes and gives them."""
    state = RoundState(slabs, last_token, hidden, offset)
    settings = RowSettings(rule, sampling, is_active, first_position)

    # 1) draft
    draft = _draft(target, drafter, state, settings, num_draft_tokens)

    # 2) verify: row i judges draft i, row K yields the bonus token
    block = last_token
    if num_draft_tokens:
        block = mx.concatenate([last_token, draft.tokens], axis=1)  # [B, K + 1]
    output = target.verify(block, slabs, offset=offset, first_position=first_position)

    # 3) accept
    accepted = decide(
        draft,
        output.logits,
        sampling,
        rule=rule,
        offset=offset,
        verification=verification,
    )

    # 4) commit: everything past the new offset is as if it were never written
    emitted = accepted.num_accepted + 1
    new_hidden = mx.take_along_axis(
        output.hidden, accepted.num_accepted[:, None, None], axis=1
    )
    return (
        output.slabs,
        mx.where(is_active[:, None], accepted.next_token, last_token),
        mx.where(is_active[:, None, None], new_hidden, hidden),
        mx.where(is_active, offset + emitted, offset),
        _report(draft.tokens, accepted),
        output.logits,
    )


def _report(draft_tokens: mx.array, accepted: Accepted) -> mx.array:
    """The accepted drafts and the token behind them, int32 [B, K + 2]."""
    num_accepted, next_token = accepted.num_accepted[:, None], accepted.next_token
    if not draft_tokens.shape[1]:
        return mx.concatenate([num_accepted, next_token], axis=1)
    tokens = mx.concatenate([draft_tokens, next_token], axis=1)
    is_draft = mx.arange(tokens.shape[1]) < num_accepted
    tokens = mx.where(is_draft, tokens, next_token)
    return mx.concatenate([num_accepted, tokens], axis=1)


def _draft(
    target: TargetLike,
    drafter: DrafterLike | None,
    state: RoundState,
    settings: RowSettings,
    num_draft_tokens: int,
) -> Draft:
    """The drafter's proposals for the positions after the last token.

    The recurrence runs through the hidden state alone: keys, masks and position are
    the same for all steps.
    """
    if num_draft_tokens == 0 or drafter is None:
        return Draft(mx.zeros((state.last_token.shape[0], 0), dtype=mx.int32), None)
    shared_kv = _shared_kv(target, drafter, state, settings)
    token, hidden = state.last_token, state.hidden
    drafts = []
    for step in range(1, num_draft_tokens + 1):
        output = drafter(target.embed(token), hidden, shared_kv, position=state.offset)
        draft = propose(
            output.logits,
            settings.sampling,
            rule=settings.rule,
            offset=state.offset,
            step=step,
            token_ids=output.token_ids,
        )
        token, hidden = draft.tokens, output.hidden
        drafts.append(draft)
    return joined(drafts)


def _shared_kv(
    target: TargetLike,
    drafter: DrafterLike,
    state: RoundState,
    settings: RowSettings,
) -> dict[str, SharedKV]:
    """The slabs that the drafter reads in place, with their masks."""
    layout = target.layout
    sources = {kind: layout.source(kind) for kind in set(drafter.layer_types)}
    masks = draft_masks(
        layout,
        offset=state.offset,
        first_position=settings.first_position,
        capacity=layout.capacity(state.slabs),
    )
    return {
        kind: SharedKV(state.slabs[2 * i], state.slabs[2 * i + 1], masks[kind])
        for kind, i in sources.items()
    }
