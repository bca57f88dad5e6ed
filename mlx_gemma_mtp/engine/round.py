"""A round's arithmetic: draft K tokens, verify K + 1 rows, accept a prefix, commit.

Functions of models and arrays by name, as ``mx.compile`` takes and gives them: the
``whole`` round, or its two parts, ``begin`` up to the target's logits and ``finish``
behind them. Between the parts the host makes masks, of the drafts. Where the host
decides rows, a round ends before its commit.

Knows nothing of traces, of seats or of who waits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from ..cache.masks import draft_masks
from ..constants import DRAFTER, LOOKUP, MIXED
from ..models.attention import SharedKV
from ..models.target import TargetOutput
from ..sampling.acceptance import Accepted, Draft, cut
from ..sampling.decision import (
    Verification,
    decide,
    given,
    joined,
    propose,
    with_given,
)
from ..sampling.graph import SamplingGraph
from ..sampling.masks import allow
from .control import Agreement
from .lookup import find, with_tokens
from .model_types import DrafterLike, TargetLike
from .state import Begun, Proposals, Report, RoundState, RowSettings, Verified

Models = tuple[TargetLike, DrafterLike | None]


@dataclass(frozen=True)
class RoundShape:
    """What shapes the graph of a round, beside the shapes of its arrays.

    Attributes:
        num_draft_tokens: K.
        min_rows: Rows that the target verifies at least.
        graph: Of the rows' settings.
        source: Where drafts come from: the drafter, the text without it, or either,
            the text in rows that look up.
        text_size: Places of the text; 0 where there is none.
        group: The machines that have a part of the target each; None for one.
    """

    num_draft_tokens: int
    min_rows: int
    graph: SamplingGraph
    source: str = DRAFTER
    text_size: int = 0
    group: mx.distributed.Group | None = None

    def agreement(self, word: mx.array | None) -> Agreement | None:
        """What agrees on a round whose word is given; None where nobody must."""
        if self.group is None or word is None:
            return None
        return Agreement(self.group, word)


def whole(
    verification: Verification,
    shape: RoundShape,
    models: Models,
    state_arrays: Mapping[str, Any],
    settings_arrays: Mapping[str, Any],
    word: mx.array | None = None,
) -> dict[str, Any]:
    """One round.

    Args:
        verification: The rule of rows that are not decided by equality.
        shape: What shapes the graph.
        models: Target and drafter.
        state_arrays: The state before it.
        settings_arrays: Of its rows.
        word: This machine's, see control.py; None where one machine decides alone.

    Returns:
        The report, and the next state; where the host has rows to decide, what was
        verified in its place.
    """
    state = RoundState(**state_arrays)
    settings = RowSettings.of_named(shape.graph, settings_arrays)
    agreement = shape.agreement(word)
    begun = _begin(verification, shape, models, state, settings, None, agreement)
    report, accepted = _judge(verification, shape.graph, begun, settings, agreement)
    if shape.graph.has_host:
        verified = {"slabs": begun.slabs, "hidden": begun.hidden}
        text = begun.before.text_by_name
        return {"verified": verified, "report": report.named, **text}
    committed = commit(begun.verified, settings, accepted)
    return {"state": committed.named, "report": report.named}


def begin(
    verification: Verification,
    shape: RoundShape,
    models: Models,
    state_arrays: Mapping[str, Any],
    settings_arrays: Mapping[str, Any],
    proposals: Mapping[str, Any],
) -> dict[str, Any]:
    """A round up to the target's logits.

    Args:
        verification: The rule of rows that are not decided by equality.
        shape: What shapes the graph.
        models: Target and drafter.
        state_arrays: The state before it.
        settings_arrays: Of its rows.
        proposals: Tokens in place of drafts.

    Returns:
        What was begun, without the state before it.
    """
    state = RoundState(**state_arrays)
    settings = RowSettings.of_named(shape.graph, settings_arrays)
    given_tokens = Proposals(**proposals) if shape.num_draft_tokens else None
    begun = _begin(verification, shape, models, state, settings, given_tokens)
    return {**begun.small, "slabs": begun.slabs, **begun.before.text_by_name}


def finish(
    verification: Verification,
    shape: RoundShape,
    models: None,
    begun_arrays: Mapping[str, Any],
    before_arrays: Mapping[str, Any],
    settings_arrays: Mapping[str, Any],
    masks: mx.array,
) -> dict[str, Any]:
    """The rest of a round: nothing of it needs the models.

    Args:
        verification: The rule of rows that are not decided by equality.
        shape: What shapes the graph.
        models: None.
        begun_arrays: What ``begin`` gave, without its slabs.
        before_arrays: The state before the round, without its slabs.
        settings_arrays: Of its rows.
        masks: What they may choose, uint32 [B, K + 1, words].

    Returns:
        The report, and the next state without its slabs; where the host has rows to
        decide, the report alone.
    """
    before = RoundState([], **before_arrays)
    settings = RowSettings.of_named(shape.graph, settings_arrays)
    begun = Begun.of_named(begun_arrays, before=before)
    begun = replace(begun, logits=allow(begun.logits, masks))
    report, accepted = _judge(verification, shape.graph, begun, settings)
    if shape.graph.has_host:
        return {"report": report.named}
    committed = commit(begun.verified, settings, accepted)
    return {"state": committed.small, "report": report.named}


def _begin(
    verification: Verification,
    shape: RoundShape,
    models: Models,
    state: RoundState,
    settings: RowSettings,
    proposals: Proposals | None,
    agreement: Agreement | None = None,
) -> Begun:
    """Draft and verify: row i judges draft i, row K yields the bonus token."""
    (target, drafter), num_draft_tokens = models, shape.num_draft_tokens
    drafts = draft(
        target,
        drafter,
        verification,
        state,
        settings,
        num_draft_tokens,
        given_tokens=_given_tokens(
            shape, state, settings, proposals, vocab_size=target.vocab_size
        ),
        is_given=shape.source == LOOKUP,
    )
    block = state.last_token
    if num_draft_tokens and agreement is not None:
        drafts = replace(drafts, tokens=agreement.first(drafts.tokens))
    if num_draft_tokens:
        block = mx.concatenate([block, drafts.tokens], axis=1)  # [B, K + 1]
    output = _verify(target, block, state, settings, min_rows=shape.min_rows)
    text = state.text
    if text is not None:
        text = with_tokens(text, state.offset + settings.text_start, block)
    before = replace(state, slabs=[], text=text)
    return Begun(drafts, output.logits, output.hidden, output.slabs, before)


def _given_tokens(
    shape: RoundShape,
    state: RoundState,
    settings: RowSettings,
    proposals: Proposals | None,
    *,
    vocab_size: int,
) -> mx.array | None:
    """Drafts that need no drafter, -1 for none: forced tokens before those looked up.

    Callers may have named tokens of a cache that no target knows: none is drafted.

    Returns:
        int32 [B, K]; None for none at all.
    """
    forced = None if proposals is None else proposals.behind(state.last_token)
    if shape.source == DRAFTER:
        return forced
    assert state.text is not None
    place = state.offset + settings.text_start
    _, following = find(with_tokens(state.text, place, state.last_token), place)
    tokens = mx.minimum(following[:, : shape.num_draft_tokens], vocab_size - 1)
    if shape.source == MIXED:
        tokens = mx.where(settings.looks_up[:, None], tokens, -1)
    return tokens if forced is None else mx.where(forced >= 0, forced, tokens)


def _judge(
    verification: Verification,
    graph: SamplingGraph,
    begun: Begun,
    settings: RowSettings,
    agreement: Agreement | None = None,
) -> tuple[Report, Accepted]:
    """What stands of a block, and what the host is told of it."""
    accepted = decide(
        begun.draft,
        begun.logits,
        settings.sampling,
        graph=graph,
        offset=begun.before.offset,
        verification=verification,
    )
    if graph.has_max_drafts:
        accepted = cut(begun.draft.tokens, accepted, settings.max_drafts)
    word = None
    if agreement is not None:
        accepted, word = agreement.decided(accepted)
    report = Report.of(begun.draft.tokens, accepted, begun.logits, graph)
    return replace(report, word=word), accepted


def _verify(
    target: TargetLike,
    block: mx.array,
    state: RoundState,
    settings: RowSettings,
    *,
    min_rows: int,
) -> TargetOutput:
    """The target's forward over a block [B, K + 1], of ``min_rows`` rows or more.

    What fills it up is the last token of the block (a mixture then reads no other
    experts). Its keys lie past the next offset, whatever is accepted.
    """
    num_rows = block.shape[1]
    if num_rows < min_rows:
        filling = mx.repeat(block[:, -1:], min_rows - num_rows, axis=1)
        block = mx.concatenate([block, filling], axis=1)
    output = target.verify(
        block, state.slabs, offset=state.offset, first_position=settings.first_position
    )
    if num_rows >= min_rows:
        return output
    return TargetOutput(
        output.logits[:, :num_rows], output.hidden[:, :num_rows], output.slabs
    )


def commit(verified: Verified, settings: RowSettings, accepted: Accepted) -> RoundState:
    """The state after a round, over the slabs that it has written.

    Everything past the new offset is as if it were never written.
    """
    before, is_active = verified.before, settings.is_active
    new_hidden = mx.take_along_axis(
        verified.hidden, accepted.num_accepted[:, None, None], axis=1
    )
    offset = before.offset + accepted.num_accepted + 1
    return RoundState(
        verified.slabs,
        mx.where(is_active[:, None], accepted.next_token, before.last_token),
        mx.where(is_active[:, None, None], new_hidden, before.hidden),
        mx.where(is_active, offset, before.offset),
        before.text,
    )


def draft(
    target: TargetLike,
    drafter: DrafterLike | None,
    verification: Verification,
    state: RoundState,
    settings: RowSettings,
    num_draft_tokens: int,
    *,
    given_tokens: mx.array | None = None,
    is_given: bool = False,
) -> Draft:
    """The proposals for the positions after the last token.

    The recurrence runs through the hidden state alone: keys, masks and position are
    the same for all steps.

    Args:
        target: Embeds tokens.
        drafter: None where K is 0.
        verification: The rule of rows that are not decided by equality.
        state: The state before the round.
        settings: Of its rows.
        num_draft_tokens: K.
        given_tokens: Proposals in place of the drafter's, -1 for none, int32 [B, K].
        is_given: Whether all of them are given: the drafter does not run.
    """
    if num_draft_tokens and is_given:
        assert given_tokens is not None
        return given(given_tokens, settings.graph)
    if num_draft_tokens == 0 or drafter is None:
        return Draft(mx.zeros((state.last_token.shape[0], 0), dtype=mx.int32), None)
    shared_kv = _shared_kv(target, drafter, state, settings)
    token, hidden = state.last_token, state.hidden
    drafts = []
    for step in range(1, num_draft_tokens + 1):
        output = drafter(target.embed(token), hidden, shared_kv, position=state.offset)
        proposal = propose(
            output.logits,
            settings.sampling,
            graph=settings.graph,
            offset=state.offset,
            step=step,
            token_ids=output.token_ids,
            verification=verification,
        )
        if given_tokens is not None:
            proposal = with_given(proposal, given_tokens[:, step - 1 : step])
        token, hidden = proposal.tokens, output.hidden
        drafts.append(proposal)
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
