"""Where the newest tokens of a text stood before, as far as the host knows the text.

It finds what ``lookup.find`` finds on the device, of the tokens that were read anyway.
So each round says at no cost how many drafts from the text would have stood.

Knows nothing of rounds, nor of what is learnt from it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .lookup import LONGEST, NUM_FOUND, UNKNOWN, known_ids

_ROOM = 256  # places beyond those in use, at least
_NEAR = 4096  # newest places, where a text that repeats itself is found at once


class KnownText:
    """A text that grows.

    Args:
        tokens: Its beginning, at least one; what is no token id equals nothing.

    Attributes:
        length: How many of its newest tokens stood there before, 0 to 16.
        place: Where the newest of them stood, the latest place of the longest match.
        following: What followed there, over and over where it is the end of the text:
            9 tokens.
    """

    def __init__(self, tokens: Sequence[int]) -> None:
        self.length = self.place = 0
        self.following: list[int] = []
        self._size = 0
        self._tokens = np.empty(len(tokens) + _ROOM, dtype=np.int32)
        self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Let tokens follow."""
        end = self._size + len(tokens)
        if end > len(self._tokens):
            room = np.empty(max(len(self._tokens), len(tokens)), dtype=np.int32)
            self._tokens = np.concatenate([self._tokens, room])
        self._tokens[self._size : end] = known_ids(tokens)
        self._size = end
        self._find()

    def goes_on(self, token: int, *, end: int) -> bool:
        """Whether a token followed where the newest ones stood, before a place."""
        return self.place + 1 < end and self.following[0] == token

    def _find(self) -> None:
        """Find the longest match, the latest place first."""
        text = self._tokens[: self._size]
        near = max(self._size - _NEAR, 0)
        self._find_behind(near)
        if near and self.length < LONGEST:
            self._find_behind(0)
        found = text[self.place + 1 :][:NUM_FOUND].tolist() or [0]
        self.following = [max(found[i % len(found)], 0) for i in range(NUM_FOUND)]

    def _find_behind(self, start: int) -> None:
        """Find the longest match that ends at a place or behind it."""
        text, last = self._tokens[: self._size], self._size - 1
        self.length, self.place = 0, max(last - 1, 0)
        newest = text[last] if text[last] != UNKNOWN else UNKNOWN - 1
        places = start + np.flatnonzero(text[start:last] == newest)
        while len(places):
            self.length, self.place = self.length + 1, int(places[-1])
            if self.length == LONGEST or text[last - self.length] == UNKNOWN:
                break
            before = places[places >= self.length] - self.length
            is_same = text[before] == text[last - self.length]
            places = before[is_same] + self.length


def num_equal(drafts: Sequence[int], tokens: Sequence[int]) -> int:
    """Length of the longest common prefix."""
    count = 0
    for draft, token in zip(drafts, tokens, strict=False):
        if draft != token:
            break
        count += 1
    return count
