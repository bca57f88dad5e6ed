"""What goes into a round and what comes out of it.

It knows nothing of models, and of rules only their settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from .config import SamplingParams
from .logprobs import Logprobs
from .sampling import SamplingRule, sampling_rows, sampling_rule


@dataclass(frozen=True)
class RoundState:
    """What one round leaves for the next; every field lives on the device.

    Attributes:
        slabs: Keys and values of each layer in turn.
        last_token: The newest token, whose K/V is not in the slabs yet, int32 [B, 1].
        hidden: The target's post-norm row that predicted it, [B, 1, H].
        offset: Tokens in the slabs, and so the last token's position, int32 [B].
    """

    slabs: list[mx.array]
    last_token: mx.array
    hidden: mx.array
    offset: mx.array

    @property
    def arrays(self) -> list[mx.array]:
        """What has to be evaluated."""
        return [self.last_token, self.hidden, self.offset, *self.slabs]


@dataclass(frozen=True)
class RowSettings:
    """What the host sets for each row.

    Attributes:
        rule: The part of the sampling settings that shapes the graph.
        sampling: The numbers of ``sampling.sampling_rows``.
        is_active: False freezes a finished or empty row, bool [B].
        first_position: The oldest position the row holds keys for, int32 [B].
    """

    rule: SamplingRule
    sampling: dict[str, mx.array]
    is_active: mx.array
    first_position: mx.array


def row_settings(
    params: Sequence[SamplingParams],
    *,
    is_host: Sequence[bool] = (),
    num_logprobs: int | None = None,
    near_tie: float | None = None,
) -> RowSettings:
    """The settings of rows that are all active and hold their keys from position 0.

    Args:
        params: One entry per row; a row that samples has a seed.
        is_host: For each row whether the host decides it; ``()`` for none.
        num_logprobs: How many of the best tokens are reported with each token's
            log-probability; None for no log-probabilities.
        near_tie: Greedy choices by this much or less are counted; None for no count.
    """
    return RowSettings(
        rule=sampling_rule(
            params, is_host=is_host, num_logprobs=num_logprobs, near_tie=near_tie
        ),
        sampling=sampling_rows(params, is_host=is_host),
        is_active=mx.array([True] * len(params)),
        first_position=mx.zeros((len(params),), dtype=mx.int32),
    )


@dataclass(frozen=True)
class Report:
    """What a round tells the host.

    Attributes:
        tokens: num_accepted, then K + 1 tokens, of which the first num_accepted + 1
            are the round's, int32 [B, K + 2]. Of a row that the host decides K, then
            the drafts and a 0. Where near ties are counted, their number among the
            round's tokens stands behind, int32 [B, K + 3].
        logits: The target's logits behind those tokens, [B, K + 1, V].
        logprobs: Log-probabilities of those tokens; None where nobody asks, or where
            the host decides every row.
    """

    tokens: mx.array
    logits: mx.array
    logprobs: Logprobs | None

    @classmethod
    def of_arrays(cls, arrays: Sequence[mx.array]) -> Report:
        """What a compiled round gives: tokens, logits, then log-probabilities."""
        tokens, logits, *logprobs = arrays
        return cls(tokens, logits, Logprobs.of_arrays(logprobs))

    @property
    def arrays(self) -> list[mx.array]:
        """What the host reads of every round."""
        return [self.tokens, *(self.logprobs.arrays if self.logprobs else [])]


@dataclass(frozen=True)
class Verified:
    """A round that stands before its commit.

    Attributes:
        slabs: With the keys and values of the whole block.
        hidden: The target's post-norm rows of the block, [B, K + 1, H].
        before: The state it started from, without its slabs.
    """

    slabs: list[mx.array]
    hidden: mx.array
    before: RoundState

    @property
    def arrays(self) -> list[mx.array]:
        """What has to be evaluated."""
        return [self.hidden, *self.slabs]
