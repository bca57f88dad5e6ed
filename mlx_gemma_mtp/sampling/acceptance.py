"""The accept rules: how many drafts of a block stand, and which token ends the round.

**By equality**: greedy decoding and coupled sampling. The target has chosen a token for
every row of the block before the drafts are looked at: the argmax, or the Gumbel
maximum under noise that is a function of seed, position and token id only. A draft is
accepted when it is the token that the target chose there, so the emitted text is the
target's own, whatever the drafter proposed.

**By block**: drafts are drawn from the drafter's own distribution, and the block is
judged as a whole. What is emitted follows the target's distribution exactly, and no
lossless rule that keeps a prefix of the drafts accepts more of them.

**One by one**: the textbook's rejection sampling, which judges each draft alone. It is
the check of the other two and never accepts more than the second.

Source: Leviathan et al. 2023, arXiv 2211.17192, algorithm 1, for temperature 0; shared
exponential (Gumbel) noise as in Daliri et al. 2024, arXiv 2408.07978; block
verification: Sun et al. 2024, arXiv 2403.10444, algorithm 2.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from .distribution import Distribution

_TINY = 1e-30  # keeps a quotient of zeros from being no number


@dataclass(frozen=True)
class Draft:
    """A draft block.

    Attributes:
        tokens: The proposals, int32 [B, K].
        source: What they were drawn from, [B, K, M]; None where no row asks.
    """

    tokens: mx.array
    source: Distribution | None


@dataclass(frozen=True)
class Accepted:
    """What the accept rule decides.

    Attributes:
        num_accepted: Length of the accepted prefix, 0..K, int32 [B].
        next_token: The token that ends the round: recovered at the first rejection,
            the bonus token when all are accepted, int32 [B, 1].
    """

    num_accepted: mx.array
    next_token: mx.array


def chosen(is_first: mx.array, first: Accepted, second: Accepted) -> Accepted:
    """For each row one of two decisions, by bool [B]."""
    return Accepted(
        mx.where(is_first, first.num_accepted, second.num_accepted),
        mx.where(is_first[:, None], first.next_token, second.next_token),
    )


def accept_equal(draft_tokens: mx.array, target_tokens: mx.array) -> Accepted:
    """Accept the longest prefix of drafts that equals the target's own tokens.

    Args:
        draft_tokens: The drafter's proposals, int32 [B, K]; K = 0 accepts nothing.
        target_tokens: The target's token after each row of the verify block, int32
            [B, K + 1].

    Returns:
        The accepted length and the round's last token.
    """
    num_draft_tokens = draft_tokens.shape[1]
    if num_draft_tokens == 0:  # no kernel takes an array without elements
        return Accepted(mx.zeros_like(target_tokens[:, 0]), target_tokens)
    is_equal = draft_tokens == target_tokens[:, :num_draft_tokens]
    # cumprod turns everything after the first difference to 0.
    num_accepted = mx.cumprod(is_equal.astype(mx.int32), axis=1).sum(axis=1)
    next_token = mx.take_along_axis(target_tokens, num_accepted[:, None], axis=1)
    return Accepted(num_accepted, next_token)


def cut(draft_tokens: mx.array, accepted: Accepted, most: mx.array) -> Accepted:
    """Let rows accept no more than some number of drafts.

    The draft behind the last one that still counts ends the round: it was accepted, so
    it is the token that the rule emits there. What the rule accepted behind it is
    dropped, and drawn anew in the next round, from the target's distribution given all
    that was emitted; so no rule loses its law by it.

    Args:
        draft_tokens: The block, int32 [B, K].
        accepted: What the rows' rules have decided.
        most: How many drafts each row may accept, int32 [B].
    """
    if not draft_tokens.shape[1]:
        return accepted
    num_accepted = mx.minimum(accepted.num_accepted, most)
    is_cut = num_accepted < accepted.num_accepted
    last = mx.minimum(num_accepted, draft_tokens.shape[1] - 1)
    draft = mx.take_along_axis(draft_tokens, last[:, None], axis=1)
    return Accepted(num_accepted, mx.where(is_cut[:, None], draft, accepted.next_token))


@dataclass(frozen=True)
class Verdict:
    """What a rule for sampled drafts decides; the last token is still to be drawn.

    Attributes:
        num_accepted: Length of the accepted prefix, 0..K, int32 [B].
        weights: Of the candidates for the token behind it, not negative, [B, 1, N].
        token_ids: Those candidates, int32 [B, 1, N].
    """

    num_accepted: mx.array
    weights: mx.array
    token_ids: mx.array


def accept_block(draft: Draft, target: Distribution, coins: mx.array) -> Verdict:
    """Accept a prefix of drafts that were drawn from the drafter's distribution.

    With p the target's and q the drafter's probabilities, x_i the drafts:

        P_0 = 1, P_i = min(1, P_{i-1} p_i(x_i) / q_i(x_i))
        S_i = sum over x of max(0, P_i p_{i+1}(x) - q_{i+1}(x))
        h_i = S_i / (S_i + 1 - P_i) for i < K, h_K = P_K
        num_accepted = the largest i with coin_i < h_i, else 0

    and the token after the prefix of length i is drawn in proportion to
    max(0, P_i p_{i+1} - q_{i+1}), or to p_{K+1} where all are accepted.

    Args:
        draft: The proposals, K >= 1, and what they were drawn from.
        target: What the target says at each place, [B, K + 1, N].
        coins: Random numbers above 0 and below 1, one for each draft, [B, K].

    Source: Sun et al. 2024, arXiv 2403.10444, algorithm 2 and theorem 1. S_i is
    computed as P_i - sum over the drafter's candidates of min(P_i p_{i+1}, q_{i+1}).
    """
    rows = _Probabilities.of(draft, target)
    reaches, chances = _chances(rows)
    # The last one that is won, not the first that is lost.
    steps = mx.arange(1, rows.num_draft_tokens + 1)
    num_accepted = mx.where(coins < chances, steps, 0).max(axis=1)
    reach = mx.take_along_axis(reaches, num_accepted[:, None], axis=1)
    return _verdict(rows, num_accepted, reach)


def accept_one_by_one(draft: Draft, target: Distribution, coins: mx.array) -> Verdict:
    """Accept drafts one after the other, up to the first that is lost.

    Draft i stands if coin_i q_i(x_i) < p_i(x_i); the token after the prefix of length
    i is drawn in proportion to max(0, p_{i+1} - q_{i+1}), or to p_{K+1} where all are
    accepted. Arguments and result as in ``accept_block``.

    Source: Leviathan et al. 2023, arXiv 2211.17192, algorithm 1.
    """
    rows = _Probabilities.of(draft, target)
    is_won = coins * rows.draft_of_drafts < rows.target_of_drafts
    num_accepted = mx.cumprod(is_won.astype(mx.int32), axis=1).sum(axis=1)
    reach = mx.ones((num_accepted.shape[0], 1))
    return _verdict(rows, num_accepted, reach)


def expected_lengths(draft: Draft, target: Distribution) -> tuple[mx.array, mx.array]:
    """How many drafts either rule accepts, on average over all coins.

    Arguments as in ``accept_block``.

    Returns:
        The mean by block and the mean one by one, each float32 [B].
    """
    rows = _Probabilities.of(draft, target)
    _, chances = _chances(rows)
    # Length i or more is accepted if any coin from i on is won.
    lost = 1 - chances
    is_short = mx.cumprod(lost, axis=1, reverse=True)
    by_block = (1 - is_short).sum(axis=1)
    ratio = rows.target_of_drafts / mx.maximum(rows.draft_of_drafts, _TINY)
    one_by_one = mx.cumprod(mx.minimum(1, ratio), axis=1).sum(axis=1)
    return by_block, one_by_one


@dataclass(frozen=True)
class _Probabilities:
    """What both rules read.

    Attributes:
        target_ids: The target's candidates, int32 [B, K + 1, N].
        target_probs: Their probabilities, [B, K + 1, N].
        draft_probs: Those of the drafter's candidates, [B, K, M].
        shared: The target's probabilities of the drafter's candidates, [B, K, M].
        owed: The drafter's probabilities of the target's candidates, [B, K, N].
        target_of_drafts: The target's probabilities of the drafts, [B, K].
        draft_of_drafts: The drafter's of its own drafts, [B, K].
    """

    target_ids: mx.array
    target_probs: mx.array
    draft_probs: mx.array
    shared: mx.array
    owed: mx.array
    target_of_drafts: mx.array
    draft_of_drafts: mx.array

    @property
    def num_draft_tokens(self) -> int:
        return self.draft_probs.shape[1]

    @classmethod
    def of(cls, draft: Draft, target: Distribution) -> _Probabilities:
        """Look every token up in the other's distribution."""
        assert draft.source is not None  # the caller has asked for it
        draft_ids, draft_probs = draft.source.token_ids, draft.source.probs
        target_probs = target.probs
        first = target_probs[:, :-1]  # row K judges no draft
        if target.is_whole:
            shared = mx.take_along_axis(first, draft_ids, axis=-1)
            owed = mx.put_along_axis(
                mx.zeros_like(first), draft_ids, draft_probs, axis=-1
            )
        else:
            target_ids = target.token_ids[:, :-1]
            is_same = draft_ids[..., None] == target_ids[..., None, :]  # [B, K, M, N]
            shared = mx.where(is_same, first[..., None, :], 0).sum(axis=-1)
            owed = mx.where(is_same, draft_probs[..., None], 0).sum(axis=-2)
        is_draft = draft_ids == draft.tokens[..., None]
        return cls(
            target.token_ids,
            target_probs,
            draft_probs,
            shared,
            owed,
            target_of_drafts=mx.where(is_draft, shared, 0).sum(axis=-1),
            draft_of_drafts=mx.where(is_draft, draft_probs, 0).sum(axis=-1),
        )


def _chances(rows: _Probabilities) -> tuple[mx.array, mx.array]:
    """P_0 .. P_K, [B, K + 1], and h_1 .. h_K, [B, K]."""
    ratio = rows.target_of_drafts / mx.maximum(rows.draft_of_drafts, _TINY)
    reach = mx.ones_like(ratio[:, 0])
    reaches, chances = [reach], []
    for i in range(1, rows.num_draft_tokens + 1):
        reach = mx.minimum(1, reach * ratio[:, i - 1])
        reaches.append(reach)
        if i == rows.num_draft_tokens:
            chances.append(reach)
            continue
        overlap = mx.minimum(reach[:, None] * rows.shared[:, i], rows.draft_probs[:, i])
        # Rounding can take it below zero where both distributions agree.
        missing = mx.maximum(reach - overlap.sum(axis=-1), 0)
        chances.append(missing / mx.maximum(missing + 1 - reach, _TINY))
    return mx.stack(reaches, axis=1), mx.stack(chances, axis=1)


def _verdict(
    rows: _Probabilities,
    num_accepted: mx.array,
    reach: mx.array,  # [B, 1]
) -> Verdict:
    """The accepted prefix with the weights of the token behind it."""
    last = rows.num_draft_tokens - 1
    row = num_accepted[:, None, None]
    probs = mx.take_along_axis(rows.target_probs, row, axis=1)
    owed = mx.take_along_axis(rows.owed, mx.minimum(row, last), axis=1)
    owed = mx.where(row > last, 0, owed)  # all are accepted: the target's own
    weights = mx.maximum(reach[..., None] * probs - owed, 0)
    # Empty only where both distributions are the same and rounding says otherwise.
    is_empty = weights.sum(axis=-1, keepdims=True) <= 0
    token_ids = mx.take_along_axis(rows.target_ids, row, axis=1)
    return Verdict(num_accepted, mx.where(is_empty, probs, weights), token_ids)
