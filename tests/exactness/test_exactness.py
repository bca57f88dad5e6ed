"""A verify block gives, byte for byte, the logits of single steps (CPU, Linux).

That makes the text with drafting equal the text without it. Metal kernels may round
one row differently from several; this file says nothing about them.
Run: python -m pytest tests/exactness/test_exactness.py
"""

from __future__ import annotations

import sys
from collections.abc import Mapping

import mlx.core as mx
import numpy as np
import pytest

from mlx_gemma_mtp.constants import FULL
from mlx_gemma_mtp.engine.decoder import Decoder, Request
from mlx_gemma_mtp.engine.rounds import Rounds
from mlx_gemma_mtp.models.attention import SharedKV
from mlx_gemma_mtp.models.drafter import DraftOutput
from tests.tiny import families, reference_pair

PROMPT = [2, 17, 300, 45, 99, *range(60, 80)]
NUM_TOKENS = 28  # the window is 16 and the ring 34: both wrap


def assert_same(got, expected):
    """Equal byte for byte; on macOS up to float ties.

    There MLX's CPU backend multiplies with Accelerate, which may take another kernel
    for one row than for several; its bytes were never compared.
    """
    if sys.platform == "darwin":
        np.testing.assert_allclose(got, expected, atol=1e-4)
    else:
        assert got.tobytes() == expected.tobytes()


class BlockOracle:
    """Drafts a given text in blocks of K, some of it wrong.

    Args:
        text: The tokens by absolute position.
        wrong_every: Every how many positions a draft is wrong; 0 for never.
        block: K.
    """

    layer_types = (FULL,)

    def __init__(self, text: list[int], wrong_every: int, block: int) -> None:
        wrong = [
            (t + 1) % 512 if wrong_every and i % wrong_every == 0 else t
            for i, t in enumerate(text)
        ]
        self._text = mx.array(wrong + [0] * 20)
        self._block = block
        self._step = 0

    def __call__(
        self,
        embedding: mx.array,
        hidden: mx.array,
        shared_kv: Mapping[str, SharedKV],
        *,
        position: mx.array,
    ) -> DraftOutput:
        # One call per step of a trace: its number within the block is fixed there.
        self._step = self._step % self._block + 1
        token = self._text[position[:, None] + self._step]
        logits = (mx.arange(512) == token[..., None]).astype(mx.float32)
        return DraftOutput(logits, None, hidden)


def decode(rounds, num_draft_tokens, num_tokens=NUM_TOKENS):
    """The tokens and the float32 logits behind each, and the decoder."""
    decoder = Decoder(
        rounds, [Request(PROMPT, num_tokens)], num_draft_tokens=num_draft_tokens
    )
    tokens, logits = [], []
    for emissions in decoder.run():
        for emission in emissions:
            tokens += emission.tokens
            logits.append(
                np.array(emission.logits[emission.place, : len(emission.tokens)])
            )
    return tokens, np.concatenate(logits), decoder


@pytest.fixture(scope="module", params=families("e2b", "12b", "26b-a4b"))
def single_steps(request):
    pair = reference_pair(request.param)
    rounds = Rounds(pair.rounds.target, use_compile=False)
    # A block longer, so that the drafts of the last round have a text too.
    tokens, logits, _ = decode(rounds, 0, NUM_TOKENS + 9)
    return pair, tokens, logits


@pytest.mark.parametrize(("num_draft_tokens", "wrong_every"), [(1, 0), (4, 3), (8, 0)])
def test_blocks_equal_single_steps(single_steps, num_draft_tokens, wrong_every):
    pair, text, logits = single_steps
    tokens, logits = text[:NUM_TOKENS], logits[:NUM_TOKENS]
    oracle = BlockOracle(PROMPT + text, wrong_every, num_draft_tokens)
    rounds = Rounds(pair.rounds.target, oracle, use_compile=False)
    block_tokens, block_logits, decoder = decode(rounds, num_draft_tokens)
    if not wrong_every:
        assert decoder.stats.acceptance_rate == 1  # else nothing was tested
    else:
        assert 0 < decoder.stats.acceptance_rate < 1
    assert block_tokens == tokens
    assert block_logits.dtype == np.float32
    assert_same(block_logits, logits)


@pytest.mark.parametrize("num_draft_tokens", [1, 4])
def test_compiled_blocks_equal_compiled_single_steps(num_draft_tokens):
    pair = reference_pair("12b")
    tokens, logits, _ = decode(pair.rounds, 0)
    oracle = BlockOracle(PROMPT + tokens, 3, num_draft_tokens)
    rounds = Rounds(pair.rounds.target, oracle)
    block_tokens, block_logits, decoder = decode(rounds, num_draft_tokens)
    assert decoder.stats.accepted > 0
    assert block_tokens == tokens
    assert_same(block_logits, logits)


def test_a_row_does_not_depend_on_its_neighbours(single_steps):
    pair, tokens, logits = single_steps
    tokens, logits = tokens[:NUM_TOKENS], logits[:NUM_TOKENS]
    rounds = Rounds(pair.rounds.target, pair.drafter, use_compile=False)
    prompts = [[9, 8, 7], PROMPT, list(range(40, 90))]
    decoder = Decoder(
        rounds, [Request(p, NUM_TOKENS) for p in prompts], num_draft_tokens=3
    )
    row_tokens, row_logits = [], []
    for emissions in decoder.run():
        for emission in emissions:
            if emission.sequence.index == 1:
                row_tokens += emission.tokens
                row_logits.append(
                    np.array(emission.logits[emission.place, : len(emission.tokens)])
                )
    assert row_tokens == tokens
    assert_same(np.concatenate(row_logits), logits)
