"""g++ as MLX calls it for fused kernels of the CPU, with MLX's header compiled once.

A kernel is a few lines behind a header that takes g++ four fifths of its time. The g++
that ``install`` puts in front keeps that header compiled in build/gxx, for every
process of the tests. The machine code is the same. A compiled header that does not fit
is passed over by g++ itself.

Run by that g++: python tests/gxx.py COMPILER ARGUMENTS...
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HEADER = "mlx/backend/cpu/compiled_preamble.h"
PLACE = Path(__file__).parents[1] / "build" / "gxx"  # git ignores build/


def install() -> None:
    """Let this process and those that it starts find the quick g++ first."""
    compiler = shutil.which("g++")
    folder = PLACE / "bin"
    if sys.platform != "linux" or compiler is None or Path(compiler).parent == folder:
        return
    command = shlex.join([sys.executable, "-SE", __file__, compiler])
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=folder, delete=False) as file:
        file.write(f'#!/bin/sh\nexec {command} "$@"\n')
    os.chmod(file.name, 0o755)
    os.replace(file.name, folder / "g++")  # another run may be calling it
    os.environ["PATH"] = os.pathsep.join([str(folder), os.environ["PATH"]])


def _folder_of_header(compiler: str, flags: list[str]) -> Path | None:
    """The folder to search first: MLX's header is there as g++ reads it fastest.

    Args:
        compiler: The path of g++.
        flags: All that a kernel is compiled with; a header must be compiled with the
            same.

    Returns:
        None if the flags name no folder of MLX's.
    """
    places = (Path(flag, HEADER) for flag in flags)
    header = next((place for place in places if place.exists()), None)
    if header is None:
        return None
    ages = [str(Path(path).stat().st_mtime_ns) for path in (compiler, header)]
    key = hashlib.sha256("\0".join([compiler, *flags, *ages]).encode()).hexdigest()
    folder = PLACE / key[:24]
    made = folder / f"{HEADER}.gch"
    if not made.exists():
        made.parent.mkdir(parents=True, exist_ok=True)
        part = made.with_name(f"{os.getpid()}.part")
        command = [compiler, *flags, "-w", "-x", "c++-header", str(header), "-o"]
        subprocess.run([*command, str(part)], check=True)
        os.replace(part, made)
    return folder


def main(compiler: str, *arguments: str) -> None:
    """Become g++; MLX's calls end with the source, ``-o`` and the library."""
    folder = _folder_of_header(compiler, list(arguments[:-3]))
    first = ["-I", str(folder)] if folder else []
    os.execv(compiler, [compiler, *first, *arguments])


if __name__ == "__main__":
    main(*sys.argv[1:])
