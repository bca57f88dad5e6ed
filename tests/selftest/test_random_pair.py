"""Pairs of random weights: published shapes, cut layers, and that they decode.

Run: python -m pytest tests/selftest/test_random_pair.py
"""

from __future__ import annotations

from typing import Any, cast

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_gemma_mtp.constants import FULL, SLIDING
from mlx_gemma_mtp.engine.prefill import read_prompt
from mlx_gemma_mtp.errors import RequestError
from mlx_gemma_mtp.generation.tokens import generate_tokens
from mlx_gemma_mtp.models import text_config as reading
from mlx_gemma_mtp.models.compatibility import check_fit
from mlx_gemma_mtp.models.drafter_config import DrafterConfig
from mlx_gemma_mtp.models.families import FAMILIES
from mlx_gemma_mtp.models.published import drafter_config, text_config
from mlx_gemma_mtp.selftest import random_pair
from tests.published import TARGETS, published
from tests.tiny import uncompiled

PUBLISHED = dict(zip(FAMILIES, TARGETS, strict=True))
# Two layers of the largest take half a minute on a CPU.
CUT = [
    "26b-a4b",
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in ("e2b", "e4b", "12b", "31b")
    ),
]


def shapes(module):
    flat: Any = tree_flatten(module.parameters())
    return {name: array.shape for name, array in flat}


@pytest.mark.parametrize("family", FAMILIES)
def test_settings_are_the_published_ones(family):
    target = published(PUBLISHED[family]).config
    assert text_config(family) == reading.text_config(target, source="here")
    assert text_config(family.upper()) == text_config(family)
    drafter = published(f"{PUBLISHED[family]}-assistant")
    found = drafter_config(family)
    expected = DrafterConfig.from_dict(drafter.config)
    num_drafts = drafter.generation_config["num_assistant_tokens"]
    assert vars(found) == vars(expected) | {"num_assistant_tokens": num_drafts}


@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_are_the_published_ones(family):
    target, drafter = random_pair.skeletons(family)
    there = published(PUBLISHED[family]).tensors
    for name, shape in shapes(target).items():
        if "switch_glu" not in name:  # published as one tensor
            assert there[name.replace("model.", "model.language_model.", 1)][1] == shape
    gate_up = "model.language_model.layers.3.experts.gate_up_proj"
    if gate_up in there:
        experts = target.layers[3].experts.switch_glu
        num_experts, width, _ = experts.gate_proj.weight.shape
        assert there[gate_up][1] == (num_experts, 2 * width, target.args.hidden_size)
    there = published(f"{PUBLISHED[family]}-assistant").tensors
    assert shapes(drafter) == {name: shape for name, (_, shape) in there.items()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_layers", [2, 3, 4, 7, 12, None])
def test_a_cut_target_still_feeds_its_drafter(family, num_layers):
    target, drafter = random_pair.skeletons(
        family, num_layers=num_layers, vocab_size=4096
    )
    check_fit(target, drafter)
    args = target.args
    assert args.num_hidden_layers == (num_layers or len(target.layers))
    num_own = args.num_hidden_layers - args.num_kv_shared_layers
    assert args.layer_types is not None
    assert args.layer_types[num_own - 2 : num_own] == [SLIDING, FULL]
    assert args.layer_types[-1] == FULL
    has_sharing = bool(FAMILIES[family].target.get("num_kv_shared_layers"))
    assert (args.num_kv_shared_layers > 0) == (has_sharing and num_layers != 2)


def test_a_cut_keeps_the_pattern_and_the_share_of_shared_layers():
    text = text_config("e2b", num_layers=14)
    assert text["num_kv_shared_layers"] == 8
    own = [SLIDING] * 4 + [FULL]
    assert text["layer_types"] == [FULL, *own, *[SLIDING] * 2, FULL, *own]


@pytest.mark.parametrize("family", CUT)
def test_cut_pairs_decode_the_same_text_with_drafts(family):
    pair = random_pair.random_pair(
        family, num_layers=2, vocab_size=4096, bits=4, dtype=mx.float32
    )
    texts = []
    with uncompiled():
        for count in (0, 1):
            tokens = generate_tokens(
                pair,
                [2, 7],
                max_tokens=3,
                num_draft_tokens=count,
                exactness="fast",  # a probe takes as long as all other tests here
                eos_token_ids=(),
            )
            texts.append(list(tokens))
    assert texts[0] == texts[1]
    assert len(texts[0]) == 3


def test_activations_keep_their_size():
    for bits in (None, 4):
        pair = random_pair.random_pair(
            "e2b", num_layers=3, vocab_size=2048, bits=bits, dtype=mx.float32
        )
        prompt = mx.arange(5, dtype=mx.int32)
        logits = read_prompt(pair.rounds.target, prompt).logits
        deviation = cast(float, mx.std(logits).item())
        assert 0.5 < deviation < 2


def test_a_seed_gives_the_same_weights_and_another_one_others():
    def weights(seed):
        pair = random_pair.random_pair(
            "e2b", num_layers=2, vocab_size=2048, bits=4, seed=seed
        )
        assert pair.num_draft_tokens == 2
        return pair.target.model.embed_tokens.weight

    assert mx.array_equal(weights(3), weights(3))
    assert not mx.array_equal(weights(3), weights(4))


def test_quantized_as_a_converted_pair():
    pair = random_pair.random_pair("e2b", num_layers=2, vocab_size=2048, bits=4)
    drafter: Any = pair.drafter
    assert pair.target.model.layers[0].mlp.up_proj.bits == 4
    assert pair.target.model.layers[0].mlp.up_proj.scales.dtype == mx.bfloat16
    assert drafter.pre_projection.bits == drafter.model.embed_tokens.bits == 8
    assert drafter.masked_embedding.centroids.weight.dtype == mx.bfloat16
    ordering = drafter.masked_embedding.token_ordering
    assert mx.array_equal(mx.sort(ordering), mx.arange(2048))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"family": "7b"}, "the family must be one of e2b, e4b, 12b"),
        ({"family": "12b", "num_layers": 1}, "num_layers must be from 2 to 48: got 1"),
        ({"family": "12b", "vocab_size": 1}, "vocab_size must be from 256 to 262144"),
        ({"family": "e2b", "vocab_size": 3000}, "a multiple of 2048 for e2b"),
    ],
)
def test_mistakes(settings, message):
    with pytest.raises(RequestError, match=message):
        random_pair.random_pair(**settings)


@pytest.mark.skipif(mx.default_device() != mx.Device(mx.cpu), reason="runs on a GPU")
def test_a_mixture_in_half_precision_needs_a_gpu():
    with pytest.raises(RequestError, match="float32 or quantized on the CPU"):
        random_pair.random_pair("26b-a4b", num_layers=2)
