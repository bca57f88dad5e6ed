"""What a checkpoint folder holds, told without loading a single weight.

Reads JSON files and safetensors headers with plain reads, so that a missing
shard, a cut-off download or a folder in another format is found in milliseconds
and told in one line. Knows nothing of models, of MLX or of the Hub.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ..errors import CheckpointError, cut, shorten

CONFIG_NAME = "config.json"
GENERATION_CONFIG_NAME = "generation_config.json"
ADAPTER_CONFIG_NAME = "adapter_config.json"
TRAINING_NAME = "training.json"  # how a drafter was trained, where it was here
INDEX_NAME = "model.safetensors.index.json"
# The files that mlx-lm loads: all of these, whatever the index says.
WEIGHTS_PATTERN = "model*.safetensors"

SAME_CHECKPOINT = "Take config.json and weights from the same checkpoint."
MERGE = (
    "Merge them into their model with peft's merge_and_unload and save that, or train "
    "with mlx_lm.lora."
)
_AGAIN = "Download or copy it again."
_SHARD_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.safetensors")
_PEFT_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_LENGTH_BYTES = 8  # a safetensors file starts with its header's length
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_MAX_COUNT = 2**63 - 1
_PIECE_BYTES = 2**24  # of a file at once
# Types of weights: how configs call them, and how safetensors does.
FLOAT_DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
DTYPE_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F8_E8M0": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
    "U32": 32,
    "I32": 32,
    "F32": 32,
    "U64": 64,
    "I64": 64,
    "F64": 64,
    "C64": 64,
}


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies.

    Attributes:
        file: The safetensors file.
        dtype: safetensors' name of the type, such as ``"BF16"``.
        shape: Its shape.
        offsets: Its first byte and the byte after its last one, counted from the
            start of the file.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offsets: tuple[int, int]

    @property
    def num_bytes(self) -> int:
        """Its size in the file."""
        return self.offsets[1] - self.offsets[0]


@dataclass(frozen=True)
class Checkpoint:
    """A folder whose files were found complete.

    Attributes:
        folder: The folder.
        config: The parsed ``config.json``.
        generation_config: The parsed ``generation_config.json``, empty without one.
        tensors: Every tensor of the safetensors files by its name there.
    """

    folder: Path
    config: dict[str, Any]
    generation_config: dict[str, Any]
    tensors: dict[str, TensorInfo]

    @property
    def config_path(self) -> Path:
        """The file ``config`` was read from, for messages."""
        return self.folder / CONFIG_NAME


def open_checkpoint(folder: str | Path, *, headers_only: bool = False) -> Checkpoint:
    """Read a checkpoint's configs and tensor list, and check that all is there.

    Args:
        folder: A local folder with ``config.json`` and ``model*.safetensors``.
        headers_only: Be content with files that end behind their header.

    Raises:
        CheckpointError: The folder, or a file in it, is missing, cut off, damaged
            or of a format that is not safetensors. One line: which file, which
            tensor, what to do.
    """
    folder = Path(folder)
    config = read_config(folder)
    generation_config: dict[str, Any] = {}
    if (folder / GENERATION_CONFIG_NAME).is_file():
        generation_config = read_json(folder / GENERATION_CONFIG_NAME)
    if (folder / INDEX_NAME).is_file():
        tensors = _read_indexed(folder, headers_only=headers_only)
    else:
        tensors = _read_files(_weight_files(folder), headers_only=headers_only)
    if not tensors:
        _fail(f"the weights in {folder}", "at least one tensor", "none", _AGAIN)
    return Checkpoint(folder, config, generation_config, tensors)


def read_config(folder: Path) -> dict[str, Any]:
    """Return a checkpoint folder's ``config.json``.

    Args:
        folder: The local folder.

    Raises:
        CheckpointError: There is no such folder or file, or it is no JSON object.
    """
    if _attempt(folder.is_file, folder):
        _fail_other_format(folder, [folder])
        next_step = f"Pass the folder {folder.parent}."
        _fail(f"the checkpoint {folder}", "a folder", "a file", next_step)
    if not _attempt(folder.is_dir, folder):
        next_step = "Check the path, or pass a Hub id such as google/gemma-4-E2B-it."
        _fail(f"the checkpoint {folder}", "a folder", "no such folder", next_step)
    _refuse_no_file(folder / CONFIG_NAME)
    if not (folder / CONFIG_NAME).is_file():
        _fail_other_format(folder, _attempt(lambda: list(folder.iterdir()), folder))
        _refuse_adapters(folder)
        next_step = "Pass the folder that holds config.json and model.safetensors."
        _fail(f"{folder}", "a folder with config.json", "none there", next_step)
    return read_json(folder / CONFIG_NAME)


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Args:
        path: The file.

    Raises:
        CheckpointError: It cannot be read or is no JSON object.
    """
    return _parse_object(_attempt(path.read_bytes, path), path)


def read_header(path: Path, *, headers_only: bool = False) -> dict[str, TensorInfo]:
    """Return the tensors of one safetensors file, from its header alone.

    Args:
        path: The file.
        headers_only: Do not ask for the data behind the header.

    Raises:
        CheckpointError: The file is shorter than its header says, or the header
            is damaged.
    """
    size, start, raw = _attempt(lambda: _header_bytes(path), path)
    entries = _parse_object(raw, path)
    entries.pop("__metadata__", None)
    tensors = {
        name: _tensor_info(path, name, entry, start) for name, entry in entries.items()
    }
    for name, tensor in tensors.items():
        if tensor.offsets[1] > size and not headers_only:
            _fail(
                f"{path}",
                f"at least {tensor.offsets[1]:,} bytes to hold {name}",
                f"{size:,} bytes, so it is cut off",
                _AGAIN,
            )
    _check_overlaps(path, tensors)
    return tensors


def have_same_data(tensor: TensorInfo, other: TensorInfo) -> bool:
    """Tell whether two tensors are equal, type and shape included.

    Args:
        tensor: One of them.
        other: The other one.
    """
    if (tensor.dtype, tensor.shape) != (other.dtype, other.shape):
        return False
    with tensor.file.open("rb") as one, other.file.open("rb") as two:
        one.seek(tensor.offsets[0])
        two.seek(other.offsets[0])
        for done in range(0, tensor.num_bytes, _PIECE_BYTES):
            size = min(_PIECE_BYTES, tensor.num_bytes - done)
            piece = one.read(size)
            if len(piece) < size or piece != two.read(size):
                return False
    return True


def _check_overlaps(path: Path, tensors: Mapping[str, TensorInfo]) -> None:
    """Refuse two tensors in one place, which the format forbids."""
    end, before = 0, ""
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offsets):
        if tensor.num_bytes and tensor.offsets[0] < end:
            found = f"a place inside {before}"
            _fail(f"{name} in {path}", "in a place of its own", found, _AGAIN)
        if tensor.num_bytes:
            end, before = tensor.offsets[1], name


def _header_bytes(path: Path) -> tuple[int, int, bytes]:
    """Return (file size, where tensor data starts, the header's JSON)."""
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(_LENGTH_BYTES)
        if first == b"version ":
            next_step = "Run `git lfs pull`, or download it again."
            _fail(f"{path}", "a safetensors file", "a git-lfs pointer", next_step)
        length = int.from_bytes(first, "little")
        start = _LENGTH_BYTES + length
        if len(first) < _LENGTH_BYTES or (start > size and length < _MAX_HEADER_BYTES):
            found = f"{size:,} bytes, so it is cut off inside its header"
            _fail(f"{path}", f"at least {start:,} bytes", found, _AGAIN)
        if start > size or length > _MAX_HEADER_BYTES:
            found = "a file with another beginning"
            _fail(f"{path}", "a safetensors file", found, _AGAIN)
        return size, start, file.read(length)


def _tensor_info(path: Path, name: str, entry: Any, start: int) -> TensorInfo:
    """Check one entry of a header."""
    if not isinstance(entry, Mapping):
        entry = {}
    dtype, shape = entry.get("dtype"), entry.get("shape")
    offsets = entry.get("data_offsets")
    if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
        _fail(f"the header of {path}", f"whole at {name}", "a damaged entry", _AGAIN)
    if not isinstance(dtype, str):
        _fail(f"{name} in {path}", "of a type", shorten(dtype), _AGAIN)
    if dtype not in DTYPE_BITS:
        next_step = "Take a checkpoint in bfloat16, or update this package."
        expected = "of a type that is known here"
        _fail(f"{name} in {path}", expected, shorten(dtype), next_step)
    num_bytes = math.prod(shape) * DTYPE_BITS[dtype] // 8
    first, end = offsets
    if end - first != num_bytes:
        expected = f"{num_bytes:,} bytes long as {dtype} {shape}"
        _fail(f"{name} in {path}", expected, f"{end - first:,} bytes", _AGAIN)
    return TensorInfo(path, dtype, tuple(shape), (start + first, start + end))


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(
        type(v) is int and 0 <= v <= _MAX_COUNT for v in value
    )


def _read_indexed(folder: Path, *, headers_only: bool) -> dict[str, TensorInfo]:
    """Read the shards that the index names and hold it against them."""
    path = folder / INDEX_NAME
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        found = "no such object"
        _fail(f"{path}", 'a JSON object with a "weight_map"', found, _AGAIN)
    present = {path.name for path in _attempt(lambda: list(folder.iterdir()), folder)}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard or Path(shard).name != shard:
            expected = "a file name in the same folder"
            _fail(f"{path} for {name}", expected, repr(shard), _AGAIN)
        if shard not in present:
            expected = f"there: {INDEX_NAME} says it holds {name}"
            _fail(f"{folder / shard}", expected, "no such file", _AGAIN)
    _check_strays(folder, set(weight_map.values()))
    shards = [folder / shard for shard in sorted(set(weight_map.values()))]
    tensors = _read_files(shards, headers_only=headers_only)
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].file.name != shard:
            expected = f"a shard with {name}, as {INDEX_NAME} says"
            _fail(f"{folder / shard}", expected, "no such tensor in it", _AGAIN)
    return tensors


def _check_strays(folder: Path, named: set[str]) -> None:
    """Refuse a mismatch between the index and the files that mlx-lm would load."""
    present = {path.name for path in folder.glob(WEIGHTS_PATTERN)}
    if stray := sorted(present - named):
        found = f"a {INDEX_NAME} that does not name it"
        next_step = "One of the two is left over from another save: delete it."
        _fail(f"{folder / stray[0]}", "named by the index", found, next_step)
    if misnamed := sorted(named - present):
        next_step = f"Rename the file, and its name in {INDEX_NAME}."
        expected = f"named {WEIGHTS_PATTERN}, which is what mlx-lm loads"
        _fail(f"{folder / misnamed[0]}", expected, "another name", next_step)


def _weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a folder that has no index."""
    everything = _attempt(lambda: sorted(folder.iterdir()), folder)
    files = [p for p in everything if p.match(WEIGHTS_PATTERN)]
    if not files:
        _refuse_adapters(folder)
        others = [p.name for p in everything if p.suffix == ".safetensors"]
        if others:
            expected = f"weights named {WEIGHTS_PATTERN}"
            next_step = "Rename the file to model.safetensors if it is the model."
            _fail(f"{folder}", f"a folder with {expected}", others[0], next_step)
        _fail_other_format(folder, everything)
        expected = f"a folder with weights ({WEIGHTS_PATTERN})"
        _fail(f"{folder}", expected, "none there", "Download the checkpoint again.")
    names = {path.name for path in files}
    for name in sorted(names):
        if match := _SHARD_NAME.fullmatch(name):
            stem, _, count = match.groups()
            for i in range(1, int(count) + 1):
                shard = f"{stem}-{i:05d}-of-{count}.safetensors"
                if shard not in names:
                    expected = f"there beside {name}"
                    _fail(f"{folder / shard}", expected, "no such file", _AGAIN)
    return files


def _read_files(files: list[Path], *, headers_only: bool) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for path in files:
        _refuse_no_file(path)
        for name, tensor in read_header(path, headers_only=headers_only).items():
            if name in tensors:
                found = f"also in {tensors[name].file.name}"
                next_step = "Delete the file that is left over from another save."
                _fail(f"{name} in {path}", "in one file only", found, next_step)
            tensors[name] = tensor
    return tensors


def _refuse_no_file(path: Path) -> None:
    """Say what lies in the place of a file, if it is something else."""
    if _attempt(path.is_dir, path):
        _fail(f"{path}", "a file", "a folder", "Put the file itself in its place.")
    if path.is_symlink() and not path.exists():
        found = f"a link to {cut(_attempt(path.readlink, path))}, where nothing is"
        _fail(f"{path}", "a file", found, "Mend the link, or download the file again.")


def refuse_peft(folder: Path) -> None:
    """Refuse adapters that PEFT has trained, which mlx-lm does not read.

    Args:
        folder: A folder, maybe one with adapters.

    Raises:
        CheckpointError: It holds PEFT's.
    """
    has_weights = any(
        _attempt((folder / name).is_file, folder) for name in _PEFT_WEIGHTS
    )
    config = folder / ADAPTER_CONFIG_NAME
    if has_weights or (config.is_file() and "peft_type" in read_json(config)):
        _fail(f"the adapters in {folder}", "mlx-lm's", "PEFT's", MERGE)


def _refuse_adapters(folder: Path) -> None:
    """Tell adapters that are passed as a model."""
    refuse_peft(folder)
    if (folder / ADAPTER_CONFIG_NAME).is_file():
        next_step = "Pass the model they belong to, and them as adapter_path."
        _fail(f"{folder}", "a model", "adapters (--adapter-path)", next_step)


def _fail_other_format(folder: Path, files: list[Path]) -> None:
    """Name the format that was found instead of safetensors, if it is a known one."""
    suffixes = {path.suffix.lower() for path in files}
    if ".safetensors" in suffixes:
        return
    if ".gguf" in suffixes:
        next_step = "Take the safetensors repository of the same model instead."
        _fail(f"{folder}", "a safetensors checkpoint", "a GGUF file", next_step)
    if pickled := sorted(suffixes & {".bin", ".pt", ".pth"}):
        found = f"pickled weights (*{pickled[0]})"
        next_step = "Save the model again with safe_serialization=True in transformers."
        _fail(f"{folder}", "a safetensors checkpoint", found, next_step)


def _parse_object(raw: bytes, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:  # bad UTF-8 is a ValueError too
        reason = str(error).replace("\n", " ")
        what = "header" if path.suffix == ".safetensors" else "text"
        found = f"a broken {what} ({reason})"
        _fail(f"{path}", "readable JSON", found, _AGAIN)
    if not isinstance(value, dict):
        _fail(f"{path}", "a JSON object", type(value).__name__, _AGAIN)
    return value


def _attempt(read: Any, path: Path) -> Any:
    """Call ``read``; what the operating system refuses becomes one line."""
    try:
        return read()
    except OSError as error:
        next_step = "Check the path and its permissions."
        _fail(f"{path}", "readable", error.strerror or str(error), next_step)


def _fail(what: str, constraint: str, found: str, next_step: str) -> NoReturn:
    """Raise the one error of this module, cut where names of any length stand."""
    what, constraint, found, next_step = (
        cut(part) for part in (what, constraint, found, next_step)
    )
    raise CheckpointError(f"{what} must be {constraint}: got {found}. {next_step}")
