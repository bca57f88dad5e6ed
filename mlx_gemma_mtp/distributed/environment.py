"""How many ranks were launched, by the variables that ``mlx.launch`` and MPI set.

MLX is not asked: its ``init`` waits for the others, and one process needs none.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import RanksError, cut, shorten

_RANK = ("JACCL_RANK", "MLX_RANK")
# Files with one entry a rank: RDMA devices, addresses.
_RDMA = ("JACCL_IBV_DEVICES", "MLX_IBV_DEVICES")
_FILES = (*_RDMA, "MLX_HOSTFILE")
_NCCL_SIZE = "MLX_WORLD_SIZE"
_MPI_SIZE = "OMPI_COMM_WORLD_SIZE"
_MPI_RANK = "OMPI_COMM_WORLD_RANK"


def num_launched(environ: Mapping[str, str]) -> int:
    """Ranks that were launched together with this process, which is one of them.

    Args:
        environ: The process's variables.

    Raises:
        RanksError: The variables contradict each other, or name no file.
    """
    rank = next((name for name in _RANK if name in environ), None)
    if rank is None:
        return _count(environ, _MPI_SIZE)
    file = next((name for name in _FILES if name in environ), None)
    size = _count(environ, _NCCL_SIZE) if file is None else _entries(environ, file)
    if environ[rank] not in map(str, range(size)):
        raise RanksError(
            f"{rank} must be a rank below {size}: got {shorten(environ[rank])}."
            " Start with mlx.launch, or unset it."
        )
    return size


def is_first(environ: Mapping[str, str]) -> bool:
    """Whether this process is rank 0, or alone.

    Args:
        environ: The process's variables.
    """
    return all(environ.get(name, "0") == "0" for name in (*_RANK, _MPI_RANK))


def has_rdma(environ: Mapping[str, str]) -> bool:
    """Whether ranks speak by RDMA (JACCL)."""
    return any(name in environ for name in _RDMA)


def _count(environ: Mapping[str, str], name: str) -> int:
    text = environ.get(name, "1")
    if not text.isdecimal() or not int(text):
        raise RanksError(
            f"{name} must be a number of ranks: got {shorten(text)}."
            " Start with mlx.launch, or unset it."
        )
    return int(text)


def _entries(environ: Mapping[str, str], name: str) -> int:
    """Ranks in a file; ``mlx.launch`` writes an empty one for one process."""
    hosts: Any = None
    try:
        text = Path(environ[name]).read_text(encoding="utf-8")
        hosts = json.loads(text) if text.strip() else [[]]
    except (OSError, ValueError):
        pass
    if not isinstance(hosts, list) or not hosts:
        raise RanksError(
            f"{name} must name a JSON list with one entry per rank:"
            f" got {cut(environ[name])}. Start with mlx.launch, or unset it."
        )
    return len(hosts)
