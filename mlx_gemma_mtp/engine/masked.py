"""The masks of a batch's rows, and what they say of tokens to come.

Where a mask leaves one token, it is known before the target has chosen it, and perhaps
some that follow: forced tokens. They are proposed in place of drafts, and judged like
these. So the text does not depend on them.

Knows nothing of where masks come from, nor of how rounds are run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from ..constants import MAX_DRAFT_TOKENS
from ..sampling.masks import ALL, WORD, BlockMasks, Words
from .sequence import TokenSequence

_Seats = Sequence[TokenSequence | None]
_NUM_PLACES = MAX_DRAFT_TOKENS + 1  # at which a round may end


@dataclass(frozen=True)
class RoundMasks:
    """The masks of a round.

    Attributes:
        words: What each row may choose, uint32 [B, K + 1, words].
        forced: Of each sequence that has masks the tokens that are forced where 0 to K
            drafts stand.
        errors: Why sequences cannot go on; they have no masks.
    """

    words: mx.array
    forced: Mapping[TokenSequence, Sequence[Sequence[int]]]
    errors: Mapping[TokenSequence, Exception]

    @classmethod
    def of(
        cls, sequences: _Seats, drafts: Sequence[Sequence[int]], vocab_size: int
    ) -> RoundMasks:
        """Make them.

        Args:
            sequences: Who sits where.
            drafts: Of each seat, [B, K].
            vocab_size: Ids that logits have.
        """
        size = -(-vocab_size // WORD)
        words = np.full((len(drafts), len(drafts[0]) + 1, size), ALL, dtype=np.uint32)
        forced: dict[TokenSequence, Sequence[Sequence[int]]] = {}
        errors: dict[TokenSequence, Exception] = {}
        for seat, sequence in enumerate(sequences):
            if sequence is None:
                continue
            try:
                block = sequence.block_masks(drafts[seat])
                if block is not None:
                    words[seat] = _fitted(block, size)
                    forced[sequence] = block.forced
            except Exception as error:  # noqa: BLE001 (of this row alone)
                errors[sequence] = error
        return cls(mx.array(words), forced, errors)


def proposed_tokens(
    sequences: _Seats,
    num_draft_tokens: int,
    *,
    vocab_size: int,
    before: _Seats,
    forced: Mapping[TokenSequence, Sequence[Sequence[int]]],
) -> mx.array:
    """Forced tokens for a round's drafts; see ``Proposals.tokens``.

    Args:
        sequences: Who sits where.
        num_draft_tokens: K, at least 1.
        vocab_size: Ids that can be embedded; a run ends before others.
        before: Who sat where in the round in flight; empty where none is.
        forced: What is forced behind that round, by the drafts of it that stand.
    """
    size = (len(sequences), _NUM_PLACES, 1 + num_draft_tokens)
    tokens = np.full(size, -1, dtype=np.int64)
    for seat, sequence in enumerate(sequences):
        if sequence is None or sequence.masks is None or not sequence.is_live:
            continue
        if sequence not in before:  # what stands is known: the same at every place
            run = [*sequence.emitted[-1:], *_forced_now(sequence)]
            _fill(tokens[seat], [run] * _NUM_PLACES)
        elif seat < len(before) and before[seat] is sequence:
            _fill(tokens[seat], forced.get(sequence, ()))
    is_known = np.minimum.accumulate(tokens < vocab_size, axis=-1)
    return mx.array(np.where(is_known, tokens, -1).astype(np.int32))


def _forced_now(sequence: TokenSequence) -> Sequence[int]:
    """The tokens that are forced behind those emitted."""
    try:
        block = sequence.block_masks(())
    except Exception:  # noqa: BLE001 (the round's masks will say it)
        return ()
    return () if block is None else block.forced[0]


def _fill(
    table: npt.NDArray[np.int64],  # [places, 1 + K]
    runs: Sequence[Sequence[int]],
) -> None:
    for place, run in enumerate(runs):
        count = min(len(run), table.shape[1])
        table[place, :count] = run[:count]


def _fitted(block: BlockMasks, size: int) -> Words:
    """Masks of ``size`` words; ids beyond those that they have are not allowed."""
    words = block.words[:, :size]
    return np.pad(words, [(0, 0), (0, size - words.shape[1])])
