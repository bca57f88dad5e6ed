"""What a folder holds: whole ones are read, damaged ones told in one line.

Run: python -m pytest tests/checkpoints/test_checkpoint.py
"""

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_gemma_mtp.checkpoints.checkpoint import (
    INDEX_NAME,
    open_checkpoint,
    read_header,
)
from mlx_gemma_mtp.errors import CheckpointError

REFERENCE = Path(__file__).parents[1] / "data" / "reference"
DRAFTER = REFERENCE / "e2b" / "drafter"
WEIGHTS = DRAFTER / "model.safetensors"
NORM = "model.norm.weight"


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of a few tensors that a test may damage."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "gemma4"}')
    save(folder / "model.safetensors", {"a": mx.zeros((2, 3)), "b": mx.ones((4,))})
    return folder


def save(path, tensors):
    mx.save_safetensors(str(path), tensors)


def shard(folder, *, files=None):
    """Split the folder's two tensors into two shards with an index."""
    (folder / "model.safetensors").unlink()
    names = files or ["model-00001-of-00002", "model-00002-of-00002"]
    names = [f"{name}.safetensors" for name in names]
    save(folder / names[0], {"a": mx.zeros((2, 3))})
    save(folder / names[1], {"b": mx.ones((4,))})
    write_index(folder, {"a": names[0], "b": names[1]})
    return [folder / name for name in names]


def write_index(folder, weight_map):
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))


def write_header(path, header, data=b""):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)


def fails(folder, *words):
    """Assert that opening raises one line with these words."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) <= 1000
    assert " must be " in message
    for word in words:
        assert word in message
    return message


@pytest.mark.parametrize("family", ["e2b", "e4b", "12b", "26b-a4b", "31b"])
@pytest.mark.parametrize("role", ["target", "drafter"])
def test_every_tensor_is_where_it_is_said_to_be(family, role):
    checkpoint = open_checkpoint(REFERENCE / family / role)
    loaded: Any = mx.load(str(checkpoint.folder / "model.safetensors"))
    assert set(loaded) == set(checkpoint.tensors)
    assert {k: v.shape for k, v in loaded.items()} == {
        k: v.shape for k, v in checkpoint.tensors.items()
    }
    assert checkpoint.config["model_type"].startswith("gemma4")
    assert "eos_token_id" in checkpoint.generation_config


def test_offsets_count_from_the_start_of_the_file(folder):
    tensor = open_checkpoint(folder).tensors["b"]
    first, end = tensor.offsets
    raw = tensor.file.read_bytes()[first:end]
    assert raw == b"\x00\x00\x80\x3f" * 4  # four float32 ones
    assert (tensor.dtype, tensor.shape) == ("F32", (4,))


def test_shards_with_and_without_an_index(folder):
    single = open_checkpoint(folder)
    shard(folder)
    for _ in range(2):
        sharded = open_checkpoint(folder)
        assert set(sharded.tensors) == set(single.tensors)
        assert {t.file.name for t in sharded.tensors.values()} == {
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
        }
        (folder / INDEX_NAME).unlink(missing_ok=True)


def test_a_string_is_a_path_and_generation_config_is_optional(folder):
    assert open_checkpoint(str(folder)).generation_config == {}


def test_no_such_folder(tmp_path):
    fails(tmp_path / "none", "none", "no such folder", "Hub id")


def test_a_file_is_no_folder(folder):
    fails(
        folder / "model.safetensors", "a folder", "a file", f"Pass the folder {folder}"
    )


def test_no_config(folder):
    (folder / "config.json").unlink()
    fails(folder, "config.json", "none there")


@pytest.mark.parametrize("text", [b"{", b"\xff\xfe", b"", b"[" * 100_000, b"{'a': 1}"])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", INDEX_NAME])
def test_broken_json(folder, name, text):
    (folder / name).write_bytes(text)
    fails(folder, name, "JSON", "Download")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", INDEX_NAME])
def test_json_that_is_no_object(folder, name):
    (folder / name).write_text("[1]")
    fails(folder, name, "a JSON object", "list")


def test_unreadable_file(folder, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    fails(folder, "config.json", "Permission denied", "permissions")


@pytest.mark.parametrize("weight_map", [{}, [], None])
def test_index_without_a_map(folder, weight_map):
    write_index(folder, weight_map)
    fails(folder, INDEX_NAME, "weight_map")


def test_index_names_a_missing_shard(folder):
    shard(folder)[1].unlink()
    fails(folder, "model-00002-of-00002.safetensors", "holds b", "no such file")


def test_missing_shard_without_an_index(folder):
    shard(folder)[0].unlink()
    (folder / INDEX_NAME).unlink()
    fails(folder, "model-00001-of-00002.safetensors", "no such file")


def test_index_names_a_tensor_that_is_not_in_its_shard(folder):
    first, second = (path.name for path in shard(folder))
    write_index(folder, {"a": first, "b": second, "layers.7.weight": second})
    fails(folder, second, "layers.7.weight", INDEX_NAME)
    write_index(folder, {"a": second, "b": first})
    fails(folder, second, "with a", INDEX_NAME)


@pytest.mark.parametrize("name", ["../model.safetensors", "", 3])
def test_index_points_outside_the_folder(folder, name):
    write_index(folder, {"a": name})
    fails(folder, INDEX_NAME, "for a", repr(name))


def test_left_over_weights_beside_shards(folder):
    shard(folder)
    save(folder / "model.safetensors", {"a": mx.zeros((2, 3))})
    fails(folder, "model.safetensors", INDEX_NAME, "left over", "delete")


def test_a_tensor_in_two_files(folder):
    save(folder / "model-old.safetensors", {"a": mx.zeros((2, 3))})
    fails(folder, "a in", "model-old.safetensors", "Delete")


def test_shards_that_mlx_lm_would_not_see(folder):
    shard(folder, files=["weights-1", "weights-2"])
    fails(folder, "weights-1.safetensors", "model*.safetensors", "Rename")


def test_weights_of_another_name(folder):
    (folder / "model.safetensors").rename(folder / "adapters.safetensors")
    fails(folder, "model*.safetensors", "adapters.safetensors", "Rename")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_link_to_nothing(folder, name):
    (folder / name).unlink()
    (folder / name).symlink_to(folder / "gone")
    message = fails(folder, name, "a link to", "gone", "where nothing is")
    assert "Rename" not in message


def test_a_shard_that_is_a_link_to_nothing(folder):
    path = shard(folder)[1]
    path.unlink()
    path.symlink_to(folder / "gone")
    fails(folder, path.name, "a link to", "where nothing is")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_folder_in_the_place_of_a_file(folder, name):
    (folder / name).unlink()
    (folder / name).mkdir()
    message = fails(folder, name, "a folder. Put the file itself")
    assert "Rename" not in message


def test_a_type_that_is_not_known_is_no_damage(folder):
    entry = {"dtype": "X9", "shape": [1], "data_offsets": [0, 4]}
    write_header(folder / "model.safetensors", {"a": entry}, b"\0" * 4)
    message = fails(folder, "a in", "'X9'", "update")
    assert "again" not in message


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    fails(folder, "weights", "none there")


def test_weights_without_a_tensor(folder):
    write_header(folder / "model.safetensors", {"__metadata__": {"format": "mlx"}})
    fails(folder, "at least one tensor")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth"])
def test_pickled_weights(folder, name):
    (folder / "model.safetensors").rename(folder / name)
    fails(folder, "safetensors checkpoint", Path(name).suffix, "safe_serialization")


def test_a_gguf_folder_and_a_gguf_file(tmp_path):
    (tmp_path / "gemma-4-E2B-it-Q4_0.gguf").write_bytes(b"GGUF")
    fails(tmp_path, "safetensors checkpoint", "a GGUF file", "instead")
    fails(tmp_path / "gemma-4-E2B-it-Q4_0.gguf", "a GGUF file")


def test_a_git_lfs_pointer(folder):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    (folder / "model.safetensors").write_text(pointer)
    fails(folder, "model.safetensors", "git-lfs pointer", "git lfs pull")


@pytest.mark.parametrize(
    ("header", "word"),
    [
        (b"not json", "broken header"),
        (b"[]", "JSON object"),
        ({"a": 3}, "whole at a"),
        ({"a": {"dtype": "F32", "shape": [1]}}, "whole at a"),
        ({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, "whole at a"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}, "whole at a"),
        ({"a": {"dtype": 9, "shape": [1], "data_offsets": [0, 4]}}, "of a type"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, "8 bytes long"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}, "-4 bytes"),
    ],
)
def test_a_damaged_header(folder, header, word):
    write_header(folder / "model.safetensors", header, b"\0" * 4)
    fails(folder, "model.safetensors", word)


def test_a_file_of_something_else(folder):
    (folder / "model.safetensors").write_bytes(b"<!DOCTYPE html><html></html>")
    fails(folder, "model.safetensors", "another beginning")


def test_a_cut_off_shard_names_file_and_tensor(folder):
    path = shard(folder)[1]
    path.write_bytes(path.read_bytes()[:-1])
    fails(folder, path.name, "to hold b", "cut off", "Download")


def test_a_message_says_what_to_do_however_long_it_is(folder):
    name = "a" * 100_000
    write_header(folder / "model.safetensors", {name: 3})
    fails(folder, "the header of", "damaged entry", "Download or copy it again.")
    message = str(CheckpointError(f"{name} must be short: got\n{name}. Cut it."))
    assert message.startswith("aaa")
    assert message.endswith("a. Cut it.")
    assert len(message) <= 1000


@pytest.fixture(scope="module")
def cuttable(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cut")
    shutil.copy(DRAFTER / "config.json", folder)
    return folder


@given(st.integers(0, WEIGHTS.stat().st_size - 1))
def test_a_file_cut_anywhere_is_told(cuttable, length):
    path = cuttable / "model.safetensors"
    path.write_bytes(WEIGHTS.read_bytes()[:length])
    fails(cuttable, "model.safetensors")


@given(st.binary(max_size=40))
def test_any_beginning_is_read_or_told(cuttable, start):
    path = cuttable / "model.safetensors"
    path.write_bytes(start + WEIGHTS.read_bytes()[len(start) : 20_000])
    with pytest.raises(CheckpointError):
        read_header(path)
