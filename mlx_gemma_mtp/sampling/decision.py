"""The choices of a round: what is drafted, and what of it stands.

Both are functions of scores, settings and places alone. Which rule a row follows is in
its settings: greedy and coupled rows are decided by equality, the others by block
verification or, where a caller asks, one by one. Of a row that the host decides all
drafts stand here: it is shown all of them.

This file knows nothing of models, caches or when to stop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx

from . import fused
from .acceptance import Accepted, Draft, Verdict, accept_block, accept_equal, chosen
from .distribution import (
    Distribution,
    choose_tokens,
    couple,
    distribution,
    draw,
    proposal,
)
from .graph import Group, SamplingArrays, SamplingGraph
from .noise import COIN, PROPOSAL, RESIDUAL, Stream, gumbel_noise, uniform_noise

Verification = Callable[[Draft, Distribution, mx.array], Verdict]


def propose(
    logits: mx.array,
    sampling: SamplingArrays,
    *,
    graph: SamplingGraph,
    offset: mx.array,
    step: int,
    token_ids: mx.array | None,
    verification: Verification = accept_block,
) -> Draft:
    """Choose the draft of one step.

    Args:
        logits: The drafter's scores of M candidates, [B, 1, M].
        sampling: The rows' settings.
        graph: The graph to build; must serve the rows.
        offset: The newest token's position, int32 [B].
        step: Number of the draft step, 1 to K.
        token_ids: The candidates' ids [B, 1, M]; None where M is the vocabulary.
        verification: The rule of rows that are not decided by equality.

    Returns:
        One draft for each row.
    """
    if not graph.is_sampled:
        return Draft(_greedy(logits, token_ids), None)
    group = graph.of_drafts
    if verification is accept_block and fused.proposes(group):
        return fused.propose_one(
            logits, sampling, group=group, offset=offset, step=step, token_ids=token_ids
        )
    positions = offset[:, None] + step
    source = proposal(
        logits, sampling, group=group, positions=positions, token_ids=token_ids
    )
    token = drawn = None
    if group.has_coupled:
        token = mx.where(
            sampling.temp.squeeze(-1) > 0,
            couple(source, sampling, positions=positions),
            source.token_ids[..., 0],  # the best one
        )
    if group.has_block:
        uniform = uniform_noise(sampling.seed, positions, Stream(PROPOSAL, offset))
        index = draw(source.probs, uniform)
        drawn = mx.take_along_axis(source.token_ids, index, axis=-1).squeeze(-1)
    if drawn is None:
        assert token is not None  # a row has one of the two rules
        return Draft(token, None)
    if token is not None:
        drawn = mx.where(sampling.is_block[:, None], drawn, token)
    return Draft(drawn, source)


def with_given(draft: Draft, tokens: mx.array) -> Draft:
    """The draft of one step, with tokens of others in place of the drafter's.

    They count as proposed with probability one.

    Args:
        draft: One draft for each row.
        tokens: -1 where there is none, int32 [B, 1].
    """
    is_given = tokens >= 0
    chosen = mx.where(is_given, tokens, draft.tokens)
    if draft.source is None:
        return Draft(chosen, None)
    is_given, ids = is_given[..., None], draft.source.token_ids  # [B, 1, 1], [B, 1, M]
    is_listed = (ids == tokens[..., None]).any(axis=-1, keepdims=True)
    is_first = mx.arange(ids.shape[-1]) == 0
    ids = mx.where(is_given & ~is_listed & is_first, tokens[..., None], ids)
    certain = mx.where(ids == tokens[..., None], 0.0, -mx.inf)
    scores = mx.where(is_given, certain, draft.source.scores)
    return Draft(chosen, Distribution(scores, ids, is_whole=False))


def given(tokens: mx.array, graph: SamplingGraph) -> Draft:
    """A block of given drafts [B, K], each proposed with probability one."""
    source = None
    if any(group.has_block for group in graph.groups):
        ids = tokens[..., None]
        source = Distribution(mx.zeros(ids.shape), ids, is_whole=False)
    return Draft(tokens, source)


def joined(drafts: Sequence[Draft]) -> Draft:
    """The steps of a block as one draft of K tokens."""
    sources = [draft.source for draft in drafts if draft.source is not None]
    source = None
    if sources:
        source = Distribution(
            mx.concatenate([source.scores for source in sources], axis=1),
            mx.concatenate([source.token_ids for source in sources], axis=1),
            is_whole=False,
        )
    return Draft(mx.concatenate([draft.tokens for draft in drafts], axis=1), source)


def decide(
    draft: Draft,
    logits: mx.array,
    sampling: SamplingArrays,
    *,
    graph: SamplingGraph,
    offset: mx.array,
    verification: Verification,
) -> Accepted:
    """Decide every row by its rule; a graph has the rules that its rows need.

    Args:
        draft: The block, K drafts for each row.
        logits: The target's, after any soft-cap, [B, K + 1, V].
        sampling: The rows' settings.
        graph: The graph to build; must serve the rows.
        offset: The newest token's position, int32 [B].
        verification: The rule of rows that are not decided by equality.

    Returns:
        The accepted length and the round's last token; of a row that the host
        decides all K and no token, 0.
    """
    accepted = None
    if graph.has_graph:
        accepted = _decide(draft, logits, sampling, graph, offset, verification)
    if not graph.has_host and accepted is not None:
        return accepted
    everything = mx.full(offset.shape, draft.tokens.shape[1], dtype=mx.int32)
    nothing = mx.zeros((*offset.shape, 1), dtype=mx.int32)
    if accepted is None:
        return Accepted(everything, nothing)
    return chosen(sampling.is_host, Accepted(everything, nothing), accepted)


def _decide(
    draft: Draft,
    logits: mx.array,
    sampling: SamplingArrays,
    graph: SamplingGraph,
    offset: mx.array,
    verification: Verification,
) -> Accepted:
    """Decide every row by the graph's rules."""
    if not graph.is_sampled:
        return accept_equal(draft.tokens, mx.argmax(logits, axis=-1).astype(mx.int32))
    first, *others = (
        _decide_group(draft, logits, sampling, group, offset, verification)
        for group in graph.groups
    )
    # Rows that draw from lists, and those that draw from the vocabulary beside them.
    return chosen(sampling.is_whole, others[0], first) if others else first


def _decide_group(
    draft: Draft,
    logits: mx.array,
    sampling: SamplingArrays,
    group: Group,
    offset: mx.array,
    verification: Verification,
) -> Accepted:
    """Decide the rows of a group; what comes out of other rows means nothing."""
    if verification is accept_block and fused.decides(group):
        return fused.decide_all(draft, logits, sampling, group=group, offset=offset)
    num_draft_tokens = draft.tokens.shape[1]
    positions = offset[:, None] + mx.arange(1, num_draft_tokens + 2)
    equal = None
    if group.has_coupled or draft.source is None:
        graph = SamplingGraph((group,))
        tokens = choose_tokens(logits, sampling, graph=graph, positions=positions)
        equal = accept_equal(draft.tokens, tokens)
    if draft.source is None or not group.has_block:
        assert equal is not None  # a row has one of the two rules
        return equal
    verified = _verify(draft, logits, sampling, group, offset, verification)
    return verified if equal is None else chosen(sampling.is_block, verified, equal)


def _verify(
    draft: Draft,
    logits: mx.array,
    sampling: SamplingArrays,
    group: Group,
    offset: mx.array,
    verification: Verification,
) -> Accepted:
    """Decide the rows whose drafts were drawn from a distribution."""
    num_draft_tokens = draft.tokens.shape[1]
    positions = offset[:, None] + mx.arange(1, num_draft_tokens + 2)
    target = distribution(logits, sampling, group=group, positions=positions)
    coins = uniform_noise(sampling.seed, positions[:, :-1], Stream(COIN, offset))
    verdict = verification(draft, target, coins)
    # By token id: the draw is the same for a list and for the whole vocabulary.
    stream = Stream(RESIDUAL, offset)
    noise = gumbel_noise(sampling.seed, offset[:, None], verdict.token_ids, stream)
    best = mx.argmax(mx.log(verdict.weights) + noise, axis=-1, keepdims=True)
    next_token = mx.take_along_axis(verdict.token_ids, best, axis=-1).squeeze(-1)
    return Accepted(verdict.num_accepted, next_token)


def _greedy(logits: mx.array, token_ids: mx.array | None) -> mx.array:
    """The best candidate of each row, int32 [B, L]."""
    best = mx.argmax(logits, axis=-1)
    if token_ids is None:
        return best.astype(mx.int32)
    return mx.take_along_axis(token_ids, best[..., None], axis=-1).squeeze(-1)
