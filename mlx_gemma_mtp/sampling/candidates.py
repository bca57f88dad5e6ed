"""Tokens of rows with their scores: the best of them in order, or all there are.

What filters ask of either is the same: who stands above whom. A list that is in order
answers by running sums. A whole row is never brought into order: on a GPU that means
to sort a vocabulary of 64-bit numbers. The place where a sum crosses a bound is found
bit by bit in it.

This file knows nothing of settings, models or rounds.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from ..kernels import common, select, trial

MAX_CANDIDATES = 64  # of a list that kernels make
_MAX_LIST = 1024  # candidates that tokens are looked up in one by one
# Low bits of a float32 that are alike in all numbers of a type.
_SPARE_BITS = {mx.bfloat16: 16, mx.float16: 13}


@dataclass(frozen=True)
class Candidates:
    """The best tokens of each row in order.

    Attributes:
        logits: Before the temperature, descending, float32 [B, L, M].
        token_ids: int32 [B, L, M].
        log_mass: logsumexp of the whole row they come from, float32 [B, L, 1].
    """

    logits: mx.array
    token_ids: mx.array
    log_mass: mx.array

    @property
    def best(self) -> mx.array:
        """The highest score of each row, [B, L, 1]."""
        return self.logits[..., :1]

    @property
    def probs(self) -> mx.array:
        """Probabilities in the whole row, [B, L, M]."""
        return mx.exp(self.logits - self.log_mass)

    def inside(self, mass: mx.array) -> mx.array:
        """Which of them have less than ``mass`` [B, 1, 1] above, bool [B, L, M]."""
        return mx.cumsum(self.probs, axis=-1, inclusive=False) < mass

    def first(self, count: mx.array, is_kept: mx.array) -> mx.array:
        """The best ``count`` [B, 1, 1] of those kept; of equal ones the lowest ids."""
        return mx.cumsum(is_kept.astype(mx.int32), axis=-1) <= count

    def among(self, token_ids: mx.array) -> mx.array:
        """Which of them stand in a row's list, int32 [B, 1, S]; others are below 0."""
        return (self.token_ids[..., None] == token_ids[:, :, None]).any(axis=-1)


@dataclass(frozen=True)
class WholeRows(Candidates):
    """Every token of each row, by its id.

    Attributes:
        num_bits: The leading bits in which scores differ; others are all alike.
    """

    num_bits: int = 32

    @classmethod
    def of(cls, logits: mx.array) -> WholeRows:
        """The tokens of rows [B, L, V]."""
        num_bits = 32 - _SPARE_BITS.get(logits.dtype, 0)
        logits = logits.astype(mx.float32)
        every_id = mx.broadcast_to(mx.arange(logits.shape[-1]), logits.shape)
        log_mass = mx.logsumexp(logits, axis=-1, keepdims=True)
        return cls(logits, every_id, log_mass, num_bits)

    @property
    def best(self) -> mx.array:
        """The highest score of each row, [B, L, 1]."""
        return self.logits.max(axis=-1, keepdims=True)

    @property
    def probs(self) -> mx.array:
        """As of a list; in one operation, which takes a CPU a fraction of the time."""
        return mx.softmax(self.logits, axis=-1, precise=True)

    def inside(self, mass: mx.array) -> mx.array:
        """As for a list."""
        return self._order >= self._crossing(self.probs, mass)

    def first(self, count: mx.array, is_kept: mx.array) -> mx.array:
        """As for a list."""
        order, last = self._order, self._crossing(is_kept, count)
        is_above, is_last = order > last, is_kept & (order == last)
        num_above = (is_kept & is_above).sum(axis=-1, keepdims=True)
        place = num_above + mx.cumsum(is_last.astype(mx.int32), axis=-1)
        return is_above | (is_last & (place <= count))

    def among(self, token_ids: mx.array) -> mx.array:
        """As for a list; a mark at each of them, whatever their number."""
        num_rows, vocab_size = token_ids.shape[0], self.logits.shape[-1]
        ids = token_ids[:, 0]
        is_token = (ids >= 0) & (ids < vocab_size)
        row = mx.arange(num_rows)[:, None]
        marks = mx.zeros((num_rows, vocab_size), dtype=mx.int32)
        marks = marks.at[row, mx.where(is_token, ids, 0)].add(is_token.astype(mx.int32))
        return marks[:, None] > 0

    @property
    def _order(self) -> mx.array:
        """Whole numbers of ``num_bits`` that sort like the scores, int32 [B, L, V]."""
        return _order(self.logits) >> (32 - self.num_bits)

    def _crossing(self, weights: mx.array, bound: mx.array) -> mx.array:
        """Where the weight of a row, summed from its best token on, reaches a bound.

        Sums of floats are all taken in one order, so they fall as the place rises,
        rounded or not.

        Args:
            weights: Of the tokens, not negative, float32 or bool [B, L, V].
            bound: Above 0, [B, 1, 1].

        Returns:
            The highest place in ``_order`` at which the tokens there and above weigh
            ``bound`` or more; its lowest number where all of them weigh less, int32
            [B, L, 1].
        """
        order = self._order

        def reaches(place: mx.array) -> mx.array:
            is_there = order >= place
            if weights.dtype == mx.bool_:
                there = is_there & weights
            else:
                there = mx.where(is_there, weights, 0)
            return there.sum(axis=-1, keepdims=True) >= bound

        zero = mx.zeros((1, 1, 1), dtype=mx.int32)
        place = mx.where(reaches(zero), zero, -(1 << (self.num_bits - 1)))
        # Numbers would stand in the text of compiled kernels: one to build for each.
        steps = mx.array([1 << bit for bit in reversed(range(self.num_bits - 1))])
        for i in range(self.num_bits - 1):
            higher = place + steps[i : i + 1]
            place = mx.where(reaches(higher), higher, place)
        return place


def longest_list() -> int:
    """How many of the best tokens are found in less time than the whole is searched.

    On a CPU a row is partitioned; on a GPU MLX sorts it for that.
    """
    return _MAX_LIST if common.backend() == "ops" else MAX_CANDIDATES


def most_likely(
    logits: mx.array, count: int, *, token_ids: mx.array | None = None
) -> Candidates:
    """The best tokens of every row in order; of equal ones the lowest ids first.

    Args:
        logits: Scores of M candidates, [B, L, M].
        count: How many, 1 to M.
        token_ids: The candidates' ids [B, L, M]; None where M is the vocabulary.
    """
    if count > MAX_CANDIDATES or not trial.works(select.KERNEL):
        return sorted_best(logits, count, token_ids=token_ids)
    B, L, M = logits.shape
    ids = None if token_ids is None else token_ids.reshape(B * L, M)
    found = select.most_likely(logits.reshape(B * L, M), token_ids=ids)
    values, tokens, stats = (array.reshape(B, L, -1) for array in found)
    log_mass = stats[..., :1] + mx.log(stats[..., 1:])
    return Candidates(values[..., :count], tokens[..., :count], log_mass)


def sorted_best(
    logits: mx.array, count: int, *, token_ids: mx.array | None = None
) -> Candidates:
    """``most_likely`` by plain operations, for any count."""
    logits = logits.astype(mx.float32)
    ids = mx.arange(logits.shape[-1]) if token_ids is None else token_ids
    # One whole number that sorts like (-logit, id), so that ties need no second sort
    # and the order is the same on every backend.
    keys = ((~_order(logits)).astype(mx.int64) << 32) | ids.astype(mx.int64)
    if count < keys.shape[-1]:
        keys = mx.partition(keys, kth=count - 1, axis=-1)[..., :count]
    keys = mx.sort(keys, axis=-1)
    bits = ~(keys >> 32).astype(mx.int32)
    return Candidates(
        mx.view(bits ^ ((bits >> 31) & 0x7FFFFFFF), mx.float32),
        (keys & 0xFFFFFFFF).astype(mx.int32),
        mx.logsumexp(logits, axis=-1, keepdims=True),
    )


def _order(logits: mx.array) -> mx.array:
    """Whole numbers that sort like floats, int32 of float32.

    The bits of a float sort like the float, negative ones backwards.
    """
    bits = mx.view(logits, mx.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
