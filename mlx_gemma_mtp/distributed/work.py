"""Work that ranks do together, and rest between: all of them call these alike."""

from __future__ import annotations

import atexit
from contextlib import suppress
from weakref import WeakSet

from ..errors import RanksError
from .ranks import Ranks

_AT_REST: WeakSet[Ranks] = WeakSet()


def begin_work(ranks: Ranks) -> None:
    """Wake the others on rank 0; wait for that on them. Nobody rests at first.

    Raises:
        RanksError: Rank 0 has ended.
    """
    if ranks not in _AT_REST:
        return
    _AT_REST.discard(ranks)
    if ranks.is_first:
        ranks.wake()
        return
    atexit.unregister(_stay)
    if not ranks.wait_for_work():
        raise RanksError(
            f"Rank 0 must go on as long as rank {ranks.rank}: got its end. Run one "
            "script on all ranks."
        )


def end_work(ranks: Ranks) -> None:
    """Sleep until there is work; rank 0 may do anything else meanwhile."""
    if ranks.is_lost:
        return
    _AT_REST.add(ranks)
    if ranks.is_first:
        ranks.rest()
    else:
        atexit.register(_stay, ranks)


def _stay(ranks: Ranks) -> None:
    """Do not end before rank 0, which would lose this rank."""
    with suppress(RanksError):
        if not ranks.is_lost:
            ranks.wait_for_work()
