"""MLX's kernels for the CPU compiled in a fifth of the time.

MLX compiles every fused graph with g++, once per folder of temporary files, and nearly
all of that time goes into reading one header. Read once, it serves every kernel: g++
finds it in the kernel's own folder. Knows nothing of tests.
"""

import os
import subprocess
import tempfile
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx

_HEADER = Path("mlx/backend/cpu/compiled_preamble.h")
# Those of MLX but for -Wall: with others g++ would leave the result alone.
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-w", "-x", "c++-header")


def read_header() -> None:
    """Compiles MLX's header for kernels to come, where MLX compiles kernels by g++.

    Processes of one folder of temporary files share it, and the kernels too: MLX writes
    each under a name of its own and renames it. Where g++ takes none, nothing is lost.
    """
    include = Path(mx.__file__).parent / "include"
    place = Path(tempfile.gettempdir(), "mlx", version("mlx"), "cpu", _HEADER.parent)
    made = place / f"{_HEADER.name}.gch"
    if made.exists() or not (include / _HEADER).exists():
        return
    place.mkdir(parents=True, exist_ok=True)
    part = made.with_suffix(f".{os.getpid()}")
    command = ["g++", *_FLAGS, str(include / _HEADER), "-I", str(include)]
    try:
        subprocess.run([*command, "-o", str(part)], check=True, capture_output=True)
        part.replace(made)
    except (OSError, subprocess.CalledProcessError):
        part.unlink(missing_ok=True)
