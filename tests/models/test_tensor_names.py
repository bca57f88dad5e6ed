"""Tensors that text has no use for: which, by name alone, and why.

Run: python -m pytest tests/test_tensor_names.py
"""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_gemma_mtp.errors import CheckpointError
from mlx_gemma_mtp.models.tensor_names import (
    Share,
    drafter_names,
    target_names,
    unused_in_drafter,
    unused_in_target,
)

INPUT = "image and audio input"
HEAD = "tied"
TABLE = "computed"
SHARED = "other layers' K/V"
FIRST_SHARED = 15
TEXT = {
    "num_hidden_layers": 35,
    "num_kv_shared_layers": 20,
    "tie_word_embeddings": True,
}
RANGE = "ranges or scales of activations"
# Of transformers 4 and 5, mlx-lm, mlx-vlm, text models alone; and what programs that
# wrap models leave in front of them.
PREFIXES = (
    "model.language_model.",
    "language_model.model.",
    "model.",
    "",
    "language_model.",
    "model.language_model.model.",
    "language_model.model.language_model.",
    "model.language_model.language_model.",
    "base_model.model.model.language_model.",
    "module.model.language_model.",
    "_orig_mod.model.language_model.",
    "_fsdp_wrapped_module.model.language_model.",
    "_fsdp_wrapped_module.model.language_model._checkpoint_wrapped_module.",
    "text_model.",
    "model.text_model.",
)
HEADS = (
    "lm_head.",
    "model.lm_head.",
    "language_model.lm_head.",
    "model.language_model.lm_head.",
    "base_model.model.lm_head.",
)


def reason(name, *, first_shared_layer=FIRST_SHARED, is_tied=True):
    return unused_in_target(
        name, first_shared_layer=first_shared_layer, is_tied=is_tied
    )


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("model.vision_tower.encoder.layers.0.mlp.up_proj.weight", INPUT),
        ("model.audio_tower.layers.0.self_attn.k_proj.weight", INPUT),
        ("vision_tower.patch_embedder.position_embedding_table", INPUT),
        ("audio_tower.output_proj.bias", INPUT),
        ("model.embed_vision.embedding_projection.weight", INPUT),
        ("embed_audio.embedding_projection.weight", INPUT),
        ("model.vision_embedder.weight", INPUT),
        ("multi_modal_projector.linear.weight", INPUT),
        ("lm_head.weight", HEAD),
        ("model.lm_head.weight", HEAD),
        ("language_model.lm_head.weight", HEAD),
        ("model.language_model.lm_head.weight", HEAD),
        ("language_model.lm_head.scales", HEAD),
        ("model.language_model.layers.3.self_attn.rotary_emb.inv_freq", TABLE),
        ("model.language_model.rotary_emb.full_attention_inv_freq", TABLE),
        ("model.language_model.layers.3.mlp.up_proj.input_max", RANGE),
        ("model.language_model.layers.3.mlp.up_proj.input_scale", RANGE),
        ("model.language_model.layers.3.self_attn.k_scale", RANGE),
        ("model.language_model.layers.3.self_attn.v_proj.v_scale", RANGE),
    ],
)
def test_what_a_target_does_not_need(name, word):
    assert word in reason(name)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_layers_with_others_kv(prefix):
    parts, kinds = ("k_proj", "v_proj", "k_norm", "v_norm"), ("weight", "scales")
    for layer, part, kind in product((0, 14, 15, 34), parts, (*kinds, "biases")):
        found = reason(f"{prefix}layers.{layer}.self_attn.{part}.{kind}")
        assert (found is None) is (layer < FIRST_SHARED)
        assert found is None or SHARED in found


@pytest.mark.parametrize("prefix", PREFIXES)
def test_what_a_target_needs(prefix):
    for rest in (
        "embed_tokens.weight",
        "embed_tokens_per_layer.weight",
        "norm.weight",
        "per_layer_model_projection.weight",
        "layers.20.self_attn.q_proj.weight",
        "layers.20.self_attn.q_norm.weight",
        "layers.20.self_attn.o_proj.weight",
        "layers.20.mlp.down_proj.weight",
        "layers.20.layer_scalar",
        "layers.20.experts.gate_up_proj",
        "layers.20.router.per_expert_scale",
        "layers.20.per_layer_input_gate.weight",
    ):
        assert reason(f"{prefix}{rest}") is None


@pytest.mark.parametrize("is_text_only", [False, True])
@pytest.mark.parametrize("kind", ["weight", "scales", "biases"])
@pytest.mark.parametrize("head", HEADS)
def test_a_head_of_its_own_is_one_parameter(head, kind, is_text_only):
    prefix = "" if is_text_only else "language_model."
    untied = {**TEXT, "tie_word_embeddings": False}
    tensor = f"{head}{kind}"
    names = target_names([tensor], untied, is_text_only=is_text_only)
    assert names.parameters == {f"{prefix}lm_head.{kind}": Share(tensor)}
    names = target_names([tensor], TEXT, is_text_only=is_text_only)
    assert (names.parameters, set(names.unused)) == ({}, {tensor})


@pytest.mark.parametrize("is_text_only", [False, True])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_layers_tensors_have_one_place_under_every_prefix(prefix, is_text_only):
    own = "model." if is_text_only else "language_model.model."
    for name in ("embed_tokens.scales", "layers.3.layer_scalar", "norm.weight"):
        names = target_names([f"{prefix}{name}"], TEXT, is_text_only=is_text_only)
        assert names.parameters == {f"{own}{name}": Share(f"{prefix}{name}")}
    fused = f"{prefix}layers.3.experts.gate_up_proj"
    names = target_names([fused], TEXT, is_text_only=is_text_only)
    experts = f"{own}layers.3.experts.switch_glu"
    assert names.parameters == {
        f"{experts}.gate_proj.weight": Share(fused, 0, 2),
        f"{experts}.up_proj.weight": Share(fused, 1, 2),
    }


def test_two_tensors_of_one_parameter_are_told():
    name = "model.norm.weight"
    other = f"language_model.{name}"
    with pytest.raises(CheckpointError, match=f"{other} must be .*: got {name} "):
        target_names([name, other], TEXT, is_text_only=False)


def test_a_layer_number_of_thousands_of_digits():
    name = f"model.language_model.layers.{'9' * 5000}.self_attn.k_proj.weight"
    assert SHARED in reason(name)


def test_what_stands_in_front_of_parts():
    name = "model.layers.3._fsdp_wrapped_module.mlp._orig_mod.up_proj.weight"
    names = target_names([name], TEXT, is_text_only=True)
    assert names.parameters == {"model.layers.3.mlp.up_proj.weight": Share(name)}


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_drafters_tensors_have_one_place_under_every_prefix(prefix):
    for name in (
        "model.layers.1.mlp.up_proj.weight",
        "model.norm.weight",
        "masked_embedding.token_ordering",
        "pre_projection.weight",
        "post_projection.scales",
    ):
        names = drafter_names([f"{prefix}{name}"])
        assert names.parameters == {name: Share(f"{prefix}{name}")}


@pytest.mark.parametrize(
    ("name", "is_used"),
    [
        ("lm_head.weight", False),
        ("module.lm_head.weight", False),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", False),
        ("model.embed_tokens.weight", True),
        ("masked_embedding.centroids.weight", True),
        ("masked_embedding.token_ordering", True),
        ("pre_projection.weight", True),
        ("model.layers.0.self_attn.q_proj.weight", True),
    ],
)
def test_drafters(name, is_used):
    assert (unused_in_drafter(name) is None) is is_used


@given(st.text(), st.integers(0, 100), st.booleans())
def test_no_name_breaks_it(name, first_shared_layer, is_tied):
    found = unused_in_target(
        name, first_shared_layer=first_shared_layer, is_tied=is_tied
    )
    assert found is None or found
    found = unused_in_drafter(name)
    assert found is None or found
