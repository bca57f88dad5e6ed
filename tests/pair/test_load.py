"""Loading: every family, layout and naming; quantized ones; misfits; drafters found.

Run: python -m pytest tests/pair/test_load.py
"""

import dataclasses
import json
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import gemma4, gemma4_text

from mlx_gemma_mtp.checkpoints.checkpoint import open_checkpoint
from mlx_gemma_mtp.checkpoints.weights import load_drafter, load_target
from mlx_gemma_mtp.constants import FULL, SLIDING
from mlx_gemma_mtp.errors import CheckpointError, PairingError
from mlx_gemma_mtp.models.drafter import Drafter
from mlx_gemma_mtp.models.target import text_model
from mlx_gemma_mtp.pair.load import (
    attach_drafter,
    check_fit,
    embedded_pair_path,
    eos_token_ids,
    load,
    load_pair,
)
from mlx_gemma_mtp.pair.pair import pair_of

REFERENCE = Path(__file__).parents[1] / "data" / "reference"
FAMILIES = ("e2b", "e4b", "12b", "26b-a4b", "31b")
CENTROIDS = "masked_embedding.centroids.weight"
ORDERING = "masked_embedding.token_ordering"


def copy(source, folder):
    """Copy a checkpoint's files (read-only in some checkouts) to change them."""
    folder.mkdir(parents=True)
    for path in (REFERENCE / source).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    text = changes.pop("text", {})
    config.update(changes)
    config.get("text_config", {}).update(text)
    (folder / "config.json").write_text(json.dumps(config))


def read_weights(folder) -> Any:  # typed as whatever any kind of file can hold
    return mx.load(str(folder / "model.safetensors"))


def edit_weights(folder, change):
    """Rewrite the weights as ``change`` of them, a dictionary by name."""
    weights = change({k: mx.array(v) for k, v in read_weights(folder).items()})
    mx.eval(weights)
    mx.save_safetensors(str(folder / "model.safetensors"), weights)


def parameters(model):
    return dict(tree_flatten(model.parameters()))


def equal(model, other):
    ours, theirs = parameters(model), parameters(other)
    assert set(ours) == set(theirs)
    return all(mx.array_equal(ours[name], theirs[name]) for name in ours)


def fails(call, *words, error=CheckpointError):
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert " must be " in message
    for word in words:
        assert str(word) in message
    return message


@pytest.fixture
def hub(monkeypatch):
    """The Hub's client, replaced; it knows the repositories put into it."""
    repositories: dict[str, Path] = {}

    def snapshot_download(repo, **options):
        if repo not in repositories:
            raise ConnectionError("no network in tests")
        return repositories[repo]

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return repositories


@pytest.fixture
def pair_folder(tmp_path):
    """A target with tokenizer, and its drafter in ``drafter/``."""
    folder = copy("e2b/target", tmp_path / "pair")
    copy("e2b/drafter", folder / "drafter")
    add_tokenizer(folder)
    return folder


def add_tokenizer(folder):
    vocab = {"<pad>": 0, "</s>": 1, "<bos>": 2, "<unk>": 3, "a": 4}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"},
        "pre_tokenizer": {"type": "Whitespace"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


# Targets


@pytest.mark.parametrize("family", FAMILIES)
def test_both_layouts_build_the_same_target(family, tmp_path):
    published = load_target(REFERENCE / family / "target")
    assert isinstance(published, gemma4.Model)
    folder = copy(f"{family}/target", tmp_path / "resaved")
    shutil.move(folder / "config.resaved.json", folder / "config.json")
    resaved = load_target(folder)
    assert equal(published, resaved)
    assert published.language_model.args == resaved.language_model.args


def test_shards_load_as_the_single_file_does(tmp_path):
    folder = copy("26b-a4b/target", tmp_path / "sharded")
    weights = read_weights(folder)
    names = sorted(weights)
    shards = [names[::3], names[1::3], names[2::3]]
    weight_map = {}
    for i, shard in enumerate(shards, start=1):
        file = f"model-{i:05d}-of-00003.safetensors"
        mx.save_safetensors(str(folder / file), {name: weights[name] for name in shard})
        weight_map.update(dict.fromkeys(shard, file))
    del weights
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert equal(load_target(folder), load_target(REFERENCE / "26b-a4b" / "target"))
    (folder / "model-00002-of-00003.safetensors").unlink()
    fails(lambda: load_target(folder), "model-00002-of-00003.safetensors", "no such")


def test_mlx_naming_and_parts_that_text_does_not_use(tmp_path):
    """The prefix of mlx conversions, towers, unused K/V, a copy of the tied head."""
    folder = copy("e2b/target", tmp_path / "mlx")

    def rename(weights):
        old, new = "model.language_model.", "language_model.model."
        weights = {name.replace(old, new): w for name, w in weights.items()}
        last = f"{new}layers.9.self_attn"  # a layer that shares its K/V
        weights[f"{last}.k_proj.weight"] = mx.zeros((32, 64))
        weights[f"{last}.v_proj.weight"] = mx.zeros((32, 64))
        weights[f"{last}.k_norm.weight"] = mx.zeros((32,))
        weights["language_model.lm_head.weight"] = weights[f"{new}embed_tokens.weight"]
        for tower in ("vision_embedder", "audio_tower", "embed_audio"):
            weights[f"{tower}.weight"] = mx.zeros((2,))
        return weights

    edit_weights(folder, rename)
    assert equal(load_target(folder), load_target(REFERENCE / "e2b" / "target"))


@pytest.mark.parametrize("model_type", ["gemma4_text", "gemma4_unified_text"])
def test_a_text_only_checkpoint(tmp_path, model_type):
    family = "31b" if model_type == "gemma4_text" else "12b"
    folder = copy(f"{family}/target", tmp_path / "text")
    config = json.loads((folder / "config.json").read_text())["text_config"]
    (folder / "config.json").write_text(
        json.dumps({**config, "model_type": model_type})
    )
    prefix = "model.language_model."
    edit_weights(
        folder,
        lambda weights: {
            name.replace(prefix, "model."): w
            for name, w in weights.items()
            if name.startswith(prefix)
        },
    )
    model = load_target(folder)
    assert isinstance(model, gemma4_text.Model)
    assert not isinstance(model, gemma4.Model)
    whole = load_target(REFERENCE / family / "target")
    assert equal(model, whole.language_model)


def test_lazy_leaves_the_weights_alone():
    folder = REFERENCE / "e2b" / "target"
    assert equal(load_target(folder, lazy=True), load_target(folder))


def quantize(source, folder, load_one, predicate):
    """Save a checkpoint as mlx-lm's converter does, each tensor as told."""
    config = json.loads((REFERENCE / source / "config.json").read_text())
    model, config = mlx_lm.utils.quantize_model(
        load_one(REFERENCE / source), config, 32, 4, quant_predicate=predicate
    )
    mlx_lm.utils.save_model(folder, model)
    mlx_lm.utils.save_config(config, folder / "config.json")
    return model


def mixed_bits(path, module):
    if "down_proj" in path or "centroids" in path:
        return False
    if "embed_tokens" in path:
        return {"bits": 8, "group_size": 32, "mode": "affine"}
    return True


@pytest.mark.parametrize("family", ["e2b", "26b-a4b"])
def test_a_quantized_target_keeps_the_bits_of_each_tensor(family, tmp_path):
    saved = quantize(f"{family}/target", tmp_path, load_target, mixed_bits)
    loaded = load_target(tmp_path)
    assert equal(saved, loaded)
    layer = loaded.layers[0]
    assert loaded.language_model.model.embed_tokens.bits == 8
    assert layer.self_attn.q_proj.bits == 4
    assert type(layer.mlp.down_proj) is nn.Linear


def test_a_quantized_target_whose_config_lost_the_map(tmp_path):
    saved = quantize("31b/target", tmp_path, load_target, mixed_bits)
    edit_config(tmp_path, quantization=None, quantization_config=None)
    assert equal(saved, load_target(tmp_path))


PREFIX = "model.language_model."
PREFIXES = ("language_model.model.", "model.", "", "model.language_model.model.")


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("family", ["e2b", "26b-a4b"])
def test_every_prefix_is_the_same_target(family, prefix, tmp_path):
    folder = copy(f"{family}/target", tmp_path / "renamed")
    edit_weights(
        folder,
        lambda weights: {
            name.replace(PREFIX, prefix, 1): array for name, array in weights.items()
        },
    )
    assert equal(load_target(folder), load_target(REFERENCE / family / "target"))


@pytest.mark.parametrize("is_text_only", [False, True])
@pytest.mark.parametrize(
    "head", ["lm_head.", "language_model.lm_head.", "model.language_model.lm_head."]
)
def test_a_head_of_its_own(head, is_text_only, tmp_path):
    """In the names of transformers it stands beside the model, not in it."""
    folder = copy("12b/target", tmp_path / "untied")
    edit_weights(
        folder,
        lambda weights: {
            **weights,
            f"{head}weight": weights[f"{PREFIX}embed_tokens.weight"] * 2,
        },
    )
    edit_config(folder, tie_word_embeddings=False)
    if is_text_only:
        config = json.loads((folder / "config.json").read_text())
        config = {**config["text_config"], "model_type": "gemma4_unified_text"}
        config["tie_word_embeddings"] = False
        (folder / "config.json").write_text(json.dumps(config))
    untied = text_model(load_target(folder))
    tied = text_model(load_target(REFERENCE / "12b" / "target"))
    hidden = mx.ones((1, 1, untied.args.hidden_size))
    assert mx.array_equal(untied.lm_head.weight, tied.model.embed_tokens.weight * 2)
    assert mx.allclose(
        untied.lm_head(hidden), tied.model.embed_tokens.as_linear(hidden) * 2, 1e-2
    )


def drop(name):
    return lambda weights: {k: w for k, w in weights.items() if k != name}


def put(name, array):
    return lambda weights: {**weights, name: array}


LAST = "model.language_model.layers.11.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop(LAST), ["Missing 1 parameters", "layers.11.self_attn.q_proj.weight"]),
        (put("model.language_model.new", mx.zeros((1,))), ["language_model.model.new"]),
        (put(LAST, mx.zeros((2, 2))), ["(2, 2)", "layers.11.self_attn.q_proj.weight"]),
        (
            lambda weights: {LAST: weights[LAST]},
            ["Missing 167 parameters", "and 163 more"],
        ),
    ],
)
def test_tensors_that_do_not_agree_with_the_config(tmp_path, change, words):
    folder = copy("31b/target", tmp_path / "target")
    edit_weights(folder, change)
    message = fails(lambda: load_target(folder), folder, *words)
    assert len(message) < 1000


def test_wrong_roles():
    fails(lambda: load_target(REFERENCE / "e2b" / "drafter"), "an MTP drafter")
    fails(lambda: load_drafter(REFERENCE / "e2b" / "target"), "is no drafter")


def test_a_model_never_runs_code_of_its_checkpoint(tmp_path):
    folder = copy("e2b/target", tmp_path / "code")
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    edit_config(folder, model_file="evil.py")
    assert equal(load_target(folder), load_target(REFERENCE / "e2b" / "target"))


def test_a_path_that_mlx_lm_would_take_for_a_pattern(tmp_path):
    folder = copy("e2b/target", tmp_path / "gemma[4]")
    fails(lambda: load_target(folder), "gemma[4]", "Rename")


# Drafters


@pytest.mark.parametrize("family", FAMILIES)
def test_both_layouts_build_the_same_drafter(family, tmp_path):
    published = load_drafter(REFERENCE / family / "drafter")
    folder = copy(f"{family}/drafter", tmp_path / "resaved")
    shutil.move(folder / "config.resaved.json", folder / "config.json")
    resaved = load_drafter(folder)
    assert equal(published, resaved)
    assert published.config == resaved.config
    assert published.config.use_ordered_embeddings == (family in ("e2b", "e4b"))
    if published.masked_embedding is not None:
        assert published.masked_embedding.token_ordering.dtype == mx.int32


@pytest.mark.parametrize(
    "quantization",
    [
        ...,  # as mlx-lm wrote it
        None,
        {"bits": 4, "group_size": 64},
        {"bits": 2, "group_size": 64, "model.embed_tokens": False},
    ],
)
def test_a_quantized_drafter_is_read_as_its_tensors_say(tmp_path, quantization):
    saved = quantize("e2b/drafter", tmp_path, load_drafter, mixed_bits)
    if quantization is not ...:
        edit_config(
            tmp_path, quantization=quantization, quantization_config=quantization
        )
    loaded = load_drafter(tmp_path)
    assert equal(saved, loaded)
    assert loaded.model.embed_tokens.bits == 8
    assert loaded.pre_projection.bits == 4
    assert type(loaded.model.layers[0].mlp.down_proj) is nn.Linear
    assert loaded.masked_embedding is not None
    assert type(loaded.masked_embedding.centroids) is nn.Linear


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
def test_a_drafter_in_a_floating_point_mode(tmp_path, mode):
    drafter = load_drafter(REFERENCE / "31b" / "drafter")
    nn.quantize(
        drafter,
        group_size=16 if mode == "nvfp4" else 32,
        bits=8 if mode == "mxfp8" else 4,
        mode=mode,
    )
    mlx_lm.utils.save_model(tmp_path, drafter)
    shutil.copy(REFERENCE / "31b" / "drafter" / "config.json", tmp_path)
    loaded = load_drafter(tmp_path)
    assert equal(drafter, loaded)
    assert loaded.post_projection.mode == mode


@pytest.mark.parametrize(
    ("family", "config", "change", "words"),
    [
        ("e2b", {}, drop(CENTROIDS), [CENTROIDS, "must be there", "True"]),
        ("e2b", {}, drop(ORDERING), [ORDERING, "no such tensor"]),
        (
            "e2b",
            {"use_ordered_embeddings": False},
            dict,
            [CENTROIDS, "must be absent", "False"],
        ),
        ("31b", {"use_ordered_embeddings": True, "num_centroids": 32}, dict, ["True"]),
        ("e2b", {}, put(ORDERING, mx.zeros((512,), mx.int64)), [ORDERING, "order"]),
        ("e2b", {}, put(ORDERING, mx.arange(1, 513)), [ORDERING, "order"]),
        ("e2b", {}, put(ORDERING, mx.arange(8)), [ORDERING, "order"]),
        ("e2b", {}, drop("model.norm.weight"), ["Missing 1", "model.norm.weight"]),
        ("e2b", {}, put("model.new", mx.zeros((1,))), ["model.new"]),
        ("e2b", {}, put("pre_projection.scales", mx.zeros((1, 1))), ["pre_projection"]),
        ("31b", {"text": {"hidden_size": 128}}, dict, ["(512, 64)", "embed_tokens"]),
    ],
)
def test_drafter_tensors_that_do_not_agree_with_the_config(
    tmp_path, family, config, change, words
):
    folder = copy(f"{family}/drafter", tmp_path / "drafter")
    edit_weights(folder, change)
    edit_config(folder, **config)
    fails(lambda: load_drafter(folder), folder, *words)


# Pairs


@pytest.fixture(scope="module")
def target_31b():
    return load_target(REFERENCE / "31b" / "target", lazy=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_drafter_fits_its_own_target_only(family, target_31b):
    drafter = load_drafter(REFERENCE / family / "drafter")
    check_fit(load_target(REFERENCE / family / "target", lazy=True), drafter)
    if family not in ("31b", "12b"):  # the 12B's target has the 31B's width here
        fails(
            lambda: check_fit(target_31b, drafter),
            "hidden size",
            "expected 96",
            error=PairingError,
        )


@pytest.mark.parametrize(
    ("text", "width", "words"),
    [
        ({}, 64, ["hidden size", "got 64", "expected 96"]),
        ({"vocab_size": 640}, 96, ["vocabulary", "got 640", "expected 512"]),
        ({"num_key_value_heads": 4}, 96, [f"K/V heads in {SLIDING}", "got 4"]),
        ({"num_global_key_value_heads": 8}, 96, [f"K/V heads in {FULL}", "got 8"]),
        ({"head_dim": 8}, 96, [f"head width in {SLIDING}", "got 8"]),
        ({"global_head_dim": 64}, 96, [f"head width in {FULL}", "got 64"]),
        ({"sliding_window": 24}, 96, ["sliding window", "got 24", "expected 16"]),
    ],
)
def test_a_drafter_that_does_not_fit(target_31b, text, width, words):
    own = load_drafter(REFERENCE / "31b" / "drafter").config
    config = dataclasses.replace(
        own,
        backbone_hidden_size=width,
        text_config={**own.text_config, **text},
    )
    drafter = Drafter(config)
    fails(
        lambda: check_fit(target_31b, drafter),
        *words,
        "made for this target",
        error=PairingError,
    )


def test_a_target_without_the_layers_a_drafter_reads():
    args = {
        **load_drafter(REFERENCE / "31b" / "drafter").config.text_config,
        "layer_types": [FULL, FULL, FULL, FULL],
        "num_kv_shared_layers": 0,
        "hidden_size": 5376,
        "intermediate_size": 8,
    }
    target = gemma4_text.Model(gemma4_text.ModelArgs.from_dict(args))
    config = load_drafter(REFERENCE / "31b" / "drafter").config
    drafter = Drafter(dataclasses.replace(config, backbone_hidden_size=5376))
    fails(
        lambda: check_fit(target, drafter),
        f"K/V source for {SLIDING}",
        "made for this target",
        error=PairingError,
    )
    drafter = load_drafter(REFERENCE / "e2b" / "drafter")
    fails(
        lambda: check_fit(target, drafter),
        "hidden size",
        "google/gemma-4-31B-it-assistant",
        error=PairingError,
    )


def test_a_target_of_another_family():
    drafter = load_drafter(REFERENCE / "e2b" / "drafter")
    fails(lambda: check_fit(nn.Linear(2, 2), drafter), "Gemma 4", error=PairingError)


def test_load_pair_takes_what_is_named(hub):
    folder = REFERENCE / "e2b"
    pair = load_pair(folder / "target", folder / "drafter")
    assert isinstance(pair.target, gemma4.Model)
    assert pair.drafter is not None
    assert set(pair.eos_token_ids) == {1, 106}
    assert str(folder / "drafter") in pair.drafter_source
    assert "as named" in pair.drafter_source
    fails(
        lambda: load_pair(folder / "target", REFERENCE / "31b" / "drafter"),
        "hidden size",
        "drafter_path=False",
        error=PairingError,
    )
    plain = load_pair(str(folder / "target"), drafter_path=False)
    assert plain.drafter is None
    assert "drafter_path is False" in plain.drafter_source


@pytest.mark.parametrize("place", ["inside", "beside", "on the Hub", "nowhere"])
def test_load_pair_finds_the_drafter_that_load_finds(place, hub, pair_folder, caplog):
    caplog.set_level(logging.INFO, logger="mlx_gemma_mtp")
    drafter, target = pair_folder / "drafter", str(pair_folder)
    if place == "beside":
        drafter.rename(pair_folder.with_name(f"{pair_folder.name}-assistant"))
    if place == "on the Hub":
        target = "google/gemma-4-E2B-it"
        hub[target] = pair_folder
        hub["google/gemma-4-E2B-it-assistant"] = drafter.rename(
            pair_folder.with_name("elsewhere")
        )
    if place == "nowhere":
        shutil.rmtree(drafter)
    pair, (model, _) = load_pair(target), load(target)
    assert pair.drafter_source == pair_of(model).drafter_source
    assert (pair.drafter is None) == (place == "nowhere")
    assert (pair_of(model).drafter is None) == (place == "nowhere")
    assert caplog.text.count(pair.drafter_source) == 2


def test_load_pair_takes_hub_ids(hub):
    hub["google/gemma-4-E2B-it"] = REFERENCE / "e2b" / "target"
    hub["me/drafter"] = REFERENCE / "e2b" / "drafter"
    pair = load_pair("google/gemma-4-E2B-it", "me/drafter")
    assert pair.target_source == "google/gemma-4-E2B-it"
    fails(lambda: load_pair("google/gemma-4-9b-it"), "google/gemma-4-31B-it")


def test_without_arguments_it_is_the_embedded_pair(pair_folder, monkeypatch):
    assert embedded_pair_path().parts[-2:] == ("mlx_gemma_mtp", "embedded")
    module = sys.modules[load.__module__]
    monkeypatch.setattr(module, "embedded_pair_path", lambda: pair_folder)
    pair = load_pair()
    assert pair.drafter is not None
    assert pair.target_source == str(pair_folder)


# The public function


def test_load_finds_the_drafter_and_says_so(hub, pair_folder, caplog):
    caplog.set_level(logging.INFO, logger="mlx_gemma_mtp")
    model, tokenizer = load(pair_folder)
    pair = pair_of(model)
    assert pair.target is model
    assert pair.drafter is not None
    assert str(pair_folder / "drafter") in pair.drafter_source
    assert pair.drafter_source in caplog.text
    assert set(tokenizer.eos_token_ids) == {1, 106}


def test_load_can_return_the_config_as_mlx_lm_does(pair_folder):
    _, _, config = load(pair_folder, speculative_decoding=False, return_config=True)
    assert config == mlx_lm.utils.load_config(pair_folder)
    assert config["eos_token_id"] == [1, 106]


def test_load_without_speculative_decoding(pair_folder):
    model, _ = load(str(pair_folder), speculative_decoding=False)
    pair = pair_of(model)
    assert pair.drafter is None
    assert "switched off" in pair.drafter_source


def test_load_goes_on_without_a_drafter_and_warns(hub, pair_folder, caplog):
    shutil.rmtree(pair_folder / "drafter")
    model, _ = load(pair_folder)
    pair = pair_of(model)
    assert pair.drafter is None
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert pair.drafter_source in record.getMessage()
    assert "--draft-model" in pair.drafter_source


def test_load_takes_the_published_drafter_from_the_hub(hub, pair_folder):
    shutil.rmtree(pair_folder / "drafter")
    hub["google/gemma-4-E2B-it"] = pair_folder
    hub["google/gemma-4-E2B-it-assistant"] = REFERENCE / "e2b" / "drafter"
    model, _ = load("google/gemma-4-E2B-it")
    assert "google/gemma-4-E2B-it-assistant" in pair_of(model).drafter_source
    del hub["google/gemma-4-E2B-it-assistant"]
    model, _ = load("google/gemma-4-E2B-it")
    source = pair_of(model).drafter_source
    assert pair_of(model).drafter is None
    assert "google/gemma-4-E2B-it-assistant" in source
    assert "\n" not in source


def test_a_named_drafter_overrides_and_must_be_there(hub, pair_folder):
    model, _ = load(pair_folder, draft_model=REFERENCE / "e2b" / "drafter")
    source = pair_of(model).drafter_source
    assert str(REFERENCE) in source
    assert "as named" in source
    fails(lambda: load(pair_folder, draft_model="google/gemma-4-9b-it-assistant"))


def test_a_named_drafter_that_does_not_fit_is_an_error(hub, pair_folder):
    other = REFERENCE / "31b" / "drafter"
    fails(
        lambda: load(pair_folder, draft_model=other),
        "hidden size",
        "speculative_decoding=False",
        "--no-draft",
        error=PairingError,
    )


def exchange(folder):
    shutil.rmtree(folder)
    copy("31b/drafter", folder)


def cut_off(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def break_config(folder):
    (folder / "config.json").write_text("{")


def pack_elsewhere(folder):
    name = "model.layers.0.mlp.up_proj"
    edit_weights(folder, put(f"{name}.weight_packed", mx.zeros((4, 4), mx.int32)))


def lose_a_tensor(folder):
    edit_weights(folder, drop("model.norm.weight"))


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (exchange, "hidden size"),
        (cut_off, "cut off"),
        (break_config, "JSON"),
        (pack_elsewhere, "compressed-tensors"),
        (lose_a_tensor, "model.norm.weight"),
    ],
)
def test_a_found_drafter_that_cannot_be_used_ends_no_load(
    hub, pair_folder, caplog, spoil, word
):
    expected, _ = load(pair_folder, speculative_decoding=False)
    spoil(pair_folder / "drafter")
    named: dict[str, Any] = {"draft_model": pair_folder / "drafter"}
    for call in (
        lambda: load(pair_folder)[0],
        lambda: attached(load_target(pair_folder), pair_folder),
    ):
        caplog.clear()
        model = call()
        assert pair_of(model).drafter is None
        assert equal(model, expected)
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        message = record.getMessage()
        assert message == pair_of(model).drafter_source
        assert "decoding without a drafter" in message
        assert "the search" not in message
        assert word in message
        assert "\n" not in message
        assert len(message) < 1000
    with pytest.raises((CheckpointError, PairingError), match=word):
        load(pair_folder, **named)
    with pytest.raises((CheckpointError, PairingError), match=word):
        attach_drafter(load_target(pair_folder), pair_folder, **named)


def attached(target, folder):
    attach_drafter(target, folder)
    return target


def test_load_without_a_tokenizer(pair_folder):
    (pair_folder / "tokenizer.json").unlink()
    fails(lambda: load(pair_folder), "the tokenizer in", pair_folder, "tokenizer.json")


def test_load_with_adapters_that_are_not_there(pair_folder, tmp_path):
    missing = str(tmp_path / "adapters")
    fails(
        lambda: load(pair_folder, adapter_path=missing),
        "the adapters in",
        missing,
        "adapters.safetensors",
    )


@pytest.mark.parametrize("names", [("config",), ("weights",), ("config", "weights")])
def test_adapters_of_peft_are_named(pair_folder, tmp_path, names):
    folder = tmp_path / "adapters"
    folder.mkdir()
    if "config" in names:
        config = {"peft_type": "LORA", "r": 8, "target_modules": ["q_proj"]}
        (folder / "adapter_config.json").write_text(json.dumps(config))
    if "weights" in names:
        tensors = {"base_model.model.model.layers.0.lora_A.weight": mx.zeros((8, 64))}
        mx.save_safetensors(str(folder / "adapter_model.safetensors"), tensors)
    for call in (
        lambda: load(pair_folder, adapter_path=str(folder)),
        lambda: load(folder),
    ):
        message = fails(call, folder, "PEFT", "merge_and_unload", "mlx_lm.lora")
        assert "again" not in message


def test_adapters_of_mlx_lm_that_are_passed_as_a_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"fine_tune_type": "lora"}')
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), {"a": mx.zeros((1,))})
    fails(lambda: load(tmp_path), tmp_path, "adapters", "adapter_path")


def test_a_name_of_thousands_of_letters_is_cut(hub, pair_folder):
    name = "long" * 5000
    for call in (
        lambda: load(name),
        lambda: load(f"google/{name}"),
        lambda: load(f"~{name}/x"),
        lambda: load(pair_folder, draft_model=name),
        lambda: load(pair_folder, adapter_path=name),
        lambda: load(f"google/{name}-gguf"),
    ):
        assert len(fails(call, "longlong", "...")) < 800


@pytest.mark.parametrize(
    ("generation", "outer", "inner", "expected"),
    [
        ({"eos_token_id": [1, 106]}, {"eos_token_id": 1}, {}, (1, 106)),
        ({"eos_token_id": 0}, {"eos_token_id": 1}, {}, (0, 1)),
        ({}, {"eos_token_id": 7}, {"eos_token_id": 1}, (1, 7)),
        ({}, {}, {"eos_token_id": 1}, (1,)),
        ({"eos_token_id": None}, {}, {}, ()),
    ],
)
def test_end_of_sequence_ids(generation, outer, inner, expected):
    checkpoint = dataclasses.replace(
        open_checkpoint(REFERENCE / "e2b" / "target"),
        config={**outer, "text_config": inner},
        generation_config=generation,
    )
    assert eos_token_ids(checkpoint) == expected


@pytest.mark.parametrize("wrong", ["1", [1, "106"], -1, {}, ["x" * 50] * 2000])
def test_end_of_sequence_ids_that_are_none(wrong):
    checkpoint = dataclasses.replace(
        open_checkpoint(REFERENCE / "e2b" / "target"),
        generation_config={"eos_token_id": wrong},
    )
    message = fails(lambda: eos_token_ids(checkpoint), "eos_token_id", repr(wrong)[:40])
    assert len(message) < 500
