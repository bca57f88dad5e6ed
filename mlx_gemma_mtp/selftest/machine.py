"""Section ``machine``: what everything else was measured on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

import mlx.core as mx

from ..kernels import common
from ..machine import cpu_name
from .result import INFO, Result

_PACKAGES = ("mlx", "mlx-lm", "mlx_gemma_mtp")


def look(allowance_s: float) -> Result:
    """Describe hardware, device, memory and versions.

    Args:
        allowance_s: Not needed.
    """
    info = dict(mx.device_info())
    figures: dict[str, Any] = {
        "processor": cpu_name(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()}",
        "mlx_device": str(mx.default_device()),
        "device_info": info,
        "memory_gb": memory_bytes() / 1e9,
        "kernels": common.backend(),
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in _PACKAGES},
        },
    }
    versions = (f"{name} {v}" for name, v in figures["versions"].items())
    chip = info.get("device_name") or figures["processor"]
    architecture = info.get("architecture", "")
    return Result(
        "machine",
        INFO,
        f"{chip}, {figures['cores']} cores, {figures['memory_gb']:.1f} GB",
        lines=(
            f"{figures['mlx_device']} {architecture}, kernels: {figures['kernels']}, "
            f"{figures['system']}",
            ", ".join(versions),
        ),
        figures=figures,
    )


def memory_bytes() -> int:
    """Memory that weights may take: the device's, as far as it says."""
    info = mx.device_info()
    size = info.get("memory_size") or info.get("total_memory")
    if size is None:
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(size)


def is_on_cpu() -> bool:
    """Whether MLX computes on the processor."""
    return bool(mx.default_device() == mx.Device(mx.cpu))
