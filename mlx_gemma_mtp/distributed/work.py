"""Work that ranks do together, and rest between: all of them call these alike."""

from __future__ import annotations

import atexit
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from weakref import WeakSet

from ..errors import RanksError, RequestError
from .ranks import Ranks

_AT_REST: WeakSet[Ranks] = WeakSet()
_AT_WORK: WeakSet[Ranks] = WeakSet()


def begin_work(ranks: Ranks) -> None:
    """Wake the others on rank 0; wait for that on them. Nobody rests at first.

    Raises:
        RanksError: Rank 0 has ended, or the ranks have lost each other.
        RequestError: They are at work.
    """
    ranks.check()
    if ranks in _AT_WORK:
        raise RequestError(
            "several machines must decode one text at a time: got another one. Take "
            "the first one to its end, or close it."
        )
    _AT_WORK.add(ranks)
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
    _AT_WORK.discard(ranks)
    if ranks.is_lost:
        return
    _AT_REST.add(ranks)
    if ranks.is_first:
        ranks.rest()
    else:
        atexit.register(_stay, ranks)


@contextmanager
def working(ranks: Ranks | None) -> Iterator[None]:
    """What is done inside needs all ranks, where there are several.

    Raises:
        RanksError: Rank 0 has ended, or the ranks have lost each other.
        RequestError: They are at work.
    """
    if ranks is None:
        yield
        return
    begin_work(ranks)
    try:
        yield
    finally:
        end_work(ranks)


def _stay(ranks: Ranks) -> None:
    """Do not end before rank 0, which would lose this rank."""
    with suppress(RanksError):
        if not ranks.is_lost:
            ranks.wait_for_work()
