"""Start again with OpenBLAS in front of the BLAS that MLX's Linux wheel brings.

That wheel multiplies float32 matrices with a reference BLAS that does every row by
itself, so several rows cost as many times one. With OpenBLAS a few rows cost what one
costs, as on a GPU: the set-up for the cost of verification on a CPU, and for training.
"""

from __future__ import annotations

import ctypes.util
import os
import sys
from collections.abc import Callable

import mlx.core as mx

_MARK = "MLX_GEMMA_MTP_BLAS"
_NAMES = ("libopenblas.so.0", "libopenblas.so")
INSTALL = "apt-get install libopenblas0-pthread"
_MISSING = (
    f"--openblas needs libopenblas: got none. {INSTALL}, or name the file: --openblas "
    "/path/to/libopenblas.so.0"
)


def described() -> list[str]:
    """A detail for the machine's line; none where MLX has its own BLAS."""
    name = os.environ.get(_MARK)
    return [f"{name} preloaded, 1 thread"] if name else []


def require(library: str) -> None:
    """Start again with a library, once.

    Args:
        library: Its file; empty to look for it.

    Raises:
        SystemExit: It is not there, in one line.
    """
    if not _start_again([library] if library else _candidates()):
        raise SystemExit(_MISSING)


def prefer(tell: Callable[[str], None]) -> None:
    """Start again with OpenBLAS, once, where MLX computes on Linux's CPU.

    Args:
        tell: Called with a line where it is not there; work goes on without it.
    """
    is_slow = sys.platform == "linux" and mx.default_device() == mx.cpu
    if is_slow and not _start_again(_candidates()):
        tell(f"OpenBLAS is not there: training takes longer without it. {INSTALL}")


def _start_again(candidates: list[str]) -> bool:
    """Replace this process by itself with the first library that there is preloaded.

    Returns:
        False where there is none; True in the process that has it already.
    """
    if os.environ.get(_MARK):
        return True
    found = next(filter(_can_load, candidates), None)
    if found is None:
        return False
    environment = {
        **os.environ,
        "LD_PRELOAD": ":".join(filter(None, [found, os.environ.get("LD_PRELOAD")])),
        "OPENBLAS_NUM_THREADS": "1",
        # The name alone: where it lies would tell of this machine.
        _MARK: os.path.basename(found),
    }
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def _candidates() -> list[str]:
    return [*filter(None, [ctypes.util.find_library("openblas")]), *_NAMES]


def _can_load(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True
