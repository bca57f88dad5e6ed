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

import mlx.core as mx

from ..errors import RanksError, described
from .beats import Beats, pauses
from .environment import num_launched
from .headers import Header, Kind, Word, headers_of
from .watchdog import LIMIT_S, Watchdog

# For the others to be launched. A rank that connects to another gives up after 31 s.
_CONNECT_S = 60.0
FIRST_S = 60.0  # that a rank may take longer to trace and to compile something
_ARRIVAL_S = 600.0  # for a rank that does something of its own between texts
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
        self._has_met = False  # in a beat of this rest
        self.is_lost = False
        self._known: set[str] = set()
        if watchdog is None:
            watchdog = Watchdog(self.rank, self.size)
            watchdog.start()
        self.watchdog = watchdog
        self._beats = Beats(self._beat, watchdog.end)
        if self.is_first:  # once: what is registered at exit does not run any more
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
        self._meet(self._header(Kind.BARRIER), limit_s)

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

    def patience(self, what: str) -> float:
        """Seconds that others may take for something: longer the first time.

        They may compile what it needs.
        """
        limit_s = LIMIT_S if what in self._known else FIRST_S
        self._known.add(what)
        return limit_s

    def rest(self) -> None:
        """Rank 0 has no work for now: it and the others sleep, and beat now and then.

        Until ``wake`` this rank takes part in nothing else. If the program ends before,
        the others' ``wait_for_work`` says so.
        """
        if not self._beats.is_resting:
            self._beats.start()

    def wake(self) -> None:
        """Rank 0 has work: the others' ``wait_for_work`` returns True.

        It waits until the others are awake, at most a pause of 45 ms.

        Raises:
            RanksError: The ranks are out of step, or have lost each other.
        """
        self._leave_rest(Word.WORK)

    def wait_for_work(self) -> bool:
        """Sleep on another rank until rank 0 wakes it.

        Returns:
            Whether there is work; else rank 0 has ended.

        Raises:
            RanksError: The ranks are out of step, or have lost each other, or an
                exception has ended rank 0.
        """
        for pause_s in pauses():
            time.sleep(pause_s)
            word = self._meet_in_beat(Word.IDLE)
            if word == Word.END:
                self.tell_failure()
            if word != Word.IDLE:
                return word == Word.WORK
        raise AssertionError("pauses have no end")

    def close(self) -> None:
        """Rank 0, if it rests: the others' ``wait_for_work`` ends."""
        with suppress(RanksError):
            if self._beats.is_resting:
                self._leave_rest(Word.END)
                self.tell_failure()

    def tell_failure(self) -> None:
        """All hear of the exception that ends rank 0's program, if one does.

        Raises:
            RanksError: On the others, where one does.
        """
        found = self.share(failure())
        if found is None:
            return
        self.is_lost = True
        if not self.is_first:
            raise RanksError(
                f"Rank 0 must go on as long as rank {self.rank}: got {found} there. "
                "See what it wrote, then start all again."
            )

    def _leave_rest(self, word: Word) -> None:
        if self._beats.is_resting:
            self._beats.stop()
            self._meet_in_beat(word)

    def _beat(self) -> None:
        self._meet_in_beat(Word.IDLE)

    def _meet_in_beat(self, word: Word) -> int:
        """A beat, and rank 0's word in it."""
        # Until the first one, another rank may still do something of its own.
        limit_s = LIMIT_S if self._has_met else _ARRIVAL_S
        found = self._meet(Header(Kind.BEAT, self._number, word), limit_s)[0].value
        self._has_met = found == Word.IDLE
        return found

    def _header(self, kind: Kind, payload: bytes = b"") -> Header:
        assert not self._beats.is_resting, "wake the others first"
        return Header.of(kind, self._number, payload)

    def _meet(self, header: Header, limit_s: float = LIMIT_S) -> list[Header]:
        """Every rank's header, where all mean the same exchange."""
        self.check()
        self._number += 1
        with self.exchange(header.name, limit_s):
            row = mx.array([header.row], dtype=mx.uint32)  # [1, 4]
            rows = mx.distributed.all_gather(row, group=self.group, stream=mx.cpu)
            met: Any = rows.tolist()  # [ranks, 4]
        self.is_lost = True  # unless all mean the same
        found = headers_of(met, header, self.rank)
        self.is_lost = False
        return found


def failure() -> str | None:
    """The exception that ends this program, on one line; None where none does.

    Python has it where the program's main part has ended: for what runs at exit.
    """
    error: BaseException | None = vars(sys).get("last_value")
    return None if error is None else described(error)


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
