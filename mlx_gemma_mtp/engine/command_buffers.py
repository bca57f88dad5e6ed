"""Whether rounds can be queued one behind the other on Metal and no slab is copied.

A slab is written in place only where nobody holds it (see ``cache/slabs.py``). A
command buffer holds what it reads until it has completed. MLX keeps 10 of them in
flight at most (``MAX_ACTIVE_TASKS``), beside the one that it encodes, and begins the
next one after so many operations or so many megabytes of inputs
(``CommandEncoder::needs_commit``), which count once and whole. Between the last reader
of a slab in one round and its write in the next lies a round, or most of it. So a round
that fills 12 buffers or more is written in place; where it fills fewer, all of a round
may be in flight, and every round may copy every slab.

By MLX's own limits every published pair fills more: E2B in 4 bits, the smallest, has
1.2 GB of weights that a pass reads, of which a buffer takes 40 or 50 MB.

Source: MLX 0.32, mlx/backend/metal/{device,eval}.cpp and mlx/transforms.cpp.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

LEAST_BUFFERS = 12
_LEAST_LAUNCHES = 11  # of a layer, however much of it is one kernel
_MB = 2**20


@dataclass(frozen=True)
class Limits:
    """When MLX begins the next command buffer.

    Attributes:
        operations: After more of them than this.
        megabytes: After more of inputs than this.
    """

    operations: int
    megabytes: int


def num_buffers(sizes: Iterable[int], num_layers: int, limits: Limits) -> int:
    """How many command buffers a plain round fills at least.

    Args:
        sizes: Of the arrays that it reads, in turn, bytes.
        num_layers: Of the target.
        limits: When a buffer is full.
    """
    by_bytes = held = 0
    for size in sizes:
        held += size
        if held // _MB > limits.megabytes:
            by_bytes, held = by_bytes + 1, 0
    by_launches = _LEAST_LAUNCHES * num_layers // (max(limits.operations, 0) + 1)
    return max(by_bytes, by_launches)
