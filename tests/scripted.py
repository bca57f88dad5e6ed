"""Models that follow a script, so that a test can say what a round must do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import mlx.core as mx

from mlx_gemma_mtp.cache.prompt import PrefillCache
from mlx_gemma_mtp.cache.slabs import LayerKV, SlabLayout
from mlx_gemma_mtp.constants import FULL
from mlx_gemma_mtp.models.attention import SharedKV
from mlx_gemma_mtp.models.drafter import DraftOutput
from mlx_gemma_mtp.models.target import Prefilled, TargetOutput

VOCAB_SIZE = 64


def one_hot(tokens: mx.array) -> mx.array:
    """Logits [..., V] whose argmax is the token."""
    return (mx.arange(VOCAB_SIZE) == tokens[..., None]).astype(mx.float32)


class ScriptedTarget:
    """Gives the token that row b's script has at each position, whatever it reads.

    ``hidden`` carries the row and the position of the token it predicts, which is how
    the drafter knows both.

    Args:
        scripts: For each row the tokens by absolute position, the prompt's included.
    """

    def __init__(self, scripts: Sequence[Sequence[int]]) -> None:
        longest = max(map(len, scripts))
        padded = [[*script, *[0] * (longest - len(script))] for script in scripts]
        self._scripts = mx.array(padded, dtype=mx.int32)
        self._num_prefilled = 0
        self.vocab_size = VOCAB_SIZE
        self.layout = SlabLayout((LayerKV(FULL, 1, 1),), window=4, dtype=mx.float32)
        self.blocks: list[tuple[int, int]] = []  # shapes of the verify calls

    def embed(self, tokens: mx.array) -> mx.array:
        return tokens[..., None].astype(mx.float32)

    def prefill(
        self, tokens: mx.array, caches: list[PrefillCache], sizes: Sequence[int]
    ) -> Prefilled:
        num_rows, num_tokens = tokens.shape
        if not caches[0].offset:
            self._num_prefilled += num_rows
        first, start = self._num_prefilled - num_rows, caches[0].offset
        zeros = mx.zeros((num_rows, 1, num_tokens, 1))
        caches[0].update_and_fetch(zeros, zeros)
        rows = [[[first + i, start + size]] for i, size in enumerate(sizes)]
        hidden = mx.array(rows, dtype=mx.float32)
        return Prefilled(self._logits(hidden), hidden, caches)

    def verify(
        self,
        tokens: mx.array,
        slabs: list[mx.array],
        *,
        offset: mx.array,
        first_position: mx.array,
    ) -> TargetOutput:
        num_rows, num_tokens = tokens.shape
        self.blocks.append((num_rows, num_tokens))
        rows = mx.broadcast_to(mx.arange(num_rows)[:, None], tokens.shape)
        positions = offset[:, None] + mx.arange(1, num_tokens + 1)
        hidden = mx.stack([rows, positions], axis=-1).astype(mx.float32)
        return TargetOutput(self._logits(hidden), hidden, slabs)

    def _logits(self, hidden: mx.array) -> mx.array:
        return one_hot(look_up(self._scripts, hidden))


class ScriptedDrafter:
    """Proposes what row b's script has at each position.

    Args:
        scripts: As for the target; equal to its scripts where a draft is to be
            accepted.
    """

    layer_types = (FULL,)

    def __init__(self, scripts: Sequence[Sequence[int]]) -> None:
        longest = max(map(len, scripts))
        padded = [[*script, *[0] * (longest - len(script))] for script in scripts]
        self._scripts = mx.array(padded, dtype=mx.int32)

    def __call__(
        self,
        embedding: mx.array,
        hidden: mx.array,
        shared_kv: Mapping[str, SharedKV],
        *,
        position: mx.array,
    ) -> DraftOutput:
        # hidden predicted the newest token, so its successor is one further on.
        following = hidden + mx.array([0.0, 1.0])
        return DraftOutput(one_hot(look_up(self._scripts, following)), None, following)


def look_up(scripts: mx.array, hidden: mx.array) -> mx.array:
    """The tokens at (row, position), [B, L]; 0 past the end of a script."""
    rows, positions = hidden[..., 0].astype(mx.int32), hidden[..., 1].astype(mx.int32)
    is_inside = positions < scripts.shape[1]
    tokens = scripts[rows, mx.where(is_inside, positions, 0)]
    return mx.where(is_inside, tokens, 0)


CHAIN_SIZE = 97  # of the chains' vocabulary: tokens below it


def successor(token, position):
    """The token that follows a token at a position; its parity stays."""
    return (token + 2 * ((7 * position) % 40) + 2) % 96


class ChainTarget:
    """A target whose text is a function of the last token and its position alone.

    So a row's text does not depend on where it sits: for rows that join and leave.
    """

    def __init__(self) -> None:
        self.vocab_size = CHAIN_SIZE
        self.layout = SlabLayout((LayerKV(FULL, 1, 1),), window=4, dtype=mx.float32)

    def embed(self, tokens: mx.array) -> mx.array:
        return tokens[..., None].astype(mx.float32)

    def prefill(
        self, tokens: mx.array, caches: list[PrefillCache], sizes: Sequence[int]
    ) -> Prefilled:
        last = mx.array([[size - 1] for size in sizes])
        positions = caches[0].offset + last
        self._fill(tokens, caches)
        ends = mx.take_along_axis(tokens, last, axis=1)
        return Prefilled(*self._predict(ends, positions), caches)

    def _fill(self, tokens: mx.array, caches: list[PrefillCache]) -> None:
        """Let caches hold keys and values of the tokens behind them."""
        zeros = mx.zeros((tokens.shape[0], 1, tokens.shape[1], 1))
        caches[0].update_and_fetch(zeros, zeros)

    def verify(self, tokens, slabs, *, offset, first_position) -> TargetOutput:
        positions = offset[:, None] + mx.arange(tokens.shape[1])
        return TargetOutput(*self._predict(tokens, positions), slabs)

    def _predict(
        self, tokens: mx.array, positions: mx.array
    ) -> tuple[mx.array, mx.array]:
        """Logits and, as hidden states, the positions of the predicted tokens."""
        following = successor(tokens, positions)
        logits = (mx.arange(CHAIN_SIZE) == following[..., None]).astype(mx.float32)
        return 9 * logits, (positions + 1)[..., None].astype(mx.float32)


class ChainDrafter:
    """Is always right about even tokens, and always wrong about odd ones."""

    layer_types: tuple[str, ...] = (FULL,)

    def __call__(self, embedding, hidden, shared_kv, *, position) -> DraftOutput:
        token = embedding[..., 0].astype(mx.int32)
        following = successor(token, hidden[..., 0].astype(mx.int32))
        following = mx.where(token % 2 == 0, following, (following + 2) % 96)
        logits = (mx.arange(CHAIN_SIZE) == following[..., None]).astype(mx.float32)
        return DraftOutput(9 * logits, None, hidden + 1)
