"""Random numbers as pure functions of seed, position and use.

Every number is one word of a counter-based generator, so what a row draws depends on
its seed and on where the token stands, not on the batch around it or on the order of
calls.

This file knows nothing of logits, models or rounds.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

# Philox 4x32, 10 rounds. Source: Salmon et al. 2011, "Parallel random numbers: as easy
# as 1, 2, 3", table 2 and figure 4; the constants are those of Random123 1.14.
PHILOX_ROUNDS = 10
PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)

# What a number is for; each use has numbers of its own.
SHARED = 0  # Gumbel noise that target and drafter share
PROPOSAL = 1  # the draw of a draft
COIN = 2  # whether a draft stands
RESIDUAL = 3  # the draw of the token behind the accepted drafts
XTC = 4  # whether XTC strikes at a position


@dataclass(frozen=True)
class Stream:
    """Random numbers of one use, independent of those of every other.

    Attributes:
        number: The use, one of the constants above.
        offset: The round, told by the offset it starts at, int32 [B]; None where the
            number belongs to the position alone. A position that a round rejected is
            drawn again in the next, under other numbers: those of the first draw are
            no longer random once it is known to be rejected.
    """

    number: int
    offset: mx.array | None = None

    def words(self, like: mx.array) -> tuple[mx.array, mx.array]:
        """The last two counter words for counters [B, ...], uint32 of that shape."""
        zero = mx.zeros_like(like)
        if self.offset is None:
            return zero + self.number, zero
        offset = self.offset.astype(mx.uint32)
        offset = offset.reshape(-1, *[1] * (like.ndim - 1))
        return zero + self.number, zero + offset


def gumbel_noise(
    seed: mx.array,
    positions: mx.array,
    token_ids: mx.array,
    stream: Stream | None = None,
) -> mx.array:
    """Gumbel(0, 1) noise as a pure function of seed, position, token id and stream.

    Args:
        seed: The low and high word of each row's 64-bit seed, uint32 [B, 2].
        positions: Absolute positions, int32 [B, L].
        token_ids: Token ids, int32 [B, L, M].
        stream: What it is for; None for the noise that target and drafter share.

    Returns:
        Noise, float32 [B, L, M].
    """
    ids = token_ids.astype(mx.uint32)
    where = mx.zeros_like(ids) + positions.astype(mx.uint32)[..., None]
    counter = (ids >> 2, where, *(stream or Stream(SHARED)).words(ids))
    words = philox(counter, (seed[:, 0, None, None], seed[:, 1, None, None]))
    # One block serves four neighbouring ids, a word each.
    word = ids & 3
    bits = mx.where(
        word < 2,
        mx.where(word == 0, words[0], words[1]),
        mx.where(word == 2, words[2], words[3]),
    )
    return gumbel_of_bits(bits)


def uniform_noise(seed: mx.array, positions: mx.array, stream: Stream) -> mx.array:
    """Uniform numbers, never 0 or 1, as a function of seed, position and stream.

    Args:
        seed: The low and high word of each row's 64-bit seed, uint32 [B, 2].
        positions: Absolute positions, int32 [B, L].
        stream: What it is for.

    Returns:
        Numbers, float32 [B, L].
    """
    where = positions.astype(mx.uint32)
    counter = (mx.zeros_like(where), where, *stream.words(where))
    words = philox(counter, (seed[:, 0, None], seed[:, 1, None]))
    return uniform_of_bits(words[0])


def gumbel_of_bits(bits: mx.array) -> mx.array:
    """Turn random words, uint32, into Gumbel(0, 1) noise, finite float32."""
    return -mx.log(-mx.log(uniform_of_bits(bits)))


def uniform_of_bits(bits: mx.array) -> mx.array:
    """Turn random words, uint32, into numbers between 0 and 1, float32."""
    # 23 bits and a half step: exact in float32, and so never 0 or 1, where a logarithm
    # would be infinite. With 24 bits the last value would round to 1.
    return ((bits >> 9).astype(mx.float32) + 0.5) * 2.0**-23


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
    for _ in range(PHILOX_ROUNDS):
        hi0, lo0 = _multiply_wide(c0, PHILOX_MULTIPLIERS[0])
        hi1, lo1 = _multiply_wide(c2, PHILOX_MULTIPLIERS[1])
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0 = k0 + mx.array(PHILOX_WEYL[0], dtype=mx.uint32)
        k1 = k1 + mx.array(PHILOX_WEYL[1], dtype=mx.uint32)
    return c0, c1, c2, c3


def _multiply_wide(x: mx.array, multiplier: int) -> tuple[mx.array, mx.array]:
    """High and low word of a 32 x 32 bit product."""
    product = x.astype(mx.uint64) * mx.array(multiplier, dtype=mx.uint64)
    high = (product >> mx.array(32, dtype=mx.uint64)).astype(mx.uint32)
    return high, product.astype(mx.uint32)
