"""Masks: which tokens a row may choose, one bit for each token id.

32 of them stand in a word, the lowest id in the lowest bit. Knows nothing of where they
come from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import numpy.typing as npt

WORD = 32  # bits
ALL = 0xFFFFFFFF  # a word in which every token is allowed

Words = npt.NDArray[np.uint32]


@dataclass(frozen=True)
class BlockMasks:
    """The masks of one row's block of K drafts.

    Attributes:
        words: Of the token in front of each draft, and behind the last one, uint32
            [K + 1, words]; ids beyond them are not allowed.
        forced: For each of these places the tokens that come there, as far as the mask
            alone says; a guess where tokens can be cut in several ways. [K + 1]
    """

    words: Words
    forced: Sequence[Sequence[int]]


def allow(logits: mx.array, masks: mx.array) -> mx.array:
    """Logits in which only the tokens of masks can be chosen.

    Args:
        logits: [..., V]
        masks: Of each row, uint32 [..., words]; ids beyond them are not allowed.

    Returns:
        The logits, minus infinity where the bit is 0, in their own type. [..., V]
    """
    size, room = logits.shape[-1], WORD * masks.shape[-1]
    if room < size:
        missing = (size - room + WORD - 1) // WORD
        masks = mx.pad(masks, [(0, 0)] * (masks.ndim - 1) + [(0, missing)])
    bits = (masks[..., None] >> mx.arange(WORD, dtype=mx.uint32)) & 1
    is_allowed = bits.astype(mx.bool_).flatten(-2)[..., :size]
    return mx.where(is_allowed, logits, -math.inf)
