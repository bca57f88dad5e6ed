"""What goes into a round and what comes out of it.

A compiled round takes and gives arrays by their names, which are those of the fields
here. It knows nothing of models, and of sampling only its settings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import mlx.core as mx

from ..constants import MAX_DRAFT_TOKENS
from ..sampling.acceptance import Accepted, Draft
from ..sampling.distribution import Distribution
from ..sampling.graph import (
    SamplingArrays,
    SamplingGraph,
    sampling_arrays,
    sampling_graph,
)
from ..sampling.logprobs import Logprobs, TokenLogprobs, reported_logprobs
from ..sampling.params import SamplingParams
from .lookup import text_row


@dataclass(frozen=True)
class RoundState:
    """What one round leaves for the next; every field lives on the device.

    Attributes:
        slabs: Keys and values of each layer in turn.
        last_token: The newest token, whose K/V is not in the slabs yet, int32 [B, 1].
        hidden: The target's post-norm row that predicted it, [B, 1, H].
        offset: Tokens in the slabs, and so the last token's position, int32 [B].
        text: The token at each place, where drafts may come from it: see lookup.py.
            It is written as the slabs are, int32 [B, places].
    """

    slabs: list[mx.array]
    last_token: mx.array
    hidden: mx.array
    offset: mx.array
    text: mx.array | None = None

    @property
    def arrays(self) -> list[mx.array]:
        """What has to be evaluated."""
        return [*self.small.values(), *self.slabs]

    @property
    def small(self) -> dict[str, mx.array]:
        """All arrays but the slabs, by name."""
        arrays = self.named
        del arrays["slabs"]
        return arrays

    @property
    def named(self) -> dict[str, Any]:
        """All arrays by name."""
        return {name: a for name, a in vars(self).items() if a is not None}

    @property
    def text_size(self) -> int:
        """Places of the text; 0 where there is none."""
        return 0 if self.text is None else self.text.shape[1]

    @property
    def text_by_name(self) -> dict[str, mx.array]:
        """The text under its name; empty where there is none."""
        return {} if self.text is None else {"text": self.text}


def empty_state(
    slabs: list[mx.array], hidden: mx.array, *, text: mx.array | None = None
) -> RoundState:
    """The state of seats that nobody has taken yet.

    Args:
        slabs: Empty ones.
        hidden: Of any row, for its shape and type, [1, 1, H].
        text: An empty one; None where no drafts come from it.
    """
    num_rows = slabs[0].shape[0]
    return RoundState(
        slabs,
        last_token=mx.zeros((num_rows, 1), dtype=mx.int32),
        hidden=mx.zeros((num_rows, *hidden.shape[1:]), dtype=hidden.dtype),
        offset=mx.zeros((num_rows,), dtype=mx.int32),
        text=text,
    )


def with_row(
    state: RoundState,
    row: int,
    *,
    last_token: int,
    hidden: mx.array,
    offset: int,
    tokens: Sequence[int] = (),
    before: Sequence[int] = (),
) -> RoundState:
    """The state with one row exchanged; its slabs are the caller's to fill.

    Args:
        state: The state.
        row: Which row.
        last_token: As of ``RoundState``, and so are the next two.
        hidden: [1, 1, H].
        offset: See there.
        tokens: Those before the last one, as far as they are known.
        before: Tokens that are searched too.
    """
    is_row = mx.arange(state.offset.shape[0]) == row
    text = state.text
    if text is not None:
        new = text_row(tokens, end=offset, capacity=text.shape[1], before=before)
        text = mx.where(is_row[:, None], new, text)
    return RoundState(
        state.slabs,
        mx.where(is_row[:, None], last_token, state.last_token),
        mx.where(is_row[:, None, None], hidden, state.hidden),
        mx.where(is_row, offset, state.offset),
        text,
    )


def with_ends(state: RoundState, ends: Mapping[int, tuple[int, int]]) -> RoundState:
    """The state with rows that have ended where their text ends.

    Args:
        state: The state.
        ends: For each such row its newest token and that token's position.
    """
    num_rows = state.offset.shape[0]
    has_ended = mx.array([row in ends for row in range(num_rows)])
    places = mx.array([ends.get(row, (0, 0)) for row in range(num_rows)])
    return replace(
        state,
        last_token=mx.where(has_ended[:, None], places[:, :1], state.last_token),
        offset=mx.where(has_ended, places[:, 1], state.offset),
    )


def with_rows(state: RoundState, rows: Sequence[int]) -> RoundState:
    """The state of other rows, each of which was one of the old; slabs as they are."""
    index = mx.array(list(rows), dtype=mx.int32)
    return RoundState(
        state.slabs,
        state.last_token[index],
        state.hidden[index],
        state.offset[index],
        None if state.text is None else state.text[index],
    )


@dataclass(frozen=True)
class RowSettings:
    """What the host sets for each row.

    Attributes:
        graph: The part of the sampling settings that shapes the graph.
        sampling: Their numbers.
        is_active: False freezes a finished or empty row, bool [B].
        first_position: The oldest position that the row's rings hold keys for, int32
            [B].
        max_drafts: How many drafts the row accepts at most, int32 [B].
        looks_up: Whether the row's drafts come from the text also in a round with a
            drafter, bool [B].
        text_start: The place of its first token in the text, int32 [B].
    """

    graph: SamplingGraph
    sampling: SamplingArrays
    is_active: mx.array
    first_position: mx.array
    max_drafts: mx.array
    looks_up: mx.array
    text_start: mx.array

    @property
    def named(self) -> dict[str, Any]:
        """All arrays by name."""
        arrays = {**vars(self), "sampling": vars(self.sampling)}
        del arrays["graph"]
        return arrays

    @classmethod
    def of_named(cls, graph: SamplingGraph, arrays: Mapping[str, Any]) -> RowSettings:
        """The settings whose arrays these are."""
        sampling = SamplingArrays(**arrays["sampling"])
        return cls(graph, **{**arrays, "sampling": sampling})


def row_settings(
    params: Sequence[SamplingParams],
    *,
    is_host: Sequence[bool] = (),
    num_logprobs: int | None = None,
    max_drafts: Sequence[int] = (),
    looks_up: Sequence[bool] = (),
    text_start: Sequence[int] = (),
) -> RowSettings:
    """The settings of rows that are all active and hold their keys from position 0.

    Args:
        params: One entry per row; a row that samples has a seed.
        is_host: For each row whether the host decides it; ``()`` for none.
        num_logprobs: How many of the best tokens are reported with each token's
            log-probability; None for no log-probabilities.
        max_drafts: How many drafts each row accepts at most; ``()`` for any.
        looks_up: Of each row, see ``RowSettings``; ``()`` for none.
        text_start: The same; ``()`` where nothing stands before any text.
    """
    most = list(max_drafts) or [MAX_DRAFT_TOKENS] * len(params)
    graph = sampling_graph(params, is_host=is_host, num_logprobs=num_logprobs)
    return RowSettings(
        graph=replace(graph, has_max_drafts=min(most) < MAX_DRAFT_TOKENS),
        sampling=sampling_arrays(params, is_host=is_host),
        is_active=mx.array([True] * len(params)),
        first_position=mx.array([0] * len(params), dtype=mx.int32),
        max_drafts=mx.array(most, dtype=mx.int32),
        looks_up=mx.array(list(looks_up) or [False] * len(params)),
        text_start=mx.array(list(text_start) or [0] * len(params), dtype=mx.int32),
    )


@dataclass(frozen=True)
class Decision:
    """What a round decided of one row.

    Attributes:
        num_accepted: Length of the accepted prefix of the drafts.
        tokens: These and the token behind them. Before the host has decided a row of
            its own: all drafts and a 0.
        logits: The target's of all rows, [B, K + 1, V]; see ``SequenceOutput``.
        logprobs: One entry per token; empty where nobody asks.
        error: What a function or the masks of the row's own raised.
    """

    num_accepted: int
    tokens: list[int]
    logits: mx.array
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    error: Exception | None = None


@dataclass(frozen=True)
class Report:
    """What a round tells the host; how it is laid out is known here alone.

    Attributes:
        tokens: num_accepted, then K + 1 tokens, of which the first num_accepted + 1
            are the round's, int32 [B, K + 2].
        logits: The target's logits behind those tokens, behind the rows' masks where
            they have some, [B, K + 1, V].
        logprobs: Log-probabilities of those tokens; None where nobody asks, or where
            the host decides every row.
        word: Of all machines, see control.py; None where there is one.
    """

    tokens: mx.array
    logits: mx.array
    logprobs: Logprobs | None
    word: mx.array | None = None

    @classmethod
    def of(
        cls,
        drafts: mx.array,
        accepted: Accepted,
        logits: mx.array,
        graph: SamplingGraph,
    ) -> Report:
        """The report of a round.

        Args:
            drafts: Its drafts, int32 [B, K].
            accepted: What was decided; of a row that the host decides all drafts.
            logits: The target's, [B, K + 1, V].
            graph: Of the rows.
        """
        num_accepted, next_token = accepted.num_accepted[:, None], accepted.next_token
        tokens = next_token
        if drafts.shape[1]:
            tokens = mx.concatenate([drafts, next_token], axis=1)
            is_draft = mx.arange(tokens.shape[1]) < num_accepted
            tokens = mx.where(is_draft, tokens, next_token)
        logprobs = reported_logprobs(graph, logits, tokens)
        report = mx.concatenate([num_accepted, tokens], axis=1)
        return cls(report, logits, logprobs)

    @property
    def named(self) -> dict[str, Any]:
        """All arrays by name."""
        logprobs = {} if self.logprobs is None else self.logprobs.named
        word = {} if self.word is None else {"word": self.word}
        named = {"tokens": self.tokens, "logits": self.logits, "logprobs": logprobs}
        return {**named, **word}

    @classmethod
    def of_named(cls, arrays: Mapping[str, Any]) -> Report:
        """The report whose arrays these are."""
        logprobs = Logprobs(**arrays["logprobs"]) if arrays["logprobs"] else None
        return cls(arrays["tokens"], arrays["logits"], logprobs, arrays.get("word"))

    @property
    def arrays(self) -> list[mx.array]:
        """What the host reads of every round."""
        logprobs = {} if self.logprobs is None else self.logprobs.named
        word = [] if self.word is None else [self.word]
        return [self.tokens, *word, *logprobs.values()]

    def read(self) -> list[Decision]:
        """Wait for it: the only place where a round's result reaches the host."""
        rows = cast(list[list[int]], self.tokens.tolist())
        return [
            Decision(num_accepted, tokens[: num_accepted + 1], self.logits)
            for num_accepted, *tokens in rows
        ]


@dataclass(frozen=True)
class Proposals:
    """Tokens that are proposed in place of a drafter's, by where the last round ended.

    Attributes:
        num_accepted: How many drafts of the round before stand, int32 [B].
        tokens: For each such number the token that must have ended that round, and K
            that are proposed behind it; -1 for none, int32 [B, 9, 1 + K].
    """

    num_accepted: mx.array
    tokens: mx.array

    def behind(self, last_token: mx.array) -> mx.array:
        """The proposals behind the last tokens [B, 1]; -1 for none, int32 [B, K]."""
        place = self.num_accepted[:, None, None]
        found = mx.take_along_axis(self.tokens, place, axis=1)[:, 0]
        return mx.where(found[:, :1] == last_token, found[:, 1:], -1)


@dataclass(frozen=True)
class Verified:
    """A round that stands before its commit.

    Attributes:
        slabs: With the keys and values of the whole block.
        hidden: The target's post-norm rows of the block, [B, K + 1, H].
        before: The state it started from, without its slabs, with the block's text.
    """

    slabs: list[mx.array]
    hidden: mx.array
    before: RoundState

    @property
    def arrays(self) -> list[mx.array]:
        """What has to be evaluated."""
        return [self.hidden, *self.before.text_by_name.values(), *self.slabs]


@dataclass(frozen=True)
class Begun:
    """A round that stands before its decision.

    Attributes:
        draft: The block.
        logits: The target's, [B, K + 1, V].
        hidden: Its post-norm rows, [B, K + 1, H].
        slabs: With the keys and values of the whole block.
        before: The state it started from, without its slabs, with the block's text.
    """

    draft: Draft
    logits: mx.array
    hidden: mx.array
    slabs: list[mx.array]
    before: RoundState

    @property
    def verified(self) -> Verified:
        """What its commit takes."""
        return Verified(self.slabs, self.hidden, self.before)

    @property
    def small(self) -> dict[str, Any]:
        """All arrays but the slabs, by name, without those of the state before."""
        arrays: dict[str, Any] = {"logits": self.logits, "hidden": self.hidden}
        source = self.draft.source
        if self.draft.tokens.size:  # no kernel takes an array without elements
            arrays["drafts"] = self.draft.tokens
        if source is not None:
            arrays["source"] = {"scores": source.scores, "token_ids": source.token_ids}
        return arrays

    @classmethod
    def of_named(cls, arrays: Mapping[str, Any], *, before: RoundState) -> Begun:
        """The round whose arrays these are; without slabs where they have none."""
        source = None
        if "source" in arrays:
            source = Distribution(**arrays["source"], is_whole=False)
        drafts = arrays.get("drafts")
        if drafts is None:
            drafts = mx.zeros((before.last_token.shape[0], 0), dtype=mx.int32)
        return cls(
            Draft(drafts, source),
            arrays["logits"],
            arrays["hidden"],
            arrays.get("slabs", []),
            before,
        )

    def read_drafts(self) -> list[list[int]]:
        """Wait for the drafts."""
        if not self.draft.tokens.size:
            return [[] for _ in range(self.logits.shape[0])]
        return cast(list[list[int]], self.draft.tokens.tolist())
