"""From logits to tokens: filters, and draws under noise that is fixed by the seed.

The token at an absolute position is ``argmax(logits / temp + noise)`` over the tokens
that the filters keep, with Gumbel noise that is a function of (seed, position, token
id) alone (the Gumbel-max trick: the draw then follows softmax(logits / temp)). Target
and drafter draw with the same noise, so a draft is accepted when both agree, and the
text of a seed does not depend on whether, or how far, anything was drafted.

Filters mean what they mean in mlx-lm 0.32 and act in its order: top-p, min-p, top-k,
all on the probabilities before the temperature.

This file knows nothing of models, caches or rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from .config import SamplingParams

# Philox 4x32, 10 rounds. Source: Salmon et al. 2011, "Parallel random numbers: as easy
# as 1, 2, 3", table 2 and figure 4; the constants are those of Random123 1.14.
_PHILOX_ROUNDS = 10
_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)

_NO_TOP_K = 2**31 - 1  # a number that no vocabulary reaches
_NO_TOP_P = 2.0  # a mass that no row reaches


@dataclass(frozen=True)
class SamplingRule:
    """The part of the sampling settings that shapes the graph; one trace for each.

    Attributes:
        is_sampled: False when every row is greedy.
        max_top_k: The largest top-k of the rows; 0 when no row has one, _NO_TOP_K
            when only some have.
        has_top_p: Whether some row filters by top-p.
        has_min_p: Whether some row filters by min-p.
    """

    is_sampled: bool = False
    max_top_k: int = 0
    has_top_p: bool = False
    has_min_p: bool = False


def sampling_rule(params: Sequence[SamplingParams]) -> SamplingRule:
    """The smallest rule that serves all rows."""
    sampled = [p for p in params if p.temp > 0]
    return SamplingRule(
        is_sampled=bool(sampled),
        max_top_k=(
            max(int(p.top_k) or _NO_TOP_K for p in sampled)
            if any(p.top_k for p in sampled)
            else 0
        ),
        has_top_p=any(0 < p.top_p < 1 for p in sampled),
        has_min_p=any(p.min_p > 0 for p in sampled),
    )


def sampling_rows(params: Sequence[SamplingParams]) -> dict[str, mx.array]:
    """The numbers of each row, as arrays that a compiled round takes as inputs.

    Args:
        params: One entry per row; a row that samples has a seed.

    Returns:
        ``temp``, ``top_p``, ``min_p`` float32 [B, 1, 1], ``top_k`` int32 [B, 1, 1]
        (off: a number no vocabulary reaches) and ``seed`` uint32 [B, 2].
    """

    def column(values: list[float], dtype: mx.Dtype) -> mx.array:
        return mx.array(values, dtype=dtype)[:, None, None]

    seeds = [int(p.seed or 0) for p in params]
    return {
        "temp": column([float(p.temp) for p in params], mx.float32),
        "top_p": column(
            [float(p.top_p) if 0 < p.top_p < 1 else _NO_TOP_P for p in params],
            mx.float32,
        ),
        "min_p": column([float(p.min_p) for p in params], mx.float32),
        "top_k": column([int(p.top_k) or _NO_TOP_K for p in params], mx.int32),
        "seed": mx.array([[s & 0xFFFFFFFF, s >> 32] for s in seeds], dtype=mx.uint32),
    }


def choose_tokens(
    logits: mx.array,
    rows: dict[str, mx.array],
    *,
    rule: SamplingRule,
    positions: mx.array,
    token_ids: mx.array | None = None,
) -> mx.array:
    """Choose the token of every row and position.

    Args:
        logits: Scores of M candidates, after any soft-cap, [B, L, M].
        rows: The rows' settings, from ``sampling_rows``.
        rule: The graph to build; must serve the rows.
        positions: Absolute position of the token to choose, int32 [B, L].
        token_ids: The candidates' ids [B, L, M]; None where M is the vocabulary.

    Returns:
        Token ids, int32 [B, L].
    """
    greedy = _take_ids(token_ids, mx.argmax(logits, axis=-1))
    if not rule.is_sampled:
        return greedy
    kept = _filter(logits.astype(mx.float32), token_ids, rows, rule)
    noise = gumbel_noise(rows["seed"], positions, kept.token_ids)
    # Relative to the best, so that a tiny temperature neither rounds nor overflows.
    relative = kept.logits - kept.logits.max(axis=-1, keepdims=True)
    scores = mx.where(kept.is_kept, relative / rows["temp"] + noise, -mx.inf)
    sampled = _take_ids(kept.token_ids, mx.argmax(scores, axis=-1))
    # A greedy row beside sampled ones is still decided by the argmax alone.
    return mx.where(rows["temp"].squeeze(-1) > 0, sampled, greedy)


@dataclass(frozen=True)
class _Candidates:
    """Tokens that may be drawn: float32 logits, ids and a mask, each [B, L, M]."""

    logits: mx.array
    token_ids: mx.array
    is_kept: mx.array


def _filter(
    logits: mx.array,  # [B, L, M] float32
    token_ids: mx.array | None,
    rows: dict[str, mx.array],
    rule: SamplingRule,
) -> _Candidates:
    """Apply top-p, min-p and top-k; sort only what a filter needs sorted."""
    order = _descending(logits, rule)
    if order is None:
        values = logits
    else:
        values = mx.take_along_axis(logits, order, axis=-1)
        token_ids = _take_ids(token_ids, order)
    if token_ids is None:
        token_ids = mx.broadcast_to(mx.arange(values.shape[-1]), values.shape)
    is_kept = mx.ones(values.shape, dtype=mx.bool_)
    if order is not None:
        is_kept = is_kept & (mx.arange(values.shape[-1]) < rows["top_k"])
    if rule.has_top_p:
        # The mass before a token in the whole row: the token that crosses top_p
        # stays, and with it its equals, as in mlx-lm.
        probs = mx.exp(values - mx.logsumexp(logits, axis=-1, keepdims=True))
        mass_above = mx.cumsum(probs, axis=-1, inclusive=False)
        inside = mx.where(mass_above < rows["top_p"], values, mx.inf)
        is_kept = is_kept & (values >= inside.min(axis=-1, keepdims=True))
    if rule.has_min_p:
        floor = values.max(axis=-1, keepdims=True) + mx.log(rows["min_p"])
        is_kept = is_kept & (values >= floor)
    return _Candidates(values, token_ids, is_kept)


def _descending(logits: mx.array, rule: SamplingRule) -> mx.array | None:
    """Indices of the candidates a filter needs in order, [B, L, M'], or None."""
    num_candidates = logits.shape[-1]
    if 0 < rule.max_top_k < num_candidates:
        top = mx.argpartition(-logits, kth=rule.max_top_k - 1, axis=-1)
        # By id first, so that equal logits keep the order they have without top-k.
        top = mx.sort(top[..., : rule.max_top_k], axis=-1)
        order = mx.argsort(-mx.take_along_axis(logits, top, axis=-1), axis=-1)
        return mx.take_along_axis(top, order, axis=-1)
    if rule.has_top_p or rule.max_top_k:
        return mx.argsort(-logits, axis=-1)
    return None


def _take_ids(token_ids: mx.array | None, index: mx.array) -> mx.array:
    """Candidate indices [B, L] or [B, L, M'] to int32 token ids of the same shape."""
    if token_ids is None:
        return index.astype(mx.int32)
    if index.ndim == token_ids.ndim:
        return mx.take_along_axis(token_ids, index, axis=-1)
    return mx.take_along_axis(token_ids, index[..., None], axis=-1).squeeze(-1)


def gumbel_noise(seed: mx.array, positions: mx.array, token_ids: mx.array) -> mx.array:
    """Gumbel(0, 1) noise as a pure function of seed, position and token id.

    Args:
        seed: The low and high word of each row's 64-bit seed, uint32 [B, 2].
        positions: Absolute positions, int32 [B, L].
        token_ids: Token ids, int32 [B, L, M].

    Returns:
        Noise, float32 [B, L, M].
    """
    ids = token_ids.astype(mx.uint32)
    zero = mx.zeros_like(ids)
    counter = (ids >> 2, zero + positions.astype(mx.uint32)[..., None], zero, zero)
    key = (seed[:, 0, None, None], seed[:, 1, None, None])
    words = philox(counter, key)
    # One block serves four neighbouring ids, a word each.
    word = ids & 3
    bits = mx.where(
        word < 2,
        mx.where(word == 0, words[0], words[1]),
        mx.where(word == 2, words[2], words[3]),
    )
    return gumbel_of_bits(bits)


def gumbel_of_bits(bits: mx.array) -> mx.array:
    """Turn random words, uint32, into Gumbel(0, 1) noise, finite float32."""
    # 23 bits and a half step: exact in float32, and so never 0 or 1, where one of the
    # logarithms would be infinite. With 24 bits the last value would round to 1.
    uniform = ((bits >> 9).astype(mx.float32) + 0.5) * 2.0**-23
    return -mx.log(-mx.log(uniform))


def philox(
    counter: tuple[mx.array, ...], key: tuple[mx.array, ...]
) -> tuple[mx.array, ...]:
    """Philox 4x32-10: four random words for each counter and key.

    Args:
        counter: Four uint32 arrays of one shape.
        key: Two uint32 arrays that broadcast to that shape.

    Returns:
        Four uint32 arrays of that shape.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_PHILOX_ROUNDS):
        hi0, lo0 = _multiply_wide(c0, _PHILOX_MULTIPLIERS[0])
        hi1, lo1 = _multiply_wide(c2, _PHILOX_MULTIPLIERS[1])
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0 = k0 + mx.array(_PHILOX_WEYL[0], dtype=mx.uint32)
        k1 = k1 + mx.array(_PHILOX_WEYL[1], dtype=mx.uint32)
    return c0, c1, c2, c3


def _multiply_wide(x: mx.array, multiplier: int) -> tuple[mx.array, mx.array]:
    """High and low word of a 32 x 32 bit product."""
    product = x.astype(mx.uint64) * mx.array(multiplier, dtype=mx.uint64)
    high = (product >> mx.array(32, dtype=mx.uint64)).astype(mx.uint32)
    return high, product.astype(mx.uint32)
