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

from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx

from .config import SamplingParams
from .noise import XTC, Stream, gumbel_noise, uniform_noise

MAX_CANDIDATES = 64  # of a proposal
_MAX_LIST = 1024  # candidates that tokens are looked up in one by one
_SMALLEST = 2.0**-126  # the smallest normal float32
_NO_TOP_K = 2**31 - 1  # a number that no vocabulary reaches
_NO_TOP_P = 2.0  # a mass that no row reaches


@dataclass(frozen=True)
class SamplingRule:
    """The part of the sampling settings that shapes the graph; one trace for each.

    Attributes:
        is_sampled: False when every row is greedy.
        max_top_k: No less than the largest top-k of the rows; 0 when no row has one,
            _NO_TOP_K when only some have.
        has_top_p: Whether some row filters by top-p.
        has_min_p: Whether some row filters by min-p.
        has_xtc: Whether some row excludes top choices.
        has_coupled: Whether some row is decided by equality: greedy, or sampled under
            noise that target and drafter share.
        has_block: Whether some row is decided by block verification.
        has_host: Whether some row is decided on the host.
        has_graph: Whether some row is decided by one of the graph's rules.
        has_max_drafts: Whether some row accepts fewer drafts than a round may have.
        num_logprobs: How many of the best tokens are reported with each token's
            log-probability; None where nobody asks for it.
        near_tie: Greedy choices of a token by this much or less, in logits, are
            counted; None where nobody asks for it.
    """

    is_sampled: bool = False
    max_top_k: int = 0
    has_top_p: bool = False
    has_min_p: bool = False
    has_xtc: bool = False
    has_coupled: bool = True
    has_block: bool = False
    has_host: bool = False
    has_graph: bool = True
    has_max_drafts: bool = False
    num_logprobs: int | None = None
    near_tie: float | None = None

    def joined(self, other: SamplingRule) -> SamplingRule:
        """This rule with what costs little of another one; it serves the same rows.

        Between rules that draw from short lists any difference costs little. A whole
        vocabulary in order, XTC, log-probabilities and decisions on the host are only
        ever this rule's own.
        """
        has_max_drafts = self.has_max_drafts or other.has_max_drafts
        rule = replace(self, has_max_drafts=has_max_drafts)
        if not (self._has_lists and other._has_lists):
            return rule
        return replace(
            rule,
            has_top_p=self.has_top_p or other.has_top_p,
            has_min_p=self.has_min_p or other.has_min_p,
            has_coupled=self.has_coupled or other.has_coupled,
            has_block=self.has_block or other.has_block,
        )

    @property
    def _has_lists(self) -> bool:
        """Whether every row that samples draws from a short list."""
        is_short = 0 < self.max_top_k <= MAX_CANDIDATES
        return self.is_sampled and is_short and not self.has_xtc

    def list_size(self, num_candidates: int) -> int | None:
        """How many tokens a filter needs in order, best first; None for none."""
        if not self.is_sampled:
            return None
        if 0 < self.max_top_k < num_candidates and not self.has_xtc:
            return self.max_top_k
        if self.has_top_p or self.has_xtc or self.max_top_k:
            return num_candidates
        return None


def sampling_rule(
    params: Sequence[SamplingParams],
    *,
    is_host: Sequence[bool] = (),
    num_logprobs: int | None = None,
    near_tie: float | None = None,
) -> SamplingRule:
    """The smallest rule that serves all rows.

    Args:
        params: One entry per row.
        is_host: For each row whether the host decides it; ``()`` for none.
        num_logprobs: See ``SamplingRule``.
        near_tie: See ``SamplingRule``; dropped where the graph decides no greedy row.
    """
    sampled = [p for p in params if p.temp > 0]
    has_greedy = any(
        p.temp <= 0 and not (is_host and is_host[i]) for i, p in enumerate(params)
    )
    return SamplingRule(
        is_sampled=bool(sampled),
        max_top_k=(
            max(_rounded_up(int(p.top_k)) for p in sampled)
            if any(p.top_k for p in sampled)
            else 0
        ),
        has_top_p=any(0 < p.top_p < 1 for p in sampled),
        has_min_p=any(p.min_p > 0 for p in sampled),
        has_xtc=any(p.xtc_probability > 0 for p in sampled),
        has_coupled=any(p.temp <= 0 or p.reproducible for p in params),
        has_block=any(not p.reproducible for p in sampled),
        has_host=any(is_host),
        has_graph=not is_host or not all(is_host),
        num_logprobs=num_logprobs,
        near_tie=near_tie if has_greedy else None,
    )


def _rounded_up(top_k: int) -> int:
    """A list that is long enough; few lengths, so that few rounds are traced."""
    if not top_k:
        return _NO_TOP_K
    return min(max(MAX_CANDIDATES, 1 << (top_k - 1).bit_length()), _NO_TOP_K)


def sampling_rows(
    params: Sequence[SamplingParams], *, is_host: Sequence[bool] = ()
) -> dict[str, mx.array]:
    """The numbers of each row, as arrays that a compiled round takes as inputs.

    Args:
        params: One entry per row; a row that samples has a seed.
        is_host: For each row whether the host decides it; ``()`` for none.

    Returns:
        ``temp``, ``top_p``, ``min_p``, ``xtc_probability``, ``xtc_threshold`` float32
        [B, 1, 1], ``top_k`` int32 [B, 1, 1] (off: a number no vocabulary reaches),
        ``xtc_special_tokens`` int32 [B, 1, S] (-1 where a row has fewer), ``seed``
        uint32 [B, 2], ``is_block`` and ``is_host`` bool [B].
    """

    def column(values: list[float], dtype: mx.Dtype) -> mx.array:
        # Not a view, which would tie its first use to the thread that made it.
        return mx.array([[[value]] for value in values], dtype=dtype)

    seeds = [int(p.seed or 0) for p in params]
    most = max([1, *(len(p.xtc_special_tokens) for p in params)])
    special = [
        [[*p.xtc_special_tokens, *[-1] * (most - len(p.xtc_special_tokens))]]
        for p in params
    ]
    return {
        "temp": column(
            # What float32 would round to 0 is not greedy, see SamplingParams.
            [max(float(p.temp), _SMALLEST) if p.temp > 0 else 0.0 for p in params],
            mx.float32,
        ),
        "top_p": column(
            [
                max(float(p.top_p), _SMALLEST) if 0 < p.top_p < 1 else _NO_TOP_P
                for p in params
            ],
            mx.float32,
        ),
        "min_p": column([float(p.min_p) for p in params], mx.float32),
        "top_k": column([int(p.top_k) or _NO_TOP_K for p in params], mx.int32),
        "xtc_probability": column(
            [float(p.xtc_probability) for p in params], mx.float32
        ),
        "xtc_threshold": column([float(p.xtc_threshold) for p in params], mx.float32),
        "xtc_special_tokens": mx.array(special, dtype=mx.int32),
        "seed": mx.array([[s & 0xFFFFFFFF, s >> 32] for s in seeds], dtype=mx.uint32),
        "is_block": mx.array([p.temp > 0 and not p.reproducible for p in params]),
        "is_host": mx.array(list(is_host) or [False] * len(params)),
    }


@dataclass(frozen=True)
class Candidates:
    """Tokens of each row with their scores.

    Attributes:
        logits: Before the temperature, float32 [B, L, M].
        token_ids: int32 [B, L, M].
        log_mass: logsumexp of the whole row they come from, float32 [B, L, 1].
    """

    logits: mx.array
    token_ids: mx.array
    log_mass: mx.array


def most_likely(
    logits: mx.array, count: int, *, token_ids: mx.array | None = None
) -> Candidates:
    """The best tokens of every row in order; of equal ones the lowest ids first.

    Args:
        logits: Scores of M candidates, [B, L, M].
        count: How many, 1 to M.
        token_ids: The candidates' ids [B, L, M]; None where M is the vocabulary.
    """
    logits = logits.astype(mx.float32)
    ids = mx.arange(logits.shape[-1]) if token_ids is None else token_ids
    # One whole number that sorts like (-logit, id): the bits of a float sort like the
    # float, negative ones backwards. So ties need no second sort, and the order is
    # the same on every backend.
    bits = mx.view(logits, mx.int32)
    ascending = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    keys = ((~ascending).astype(mx.int64) << 32) | ids.astype(mx.int64)
    if count < keys.shape[-1]:
        keys = mx.partition(keys, kth=count - 1, axis=-1)[..., :count]
    keys = mx.sort(keys, axis=-1)
    ascending = ~(keys >> 32).astype(mx.int32)
    bits = ascending ^ ((ascending >> 31) & 0x7FFFFFFF)
    return Candidates(
        mx.view(bits, mx.float32),
        (keys & 0xFFFFFFFF).astype(mx.int32),
        mx.logsumexp(logits, axis=-1, keepdims=True),
    )


def choose_tokens(
    logits: mx.array,
    rows: dict[str, mx.array],
    *,
    rule: SamplingRule,
    positions: mx.array,
) -> mx.array:
    """Choose the target's token of every row and position.

    The token is ``argmax(logits / temp + noise)`` over the tokens that the filters
    keep, with Gumbel noise that is a function of (seed, position, token id) alone (the
    Gumbel-max trick: it follows softmax(logits / temp)); without a temperature it is
    the argmax.

    Args:
        logits: After any soft-cap, [B, L, V].
        rows: The rows' settings, from ``sampling_rows``.
        rule: The graph to build; must serve the rows.
        positions: Absolute position of the token to choose, int32 [B, L].

    Returns:
        Token ids, int32 [B, L].
    """
    greedy = mx.argmax(logits, axis=-1).astype(mx.int32)
    if not rule.is_sampled:
        return greedy
    sampled = couple(
        distribution(logits, rows, rule=rule, positions=positions),
        rows,
        positions=positions,
    )
    # A greedy row beside sampled ones is still decided by the argmax alone.
    return mx.where(rows["temp"].squeeze(-1) > 0, sampled, greedy)


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
    rows: dict[str, mx.array],
    *,
    rule: SamplingRule,
    positions: mx.array,
) -> Distribution:
    """What the target's tokens are drawn from.

    Args:
        logits: After any soft-cap, [B, L, V].
        rows: The rows' settings, from ``sampling_rows``.
        rule: The graph to build; must serve the rows.
        positions: Absolute position of the token to draw, int32 [B, L].
    """
    vocab_size = logits.shape[-1]
    size = rule.list_size(vocab_size)
    if size is not None:
        candidates = most_likely(logits, size)
        kept = _scores(candidates, rows, rule, positions, is_sorted=True)
        if size <= _MAX_LIST:
            return Distribution(kept, candidates.token_ids, is_whole=False)
        # Too long to look tokens up in: back in the vocabulary's order.
        dropped = mx.full(logits.shape, -mx.inf)
        kept = mx.put_along_axis(dropped, candidates.token_ids, kept, axis=-1)
    every_id = mx.broadcast_to(mx.arange(vocab_size), logits.shape)
    if size is None:
        logits = logits.astype(mx.float32)
        # No filter that is on asks for the mass.
        candidates = Candidates(logits, every_id, mx.zeros_like(logits[..., :1]))
        kept = _scores(candidates, rows, rule, positions, is_sorted=False)
    return Distribution(kept, every_id, is_whole=True)


def proposal(
    logits: mx.array,
    rows: dict[str, mx.array],
    *,
    rule: SamplingRule,
    positions: mx.array,
    token_ids: mx.array | None,
) -> Distribution:
    """What a draft is drawn from, at most ``MAX_CANDIDATES`` tokens, best first.

    Args:
        logits: The drafter's scores of M candidates, [B, L, M].
        rows: The rows' settings, from ``sampling_rows``.
        rule: The graph to build; must serve the rows.
        positions: Absolute position of the token to draw, int32 [B, L].
        token_ids: The candidates' ids [B, L, M]; None where M is the vocabulary.
    """
    size = rule.list_size(logits.shape[-1]) or MAX_CANDIDATES
    size = min(size, MAX_CANDIDATES, logits.shape[-1])
    candidates = most_likely(logits, size, token_ids=token_ids)
    scores = _scores(candidates, rows, rule, positions, is_sorted=True)
    return Distribution(scores, candidates.token_ids, is_whole=False)


def couple(
    source: Distribution, rows: dict[str, mx.array], *, positions: mx.array
) -> mx.array:
    """The token of the Gumbel maximum under the shared noise, int32 [B, L]."""
    noise = gumbel_noise(rows["seed"], positions, source.token_ids)
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


def _scores(
    candidates: Candidates,
    rows: dict[str, mx.array],
    rule: SamplingRule,
    positions: mx.array,
    *,
    is_sorted: bool,
) -> mx.array:
    """Apply the filters and the temperature, see ``Distribution.scores``."""
    is_kept = _kept(candidates, rows, rule, positions, is_sorted=is_sorted)
    # Relative to the best, so that a tiny temperature neither rounds nor overflows.
    best = _best(candidates.logits, is_sorted=is_sorted)
    temp = mx.where(rows["temp"] > 0, rows["temp"], 1.0)  # of a greedy row beside
    return mx.where(is_kept, (candidates.logits - best) / temp, -mx.inf)


def _kept(
    candidates: Candidates,
    rows: dict[str, mx.array],
    rule: SamplingRule,
    positions: mx.array,
    *,
    is_sorted: bool,
) -> mx.array:
    """Which candidates the filters keep, bool [B, L, M].

    Unsorted ones are only ever filtered by min-p.
    """
    logits = candidates.logits
    is_kept = mx.ones(logits.shape, dtype=mx.bool_)
    if rule.has_top_p:
        # The mass before a token in the whole row: the token that crosses top_p
        # stays, and with it its equals, as in mlx-lm.
        probs = mx.exp(logits - candidates.log_mass)
        mass_above = mx.cumsum(probs, axis=-1, inclusive=False)
        inside = mx.where(mass_above < rows["top_p"], logits, mx.inf)
        is_kept = is_kept & (logits >= inside.min(axis=-1, keepdims=True))
    if rule.has_min_p:
        floor = _best(logits, is_sorted=is_sorted) + mx.log(rows["min_p"])
        is_kept = is_kept & (logits >= floor)
    if rule.has_xtc:
        is_kept = is_kept & ~_struck(candidates, is_kept, rows, positions)
        rank = mx.cumsum(is_kept.astype(mx.int32), axis=-1)
        return is_kept & (rank <= rows["top_k"])
    if rule.max_top_k:
        is_kept = is_kept & (mx.arange(logits.shape[-1]) < rows["top_k"])
    return is_kept


def _struck(
    candidates: Candidates,
    is_kept: mx.array,
    rows: dict[str, mx.array],
    positions: mx.array,
) -> mx.array:
    """Which candidates XTC excludes: all above the threshold but the least likely.

    Whether it strikes at a position is a coin of the position's own, in every round
    the same. Were it tossed anew when a rejected position is drawn again, text would
    not follow the target: block verification looks at later rows before it rejects.
    """
    weights = mx.where(is_kept, mx.exp(candidates.logits - candidates.log_mass), 0)
    probs = weights / weights.sum(axis=-1, keepdims=True)
    is_above = probs > rows["xtc_threshold"]
    least = mx.where(is_above, probs, mx.inf).min(axis=-1, keepdims=True)
    special = rows["xtc_special_tokens"][:, :, None]  # [B, 1, 1, S]
    is_special = (candidates.token_ids[..., None] == special).any(axis=-1)
    coin = uniform_noise(rows["seed"], positions, Stream(XTC))[..., None]
    return (coin <= rows["xtc_probability"]) & (probs > least) & ~is_special


def _best(logits: mx.array, *, is_sorted: bool) -> mx.array:
    """The highest score of each row, [B, L, 1]."""
    return logits[..., :1] if is_sorted else logits.max(axis=-1, keepdims=True)
