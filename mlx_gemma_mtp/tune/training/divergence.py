"""How far a drafter is from what it will be judged by: the loss of K draft steps.

With p the target's and q the drafter's distribution of a token, a draft is accepted
with probability ``a = sum min(p, q) = 1 - TV(p, q)`` (Leviathan et al. 2023, arXiv
2211.17192, theorem 3.5), and step k of a block counts only where the steps before it
were accepted. Along a text x that follows p, the block follows the text so far with
probability ``prod q(x_j)`` and is accepted with ``prod min(1, p(x_j) / q(x_j))``; over
that of the text itself this is the reach ``r_k = prod over j < k of
min(1, q(x_j) / p(x_j))``. So the expected number of accepted drafts is the mean over
texts of

    sum over k of r_k * a_k

without any sampling from the drafter. The loss is the same sum with the divergence
``sum p log(p / q)`` in place of the acceptance, and r_k as a weight. Measured against
1 - a, -log a and -log q of the text's own token it was the best or equal to it.

Knows distributions as arrays; nothing of records or of drafters' insides.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from ...models.drafter import DraftOutput

# Logarithm of the probability of a token that the drafter does not list: such tokens
# have no gradient, and the loss stays finite.
_LOG_NOTHING = -20.0
_TINY = 1e-6


@dataclass(frozen=True)
class Foretold:
    """What a draft step says of the tokens that its judge lists.

    Attributes:
        log_probs: Of the target's most likely tokens, float32 [C, M].
        next_log_probs: Of the text's own token, float32 [C].
    """

    log_probs: mx.array
    next_log_probs: mx.array


def foretold(
    output: DraftOutput, token_ids: mx.array, next_tokens: mx.array, temp: float
) -> Foretold:
    """Look tokens up in a draft step's distribution.

    Args:
        output: The step's, of C places.
        token_ids: The target's most likely tokens, int32 [C, M].
        next_tokens: The text's own, int32 [C].
        temp: The temperature drafts are drawn at; 0 is taken as 1: of what a greedy
            drafter proposes only the order counts.
    """
    logits = output.logits[0].astype(mx.float32) / (temp or 1.0)  # [C, N]
    mass = mx.logsumexp(logits, axis=-1, keepdims=True)
    wanted = mx.concatenate([token_ids, next_tokens[:, None]], axis=-1)
    if output.token_ids is None:
        found = mx.take_along_axis(logits, wanted, axis=-1) - mass
    else:
        is_same = wanted[..., None] == output.token_ids[0][:, None]  # [C, M + 1, N]
        place = mx.argmax(is_same, axis=-1)
        found = mx.take_along_axis(logits, place, axis=-1) - mass
        found = mx.where(is_same.any(axis=-1), found, _LOG_NOTHING)
    return Foretold(found[:, :-1], found[:, -1])


def acceptance(said: Foretold, probs: mx.array) -> mx.array:
    """The probability that a draft is accepted, [C]; probs: the target's [C, M]."""
    return mx.minimum(mx.exp(said.log_probs), probs).sum(axis=-1)


def reached(said: Foretold, next_probs: mx.array) -> mx.array:
    """The factor min(1, q / p) of the text's own token, [C]; 0 where p is 0."""
    ratio = mx.exp(said.next_log_probs) / mx.maximum(next_probs, _TINY)
    return mx.where(next_probs > 0, mx.minimum(1, ratio), 0)


def divergence(said: Foretold, probs: mx.array) -> mx.array:
    """Kullback and Leibler's, of one step at every place, [C].

    Args:
        said: What the drafter says.
        probs: The target's probabilities, [C, M].
    """
    own = mx.where(probs > 0, mx.log(mx.maximum(probs, _TINY)), 0)
    return (probs * (own - said.log_probs)).sum(axis=-1)


def cluster_divergence(
    scores: mx.array, clusters: mx.array, probs: mx.array
) -> mx.array:
    """Cross-entropy of the target's clusters, [C]: how a centroid head learns to route.

    Which clusters are scored is a hard choice without a gradient, so their scores are
    trained by themselves, as logits of a distribution over clusters.

    Args:
        scores: Of all clusters, [C, N].
        clusters: Those of the target's most likely tokens, int32 [C, M].
        probs: The target's probabilities, [C, M].
    """
    scores = scores.astype(mx.float32)
    log_probs = mx.take_along_axis(scores, clusters, axis=-1)
    log_probs = log_probs - mx.logsumexp(scores, axis=-1, keepdims=True)
    return -(probs * log_probs).sum(axis=-1)
