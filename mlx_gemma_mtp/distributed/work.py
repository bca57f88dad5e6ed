"""Work that ranks do together, and rest between: all of them call these alike."""

from __future__ import annotations

import atexit
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakSet

from ..errors import MTPError, RanksError, RequestError
from .ranks import Ranks, failure

_AT_REST: WeakSet[Ranks] = WeakSet()
_AT_WORK: WeakSet[Ranks] = WeakSet()


def begin_work(ranks: Ranks) -> None:
    """Wait until all ranks have work. Nobody rests at first.

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
    if ranks in _AT_REST:
        if not ranks.wake():
            ranks.is_lost = True
            raise RanksError(
                f"Rank 0 must go on as long as rank {ranks.rank}: got its end. See "
                "what it wrote; one script must run on all ranks."
            )
        _AT_REST.discard(ranks)
    _AT_WORK.add(ranks)


def end_work(ranks: Ranks) -> None:
    """Rest until there is work; the program may do anything else meanwhile."""
    _AT_WORK.discard(ranks)
    if ranks.is_lost:
        return
    _AT_REST.add(ranks)
    ranks.rest()


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
    with ending_where_it_fails(ranks):
        yield
    end_work(ranks)


@contextmanager
def ending_where_it_fails(ranks: Ranks) -> Iterator[None]:
    """End the work where what is done inside fails.

    What the package refuses all ranks refuse alike. With anything else one may be by
    itself, and the others wait for it inside an exchange.
    """
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) and not isinstance(error, MTPError):
            ranks.is_lost = True
        end_work(ranks)
        raise


@atexit.register  # now: what runs at exit can register nothing
def _stay() -> None:
    """Do not end before rank 0, which would lose this rank; unless this one fails."""
    for ranks in [each for each in _AT_REST if not (each.is_first or each.is_lost)]:
        if failure() is None:
            _stay_with(ranks)
        else:
            ranks.close()


def _stay_with(ranks: Ranks) -> None:
    """Wait for rank 0's end; end with a line where something else comes."""
    try:
        if ranks.wake():
            ranks.watchdog.end(
                f"Rank {ranks.rank} must go on as long as rank 0: got its own end. Run "
                "one script on all ranks."
            )
    except RanksError as error:
        ranks.watchdog.end(str(error))
