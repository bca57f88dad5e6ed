"""Quantized pairs decode through the same rounds, the centroid head included.

Run: python -m pytest tests/engine/test_quantized.py
"""

from __future__ import annotations

import shutil

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_gemma_mtp.checkpoints.weights import load_drafter, load_target
from mlx_gemma_mtp.errors import CheckpointError
from mlx_gemma_mtp.generation.tokens import draft_block, generate_tokens
from mlx_gemma_mtp.pair.load import load_pair
from mlx_gemma_mtp.pair.pair import Pair, named_arrays
from tests.tiny import REFERENCE, families, uncompiled

PROMPT = [2, 17, 300, 45, 99, 8, 120, 33, 71]


@pytest.fixture(scope="module", params=families("e2b", "12b", "26b-a4b"))
def pairs(request):
    """The pair as it is, and with 8-bit weights wherever groups of 32 fit."""

    def predicate(path, module):
        is_target = (
            hasattr(module, "to_quantized") and module.weight.shape[-1] % 32 == 0
        )
        return is_target and "router" not in path

    made = []
    for is_quantized in (False, True):
        target = load_target(REFERENCE / request.param / "target")
        drafter = load_drafter(REFERENCE / request.param / "drafter")
        if is_quantized:
            for model in (target, drafter):
                nn.quantize(model, 32, 8, class_predicate=predicate)
        made.append(Pair(target, drafter))
    with uncompiled():
        yield made


def test_something_was_quantized(pairs):
    _, quantized = pairs
    embedding = quantized.drafter.model.embed_tokens
    assert isinstance(embedding, nn.QuantizedEmbedding)


@pytest.mark.parametrize("settings", [{}, {"temp": 1.0, "top_k": 64, "seed": 3}])
def test_text_does_not_depend_on_drafting(pairs, settings):
    _, quantized = pairs
    texts = [
        list(
            generate_tokens(
                quantized,
                PROMPT,
                max_tokens=12,
                num_draft_tokens=num_draft_tokens,
                eos_token_ids=(),
                **settings,
            )
        )
        for num_draft_tokens in (0, 4)
    ]
    assert texts[0] == texts[1]


def test_drafts_are_close_to_those_of_the_float_drafter(pairs):
    """8-bit weights move logits a little; a packed row taken for a float one a lot."""
    float_pair, quantized = pairs
    mixed = Pair(float_pair.target, quantized.drafter)
    same = sum(
        draft_block(float_pair, PROMPT[: 2 + i], 1)
        == draft_block(mixed, PROMPT[: 2 + i], 1)
        for i in range(7)
    )
    assert same >= 5


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_half_precision_decodes(dtype):
    target = load_target(REFERENCE / "e2b" / "target")
    drafter = load_drafter(REFERENCE / "e2b" / "drafter")
    target.set_dtype(dtype)
    drafter.set_dtype(dtype)
    pair = Pair(target, drafter)
    assert pair.rounds.target.layout.dtype == dtype
    with uncompiled():
        texts = [
            list(
                generate_tokens(
                    pair, PROMPT, max_tokens=12, num_draft_tokens=k, eos_token_ids=()
                )
            )
            for k in (0, 4)
        ]
    assert texts[0] == texts[1]


def half_precision_copy(source, folder):
    """The checkpoint with its weights in bfloat16."""
    folder.mkdir()
    for name in ("config.json", "generation_config.json"):
        shutil.copy(source / name, folder / name)
    weights = mx.load(str(source / "model.safetensors"))
    assert isinstance(weights, dict)
    halves = {
        name: w.astype(mx.bfloat16) if w.dtype == mx.float32 else w
        for name, w in weights.items()
    }
    mx.save_safetensors(str(folder / "model.safetensors"), halves)
    return folder


def test_a_mixture_in_half_precision_is_refused_on_the_cpu(tmp_path):
    """MLX's CPU backend multiplies by gathered experts in float32 only."""
    folder = half_precision_copy(REFERENCE / "26b-a4b" / "target", tmp_path / "target")
    with pytest.raises(CheckpointError, match=r"switch_glu.*float32 or quantized"):
        load_target(folder)


def test_a_drafter_takes_the_type_of_its_target(tmp_path):
    """Another type would convert the target's cache in every draft step."""
    folder = half_precision_copy(REFERENCE / "e2b" / "target", tmp_path / "target")
    pair = load_pair(folder, REFERENCE / "e2b" / "drafter")
    assert pair.drafter is not None
    types = {name: a.dtype for name, a in named_arrays(pair.drafter)}
    assert types["pre_projection.weight"] == mx.bfloat16
    assert types["masked_embedding.token_ordering"] == mx.int32
    with uncompiled():
        assert len(draft_block(pair, PROMPT, 4)) == 4
