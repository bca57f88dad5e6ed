"""The accept rule: how many drafts of a block stand, and which token ends the round.

One rule serves greedy decoding and coupled sampling. In both the target has chosen a
token for every row of the block before the drafts are looked at: the argmax, or the
Gumbel maximum under noise that is a function of seed, position and token id only. A
draft is accepted when it is the token that the target chose there, so the emitted text
is the target's own, whatever the drafter proposed.

Source: Leviathan et al. 2023, arXiv 2211.17192, algorithm 1, for temperature 0; shared
exponential (Gumbel) noise as in Daliri et al. 2024, arXiv 2408.07978.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx


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
