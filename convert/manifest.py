"""The manifest of a converted pair: what it was made of and what it should hold.

``mlx_gemma_mtp.json`` names both sources with their commits, both formats, how the pair
was found and every file of weights with its SHA-256. Nothing needs it to load; it is
for whoever wants to know, or to check a copy.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx_gemma_mtp

from .plan import PartPlan
from .sources import Source

MANIFEST_NAME = "mlx_gemma_mtp.json"
_MANIFEST_VERSION = 1


def part_entry(source: Source, plan: PartPlan, path: str) -> dict[str, Any]:
    """Return what the manifest says of one part.

    Args:
        source: Where it came from.
        plan: Its plan.
        path: Its folder inside the result.
    """
    dtypes = {array.dtype for array in plan.arrays if array.dtype[-1:].isdigit()}
    floats = sorted(dtypes & {"F32", "BF16", "F16"})
    return {
        "path": path,
        "source": source.name,
        "revision": source.revision,
        "quantization": plan.config.get("quantization"),
        "float_types": floats,
        "num_parameters": plan.num_weights,
        "num_bytes": plan.num_bytes,
    }


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
            "mlx_gemma_mtp": mlx_gemma_mtp.__version__,
            "mlx": version("mlx"),
            "mlx_lm": version("mlx-lm"),
        },
        "target": target,
        "drafter": drafter,
        "pairing": pairing,
        "files": dict(files),
    }


def write_manifest(folder: Path, contents: Mapping[str, Any]) -> None:
    """Write or replace a folder's manifest in one step.

    Args:
        folder: The pair's folder.
        contents: As from ``manifest()``.
    """
    scratch = folder / f".{MANIFEST_NAME}.partial"
    scratch.write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")
    os.replace(scratch, folder / MANIFEST_NAME)
