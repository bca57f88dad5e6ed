"""Runs a compiled kernel on arrays of numpy: in this process, or in one of its own.

Run by run_under_tsan: python -m tests.metal.launch FILE   # a pickled Launch
"""

from __future__ import annotations

import ctypes
import pickle
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np

TIME_LIMIT_S = 60  # of processor time; a kernel that waits for itself never ends
MESSAGE_BYTES = 1000

_lock = threading.Lock()  # signal handlers and alternate stacks belong to the process


class MetalError(Exception):
    """A kernel does not compile, or does what a GPU does not define."""


class _Settings(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("threadgroup", ctypes.c_uint * 3),
        ("seed", ctypes.c_uint64),
        ("noise_ulps", ctypes.c_int),
        ("time_limit_s", ctypes.c_int),
    )


class _Buffer(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("data", ctypes.c_void_p),
        ("size", ctypes.c_size_t),
        ("is_output", ctypes.c_int),
    )


@dataclass(frozen=True)
class Buffer:
    """One argument of a kernel; a launch writes to ``array`` if it is an output."""

    name: str
    array: np.ndarray
    is_output: bool


@dataclass(frozen=True)
class Launch:
    """A compiled kernel with all that it runs on."""

    library: Path
    buffers: list[Buffer]
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]

    def run(self, *, seed: int = 1, noise_ulps: int = 0) -> None:
        """Run the grid; the arrays of output buffers get the results.

        Args:
            seed: Chooses the order in which threads run.
            noise_ulps: How far transcendental functions may be off.

        Raises:
            MetalError: The kernel did something that a GPU does not define.
        """
        settings = _Settings(
            self.grid, self.threadgroup, seed, noise_ulps, TIME_LIMIT_S
        )
        buffers = (_Buffer * len(self.buffers))(
            *(
                _Buffer(
                    b.name.encode(), b.array.ctypes.data, b.array.nbytes, b.is_output
                )
                for b in self.buffers
            )
        )
        message = ctypes.create_string_buffer(MESSAGE_BYTES)
        with _lock:
            failed = load(self.library).shim_launch(
                ctypes.byref(settings),
                buffers,
                len(buffers),
                message,
                ctypes.c_size_t(MESSAGE_BYTES),
            )
        if failed:
            raise MetalError(message.value.decode(errors="replace"))


def load(library: Path) -> ctypes.CDLL:
    """Load a compiled kernel, and libstdc++ before it: it is linked without."""
    ctypes.CDLL("libstdc++.so.6", mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(library))


if __name__ == "__main__":
    pickle.loads(Path(sys.argv[1]).read_bytes()).run()
