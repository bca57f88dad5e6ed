"""The kernels that MLX compiles with g++ while it computes on a CPU.

Each fused part of a graph is one kernel, compiled where it is first needed and kept in
a folder for temporary files. Nearly all of that time goes into reading one header. So
the header is compiled ahead, into the kernels' own folder: g++ looks there first, and
leaves what does not suit its flags alone. Kernels are the same, byte for byte.

What g++ takes says nothing of how fast text is made: ``clock`` stands still meanwhile.
Knows nothing of MLX but its folders (mlx/backend/cpu/compiled.cpp, jit_compiler.cpp).
"""

from __future__ import annotations

import importlib.metadata
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

_HEADER = Path("mlx", "backend", "cpu", "compiled_preamble.h")
# MLX's own but for warnings: g++ takes a header of the same flags only.
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-w")
# What was compiled is there whole or not at all, even where this process ends first.
_COMPILE = 'g++ "$@" -o "$0.$$" && mv -f "$0.$$" "$0" || rm -f "$0.$$"'
# Where libstdc++ looks for the folder for temporary files, in this order.
_TEMPORARY = ("TMPDIR", "TMP", "TEMP", "TEMPDIR")
_WITH_CUDA = ("mlx-cuda-12", "mlx-cuda-13")  # there kernels are not g++'s

_jobs: dict[Path, subprocess.Popen[bytes]] = {}  # by what they make


def folder() -> Path:
    """Where MLX keeps the kernels that it compiles for the CPU."""
    named = [os.environ[name] for name in _TEMPORARY if os.environ.get(name)]
    place = Path(named[0] if named else "/tmp")
    return place / "mlx" / importlib.metadata.version("mlx") / "cpu"


def compile_header() -> subprocess.Popen[bytes] | None:
    """Begin to compile the header of all kernels, in a process of its own.

    Nothing waits for it: kernels that are needed before it is there take longer. It
    takes some two seconds and 50 MB of disk, once for a version of MLX.

    Returns:
        The process that does it; None where there is nothing to do, g++ compiles no
        kernels, or it has failed before.
    """
    include = _include_folder()
    made = folder() / f"{_HEADER}.gch"
    if include is None:
        return None
    if made in _jobs:
        return _jobs[made] if _jobs[made].poll() is None else None
    try:
        if made.exists():
            return None
        made.parent.mkdir(parents=True, exist_ok=True)
        flags = (*_FLAGS, "-I", str(include), "-x", "c++-header")
        job = subprocess.Popen(
            ["/bin/sh", "-c", _COMPILE, str(made), *flags, str(include / _HEADER)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Control-C is not meant for it
        )
    except OSError:  # nobody may look or write there: MLX will say so
        return None
    _jobs[made] = job
    return job


def clock() -> float:
    """Seconds that only ever grow, and do not while kernels are compiled."""
    return _builds.clock()


def num_compiled() -> int:
    """Kernels that were compiled since this process began."""
    _builds.look()
    return _builds.number


def num_kept() -> int:
    """Kernels that were there before this process began."""
    return _builds.num_before


def compile_seconds() -> float:
    """What they took, seconds."""
    _builds.look()
    return _builds.seconds


class Builds:
    """What MLX has compiled in a folder since this was made.

    Another process may compile there too: only what comes while this process's own
    children compute is counted, and no second twice.

    Args:
        place: The folder; it need not be there.

    Attributes:
        number: Kernels.
        seconds: What they took.
        num_before: Kernels that were there.
    """

    def __init__(self, place: Path) -> None:
        self.number = 0
        self.seconds = 0.0
        self._place = place
        self._lock = threading.Lock()
        self._children_s = _children_s()
        self._until_ns = time.time_ns()
        self._seen: set[str] = set()
        self.num_before = len(list(self._new()))
        self._last = time.perf_counter()
        self._stood_s = 0.0  # the clock, so far

    def look(self) -> None:
        """Count what has come."""
        with self._lock:
            self._look()

    def clock(self) -> float:
        """See ``clock``."""
        with self._lock:
            self._look()
            now = time.perf_counter()
            # What another thread has waited for may be longer than this look.
            owed = min(self.seconds - self._stood_s, now - self._last)
            self._stood_s += max(owed, 0.0)
            self._last = now
            return now - self._stood_s

    def _look(self) -> None:
        children_s = _children_s()
        if children_s == self._children_s:  # no compiler has run
            return
        self._children_s = children_s
        for start_ns, end_ns in sorted(self._new()):
            self.number += 1
            self.seconds += max(end_ns - max(start_ns, self._until_ns), 0) / 1e9
            self._until_ns = max(self._until_ns, end_ns)

    def _new(self) -> Iterator[tuple[int, int]]:
        """From when to when each new kernel was compiled: its source's age, its own."""
        try:
            with os.scandir(self._place) as entries:
                found = {entry.name: entry.stat().st_mtime_ns for entry in entries}
        except OSError:  # it is not there yet, or nobody may look
            return
        for name, end_ns in found.items():
            start_ns = found.get(f"{name[3:-3]}.cpp")
            if start_ns is None or name in self._seen or not name.endswith(".so"):
                continue
            self._seen.add(name)
            yield start_ns, end_ns


def _include_folder() -> Path | None:
    """MLX's headers; None where g++ compiles no kernels with them."""
    if sys.platform != "linux" or "MLX_DISABLE_COMPILE" in os.environ:
        return None
    if any(map(_is_installed, _WITH_CUDA)):
        return None
    spec = find_spec("mlx")
    places = (spec and spec.submodule_search_locations) or ()
    found = [Path(place) / "include" for place in places]
    return next((path for path in found if (path / _HEADER).exists()), None)


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _children_s() -> float:
    """CPU time of the processes that this one has waited for, seconds."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


_builds = Builds(folder())
