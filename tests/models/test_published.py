"""The published checkpoints' headers: their totals, and the models they are for.

No weights: parameters of the models here are never evaluated.

Run: python -m pytest tests/models/test_published.py
"""

import json
import math

import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import gemma4

from mlx_gemma_mtp.checkpoints.checkpoint import open_checkpoint
from mlx_gemma_mtp.models.drafter import Drafter
from mlx_gemma_mtp.models.drafter_config import DrafterConfig
from mlx_gemma_mtp.models.families import PUBLISHED_DRAFTERS, PUBLISHED_TARGETS
from mlx_gemma_mtp.models.text_config import text_config
from tests.published import (
    DRAFTERS,
    REPOSITORIES,
    TARGETS,
    published,
    without_shared_kv,
    write_headers,
)

E2B, E4B, B12, B26, B31 = TARGETS
ONE_FILE = 10**12

# What the Hub reports as a repository's parameters. It counts a scalar as none: the
# E-series has 928 of them, bounds of the towers' clipped layers.
PARAMETERS = {
    E2B: 5_123_178_051,
    E4B: 7_996_156_490,
    B12: 11_959_730_224,
    B26: 25_805_936_206,
    B31: 31_273_088_876,
    f"{B12}-assistant": 422_856_964,
}
NUM_TENSORS = {
    E2B: 2011,
    E4B: 2130,
    B12: 677,
    B26: 1013,
    B31: 1188,
    f"{E2B}-assistant": 50,
    f"{E4B}-assistant": 50,
    f"{B12}-assistant": 48,
    f"{B26}-assistant": 48,
    f"{B31}-assistant": 48,
}
# The sizes of published files that hold a whole model.
FILE_BYTES = {
    E2B: 10_246_621_918,
    E4B: 15_992_595_884,
    B12: 23_919_549_408,
    f"{E4B}-assistant": 159_138_208,
    f"{B12}-assistant": 845_719_296,
    f"{B31}-assistant": 939_042_560,
}


def shapes(parameters):
    """Shapes by name of a model's parameters, which stay unevaluated."""
    return {name: value.shape for name, value in dict(tree_flatten(parameters)).items()}


def in_mlx(checkpoint):
    """Names and shapes that mlx-lm's model has for a target's text tensors."""
    text = checkpoint.config["text_config"]
    num_own = text["num_hidden_layers"] - text["num_kv_shared_layers"]
    unused = tuple(
        f"layers.{i}.self_attn.{part}"
        for i in range(num_own, text["num_hidden_layers"])
        for part in ("k_proj.", "v_proj.", "k_norm.")
    )
    mapped = {}
    for name, (_, shape) in checkpoint.tensors.items():
        if not name.startswith("model.language_model."):
            continue
        bare = name.removeprefix("model.language_model.")
        if bare.startswith(unused):
            continue
        new = f"language_model.model.{bare}"
        if bare.endswith(".experts.gate_up_proj"):
            stem = new.removesuffix("gate_up_proj")
            half = (shape[0], shape[1] // 2, shape[2])
            for part in ("gate_proj", "up_proj"):
                mapped[f"{stem}switch_glu.{part}.weight"] = half
        elif bare.endswith(".experts.down_proj"):
            stem = new.removesuffix("down_proj")
            mapped[f"{stem}switch_glu.down_proj.weight"] = shape
        else:
            mapped[new] = shape
    return mapped


def test_the_repositories_are_the_published_ones():
    assert TARGETS == PUBLISHED_TARGETS
    assert DRAFTERS == PUBLISHED_DRAFTERS
    assert [published(repo).repo for repo in REPOSITORIES] == list(REPOSITORIES)


@pytest.mark.parametrize("repo", REPOSITORIES)
def test_number_of_tensors(repo):
    assert len(published(repo).tensors) == NUM_TENSORS[repo]


@pytest.mark.parametrize("repo", PARAMETERS)
def test_number_of_parameters(repo):
    found = [shape for _, shape in published(repo).tensors.values()]
    assert sum(math.prod(shape) for shape in found if shape) == PARAMETERS[repo]


@pytest.mark.parametrize("repo", FILE_BYTES)
def test_file_size_to_the_byte(repo, tmp_path):
    write_headers(tmp_path, repo, max_shard_bytes=ONE_FILE, sparse=True)
    assert (tmp_path / "model.safetensors").stat().st_size == FILE_BYTES[repo]


def test_other_totals():
    # bf16, so two bytes a parameter; published as 51.6 GB.
    assert round(published(B26).num_bytes / 1e9, 1) == 51.6
    per_layer = "model.language_model.embed_tokens_per_layer.weight"
    for repo, billions in ((E2B, 2.35), (E4B, 2.82)):
        _, shape = published(repo).tensors[per_layer]
        assert round(math.prod(shape) / 1e9, 2) == billions


@pytest.mark.parametrize("repo", REPOSITORIES)
def test_dtypes(repo):
    tensors = published(repo).tensors
    integers = {
        name: shape for name, (dtype, shape) in tensors.items() if dtype == "I64"
    }
    has_centroids = repo in (f"{E2B}-assistant", f"{E4B}-assistant")
    expected = {"masked_embedding.token_ordering": (262144,)} if has_centroids else {}
    assert integers == expected
    assert {dtype for dtype, _ in tensors.values()} - {"I64"} == {"BF16"}


@pytest.mark.parametrize("repo", REPOSITORIES)
def test_a_sparse_folder_opens(repo, tmp_path):
    expected = published(repo)
    folder = write_headers(tmp_path / "checkpoint", repo, sparse=True)
    found = open_checkpoint(folder)
    assert {n: (t.dtype, t.shape) for n, t in found.tensors.items()} == expected.tensors
    assert found.config == expected.config
    assert found.generation_config == expected.generation_config
    assert sum(path.stat().st_blocks for path in folder.iterdir()) * 512 < 10**6


def test_shards_are_numbered_and_bounded(tmp_path):
    folder = write_headers(tmp_path, B12)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    names = [f"model-0000{i}-of-00005.safetensors" for i in range(1, 6)]
    assert sorted(set(index["weight_map"].values())) == names
    assert sorted(p.name for p in folder.glob("model*.safetensors")) == names
    assert index["metadata"]["total_size"] == published(B12).num_bytes
    ends = []
    for name in names:
        raw = (folder / name).read_bytes()
        length = int.from_bytes(raw[:8], "little")
        assert length % 8 == 0
        assert len(raw) == 8 + length  # the header, and nothing after it
        header = json.loads(raw[8:])
        header.pop("__metadata__")
        ends.append(max(entry["data_offsets"][1] for entry in header.values()))
    assert max(ends) <= 5_000_000_000
    assert sum(ends) == published(B12).num_bytes


@pytest.mark.parametrize("repo", REPOSITORIES)
def test_the_config_is_accepted(repo):
    checkpoint = published(repo)
    text = text_config(checkpoint.config, source=repo)
    assert text["vocab_size"] == 262144
    assert text["global_head_dim"] == 512
    assert checkpoint.generation_config["eos_token_id"] == [1, 106]
    if repo in DRAFTERS:
        DrafterConfig.from_dict(checkpoint.config, source=repo)
        assert checkpoint.generation_config["num_assistant_tokens"] > 0


@pytest.mark.parametrize("repo", TARGETS)
def test_text_tensors_are_those_of_mlx_lm(repo):
    checkpoint = published(repo)
    text = text_config(checkpoint.config, source=repo)
    args = {
        "model_type": "gemma4",
        "text_config": text,
        "vocab_size": text["vocab_size"],
    }
    model = gemma4.Model(gemma4.ModelArgs.from_dict(args))
    assert in_mlx(checkpoint) == shapes(model.parameters())


@pytest.mark.parametrize(("repo", "num_dropped"), [(E2B, 60), (E4B, 54), (B12, 0)])
def test_without_shared_kv(repo, num_dropped):
    full, saved_again = published(repo), without_shared_kv(published(repo))
    assert len(full.tensors) - len(saved_again.tensors) == num_dropped
    assert in_mlx(full) == in_mlx(saved_again)


@pytest.mark.parametrize("repo", DRAFTERS)
def test_drafter_tensors_are_those_of_the_drafter(repo):
    checkpoint = published(repo)
    drafter = Drafter(DrafterConfig.from_dict(checkpoint.config, source=repo))
    expected = {name: shape for name, (_, shape) in checkpoint.tensors.items()}
    assert shapes(drafter.parameters()) == expected
