"""The ranks of a launched program: small values from one to all, and rest between work.

Stands on ``mx.distributed`` alone, whichever backend that finds. Exchanges run on the
CPU stream and are over when a method returns. All ranks must call the same methods in
the same order, and no other collective may be under way meanwhile. Knows nothing of
models.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any
from weakref import WeakKeyDictionary

import mlx.core as mx

from ..errors import RanksError, described
from .beats import Beats
from .environment import num_launched
from .headers import Header, Kind, Word, headers_of
from .patience import Patience
from .watchdog import LIMIT_S, Watchdog

# For the others to be launched. A rank that connects to another gives up after 31 s.
_CONNECT_S = 60.0
# What backends raise, and how they begin it.
_ERRORS = (RuntimeError, ValueError)
_BACKENDS = ("[ring]", "[jaccl]", "[mpi]", "[nccl]")


class Ranks:
    """This process among the others.

    Args:
        group: All of them.
        watchdog: Ends this process when the others are silent; by default a new one,
            which is started.

    Attributes:
        group: What the engine's own collectives name.
        rank: This process.
        size: How many there are.
        watchdog: Ends this process when the others are silent.
        is_lost: Whether the ranks are out of step, or have lost each other: nothing
            goes on together.
    """

    def __init__(
        self, group: mx.distributed.Group, watchdog: Watchdog | None = None
    ) -> None:
        self.group = group
        self.rank = group.rank()
        self.size = group.size()
        self._number = 0
        self._says = Word.IDLE  # in the next beat
        self._has_ended = False  # rank 0, with this exception, if one has ended it
        self._failure: str | None = None
        self._own_failure: str | None = None
        self.is_lost = False
        self._patiences: WeakKeyDictionary[object, Patience] = WeakKeyDictionary()
        if watchdog is None:
            watchdog = Watchdog(self.rank, self.size)
            watchdog.start()
        self.watchdog = watchdog
        self._beats = Beats(self._beat, self._end)
        if self.is_first:  # now: what runs at exit can register nothing
            atexit.register(self.close)

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which decides and prints."""
        return self.rank == 0

    def share(self, value: Any = None) -> Any:
        """Rank 0's value on every rank.

        Args:
            value: What JSON can hold; of other ranks it is ignored.

        Returns:
            The value as JSON gives it back, on rank 0 too.

        Raises:
            RanksError: The ranks are out of step, or have lost each other.
        """
        self._check_awake()
        return self._shared(value)

    def _shared(self, value: Any) -> Any:
        """See ``share``; also in the beat that ends a rest."""
        sent = _to_bytes(value) if self.is_first else b""
        header = self._meet(self._header(Kind.SHARE, sent))[0]
        blank = bytes(header.value)
        with self.exchange(header.name):
            summed = mx.distributed.all_sum(
                _array_of(sent if self.is_first else blank),
                group=self.group,
                stream=mx.cpu,
            )
            received = _bytes_of(summed)
        header.check(received, 0)
        return json.loads(received)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value on every rank, by rank.

        Args:
            value: What JSON can hold.

        Raises:
            RanksError: The ranks are out of step, or have lost each other.
        """
        self._check_awake()
        sent = _to_bytes(value)
        headers = self._meet(self._header(Kind.GATHER, sent))
        width = max(header.value for header in headers)
        with self.exchange(headers[0].name):
            joined = mx.distributed.all_gather(
                _array_of(sent.ljust(width)), group=self.group, stream=mx.cpu
            )
            received = _bytes_of(joined)
        values = []
        for rank, header in enumerate(headers):
            payload = received[rank * width : rank * width + header.value]
            header.check(payload, rank)
            values.append(json.loads(payload))
        return values

    def barrier(self, limit_s: float = LIMIT_S) -> None:
        """Wait until all ranks are here.

        Args:
            limit_s: Seconds after which the watchdog ends this rank.

        Raises:
            RanksError: The ranks are out of step, or have lost each other.
        """
        self._check_awake()
        self._meet(self._header(Kind.BARRIER), limit_s)

    def all_say(self, is_so: bool, limit_s: float = LIMIT_S) -> bool:
        """Whether all ranks say yes.

        Args:
            is_so: What this one says.
            limit_s: Seconds after which the watchdog ends this rank.

        Raises:
            RanksError: The ranks are out of step, or have lost each other.
        """
        self._check_awake()
        headers = self._meet(Header(Kind.VOTE, self._number, int(is_so)), limit_s)
        return all(header.value for header in headers)

    @contextmanager
    def exchange(self, what: str, limit_s: float = LIMIT_S) -> Iterator[None]:
        """What is evaluated inside needs the other ranks, and hears of them.

        Args:
            what: What it is, for messages.
            limit_s: Seconds after which the watchdog ends this rank.

        Raises:
            RanksError: The backend has lost a rank.
        """
        try:
            with self.watchdog.waiting(what, limit_s):
                yield
        except _ERRORS as error:
            if not str(error).startswith(_BACKENDS):
                raise
            self.is_lost = True
            raise RanksError(
                f"Rank {self.rank} of {self.size} must hear of the others:"
                f" got {described(error)} in {what}. See what the other ranks wrote,"
                " then start all again."
            ) from error
        self.watchdog.beat()

    @contextmanager
    def long_exchange(self, what: str, size: int, worker: object) -> Iterator[None]:
        """An exchange that takes as long as a piece of work, see ``Patience``.

        Args:
            what: What it is, for messages.
            size: Of the piece.
            worker: What does it; each has a speed of its own.

        Raises:
            RanksError: The backend has lost a rank.
        """
        patience = self._patiences.setdefault(worker, Patience())
        start = time.monotonic()
        with self.exchange(what, patience.limit_s(size)):
            yield
        patience.note(size, time.monotonic() - start)

    def check(self) -> None:
        """Check that the ranks go on together.

        Raises:
            RanksError: They have lost each other.
        """
        if self.is_lost:
            raise RanksError(
                f"Rank {self.rank} of {self.size} must go on with the others: got out "
                "of step before, or has lost them. Start all again."
            )

    def rest(self) -> None:
        """This rank has no work for now: it beats now and then, and sleeps between.

        All ranks do so. Until ``wake`` they take part in nothing else, and may do
        anything by themselves. If rank 0's program ends before, the others hear it.
        """
        if not self._beats.is_resting:
            self._says = Word.IDLE
            self._beats.start()

    def wake(self) -> bool:
        """This rank has work: wait until all have some.

        Who sleeps hears of it behind its pause, of at most 45 ms.

        Returns:
            Whether all have work; else rank 0 has ended.

        Raises:
            RanksError: The ranks are out of step, or have lost each other, or an
                exception has ended rank 0.
        """
        self._says = Word.WORK
        try:
            self._beats.wait()
        except KeyboardInterrupt:
            self._says = Word.IDLE
            raise
        if self._failure is not None:
            self.is_lost = True
            raise RanksError(
                f"Rank 0 must go on as long as rank {self.rank}: got {self._failure} "
                "there. See what it wrote, then start all again."
            )
        return not self._has_ended

    def give_up(self, error: BaseException) -> None:
        """This program is about to end with an error that it has caught."""
        self._own_failure = described(error)

    def close(self) -> None:
        """End the rest, if this is one, with this rank's program.

        Rank 0 says so, and the exception that ends it, if one does. Another rank just
        beats no more: the others lose it.
        """
        if not self.is_first:
            self._beats.stop()
        elif self._beats.is_resting:
            self._says = Word.END
            with suppress(RanksError):
                self._beats.wait()

    def _end(self, line: str) -> None:
        """End this program, which has lost the others at rest.

        One that fails by itself has its own error to say, and may clean up first.
        """
        if self._own_failure or failure() or _is_handling():
            time.sleep(LIMIT_S)  # the program's end ends this thread too
        self.watchdog.end(line)

    def _beat(self) -> bool:
        """A beat; whether the rest is over."""
        mine = Header(Kind.BEAT, self._number, self._says)
        said = [header.value for header in self._meet(mine)]
        self._has_ended = said[0] == Word.END
        if self._has_ended:
            self._failure = self._shared(self._own_failure or failure())
        return self._has_ended or all(word == Word.WORK for word in said)

    def _header(self, kind: Kind, payload: bytes = b"") -> Header:
        return Header.of(kind, self._number, payload)

    def _check_awake(self) -> None:
        assert not self._beats.is_resting, "wake the others first"

    def _meet(self, header: Header, limit_s: float = LIMIT_S) -> list[Header]:
        """Every rank's header, where all mean the same exchange."""
        self.check()
        self._number += 1
        with self.exchange(header.name, limit_s):
            row = mx.array([header.row], dtype=mx.uint32)  # [1, 4]
            rows = mx.distributed.all_gather(row, group=self.group, stream=mx.cpu)
            met: Any = rows.tolist()  # [ranks, 4]
        try:
            return headers_of(met, header, self.rank)
        except RanksError:
            self.is_lost = True
            raise


def failure() -> str | None:
    """The exception that ends this program, on one line; None where none does.

    Python has it where the program's main part has ended: for what runs at exit.
    """
    if "ps1" in vars(sys):  # somebody types, and goes on behind it
        return None
    error: BaseException | None = vars(sys).get("last_value")
    return None if error is None else described(error)


def _is_handling() -> bool:
    """Whether the main thread is handling an exception."""
    main: Any = threading.main_thread().ident
    error: Any = sys._current_exceptions().get(main)
    return error not in (None, (None, None, None))  # before Python 3.12 there are three


@functools.cache
def launched() -> Ranks | None:
    """The ranks that this process was launched with; None where it is alone.

    Found in the environment, so that one process pays nothing. Connects to the others
    when it is first called.

    Raises:
        RanksError: The environment is wrong, or the others do not come.
    """
    size = num_launched(os.environ)
    if size == 1:
        return None
    try:
        with _interrupted_after(_CONNECT_S) as interrupts:
            group = mx.distributed.init(strict=True)
    except _ERRORS as error:
        found = f"none for {_CONNECT_S:g} s" if interrupts else described(error)
        raise RanksError(
            f"All {size} ranks must be reached: got {found}. Start all at once with"
            " mlx.launch, and see that no other program uses their ports."
        ) from error
    return ranks_of(group)


@functools.cache
def ranks_of(group: mx.distributed.Group) -> Ranks:
    """The ranks of a group: always the same object, as exchanges are numbered."""
    return Ranks(group)


@contextmanager
def _interrupted_after(limit_s: float) -> Iterator[list[int]]:
    """Let a signal end MLX's wait for connections; it stands in the list then.

    MLX keeps Python's lock in it, so no thread of Python can. Its system call fails
    when a signal comes, and MLX raises what it says then. Python lets the main thread
    alone set signals; another waits without a limit.
    """
    interrupts: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield interrupts
        return
    alarm = signal.SIGALRM
    before = signal.signal(alarm, lambda number, _: interrupts.append(number))
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    try:
        yield interrupts
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(alarm, before)


def _to_bytes(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _array_of(payload: bytes) -> mx.array:
    data: Any = payload  # MLX takes any buffer; its types do not know
    return mx.array(data)  # [bytes] uint8


def _bytes_of(array: mx.array) -> bytes:
    data: Any = array
    return bytes(memoryview(data))
