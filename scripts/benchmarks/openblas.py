"""Start again with OpenBLAS in front of the BLAS that MLX's Linux wheel brings.

That wheel multiplies float32 matrices with a reference BLAS that does every row by
itself, so several rows cost as many times one. With OpenBLAS a few rows cost what one
costs, as on a GPU: the set-up for the cost of verification on a CPU.
"""

from __future__ import annotations

import ctypes.util
import os
import sys

_MARK = "MLX_GEMMA_MTP_BENCH_BLAS"
_NAMES = ("libopenblas.so.0", "libopenblas.so")
_MISSING = (
    "--openblas needs libopenblas: got none. apt-get install libopenblas0-pthread, or "
    "name the file: --openblas /path/to/libopenblas.so.0"
)


def described() -> list[str]:
    """A detail for the machine's line; none where MLX has its own BLAS."""
    name = os.environ.get(_MARK)
    return [f"{name} preloaded, 1 thread"] if name else []


def start_again(library: str) -> None:
    """Replace this process by itself with the library preloaded, once.

    Args:
        library: Its file; empty to look for it.

    Raises:
        SystemExit: It is not there, in one line.
    """
    if os.environ.get(_MARK):
        return
    found = next(filter(_can_load, [library] if library else _candidates()), None)
    if found is None:
        raise SystemExit(_MISSING)
    # The name alone would tell where it lies on this machine.
    environment = {
        **os.environ,
        "LD_PRELOAD": found,
        "OPENBLAS_NUM_THREADS": "1",
        _MARK: os.path.basename(found),
    }
    os.execve(sys.executable, [sys.executable, *sys.argv], environment)


def _candidates() -> list[str]:
    return [*filter(None, [ctypes.util.find_library("openblas")]), *_NAMES]


def _can_load(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True
