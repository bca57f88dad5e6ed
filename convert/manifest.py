"""The manifest of a converted pair: what it was made of and what it should hold.

``mlx_gemma_mtp.json`` names both sources with their commits, both formats, how the pair
was found and every file of weights with its SHA-256. Nothing needs it to load; it is
for whoever wants to know, or to check a copy.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mlx_gemma_mtp._version import __version__
from mlx_gemma_mtp.checkpoints.checkpoint import (
    TRAINING_NAME,
    WEIGHTS_PATTERN,
    read_json,
)
from mlx_gemma_mtp.errors import OutputError

from .plan import PartPlan

MANIFEST_NAME = "mlx_gemma_mtp.json"
_MANIFEST_VERSION = 1


def part_entry(
    plan: PartPlan,
    *,
    source: str,
    revision: str | None,
    path: str,
    training: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return what the manifest says of one part.

    Args:
        plan: Its plan.
        source: The Hub id or the name of the folder it came from.
        revision: The commit, None where it is unknown.
        path: Its folder inside the result.
        training: How it was trained, as from ``read_training()``.
    """
    floats = {array.dtype for array in plan.arrays} & {"F32", "BF16", "F16"}
    entry = {
        "path": path,
        "source": source,
        "revision": revision,
        "quantization": plan.config.get("quantization"),
        "float_types": sorted(floats),
        "num_parameters": plan.num_weights,
        "num_bytes": plan.num_bytes,
    }
    return entry if training is None else {**entry, "training": dict(training)}


def manifest(
    target: dict[str, Any],
    drafter: dict[str, Any] | None,
    *,
    pairing: str,
    files: Mapping[str, Any],
) -> dict[str, Any]:
    """Return a manifest.

    Args:
        target: The target's entry, as from ``part_entry()``.
        drafter: The drafter's, None without one.
        pairing: Why this drafter goes with this target.
        files: File name to its size and its SHA-256.
    """
    return {
        "manifest_version": _MANIFEST_VERSION,
        "versions": {
            "mlx_gemma_mtp": __version__,
            "mlx": version("mlx"),
            "mlx_lm": version("mlx-lm"),
        },
        "target": target,
        "drafter": drafter,
        "pairing": pairing,
        "files": dict(files),
    }


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return a folder's manifest, empty if it has none that can be read.

    Args:
        folder: Any folder.
    """
    try:
        contents = json.loads((folder / MANIFEST_NAME).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return contents if isinstance(contents, dict) else {}


def read_origin(folder: Path) -> tuple[str, str | None] | None:
    """Return where a converted part came from: Hub id or folder's name, and commit.

    Args:
        folder: The folder of a target or of the drafter inside it.

    Returns:
        What the manifest says, None without one or where other weights lie there now.
    """
    for entry in _entries(folder):
        source, revision = entry.get("source"), entry.get("revision")
        if isinstance(source, str):
            return source, revision if isinstance(revision, str) else None
    return None


def read_training(folder: Path) -> dict[str, Any] | None:
    """Return how a drafter was trained.

    Args:
        folder: The folder of a drafter, converted or not.

    Returns:
        The record beside its weights, else the one in its manifest, else None.

    Raises:
        CheckpointError: The record is there and broken.
    """
    if (folder / TRAINING_NAME).is_file():
        return read_json(folder / TRAINING_NAME)
    for entry in _entries(folder):
        training = entry.get("training")
        if isinstance(training, dict):
            return training
    return None


def _entries(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield what manifests say of a folder whose weights are those they know."""
    for part, place, prefix in (
        ("target", folder, ""),
        ("drafter", folder.parent, f"{folder.name}/"),
    ):
        contents = read_manifest(place)
        entry, files = contents.get(part), contents.get("files")
        if not isinstance(entry, dict) or not isinstance(files, dict):
            continue
        known = {
            name: value.get("bytes") if isinstance(value, dict) else None
            for name, value in files.items()
            if name.startswith(prefix) and "/" not in name.removeprefix(prefix)
        }
        found = {
            f"{prefix}{path.name}": path.stat().st_size
            for path in folder.glob(WEIGHTS_PATTERN)
        }
        if known == found:
            yield entry


@contextmanager
def written_manifest(folder: Path, contents: Mapping[str, Any]) -> Iterator[None]:
    """Write a folder's manifest, which gets its name at the end of the block.

    Args:
        folder: The pair's folder.
        contents: As from ``manifest()``.

    Raises:
        OutputError: It cannot be written.
    """
    scratch = folder / f".{MANIFEST_NAME}.partial"
    try:
        scratch.write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")
        yield
        os.replace(scratch, folder / MANIFEST_NAME)
    except OSError as error:
        raise OutputError(
            f"{folder / MANIFEST_NAME} must be writable: got "
            f"{error.strerror or error}. Check the place, then run again."
        ) from error
    finally:
        scratch.unlink(missing_ok=True)
