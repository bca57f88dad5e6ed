"""The wired limit: keeps weights in memory while tokens are made, on a Mac.

Without it macOS may page weights out between rounds. The limit is the process's, so it
is raised by the first generation and put back by the last one that ends, in whatever
order they do. Knows nothing of models but their size.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx

logger = logging.getLogger("mlx_gemma_mtp")

_lock = threading.Lock()
_num_users = 0
_old_limit = 0


@contextmanager
def wired(num_bytes: int) -> Iterator[None]:
    """Raise the wired limit to what the device recommends, where it has one.

    Args:
        num_bytes: Size of the weights, target and drafter together; a warning says
            when they come close to the limit.
    """
    limit = mx.device_info().get("max_recommended_working_set_size")
    if limit is None:
        yield
        return
    if num_bytes > 0.9 * int(limit):
        logger.warning(
            "the weights take %d MB of the %d MB that this machine recommends: "
            "generation can be slow. Take a model with fewer bits.",
            num_bytes // 2**20,
            int(limit) // 2**20,
        )
    _enter(int(limit))
    try:
        yield
    finally:
        try:
            mx.synchronize()  # the limit must not change under running work
        finally:
            _leave()  # also where that work has failed


def _enter(limit: int) -> None:
    global _num_users, _old_limit
    with _lock:
        if _num_users == 0:
            _old_limit = mx.set_wired_limit(limit)
        _num_users += 1


def _leave() -> None:
    global _num_users
    with _lock:
        _num_users -= 1
        if _num_users == 0:
            mx.set_wired_limit(_old_limit)
