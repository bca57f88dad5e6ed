"""The file of one place in a prompt: what is in it, and whether it is whole.

It holds the keys and values of full layers for the tokens between the place before and
this one, and those in the sliding windows at this one. So the files of all places up to
one give its caches, and of the earlier ones only the full layers are read.

The format is safetensors. A file says what it holds, and has a digest of each tensor.
What does not say exactly what it must, or has other bytes, is damaged. It has no token
ids; keys and values tell them all the same to who has the model.

Knows nothing of folders, nor of what else is kept.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import IO, Any

import mlx.core as mx
import numpy as np

from ..constants import FULL, SLIDING
from .mlx_lm_cache import held_arrays
from .slabs import SlabLayout

FORMAT = "mlx_gemma_mtp prompt 1"
_TYPES = {mx.float32: "F32", mx.bfloat16: "BF16", mx.float16: "F16"}
_LENGTH_BYTES = 8  # of the header's length, which comes first
_MAX_HEADER_BYTES = 10**6
_ALIGNMENT = 8


class DamagedError(Exception):
    """A file is not what it must be."""


@dataclass(frozen=True)
class Place:
    """A place in a prompt, and what its file holds.

    Attributes:
        key: What the file is of, in digits: model, salt and all tokens up to here.
        begin: Tokens up to the place before; 0 where there is none.
        end: Tokens up to this place.
    """

    key: str
    begin: int
    end: int


@dataclass(frozen=True)
class _Tensor:
    """One tensor of a file.

    Attributes:
        name: The layer's number, and keys or values.
        layer: The layer's number.
        is_full: Whether that is a full one.
        shape: [1, G, tokens, D].
        num_bytes: Of its data.
    """

    name: str
    layer: int
    is_full: bool
    shape: tuple[int, int, int, int]
    num_bytes: int


def bytes_at(
    layout: SlabLayout, place: Place, caches: Sequence[Any]
) -> list[memoryview]:
    """The data of a place's file, in order; from here on any thread may read it.

    Args:
        layout: Of the target.
        place: The place.
        caches: mlx-lm's, of all tokens up to there.
    """
    arrays = held_arrays(caches, begin=place.begin)
    found = []
    for tensor in _tensors(layout, place):
        keys, values = arrays[tensor.layer]
        array = keys if tensor.name.endswith("keys") else values
        if tuple(array.shape) != tensor.shape or array.dtype != layout.dtype:
            raise ValueError(f"{tensor.name} has {array.shape} of {array.dtype}")
        found.append(array.view(mx.uint8))
    mx.eval(found)
    return [np.array(array, copy=False).data.cast("B") for array in found]


def write_place(
    file: IO[bytes], layout: SlabLayout, place: Place, data: Sequence[memoryview]
) -> None:
    """Write a place's file.

    Args:
        file: Open for writing.
        layout: Of the target.
        place: The place.
        data: What ``bytes_at`` gave.
    """
    text = json.dumps(_header(layout, place, [_digest(part) for part in data]))
    raw = text.encode()
    raw += b" " * (-len(raw) % _ALIGNMENT)
    file.write(len(raw).to_bytes(_LENGTH_BYTES, "little"))
    file.write(raw)
    for part in data:
        file.write(part)


def read_place(
    path: Path, layout: SlabLayout, key: str, end: int, *, has_windows: bool
) -> tuple[int, dict[int, list[mx.array]]]:
    """Read a place's file.

    Args:
        path: The file.
        layout: Of the target.
        key: See ``Place``.
        end: See ``Place``.
        has_windows: Whether to read the sliding layers too.

    Returns:
        ``begin`` of the place; and each layer's keys and values, by its number.

    Raises:
        DamagedError: It is not a whole file of this place.
        OSError: It cannot be read.
    """
    with open(path, "rb", opener=_open) as file:
        place, digests = _read_header(file, layout, key, end)
        found: dict[int, list[mx.array]] = {}
        for tensor, digest in zip(_tensors(layout, place), digests, strict=True):
            if not (tensor.is_full or has_windows):
                break  # they are the last ones
            data = np.empty(tensor.num_bytes, dtype=np.uint8)
            if file.readinto(data.data) != data.size:
                raise DamagedError("it is cut off")
            if _digest(data.data) != digest:
                raise DamagedError(f"{tensor.name} has other bytes than were written")
            array = mx.array(data).view(layout.dtype).reshape(tensor.shape)
            found.setdefault(tensor.layer, []).append(array)
    return place.begin, found


def _open(path: str, flags: int) -> int:
    """Open a file itself, never what a link names, nor wait for a pipe's writer."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)


def _read_header(
    file: BufferedReader, layout: SlabLayout, key: str, end: int
) -> tuple[Place, list[str]]:
    """What a file says it holds: the place, and the digests of its tensors.

    Raises:
        DamagedError: That is not what it must be.
    """
    length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
    if length > _MAX_HEADER_BYTES:
        raise DamagedError("its header is too long")
    try:
        header = json.loads(file.read(length))
        place = Place(key, int(header["__metadata__"]["begin"]), end)
        digests = header["__metadata__"]["digests"].split()
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as e:
        raise DamagedError("its header cannot be read") from e
    if not 0 <= place.begin < end or header != _header(layout, place, digests):
        raise DamagedError("it holds something else")
    size = sum(tensor.num_bytes for tensor in _tensors(layout, place))
    if os.fstat(file.fileno()).st_size != _LENGTH_BYTES + length + size:
        raise DamagedError("it has another size")
    return place, digests


def _header(layout: SlabLayout, place: Place, digests: Sequence[str]) -> dict[str, Any]:
    """What a place's file says it holds."""
    header: dict[str, Any] = {
        "__metadata__": {
            "format": FORMAT,
            "key": place.key,
            "begin": str(place.begin),
            "end": str(place.end),
            "digests": " ".join(digests),
        }
    }
    start = 0
    for tensor in _tensors(layout, place):
        header[tensor.name] = {
            "dtype": _TYPES[layout.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, start + tensor.num_bytes],
        }
        start += tensor.num_bytes
    return header


def _tensors(layout: SlabLayout, place: Place) -> Iterator[_Tensor]:
    """The tensors of a place's file, the full layers' first."""
    for kind in (FULL, SLIDING):
        num_tokens = place.end - place.begin
        if kind == SLIDING:
            num_tokens = min(layout.window, place.end)
        for i, layer in enumerate(layout.layers):
            if layer.layer_type != kind:
                continue
            shape = (1, layer.num_kv_heads, num_tokens, layer.head_dim)
            size = math.prod(shape) * layout.dtype.size
            for part in ("keys", "values"):
                yield _Tensor(f"{i}.{part}", i, kind == FULL, shape, size)


def _digest(data: memoryview) -> str:
    """What tells whether data are those that were written."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()
