"""Drafts from the text itself: what followed where its newest tokens stood before.

The tokens of every row stand in a slab beside its keys and values, perhaps behind
others that no model reads. The longest suffix of up to 16 tokens that occurred before
is found by arithmetic on it, the latest place first; what followed there is the draft.
Nothing is read by the host.

Knows nothing of models, of rounds or of what is done with the drafts.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from ..constants import MAX_DRAFT_TOKENS

LONGEST = 16  # tokens of a suffix that are compared
NUM_FOUND = MAX_DRAFT_TOKENS + 1  # tokens that are looked up: as many as a round emits
_IDS = 2**31
_PLACES = 256  # the fewest of tokens that are searched before a text
UNKNOWN = -1  # a token that equals nothing: of it only keys and values came


def empty_text(num_rows: int, capacity: int) -> mx.array:
    """The text of rows of which nothing is known, int32 [B, capacity]."""
    return mx.full((num_rows, capacity), UNKNOWN, dtype=mx.int32)


def known_ids(tokens: Sequence[int]) -> npt.NDArray[np.int32]:
    """Tokens, unknown ones in place of what is no token id at all."""
    ids = [t if 0 <= t < _IDS else UNKNOWN for t in tokens]
    return np.array(ids, dtype=np.int32)


def text_row(
    tokens: Sequence[int], *, end: int, capacity: int, before: Sequence[int] = ()
) -> mx.array:
    """The text of one row.

    Args:
        tokens: Those that are known, the last one ``end`` - 1 places behind the first
            of the text.
        end: Tokens of the text.
        capacity: Places.
        before: Tokens before the text, that are searched too.

    Returns:
        int32 [1, capacity].
    """
    row = np.full(capacity, UNKNOWN, dtype=np.int32)
    known, end = tokens[max(len(tokens) - end, 0) :], len(before) + end
    row[: len(before)] = known_ids(before)
    row[end - len(known) : end] = known_ids(known)
    return mx.array(row)[None]


def searched_places(needed: int) -> int:
    """Places for tokens that are searched before a text: one of few numbers.

    Each is a trace of every round; a place takes 4 bytes.
    """
    places = _PLACES
    while places < needed:
        places *= 4
    return places


def resized_text(text: mx.array, capacity: int) -> mx.array:
    """The text cut to so many places, or with unknown tokens behind."""
    num_rows, size = text.shape
    if capacity <= size:
        return mx.contiguous(text[:, :capacity])
    return mx.concatenate([text, empty_text(num_rows, capacity - size)], axis=1)


def with_tokens(text: mx.array, place: mx.array, tokens: mx.array) -> mx.array:
    """The text with tokens [B, L] at the places from ``place`` [B] on."""
    places = place[:, None] + mx.arange(tokens.shape[1])
    return mx.put_along_axis(text, places, tokens, axis=1)


def find(text: mx.array, place: mx.array) -> tuple[mx.array, mx.array]:
    """Find where the newest tokens of each row stood before.

    Args:
        text: Tokens of each row; what lies behind its newest one means nothing, int32
            [B, capacity].
        place: The newest token's, int32 [B].

    Returns:
        How many of the newest tokens are the same there, 0 to 16, int32 [B]; and what
        followed, over and over where it is the end of the text, int32 [B, 9].
    """
    num_rows, capacity = text.shape
    end = place[:, None]
    room = mx.full((num_rows, LONGEST - 1), UNKNOWN, dtype=mx.int32)
    padded = mx.concatenate([room, text], axis=1)
    newest = mx.take_along_axis(padded, end + mx.arange(LONGEST), axis=1)
    newest = mx.where(newest < 0, UNKNOWN - 1, newest)  # what is unknown equals nothing
    # [B, capacity, 16]: the tokens that end at each place.
    windows = mx.as_strided(
        padded, (num_rows, capacity, LONGEST), (padded.shape[1], 1, 1)
    )
    differs = windows != newest[:, None]
    steps = mx.arange(1, LONGEST + 1, dtype=mx.uint8)
    last_other = mx.where(differs, steps, mx.array(0, dtype=mx.uint8)).max(axis=-1)
    length = LONGEST - last_other.astype(mx.int32)
    places = mx.arange(capacity, dtype=mx.int32)
    score = mx.where(places < end, length * capacity + places, 0)
    best = score.max(axis=1, keepdims=True)
    length = best // capacity
    found = best - length * capacity
    period = mx.maximum(end - found, 1)
    following = found + 1 + mx.arange(NUM_FOUND, dtype=mx.int32) % period
    tokens = mx.take_along_axis(text, following, axis=1)
    return length[:, 0], mx.maximum(tokens, 0)
