"""What a figure was measured on, in words: hardware and versions.

Standard library only, so that a process stays small that measures others.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path


def describe_machine(*details: str) -> str:
    """Return hardware and versions, one line.

    Args:
        details: More about the hardware, such as MLX's device.
    """
    cores = f"{os.cpu_count()} cores"
    return ", ".join(
        (cpu_name(), cores, *details, platform.system(), describe_versions())
    )


def describe_versions() -> str:
    """Return the versions of the package and of what it stands on, one line."""
    versions = (
        f"{name} {importlib.metadata.version(name)}"
        for name in ("mlx_gemma_mtp", "mlx", "mlx-lm")
    )
    return ", ".join((*versions, f"Python {platform.python_version()}"))


def cpu_name() -> str:
    """Return the processor's name as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.machine()
