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
from dataclasses import astuple, dataclass, replace
from functools import reduce

import mlx.core as mx

from .candidates import MAX_CANDIDATES, Candidates, WholeRows, longest_list, most_likely
from .noise import XTC, Stream, gumbel_noise, uniform_noise
from .params import SamplingParams

_SMALLEST, _LARGEST = 2.0**-126, (2 - 2.0**-23) * 2.0**127  # of normal float32
_NO_TOP_K = 2**31 - 1  # a number that no vocabulary reaches
_NO_TOP_P = 2.0  # a mass that no row reaches


@dataclass(frozen=True)
class Group:
    """What the rows of a batch ask for that draw their tokens in one way.

    Attributes:
        list_size: No less than the largest top-k of the rows; None where they may
            draw any token of the vocabulary.
        has_top_p: Whether some row filters by top-p.
        has_min_p: Whether some row filters by min-p.
        has_xtc: Whether some row excludes top choices.
        has_top_k: Whether some row has a top-k.
        has_coupled: Whether some row is decided by equality: greedy, or sampled under
            noise that target and drafter share.
        has_block: Whether some row is decided by block verification.
    """

    list_size: int | None
    has_top_p: bool = False
    has_min_p: bool = False
    has_xtc: bool = False
    has_top_k: bool = False
    has_coupled: bool = False
    has_block: bool = False

    def joined(self, other: Group) -> Group:
        """What the rows of both ask for."""
        flags = zip(astuple(self)[1:], astuple(other)[1:], strict=True)
        size = max(self.list_size or 0, other.list_size or 0)
        return Group(size or None, *(a or b for a, b in flags))


@dataclass(frozen=True)
class SamplingRule:
    """The part of the sampling settings that shapes the graph; one trace for each.

    Attributes:
        groups: Empty where every row is greedy; else the rows that draw from lists,
            those that draw from the vocabulary, or both in this order. Greedy rows are
            in the first one.
        num_xtc_tokens: No less than the tokens that any row keeps from XTC.
        has_host: Whether some row is decided on the host.
        has_graph: Whether some row is decided by one of the graph's rules.
        has_max_drafts: Whether some row accepts fewer drafts than a round may have.
        num_logprobs: How many of the best tokens are reported with each token's
            log-probability; None where nobody asks for it.
    """

    groups: tuple[Group, ...] = ()
    num_xtc_tokens: int = 1
    has_host: bool = False
    has_graph: bool = True
    has_max_drafts: bool = False
    num_logprobs: int | None = None

    @property
    def is_sampled(self) -> bool:
        """False when every row is greedy."""
        return bool(self.groups)

    @property
    def of_drafts(self) -> Group:
        """What the drafts of all rows are drawn by: lists, whatever the target's."""
        return replace(reduce(Group.joined, self.groups), list_size=MAX_CANDIDATES)

    @property
    def by_equality(self) -> SamplingRule:
        """The same rows, every one decided by equality under shared noise."""
        groups = (replace(g, has_coupled=True, has_block=False) for g in self.groups)
        return replace(self, groups=tuple(groups))

    def joined(self, other: SamplingRule) -> SamplingRule:
        """This rule with what costs little of another one; it serves the same rows.

        Between rules that draw from lists any difference costs little. The whole
        vocabulary, log-probabilities and decisions on the host are only ever this
        rule's own.
        """
        has_max_drafts = self.has_max_drafts or other.has_max_drafts
        rule = replace(self, has_max_drafts=has_max_drafts)
        if not (self._has_lists_alone and other._has_lists_alone):
            return rule
        return replace(rule, groups=(self.groups[0].joined(other.groups[0]),))

    @property
    def _has_lists_alone(self) -> bool:
        """Whether rows sample, and all of them from lists."""
        return self.is_sampled and all(g.list_size for g in self.groups)


def sampling_rule(
    params: Sequence[SamplingParams],
    *,
    is_host: Sequence[bool] = (),
    num_logprobs: int | None = None,
) -> SamplingRule:
    """The smallest rule that serves all rows.

    Args:
        params: One entry per row.
        is_host: For each row whether the host decides it; ``()`` for none.
        num_logprobs: See ``SamplingRule``.
    """
    groups = []
    sizes = [_list_size(p) for p in params]
    for is_whole in (False, True):
        rows = [
            p
            for p, size in zip(params, sizes, strict=True)
            if p.temp > 0 and (size is None) == is_whole
        ]
        if rows:
            groups.append(_group(rows))
    if groups and any(p.temp <= 0 for p in params):
        groups[0] = replace(groups[0], has_coupled=True)
    return SamplingRule(
        groups=tuple(groups),
        num_xtc_tokens=_num_xtc_tokens(params),
        has_host=any(is_host),
        has_graph=not is_host or not all(is_host),
        num_logprobs=num_logprobs,
    )


def _group(rows: Sequence[SamplingParams]) -> Group:
    """What rows that sample ask for."""
    return Group(
        list_size=max(_list_size(p) or 0 for p in rows) or None,
        has_top_p=any(0 < p.top_p < 1 for p in rows),
        has_min_p=any(p.min_p > 0 for p in rows),
        has_xtc=any(p.xtc_probability > 0 for p in rows),
        has_top_k=any(p.top_k > 0 for p in rows),
        has_coupled=any(p.reproducible for p in rows),
        has_block=any(not p.reproducible for p in rows),
    )


def _list_size(params: SamplingParams) -> int | None:
    """A list that is long enough for a row; few sizes, so that few rounds are traced.

    With XTC none is: the tokens that it strikes are no part of the top-k.
    """
    if not params.top_k or params.xtc_probability > 0:
        return None
    size = max(MAX_CANDIDATES, 1 << (int(params.top_k) - 1).bit_length())
    return size if size <= longest_list() else None


def _num_xtc_tokens(params: Sequence[SamplingParams]) -> int:
    """Room for the tokens that rows keep from XTC; few sizes, for few traces."""
    most = max((len(p.xtc_special_tokens) for p in params if _has_xtc(p)), default=1)
    return 1 << max(most - 1, 0).bit_length()


def _has_xtc(params: SamplingParams) -> bool:
    return params.temp > 0 and params.xtc_probability > 0


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
        uint32 [B, 2], ``is_whole``, ``is_block`` and ``is_host`` bool [B].
    """

    def column(values: list[float], dtype: mx.Dtype = mx.float32) -> mx.array:
        # Not a view, which would tie its first use to the thread that made it.
        return mx.array([[[value]] for value in values], dtype=dtype)

    seeds = [int(p.seed or 0) for p in params]
    room = _num_xtc_tokens(params)
    special = [p.xtc_special_tokens if _has_xtc(p) else () for p in params]
    return {
        "temp": column([_temp(p) for p in params]),
        "top_p": column([_top_p(p) for p in params]),
        "min_p": column([float(p.min_p) for p in params]),
        "top_k": column([int(p.top_k) or _NO_TOP_K for p in params], mx.int32),
        "xtc_probability": column([float(p.xtc_probability) for p in params]),
        "xtc_threshold": column([float(p.xtc_threshold) for p in params]),
        "xtc_special_tokens": mx.array(
            [[[*tokens, *[-1] * (room - len(tokens))]] for tokens in special],
            dtype=mx.int32,
        ),
        "seed": mx.array([[s & 0xFFFFFFFF, s >> 32] for s in seeds], dtype=mx.uint32),
        "is_whole": mx.array([p.temp > 0 and _list_size(p) is None for p in params]),
        "is_block": mx.array([p.temp > 0 and not p.reproducible for p in params]),
        "is_host": mx.array(list(is_host) or [False] * len(params)),
    }


def _temp(params: SamplingParams) -> float:
    """The temperature that float32 has: never 0 or infinite for one that is not."""
    return min(max(float(params.temp), _SMALLEST), _LARGEST) if params.temp > 0 else 0.0


def _top_p(params: SamplingParams) -> float:
    """The same of top-p; what float32 rounds to 1 keeps every token."""
    is_on = 0 < params.top_p < 1 - 2.0**-25
    return max(float(params.top_p), _SMALLEST) if is_on else _NO_TOP_P


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
    tokens = mx.argmax(logits, axis=-1).astype(mx.int32)
    is_sampled = rows["temp"].squeeze(-1) > 0
    for group in rule.groups:
        source = distribution(logits, rows, group=group, positions=positions)
        is_here = rows["is_whole"][:, None] == (group.list_size is None)
        # A greedy row beside sampled ones is still decided by the argmax alone.
        drawn = couple(source, rows, positions=positions)
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
    rows: dict[str, mx.array],
    *,
    group: Group,
    positions: mx.array,
) -> Distribution:
    """What the target's tokens are drawn from; of other rows than the group's nothing.

    Args:
        logits: After any soft-cap, [B, L, V].
        rows: The rows' settings, from ``sampling_rows``.
        group: The rows that are asked for.
        positions: Absolute position of the token to draw, int32 [B, L].
    """
    if group.list_size is None:
        candidates: Candidates = WholeRows.of(logits)
    else:
        candidates = most_likely(logits, min(group.list_size, logits.shape[-1]))
    return _filtered(candidates, rows, group, positions)


def proposal(
    logits: mx.array,
    rows: dict[str, mx.array],
    *,
    group: Group,
    positions: mx.array,
    token_ids: mx.array | None,
) -> Distribution:
    """What a draft is drawn from, at most ``MAX_CANDIDATES`` tokens, best first.

    Args:
        logits: The drafter's scores of M candidates, [B, L, M].
        rows: The rows' settings, from ``sampling_rows``.
        group: What they are drawn by, see ``SamplingRule.of_drafts``.
        positions: Absolute position of the token to draw, int32 [B, L].
        token_ids: The candidates' ids [B, L, M]; None where M is the vocabulary.
    """
    count = min(MAX_CANDIDATES, logits.shape[-1])
    candidates = most_likely(logits, count, token_ids=token_ids)
    return _filtered(candidates, rows, group, positions)


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


def _filtered(
    candidates: Candidates,
    rows: dict[str, mx.array],
    group: Group,
    positions: mx.array,
) -> Distribution:
    """What the filters and the temperature leave of candidates."""
    is_kept = _kept(candidates, rows, group, positions)
    # Relative to the best, so that a tiny temperature neither rounds nor overflows.
    temp = mx.where(rows["temp"] > 0, rows["temp"], 1.0)  # of a greedy row beside
    scores = (candidates.logits - candidates.best) / temp
    return Distribution(
        mx.where(is_kept, scores, -mx.inf),
        candidates.token_ids,
        is_whole=group.list_size is None,
    )


def _kept(
    candidates: Candidates,
    rows: dict[str, mx.array],
    group: Group,
    positions: mx.array,
) -> mx.array:
    """Which candidates the filters keep, bool [B, L, M]."""
    logits = candidates.logits
    is_kept = mx.ones(logits.shape, dtype=mx.bool_)
    if group.has_top_p:
        # The token that crosses top_p stays, and with it its equals, as in mlx-lm.
        inside = mx.where(candidates.inside(rows["top_p"]), logits, mx.inf)
        is_kept = is_kept & (logits >= inside.min(axis=-1, keepdims=True))
    if group.has_min_p:
        is_kept = is_kept & (logits >= candidates.best + mx.log(rows["min_p"]))
    if group.has_xtc:
        is_kept = is_kept & ~_struck(candidates, is_kept, rows, positions)
    if group.has_top_k:
        is_kept = is_kept & candidates.first(rows["top_k"], is_kept)
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
    weights = mx.where(is_kept, candidates.probs, 0)
    probs = weights / weights.sum(axis=-1, keepdims=True)
    is_above = probs > rows["xtc_threshold"]
    least = mx.where(is_above, probs, mx.inf).min(axis=-1, keepdims=True)
    coin = uniform_noise(rows["seed"], positions, Stream(XTC))[..., None]
    is_struck = (coin <= rows["xtc_probability"]) & (probs > least)
    return is_struck & ~candidates.among(rows["xtc_special_tokens"])
