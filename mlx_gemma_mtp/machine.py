"""What a figure was measured on: hardware, versions, settings.

Standard library only, so that a process stays small that measures others.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from pathlib import Path

# The variables by which MLX 0.32 lets its users choose kernels, numbers or speed, from
# its sources. No others are looked at: what they hold is nobody's business.
MLX_SETTINGS = (
    "MLX_BFS_MAX_WIDTH",
    "MLX_CUDA_GRAPH_CACHE_SIZE",
    "MLX_CUDA_SDPA_CACHE_SIZE",
    "MLX_CUDA_USE_CUDNN_SDPA",
    "MLX_DISABLE_COMPILE",
    "MLX_ENABLE_TF32",
    "MLX_MAX_MB_PER_BUFFER",
    "MLX_MAX_OPS_PER_BUFFER",
    "MLX_METAL_FAST_SYNCH",
    "MLX_METAL_GPU_ARCH",
    "MLX_RESIDENCY_SET_MAX_PCT",
    "MLX_SDPA_BLOCKS",
    "MLX_USE_CUDA_GRAPHS",
)

# Operations and megabytes of a command buffer, by the size of the GPU (MLX 0.32).
_LIMITS = {"p": (20, 40), "s": (50, 50), "d": (50, 50)}
_OTHER_LIMITS = (40, 40)

_ARCHITECTURE = re.compile(r"applegpu_g(\d+)([a-z])")


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


def system_version() -> str:
    """Return the system's version: macOS's own, elsewhere the kernel's."""
    return platform.mac_ver()[0] or platform.release()


def mlx_settings() -> dict[str, str]:
    """Return the variables of ``MLX_SETTINGS`` that are set."""
    return {name: os.environ[name] for name in MLX_SETTINGS if name in os.environ}


def command_buffer_limits(architecture: str | None) -> tuple[int, int] | None:
    """Return the user's limits of Metal's command buffers; None where none is set.

    Args:
        architecture: As for ``apple_gpu``; MLX has other limits for other sizes.

    Returns:
        Operations, and megabytes of inputs.
    """
    found = mlx_settings()
    gpu = apple_gpu(architecture)
    operations, megabytes = _LIMITS.get(gpu[1] if gpu else "", _OTHER_LIMITS)
    names = ("MLX_MAX_OPS_PER_BUFFER", "MLX_MAX_MB_PER_BUFFER")
    if not any(name in found for name in names):
        return None
    return (
        _whole(found.get(names[0]), operations),
        _whole(found.get(names[1]), megabytes),
    )


def _whole(text: str | None, other: int) -> int:
    """The whole number that a text begins with, as C reads it; else the other one."""
    if text is None:
        return other
    match = re.match(r"\s*[+-]?\d+", text)
    return int(match[0]) if match else 0


def apple_gpu(architecture: str | None) -> tuple[int, str] | None:
    """Return generation and size of a GPU of Apple's; None for any other.

    Args:
        architecture: ``mx.device_info()["architecture"]``, such as "applegpu_g15s".

    Returns:
        The generation (13 is M1, 14 M2, and so on) and the letter of the size.
    """
    match = _ARCHITECTURE.fullmatch(architecture or "")
    return None if match is None else (int(match[1]), match[2])
