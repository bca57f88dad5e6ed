"""From logits to tokens: filters, distributions, and draws.

Filters mean what they mean in mlx-lm 0.32 and act in its order: top-p, min-p, XTC,
top-k, all on the probabilities before the temperature. Target and drafter go through
the same code.

Drafts come from a short list: the drafter's most likely tokens, at most
``MAX_CANDIDATES`` of them, then the filters. That is a distribution as good as any
other to the accept rules, and no row of the vocabulary's size is made for it.

This file knows nothing of models, caches or rounds.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from .candidates import MAX_CANDIDATES, Candidates, WholeRows, most_likely
from .graph import Group, SamplingArrays, SamplingGraph
from .noise import XTC, Stream, gumbel_noise, uniform_noise


def choose_tokens(
    logits: mx.array,
    sampling: SamplingArrays,
    *,
    graph: SamplingGraph,
    positions: mx.array,
) -> mx.array:
    """Choose the target's token of every row and position.

    The token is ``argmax(logits / temp + noise)`` over the tokens that the filters
    keep, with Gumbel noise that is a function of (seed, position, token id) alone (the
    Gumbel-max trick: it follows softmax(logits / temp)); without a temperature it is
    the argmax.

    Args:
        logits: After any soft-cap, [B, L, V].
        sampling: The rows' settings.
        graph: The graph to build; must serve the rows.
        positions: Absolute position of the token to choose, int32 [B, L].

    Returns:
        Token ids, int32 [B, L].
    """
    tokens = mx.argmax(logits, axis=-1).astype(mx.int32)
    is_sampled = sampling.temp.squeeze(-1) > 0
    for group in graph.groups:
        source = distribution(logits, sampling, group=group, positions=positions)
        is_here = sampling.is_whole[:, None] == (group.list_size is None)
        # A greedy row beside sampled ones is still decided by the argmax alone.
        drawn = couple(source, sampling, positions=positions)
        tokens = mx.where(is_sampled & is_here, drawn, tokens)
    return tokens


@dataclass(frozen=True)
class Distribution:
    """What a token is drawn from, after all filters and the temperature.

    Attributes:
        scores: Logarithms of weights in proportion to the probabilities, the best
            token's 0 unless it is dropped; -inf for what a filter drops, float32
            [B, L, M].
        token_ids: The candidates' ids, int32 [B, L, M].
        is_whole: Whether the candidates are the vocabulary in order.
    """

    scores: mx.array
    token_ids: mx.array
    is_whole: bool

    @property
    def probs(self) -> mx.array:
        """Probabilities of the candidates, float32 [B, L, M]."""
        weights = mx.exp(self.scores)
        return weights / weights.sum(axis=-1, keepdims=True)


def distribution(
    logits: mx.array,
    sampling: SamplingArrays,
    *,
    group: Group,
    positions: mx.array,
) -> Distribution:
    """What the target's tokens are drawn from; of other rows than the group's nothing.

    Args:
        logits: After any soft-cap, [B, L, V].
        sampling: The rows' settings.
        group: The rows that are asked for.
        positions: Absolute position of the token to draw, int32 [B, L].
    """
    if group.list_size is None:
        candidates: Candidates = WholeRows.of(logits)
    else:
        candidates = most_likely(logits, min(group.list_size, logits.shape[-1]))
    return _filtered(candidates, sampling, group, positions)


def proposal(
    logits: mx.array,
    sampling: SamplingArrays,
    *,
    group: Group,
    positions: mx.array,
    token_ids: mx.array | None,
) -> Distribution:
    """What a draft is drawn from, at most ``MAX_CANDIDATES`` tokens, best first.

    Args:
        logits: The drafter's scores of M candidates, [B, L, M].
        sampling: The rows' settings.
        group: What they are drawn by, see ``SamplingGraph.of_drafts``.
        positions: Absolute position of the token to draw, int32 [B, L].
        token_ids: The candidates' ids [B, L, M]; None where M is the vocabulary.
    """
    count = min(MAX_CANDIDATES, logits.shape[-1])
    candidates = most_likely(logits, count, token_ids=token_ids)
    return _filtered(candidates, sampling, group, positions)


def couple(
    source: Distribution, sampling: SamplingArrays, *, positions: mx.array
) -> mx.array:
    """The token of the Gumbel maximum under the shared noise, int32 [B, L]."""
    noise = gumbel_noise(sampling.seed, positions, source.token_ids)
    best = mx.argmax(source.scores + noise, axis=-1, keepdims=True)
    return mx.take_along_axis(source.token_ids, best, axis=-1).squeeze(-1)


def draw(weights: mx.array, uniform: mx.array) -> mx.array:
    """Draw one candidate of each row, in proportion to its weight.

    Args:
        weights: Not negative, some above 0, [B, L, M].
        uniform: A number above 0 and below 1 for each row, [B, L].

    Returns:
        Index of the candidate: the first at which the sum of weights exceeds
        ``uniform`` times the whole, int32 [B, L, 1].
    """
    sums = mx.cumsum(weights, axis=-1)
    is_before = sums <= uniform[..., None] * sums[..., -1:]
    return is_before.astype(mx.int32).sum(axis=-1, keepdims=True)


def _filtered(
    candidates: Candidates,
    sampling: SamplingArrays,
    group: Group,
    positions: mx.array,
) -> Distribution:
    """What the filters and the temperature leave of candidates."""
    is_kept = _kept(candidates, sampling, group, positions)
    # Relative to the best, so that a tiny temperature neither rounds nor overflows.
    temp = mx.where(sampling.temp > 0, sampling.temp, 1.0)  # of a greedy row beside
    scores = (candidates.logits - candidates.best) / temp
    return Distribution(
        mx.where(is_kept, scores, -mx.inf),
        candidates.token_ids,
        is_whole=group.list_size is None,
    )


def _kept(
    candidates: Candidates,
    sampling: SamplingArrays,
    group: Group,
    positions: mx.array,
) -> mx.array:
    """Which candidates the filters keep, bool [B, L, M]."""
    logits = candidates.logits
    is_kept = mx.ones(logits.shape, dtype=mx.bool_)
    if group.has_top_p:
        # The token that crosses top_p stays, and with it its equals, as in mlx-lm.
        inside = mx.where(candidates.inside(sampling.top_p), logits, mx.inf)
        is_kept = is_kept & (logits >= inside.min(axis=-1, keepdims=True))
    if group.has_min_p:
        is_kept = is_kept & (logits >= candidates.best + mx.log(sampling.min_p))
    if group.has_xtc:
        is_kept = is_kept & ~_struck(candidates, is_kept, sampling, positions)
    if group.has_top_k:
        is_kept = is_kept & candidates.first(sampling.top_k, is_kept)
    return is_kept


def _struck(
    candidates: Candidates,
    is_kept: mx.array,
    sampling: SamplingArrays,
    positions: mx.array,
) -> mx.array:
    """Which candidates XTC excludes: all above the threshold but the least likely.

    Whether it strikes at a position is a coin of the position's own, in every round
    the same. Were it tossed anew when a rejected position is drawn again, text would
    not follow the target: block verification looks at later rows before it rejects.
    """
    weights = mx.where(is_kept, candidates.probs, 0)
    probs = weights / weights.sum(axis=-1, keepdims=True)
    is_above = probs > sampling.xtc_threshold
    least = mx.where(is_above, probs, mx.inf).min(axis=-1, keepdims=True)
    coin = uniform_noise(sampling.seed, positions, Stream(XTC))[..., None]
    is_struck = (coin <= sampling.xtc_probability) & (probs > least)
    return is_struck & ~candidates.among(sampling.xtc_special_tokens)
