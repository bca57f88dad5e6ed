"""The folder of a trained drafter: that it loads, converts and tells its training.

Run: python -m pytest tests/tune/test_result.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from convert.manifest import read_manifest, read_training
from convert.pipeline import convert, plan_conversion
from convert.request import PartRequest, Request
from mlx_gemma_mtp import load
from mlx_gemma_mtp.checkpoints.checkpoint import open_checkpoint
from mlx_gemma_mtp.checkpoints.find_drafter import find_drafter
from mlx_gemma_mtp.checkpoints.weights import load_drafter
from mlx_gemma_mtp.errors import CheckpointError, OutputError
from mlx_gemma_mtp.models.drafter import Drafter
from mlx_gemma_mtp.pair.load import embedded_pair_path
from mlx_gemma_mtp.pair.pair import pair_of
from mlx_gemma_mtp.tune.fresh import fresh_drafter
from mlx_gemma_mtp.tune.report import result
from mlx_gemma_mtp.tune.report.result import write_drafter
from mlx_gemma_mtp.tune.training.adapters import (
    add_adapters,
    dequantized,
    fuse_adapters,
)
from tests.tiny import FAMILIES, REFERENCE, model_folder, reference_pair

EMBEDDED = embedded_pair_path()
FOLDERS = {family: REFERENCE / family / "drafter" for family in FAMILIES}
FOLDERS["embedded"] = EMBEDDED / "drafter"
RECORD = {"steps": 3, "acceptance_length": {"before": 1.5, "after": 2.5}}
ORDERING = "masked_embedding.token_ordering"


def parameters(module: nn.Module) -> dict[str, mx.array]:
    leaves: Any = tree_flatten(module.parameters())
    return dict(leaves)


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def header(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Each tensor's type and shape."""
    tensors = open_checkpoint(folder).tensors
    return {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}


def write(place: Path, name: str = "12b", **settings: Any) -> Drafter:
    """Write a drafter out as it was read."""
    drafter = load_drafter(FOLDERS[name])
    config = read(FOLDERS[name], "config.json")
    settings = {"training": RECORD, "dtype": mx.float32, **settings}
    write_drafter(place, drafter, config, **settings)
    return drafter


def assert_same(one: nn.Module, other: nn.Module) -> None:
    ours, theirs = parameters(one), parameters(other)
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        assert array.dtype == theirs[name].dtype, name
        assert mx.array_equal(array, theirs[name]), name


@pytest.mark.parametrize("name", FOLDERS)
def test_a_drafter_is_read_back_as_it_was(name, tmp_path):
    dtype = mx.bfloat16 if name == "embedded" else mx.float32
    place = tmp_path / "made"
    drafter = write(place, name, dtype=dtype)
    found = load_drafter(place)
    assert vars(found.config) == vars(drafter.config)
    assert_same(found, drafter)
    assert read(place, "config.json") == read(FOLDERS[name], "config.json")
    assert header(place) == header(FOLDERS[name])
    _, metadata = mx.load(str(place / "model.safetensors"), return_metadata=True)
    assert metadata == {"format": "pt"}
    assert read(place, "training.json") == RECORD
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    assert sorted(path.name for path in place.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "training.json",
    ]


def test_another_type_is_written_and_named(tmp_path):
    place = tmp_path / "made"
    write(place, "e2b", dtype=mx.bfloat16)
    types = {name: dtype for name, (dtype, _) in header(place).items()}
    assert types.pop(ORDERING) == "I64"
    assert set(types.values()) == {"BF16"}
    expected = read(FOLDERS["e2b"], "config.json") | {"dtype": "bfloat16"}
    assert read(place, "config.json") == expected
    load_drafter(place)


def test_what_the_source_says_of_generation_stays(tmp_path):
    given = {"suppress_tokens": [5], "num_assistant_tokens": 9}
    write(tmp_path / "given", generation_config=given)
    there = read(tmp_path / "given", "generation_config.json")
    assert there == {"suppress_tokens": [5], "num_assistant_tokens": 3}
    write(tmp_path / "made")
    assert read(tmp_path / "made", "generation_config.json") == {
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "num_assistant_tokens": 3,
    }


def test_a_fresh_drafter_is_read_back(tmp_path):
    for family in ("12b", "e2b"):
        drafter, config = fresh_drafter(reference_pair(family).target, seed=0)
        write_drafter(
            tmp_path / family, drafter, config, training=RECORD, dtype=mx.float32
        )
        found = load_drafter(tmp_path / family)
        assert_same(found, drafter)
        assert vars(found.config) == vars(drafter.config)


def test_a_quantized_drafter_ends_as_a_float_one(tmp_path):
    """Converted, trained through an adapter, written: its config is plain again."""
    source = model_folder(tmp_path / "source", "12b")
    request = Request(source, tmp_path / "pair", has_check=False)
    convert(plan_conversion(request))
    checkpoint = open_checkpoint(tmp_path / "pair" / "drafter")
    assert "quantization" in checkpoint.config
    drafter = dequantized(load_drafter(checkpoint.folder))
    before = parameters(drafter)
    add_adapters(drafter, rank=2, scale=1.0, seed=0)
    fuse_adapters(drafter)
    place = tmp_path / "made"
    write_drafter(place, drafter, checkpoint.config, training=RECORD)
    found = load_drafter(place)
    assert "quantization_config" not in read(place, "config.json")
    for name, array in parameters(found).items():
        assert mx.array_equal(array, before[name].astype(mx.bfloat16)), name


def test_it_drafts_where_it_is_named_and_where_it_is_found(tmp_path):
    target = tmp_path / "target-it"
    target.mkdir()
    for path in EMBEDDED.iterdir():
        if path.is_file():
            (target / path.name).write_bytes(path.read_bytes())
    place = tmp_path / "target-it-assistant"
    drafter = write(place, "embedded", dtype=mx.bfloat16)
    model, _ = load(str(EMBEDDED), draft_model=str(place))
    named = pair_of(model).drafter
    assert named is not None
    assert_same(named, drafter)
    assert find_drafter(target, target).path_or_id == str(place)
    inside = target / "drafter"
    write(inside, "embedded")
    assert find_drafter(target, target).path_or_id == str(inside)


def test_the_converted_pair_knows_the_training(tmp_path):
    source = model_folder(tmp_path / "source", "12b", has_drafter=False)
    write(tmp_path / "tuned")
    pair, again = tmp_path / "pair", tmp_path / "again"
    four = PartRequest(is_quantized=True)
    request = Request(
        source, pair, draft_model=tmp_path / "tuned", drafter=four, has_check=False
    )
    convert(plan_conversion(request))
    entry = read_manifest(pair)["drafter"]
    assert entry["training"] == RECORD
    assert entry["quantization"]["bits"] == 4
    assert "training" not in read_manifest(pair)["target"]
    assert not list(pair.rglob("training.json"))
    load_drafter(pair / "drafter")
    convert(plan_conversion(Request(pair, again, has_check=False)))
    assert read_manifest(again)["drafter"]["training"] == RECORD
    # A manifest that was left behind does not speak for other weights.
    weights = again / "drafter" / "model.safetensors"
    weights.write_bytes(weights.read_bytes() + b" ")
    assert read_training(again / "drafter") is None


def test_a_drafter_that_tells_no_training_gets_none(tmp_path):
    source = model_folder(tmp_path / "source", "12b")
    convert(plan_conversion(Request(source, tmp_path / "pair", has_check=False)))
    assert "training" not in read_manifest(tmp_path / "pair")["drafter"]
    (source / "drafter" / "training.json").write_text("[1")
    with pytest.raises(CheckpointError, match=r"training\.json must be readable JSON"):
        plan_conversion(Request(source, tmp_path / "other", has_check=False))


def test_other_files_stand_beside_it(tmp_path):
    write(
        tmp_path / "made",
        add=lambda folder: (folder / "README.md").write_bytes(b"# A drafter\n"),
    )
    assert (tmp_path / "made" / "README.md").read_bytes() == b"# A drafter\n"


def test_only_a_checkpoint_is_replaced_and_only_when_asked(tmp_path):
    place = tmp_path / "made"
    write(place)
    with pytest.raises(OutputError, match="--force to replace it"):
        write(place, training={"again": True})
    assert read(place, "training.json") == RECORD
    write(place, training={"again": True}, force=True)
    assert read(place, "training.json") == {"again": True}
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes").write_text("mine")
    with pytest.raises(OutputError, match="with a Gemma 4 checkpoint to be replaced"):
        write(other, force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "other"]


@pytest.mark.parametrize("force", [False, True])
def test_a_failed_write_changes_nothing(tmp_path, monkeypatch, force):
    place = tmp_path / "made"
    if force:
        write(place)

    def full(path: str, *args: Any, **settings: Any) -> None:
        Path(path).write_bytes(b"half")
        raise RuntimeError("[write] Unable to write 100 bytes to file.")

    monkeypatch.setattr(result.mx, "save_safetensors", full)
    with pytest.raises(OutputError, match=r"Unable to write 100 bytes to file\. Check"):
        write(place, force=force, training={})
    assert [path.name for path in tmp_path.iterdir()] == ["made"] * force
    if force:
        assert read(place, "training.json") == RECORD
        load_drafter(place)


def test_a_drafter_of_another_config_is_not_written(tmp_path):
    drafter = load_drafter(FOLDERS["12b"])
    add_adapters(drafter, rank=2, scale=1.0, seed=0)
    config = read(FOLDERS["12b"], "config.json")
    with pytest.raises(AssertionError, match="a plain one of this config"):
        write_drafter(tmp_path / "made", drafter, config, training=RECORD)
    assert not list(tmp_path.iterdir())
