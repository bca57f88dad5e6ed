"""What tells the caches of one target from those of another.

Run: python -m pytest tests/generation/test_prompt_folder.py
"""

from __future__ import annotations

import json
import os

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_gemma_mtp.generation.prompt_folder import target_identity
from mlx_gemma_mtp.pair.load import attach_drafter, load, load_pair
from mlx_gemma_mtp.pair.pair import Pair, pair_of
from tests.tiny import model_folder, new_pair

LORA = {"rank": 2, "scale": 20.0, "dropout": 0.0}


def identity(pair):
    """As it is hashed."""
    return json.dumps(target_identity(pair), sort_keys=True)


@pytest.fixture
def folder(tmp_path):
    """A checkpoint that may be changed."""
    return model_folder(tmp_path / "folder")


def test_one_model_is_itself(folder, tmp_path):
    known = identity(load_pair(folder, False))
    assert identity(load_pair(folder)) == known  # of the drafter nothing is kept
    model, _ = load(folder)
    assert identity(pair_of(model)) == known
    link = tmp_path / "link"
    link.symlink_to(folder)
    assert identity(load_pair(link, False)) == known
    attach_drafter(model, folder)
    assert identity(pair_of(model)) == known


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rope_theta", 123.0),
        ("rms_norm_eps", 1e-2),
        ("final_logit_softcapping", 15.0),
        ("sliding_window", 8),
    ],
)
def test_another_config_of_the_same_weights(folder, name, value):
    known = identity(load_pair(folder, False))
    config = json.loads((folder / "config.json").read_text())
    text = config["text_config"]
    if name == "rope_theta":
        text["rope_parameters"]["sliding_attention"][name] = value
    else:
        assert text[name] != value
        text[name] = value
    (folder / "config.json").write_text(json.dumps(config))
    assert identity(load_pair(folder, False)) != known


def test_a_change_in_a_file_that_no_sample_sees(folder):
    known = target_identity(load_pair(folder, False))
    file = folder / "model.safetensors"
    before = file.stat().st_mtime_ns
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(before + 1, before + 1))
    other = target_identity(load_pair(folder, False))
    assert other["pair"] == known["pair"]
    assert other != known


def adapters(folder, path, **changes):
    """Write adapters of one seed."""
    path.mkdir()
    lora = {**LORA, **changes}
    config = {"num_layers": 2, "lora_parameters": lora}
    (path / "adapter_config.json").write_text(json.dumps(config))
    mx.random.seed(0)
    target = load_pair(folder, False).target
    target.freeze()
    linear_to_lora_layers(target, 2, lora)
    arrays = dict(tree_flatten(target.trainable_parameters()))
    mx.save_safetensors(str(path / "adapters.safetensors"), arrays)
    for file in path.iterdir():
        os.utime(file, ns=(1, 1))
    return path


def test_adapters_and_their_scale(folder, tmp_path):
    """The scale is in no array."""
    paths = [adapters(folder, tmp_path / str(s), scale=s) for s in (10.0, 30.0)]
    found = [
        target_identity(pair_of(load(folder, adapter_path=path)[0]))
        for path in (None, *map(str, paths))
    ]
    assert len({json.dumps(each, sort_keys=True) for each in found}) == 3
    assert found[1]["pair"] == found[2]["pair"]
    assert found[1]["files"] == found[2]["files"]
    assert [len(each["files"]) for each in found] == [1, 3, 3]


def test_models_in_memory():
    first, second = (Pair(new_pair().target) for _ in range(2))
    known = identity(first)
    assert target_identity(first)["files"] == ()
    assert identity(second) == known
    norms = dict(second.target.named_modules())
    norm = next(norms[path] for path in norms if path.endswith("input_layernorm"))
    assert isinstance(norm, nn.RMSNorm)
    norm.eps *= 2
    assert identity(second) != known
