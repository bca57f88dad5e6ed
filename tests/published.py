"""The ten published Gemma 4 checkpoints as their headers: every name, no weights.

`scripts/make_published.py` wrote `tests/data/published`; nothing is downloaded.
"""

from __future__ import annotations

import gzip
import json
import math
import re
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent / "data" / "published"
TARGETS = tuple(
    f"google/gemma-4-{size}-it" for size in ("E2B", "E4B", "12B", "26B-A4B", "31B")
)
DRAFTERS = tuple(f"{target}-assistant" for target in TARGETS)
REPOSITORIES = TARGETS + DRAFTERS

Tensors = dict[str, tuple[str, tuple[int, ...]]]  # (dtype, shape) by name

_ITEM_BYTES = {"BF16": 2, "I64": 8}
_ALIGNMENT = 8
_KV = re.compile(r"model\.language_model\.layers\.(\d+)\.self_attn\.[kv]_(proj|norm)\.")


@dataclass(frozen=True)
class Published:
    """What a repository holds besides the numbers themselves.

    Attributes:
        repo: Its id on the Hub.
        config: Its ``config.json``, in the published layout.
        generation_config: Its ``generation_config.json``.
        tensors: dtype and shape of each tensor by its name.
    """

    repo: str
    config: dict[str, Any]
    generation_config: dict[str, Any]
    tensors: Tensors

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(tensor_bytes(*tensor) for tensor in self.tensors.values())


def tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    return _ITEM_BYTES[dtype] * math.prod(shape)


@cache
def _read(repo: str) -> bytes:
    name = repo.removeprefix("google/")
    return gzip.decompress((DATA / f"{name}.json.gz").read_bytes())


def published(repo: str) -> Published:
    """Return one of ``REPOSITORIES``, a fresh copy for each call."""
    data = json.loads(_read(repo))
    tensors = {name: (dtype, tuple(shape)) for name, dtype, shape in data["tensors"]}
    return Published(data["repo"], data["config"], data["generation_config"], tensors)


def without_shared_kv(checkpoint: Published) -> Published:
    """Return it as transformers saves it again: no K/V of layers that share others'."""
    text = checkpoint.config["text_config"]
    first = text["num_hidden_layers"] - text["num_kv_shared_layers"]
    kept = {
        name: tensor
        for name, tensor in checkpoint.tensors.items()
        if not (match := _KV.match(name)) or int(match[1]) < first
    }
    return replace(checkpoint, tensors=kept)


def write_headers(
    folder: Path,
    repo: str | Published,
    *,
    max_shard_bytes: int = 5_000_000_000,
    sparse: bool = False,
) -> Path:
    """Write a checkpoint folder whose safetensors files end after their headers.

    Args:
        folder: Where to; made if it is not there.
        repo: One of ``REPOSITORIES``, or a changed checkpoint.
        max_shard_bytes: Tensor bytes of a shard; a larger tensor gets its own one.
        sparse: Extend the files to their full sizes, with holes: no disk is used.
    """
    checkpoint = published(repo) if isinstance(repo, str) else repo
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", checkpoint.config)
    _write_json(folder / "generation_config.json", checkpoint.generation_config)
    shards = _shards(checkpoint.tensors, max_shard_bytes)
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, start=1):
        name = "model.safetensors"
        if len(shards) > 1:
            name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        _write_header(folder / name, shard, sparse=sparse)
        weight_map |= dict.fromkeys(shard, name)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": checkpoint.num_bytes},
            "weight_map": dict(sorted(weight_map.items())),
        }
        _write_json(folder / "model.safetensors.index.json", index)
    return folder


def _shards(tensors: Tensors, max_bytes: int) -> list[Tensors]:
    """Split tensors, in their order, where the next one would be too much."""
    shards: list[Tensors] = [{}]
    num_bytes = 0
    for name, tensor in tensors.items():
        size = tensor_bytes(*tensor)
        if shards[-1] and num_bytes + size > max_bytes:
            shards.append({})
            num_bytes = 0
        shards[-1][name] = tensor
        num_bytes += size
    return shards


def _write_header(path: Path, tensors: Tensors, *, sparse: bool) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    # As safetensors itself: the widest types first, then by name.
    for name in sorted(tensors, key=lambda n: (-_ITEM_BYTES[tensors[n][0]], n)):
        dtype, shape = tensors[name]
        start, end = end, end + tensor_bytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        if sparse:
            file.truncate(8 + len(raw) + end)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
