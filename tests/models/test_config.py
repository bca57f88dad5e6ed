"""Settings of checkpoints and requests: two layouts, defaults, every refusal.

Run: python -m pytest tests/models/test_config.py
"""

import copy
import json
import math
import re
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_gemma_mtp.constants import FULL, SLIDING, TARGET_MODEL_TYPES
from mlx_gemma_mtp.errors import CheckpointError, RequestError, shorten
from mlx_gemma_mtp.models.drafter_config import DrafterConfig
from mlx_gemma_mtp.models.text_config import (
    check_model_type,
    check_target,
    text_config,
)
from mlx_gemma_mtp.sampling.params import SamplingParams

REFERENCE = Path(__file__).parents[1] / "data" / "reference"
FAMILIES = ("e2b", "e4b", "12b", "26b-a4b", "31b")


def read(family, role, name="config.json"):
    return json.loads((REFERENCE / family / role / name).read_text(encoding="utf-8"))


def normalised(config):
    return text_config(config, source="here/config.json")


def fails(call, *words):
    """Assert that a call raises one line with these words."""
    with pytest.raises(CheckpointError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert "here/config.json" in message
    for word in words:
        assert word in message
    return message


@pytest.mark.parametrize("role", ["target", "drafter"])
@pytest.mark.parametrize("family", FAMILIES)
def test_both_layouts_give_equal_settings(family, role):
    published = normalised(read(family, role))
    resaved = normalised(read(family, role, "config.resaved.json"))
    assert published == resaved
    assert published["global_head_dim"] == 32
    assert published["head_dim"] == 16


@pytest.mark.parametrize(
    ("family", "heads"), [("e2b", None), ("12b", 1), ("26b-a4b", 2), ("31b", 4)]
)
def test_full_layers_keep_their_key_value_heads(family, heads):
    for role in ("target", "drafter"):
        settings = normalised(read(family, role, "config.resaved.json"))
        assert settings["num_global_key_value_heads"] == heads


def test_missing_keys_get_the_defaults_of_transformers():
    settings = normalised({"model_type": "gemma4", "text_config": {}})
    # mlx-lm would say 20, True and 30.0 here: the E2B's settings.
    assert settings["num_kv_shared_layers"] == 0
    assert settings["use_double_wide_mlp"] is False
    assert settings["final_logit_softcapping"] is None
    assert settings["hidden_size"] == 2304
    assert settings["global_head_dim"] == 512
    assert settings["layer_types"] == ([SLIDING] * 5 + [FULL]) * 5
    assert settings["rope_parameters"][FULL]["rope_theta"] == 1e6
    unified = normalised({"model_type": "gemma4_unified", "text_config": {}})
    assert unified["sliding_window"] == 1024
    assert unified["hidden_size_per_layer_input"] == 0


def test_null_means_off_or_missing():
    config = read("e2b", "target")
    text = config["text_config"]
    text.update(hidden_size_per_layer_input=None, num_kv_shared_layers=None)
    text.update(rope_parameters=None, use_double_wide_mlp=None, layer_types=None)
    text.update(final_logit_softcapping=None, global_head_dim=None)
    settings = normalised(config)
    assert settings["hidden_size_per_layer_input"] == 0
    assert settings["num_kv_shared_layers"] == 0
    assert settings["use_double_wide_mlp"] is False
    assert settings["final_logit_softcapping"] is None
    assert settings["global_head_dim"] == settings["head_dim"]
    assert settings["layer_types"][-1] == FULL
    assert set(settings["rope_parameters"]) == {SLIDING, FULL}


def test_a_text_only_config_is_the_same_settings():
    config = read("31b", "target")
    text_only = {**config["text_config"], "model_type": "gemma4_text"}
    assert normalised(text_only) == normalised(config)


def test_the_outer_vocabulary_counts_only_where_there_is_no_inner_one():
    config = {**read("31b", "target"), "vocab_size": 999}
    assert normalised(config)["vocab_size"] == 512
    del config["text_config"]["vocab_size"]
    assert normalised(config)["vocab_size"] == 999


def test_the_config_is_left_as_it_was():
    config = read("31b", "target", "config.resaved.json")
    before = copy.deepcopy(config)
    normalised(config)["rope_parameters"][FULL]["rope_theta"] = 0
    assert config == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_size": "64"}, ["hidden_size", "integer >= 1", "'64'"]),
        ({"hidden_size": 0}, ["hidden_size", ">= 1", "got 0"]),
        ({"head_dim": True}, ["head_dim", "True"]),
        ({"num_kv_shared_layers": -1}, ["num_kv_shared_layers", ">= 0"]),
        ({"num_kv_shared_layers": 13}, ["num_kv_shared_layers", "at most", "12"]),
        ({"attention_k_eq_v": 1}, ["attention_k_eq_v", "true or false"]),
        ({"rms_norm_eps": "1e-6"}, ["rms_norm_eps", "number above 0"]),
        ({"final_logit_softcapping": math.nan}, ["final_logit_softcapping", "nan"]),
        ({"layer_types": [FULL]}, ["layer_types", "list of 12"]),
        ({"layer_types": ["linear"] * 12}, ["layer_types[0]", "'linear'", SLIDING]),
        ({"rope_parameters": []}, ["rope_parameters", "object"]),
        ({"rope_parameters": {FULL: {}}}, [f"rope_parameters.{FULL}", "rope_theta"]),
        ({"num_key_value_heads": 7}, ["num_key_value_heads", "divisor", "16"]),
        ({"num_global_key_value_heads": 3}, ["num_global_key_value_heads", "divisor"]),
        ({"num_global_key_value_heads": "4"}, ["num_global_key_value_heads", "'4'"]),
        ({"hidden_activation": "silu"}, ["hidden_activation", "gelu", "'silu'"]),
        ({"use_bidirectional_attention": "all"}, ["bidirectional", "'vision'"]),
        ({"per_layer_config": []}, ["per_layer_config", "object"]),
        ({"per_layer_config": {"x": {}}}, ["per_layer_config", "'x'"]),
        ({"per_layer_config": {"5": {"head_dim": 32}}}, ["every full layer"]),
        ({"per_layer_config": {"99": {}}}, ["per_layer_config"]),
        (
            {"per_layer_config": {"0": {"head_dim": 8}}},
            ["per_layer_config[0].head_dim"],
        ),
        ({"per_layer_config": {"5": {"head_dim": "x"}}}, ["head_dim", "'x'"]),
        ({"per_layer_config": {"5": {"new": 1}}}, ["per_layer_config[5].new"]),
        (
            {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 8},
            ["moe_intermediate_size", "got nothing"],
        ),
        (
            {
                "enable_moe_block": True,
                "num_experts": 4,
                "top_k_experts": 8,
                "moe_intermediate_size": 8,
            },
            ["top_k_experts", "num_experts (4)", "got 8"],
        ),
    ],
)
def test_a_wrong_setting_is_named(change, words):
    config = read("31b", "target")
    config["text_config"].update(change)
    fails(lambda: normalised(config), *words)


def test_a_config_without_text_settings_is_refused():
    fails(lambda: normalised({"model_type": "gemma4"}), "text_config", "got nothing")


@pytest.mark.parametrize("model_type", ["gemma3", None, ["gemma4"], "llama"])
def test_a_foreign_model_type_names_the_published_ids(model_type):
    config = {"model_type": model_type}
    source = "here/config.json"

    def call():
        check_model_type(config, TARGET_MODEL_TYPES, source=source)

    fails(call, "model_type", repr(model_type), "gemma4_unified", "gemma-4-31B-it")


def test_swapped_roles_are_told():
    drafter, target = read("e2b", "drafter"), read("e2b", "target")
    source = "here/config.json"
    message = fails(
        lambda: check_model_type(drafter, TARGET_MODEL_TYPES, source=source),
        "an MTP drafter",
    )
    assert "google/gemma-4-E2B-it," in message
    fails(
        lambda: DrafterConfig.from_dict(target, source=source),
        "'gemma4'",
        "is no drafter",
        "google/gemma-4-E2B-it-assistant",
    )


@pytest.mark.parametrize("num_shared", [10, 6])
def test_a_target_needs_its_own_keys_and_values_of_each_type(num_shared):
    config = read("e2b", "target")  # four sliding layers and a full one, twice
    config["text_config"]["num_kv_shared_layers"] = num_shared
    settings = normalised(config)
    fails(
        lambda: check_target(settings, source="here/config.json"),
        "num_kv_shared_layers",
        str(num_shared),
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_drafter_config(family):
    raw = read(family, "drafter")
    config = DrafterConfig.from_dict(raw, source="here/config.json")
    assert config == DrafterConfig.from_dict(
        read(family, "drafter", "config.resaved.json")
    )
    assert config.use_ordered_embeddings == (family in ("e2b", "e4b"))
    assert config.text_config["num_kv_shared_layers"] == 4
    assert config.backbone_hidden_size == raw["backbone_hidden_size"]


def test_drafter_without_the_optional_keys():
    raw = read("31b", "drafter")  # its centroid settings divide nothing: no such head
    del raw["use_ordered_embeddings"], raw["text_config"]["num_kv_shared_layers"]
    config = DrafterConfig.from_dict(raw)
    assert config.use_ordered_embeddings is False
    assert config.text_config["num_kv_shared_layers"] == 4


@pytest.mark.parametrize(
    ("change", "text_change", "words"),
    [
        ({"num_centroids": 48}, {}, ["num_centroids", "divisor", "512", "48"]),
        ({"num_centroids": 0}, {}, ["num_centroids", ">= 1"]),
        ({"centroid_intermediate_top_k": 33}, {}, ["top_k", "num_centroids (32)"]),
        ({"backbone_hidden_size": "x"}, {}, ["backbone_hidden_size", "'x'"]),
        ({"use_ordered_embeddings": "yes"}, {}, ["use_ordered_embeddings", "'yes'"]),
        ({"tie_word_embeddings": False}, {}, ["tie_word_embeddings", "True"]),
        ({}, {"num_kv_shared_layers": 2}, ["num_kv_shared_layers", "must be 4"]),
        ({}, {"hidden_size_per_layer_input": 8}, ["hidden_size_per_layer_input"]),
        ({}, {"use_double_wide_mlp": True}, ["use_double_wide_mlp", "False"]),
    ],
)
def test_a_setting_no_drafter_has_is_named(change, text_change, words):
    raw = read("e2b", "drafter")
    raw.update(change)
    raw["text_config"].update(text_change)
    fails(lambda: DrafterConfig.from_dict(raw, source="here/config.json"), *words)


def test_sampling_defaults_are_greedy():
    params = SamplingParams()
    assert (params.temp, params.top_p, params.top_k, params.min_p) == (0, 1, 0, 0)
    assert params.seed is None


@pytest.mark.parametrize(
    "valid",
    [
        {"temp": 1, "top_p": 0, "top_k": 64, "min_p": 1.0, "seed": 0},
        {"top_p": 1, "seed": 2**64 - 1},
    ],
)
def test_sampling_range_ends_are_valid(valid):
    SamplingParams(**valid)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temp", -0.1),
        ("temp", math.inf),
        ("temp", math.nan),
        ("temp", "1"),
        ("temp", True),
        ("top_p", 1.01),
        ("top_p", -0.5),
        ("top_k", -1),
        ("top_k", 1.0),
        ("top_k", 2**31),
        ("top_k", True),
        ("min_p", 2),
        ("min_p", None),
        ("seed", -1),
        ("seed", 2**64),
        ("seed", 1.5),
        ("temp", 10**400),
        ("xtc_probability", -0.1),
        ("xtc_probability", 1.1),
        ("xtc_probability", math.nan),
        ("xtc_probability", True),
        ("xtc_threshold", -0.1),
        ("xtc_threshold", 0.51),
        ("xtc_threshold", None),
        ("xtc_special_tokens", 5),
        ("xtc_special_tokens", None),
        ("xtc_special_tokens", "12"),
    ],
)
def test_a_sampling_setting_out_of_range_is_named(name, value):
    found = repr(value)[:77]  # what is longer is cut
    with pytest.raises(RequestError, match=f"^{name} must be .*: got {found}") as error:
        SamplingParams(**{name: value})
    assert str(error.value).endswith(". Leave it out for the default.")


@pytest.mark.parametrize("token", [-1, 2**31, 1.0, True, "1", None, [1]])
def test_a_special_token_out_of_range_is_named(token):
    words = "^xtc_special_tokens must be token ids, from 0 to 2.*31-1: got "
    with pytest.raises(RequestError, match=words + re.escape(repr(token))):
        SamplingParams(xtc_special_tokens=[5, token])


@pytest.mark.parametrize("kind", [list, tuple, iter, np.array, mx.array])
def test_special_tokens_are_any_sequence_of_ids(kind):
    params = SamplingParams(xtc_special_tokens=kind([7, 5]))
    assert params == SamplingParams(xtc_special_tokens=(7, 5))
    assert params.xtc_special_tokens == (7, 5)
    assert {params: 1}[SamplingParams(xtc_special_tokens=[7, 5])]


def test_a_number_of_thousands_of_digits():
    with pytest.raises(RequestError, match="got a number of thousands of digits"):
        SamplingParams(temp=10**5000)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner)
    ),
    max_leaves=5,
)


@given(st.data())
def test_any_value_of_any_key_is_read_or_refused(data):
    role = data.draw(st.sampled_from(["target", "drafter"]))
    config = read("31b", role, "config.resaved.json")
    place = data.draw(st.sampled_from([config, config["text_config"]]))
    place[data.draw(st.sampled_from(sorted(place)))] = data.draw(JSON)
    try:
        text_config(config, source="here/config.json")
        if role == "drafter":
            DrafterConfig.from_dict(config)
    except CheckpointError as error:
        lines = str(error).splitlines()
    else:
        lines = ["read"]
    assert len(lines) == 1


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope_theta", -1),
        ("rope_theta", 10**400),
        ("rope_theta", "10000"),
        ("partial_rotary_factor", 0),
        ("partial_rotary_factor", 1e9),  # a table of gigabytes
        ("partial_rotary_factor", True),
    ],
)
def test_rope_numbers_that_make_no_table(key, value):
    entry = {"rope_type": "proportional", "rope_theta": 1e6, key: value}
    text = {"rope_parameters": {"full_attention": entry}}
    config = {"model_type": "gemma4", "text_config": text}
    fails(lambda: text_config(config, source="here/config.json"), key)


def test_numbers_that_no_model_has():
    for key in ("num_hidden_layers", "hidden_size"):
        config = {"model_type": "gemma4", "text_config": {key: 10**10}}
        fails(lambda c=config: text_config(c, source="here/config.json"), key)


def test_values_that_python_cannot_write_are_shown_all_the_same():
    nested: list[object] = []
    for _ in range(100_000):
        nested = [nested]
    assert shorten(nested) == "something nested too deeply"
    assert shorten([10**5000]) == "a number of thousands of digits"
    assert len(shorten("x" * 1000)) == 80
