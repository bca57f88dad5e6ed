"""What shapes the graph of a round, and the numbers that it takes of each row.

Settings that differ in their numbers alone share a graph: numbers are inputs. It knows
nothing of what is computed with either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from functools import reduce

import mlx.core as mx

from .candidates import MAX_CANDIDATES, longest_list
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
class SamplingGraph:
    """The part of the sampling settings that shapes the graph; one trace for each.

    Attributes:
        groups: Empty where every row is greedy; else the rows that draw from lists,
            those that draw from the vocabulary, or both in this order. Greedy rows are
            in the first one.
        num_xtc_tokens: No less than the tokens that any row keeps from XTC.
        has_host: Whether some row is decided on the host.
        has_masks: Whether some row may not choose every token.
        has_graph: Whether some row is decided by one of the graph's rules.
        has_max_drafts: Whether some row accepts fewer drafts than a round may have.
        num_logprobs: How many of the best tokens are reported with each token's
            log-probability; None where nobody asks for it.
    """

    groups: tuple[Group, ...] = ()
    num_xtc_tokens: int = 1
    has_host: bool = False
    has_masks: bool = False
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
    def by_equality(self) -> SamplingGraph:
        """The same rows, every one decided by equality under shared noise."""
        groups = (replace(g, has_coupled=True, has_block=False) for g in self.groups)
        return replace(self, groups=tuple(groups))

    def joined(self, other: SamplingGraph) -> SamplingGraph:
        """This graph with what costs little of another one; it serves the same rows.

        Between graphs that draw from lists any difference costs little. The whole
        vocabulary, log-probabilities, masks and decisions on the host are only ever
        this graph's own.
        """
        has_max_drafts = self.has_max_drafts or other.has_max_drafts
        graph = replace(self, has_max_drafts=has_max_drafts)
        if not (self._has_lists_alone and other._has_lists_alone):
            return graph
        return replace(graph, groups=(self.groups[0].joined(other.groups[0]),))

    @property
    def _has_lists_alone(self) -> bool:
        """Whether rows sample, and all of them from lists."""
        return self.is_sampled and all(g.list_size for g in self.groups)


def sampling_graph(
    params: Sequence[SamplingParams],
    *,
    is_host: Sequence[bool] = (),
    num_logprobs: int | None = None,
) -> SamplingGraph:
    """The smallest graph that serves all rows.

    Args:
        params: One entry per row.
        is_host: For each row whether the host decides it; ``()`` for none.
        num_logprobs: See ``SamplingGraph``.
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
    return SamplingGraph(
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


@dataclass(frozen=True)
class SamplingArrays:
    """The numbers of each row, as arrays that a compiled round takes as inputs.

    Attributes:
        temp: 0 for a greedy row, float32 [B, 1, 1].
        top_p: A mass that no row reaches where it is off, float32 [B, 1, 1].
        min_p: float32 [B, 1, 1].
        top_k: A number that no vocabulary reaches where it is off, int32 [B, 1, 1].
        xtc_probability: float32 [B, 1, 1].
        xtc_threshold: float32 [B, 1, 1].
        xtc_special_tokens: -1 where a row has fewer, int32 [B, 1, S].
        seed: uint32 [B, 2].
        is_whole: Whether the row may draw any token of the vocabulary, bool [B].
        is_block: Whether it is decided by block verification, bool [B].
        is_host: Whether the host decides it, bool [B].
    """

    temp: mx.array
    top_p: mx.array
    min_p: mx.array
    top_k: mx.array
    xtc_probability: mx.array
    xtc_threshold: mx.array
    xtc_special_tokens: mx.array
    seed: mx.array
    is_whole: mx.array
    is_block: mx.array
    is_host: mx.array


def sampling_arrays(
    params: Sequence[SamplingParams], *, is_host: Sequence[bool] = ()
) -> SamplingArrays:
    """The numbers of rows.

    Args:
        params: One entry per row; a row that samples has a seed.
        is_host: For each row whether the host decides it; ``()`` for none.
    """

    def column(values: list[float], dtype: mx.Dtype = mx.float32) -> mx.array:
        # Not a view, which would tie its first use to the thread that made it.
        return mx.array([[[value]] for value in values], dtype=dtype)

    seeds = [int(p.seed or 0) for p in params]
    room = _num_xtc_tokens(params)
    special = [p.xtc_special_tokens if _has_xtc(p) else () for p in params]
    return SamplingArrays(
        temp=column([_temp(p) for p in params]),
        top_p=column([_top_p(p) for p in params]),
        min_p=column([float(p.min_p) for p in params]),
        top_k=column([int(p.top_k) or _NO_TOP_K for p in params], mx.int32),
        xtc_probability=column([float(p.xtc_probability) for p in params]),
        xtc_threshold=column([float(p.xtc_threshold) for p in params]),
        xtc_special_tokens=mx.array(
            [[[*tokens, *[-1] * (room - len(tokens))]] for tokens in special],
            dtype=mx.int32,
        ),
        seed=mx.array([[s & 0xFFFFFFFF, s >> 32] for s in seeds], dtype=mx.uint32),
        is_whole=mx.array([p.temp > 0 and _list_size(p) is None for p in params]),
        is_block=mx.array([p.temp > 0 and not p.reproducible for p in params]),
        is_host=mx.array(list(is_host) or [False] * len(params)),
    )


def _temp(params: SamplingParams) -> float:
    """The temperature that float32 has: never 0 or infinite for one that is not."""
    return min(max(float(params.temp), _SMALLEST), _LARGEST) if params.temp > 0 else 0.0


def _top_p(params: SamplingParams) -> float:
    """The same of top-p; what float32 rounds to 1 keeps every token."""
    is_on = 0 < params.top_p < 1 - 2.0**-25
    return max(float(params.top_p), _SMALLEST) if is_on else _NO_TOP_P
