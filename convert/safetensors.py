"""Files of safetensors whose contents are known before they are written.

All names, types and shapes stand in the plan, so each file's header and every array's
place are known at the start, and rows can be written where they belong in any order.
Files are split and named as mlx-lm splits and names them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mlx_gemma_mtp.checkpoints.checkpoint import DTYPE_BITS

from .plan import Array

MAX_FILE_BYTES = 5 << 30  # mlx-lm's
_LENGTH_BYTES = 8
_ALIGNMENT = 8


@dataclass(frozen=True)
class OutputFile:
    """One file that is written.

    Attributes:
        name: Its name.
        header: Its first bytes: the length of the header, and the header.
        arrays: The arrays in it, by name.
        offsets: Array name to its first byte, counted from the start of the file.
        num_bytes: Its size.
    """

    name: str
    header: bytes
    arrays: dict[str, Array]
    offsets: dict[str, int]
    num_bytes: int


def lay_out(
    arrays: Iterable[Array], *, max_file_bytes: int = MAX_FILE_BYTES
) -> list[OutputFile]:
    """Give every array its place in a file.

    Args:
        arrays: What will be written, in the order of the model.
        max_file_bytes: Most data of a file; an array that is larger gets its own.
    """
    shards: list[list[Array]] = []
    num_bytes = 0
    for array in arrays:
        if not shards or num_bytes + array.num_bytes > max_file_bytes:
            shards.append([])
            num_bytes = 0
        shards[-1].append(array)
        num_bytes += array.num_bytes
    count = len(shards)
    return [_file(_name(i, count), shard) for i, shard in enumerate(shards)]


def index(files: Iterable[OutputFile], *, num_weights: int) -> dict[str, Any]:
    """Return the contents of ``model.safetensors.index.json``.

    Args:
        files: All files of a model.
        num_weights: Weights of the model.
    """
    file_of, total = {}, 0
    for file in files:
        total += sum(array.num_bytes for array in file.arrays.values())
        file_of.update(dict.fromkeys(file.arrays, file.name))
    return {
        "metadata": {"total_size": total, "total_parameters": num_weights},
        "weight_map": dict(sorted(file_of.items())),
    }


def _name(i: int, count: int) -> str:
    if count == 1:
        return "model.safetensors"
    return f"model-{i + 1:05d}-of-{count:05d}.safetensors"


def _file(name: str, arrays: Iterable[Array]) -> OutputFile:
    # Wide types first, as the reference implementation sorts them: then every array
    # starts at a multiple of its type's size without gaps, which the format forbids.
    ordered = sorted(arrays, key=lambda array: (-DTYPE_BITS[array.dtype], array.name))
    entries: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    starts, end = {}, 0
    for array in ordered:
        starts[array.name] = end
        end += array.num_bytes
        entries[array.name] = {
            "dtype": array.dtype,
            "shape": list(array.shape),
            "data_offsets": [starts[array.name], end],
        }
    header = _header(entries)
    offsets = {array_name: len(header) + start for array_name, start in starts.items()}
    arrays_by_name = {array.name: array for array in ordered}
    return OutputFile(name, header, arrays_by_name, offsets, len(header) + end)


def _header(entries: Mapping[str, Any]) -> bytes:
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + _LENGTH_BYTES) % _ALIGNMENT)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text
