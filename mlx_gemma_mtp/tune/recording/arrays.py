"""Files of arrays, whole or not at all. Knows nothing of what they are."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import mlx.core as mx

from ...errors import OutputError

Arrays = dict[str, mx.array]


def write_arrays(path: Path, arrays: Arrays, metadata: Mapping[str, str]) -> int:
    """Write a safetensors file; gives its bytes.

    Raises:
        OutputError: It cannot be written.
    """
    # Another process may write the same file.
    scratch = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        mx.save_safetensors(str(scratch), arrays, dict(metadata))
        os.replace(scratch, path)
        return path.stat().st_size
    except (OSError, RuntimeError) as error:  # MLX's own where it cannot write
        raise not_writable(path, error) from error


def not_writable(path: Path, error: OSError | RuntimeError) -> OutputError:
    """What to raise where a run's file or folder cannot be written."""
    reason = error.strerror if isinstance(error, OSError) else None
    return OutputError(
        f"{path} must be writable: got {reason or str(error).rstrip('.')}. Check the "
        "disk, then --resume, or take another --work."
    )


def read_arrays(path: Path) -> tuple[Arrays, dict[str, str]]:
    """The arrays and the metadata of a file; arrays are read when they are used.

    Raises:
        OutputError: The file is damaged.
    """
    try:
        found = mx.load(str(path), return_metadata=True)
    except RuntimeError as error:
        raise OutputError(
            f"{path} must be a file that a run wrote: got {error}. Remove it, then "
            "--resume."
        ) from error
    return cast(tuple[Arrays, dict[str, str]], found)
