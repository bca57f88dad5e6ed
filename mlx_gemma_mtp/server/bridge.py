"""Between the event loop's thread and the engine's.

Choices and cancellations go to the engine by a queue, and wake it; what a step of the
engine gave comes back in one call into the event loop. Which requests are open, and
whether new ones are taken, is known here.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue

from .choice import Event, Piece
from .errors import SHUTTING_DOWN, AnswerError, bad_request, engine_failed
from .metrics import Metrics, StepReport
from .reply import Job, Reply

logger = logging.getLogger("mlx_gemma_mtp.server")

_RETRY_S = 1  # rows end all the time


@dataclass(frozen=True)
class Submit:
    """A job to decode."""

    job: Job


@dataclass(frozen=True)
class Cancel:
    """A job whose reader has gone."""

    job: Job


@dataclass(frozen=True)
class Drain:
    """Finish what there is, within so many seconds, and end."""

    timeout_s: float


Message = Submit | Cancel | Drain


class Mailbox:
    """Messages to the engine. ``put`` may be called from any thread or signal handler.

    ``queue.SimpleQueue`` is the one whose ``put`` may interrupt itself.
    """

    def __init__(self) -> None:
        self._queue: SimpleQueue[Message] = SimpleQueue()

    def put(self, message: Message) -> None:
        """Leave a message."""
        self._queue.put(message)

    def take(self, *, wait: bool) -> list[Message]:
        """All messages there are.

        Args:
            wait: Whether to sleep until there is one.
        """
        messages = [self._queue.get()] if wait else []
        while True:
            try:
                messages.append(self._queue.get_nowait())
            except Empty:
                return messages


class Bridge:
    """The event loop's side of the engine.

    Args:
        mailbox: Where the engine finds its messages.
        metrics: What is counted of everything.
        max_open: Most choices that decode or wait.
    """

    def __init__(self, mailbox: Mailbox, metrics: Metrics, *, max_open: int) -> None:
        self.metrics = metrics
        self._mailbox = mailbox
        self._max_open = max_open
        self._open: set[Job] = set()
        self._num_prepared = 0  # choices whose prompts are on their way here
        self._loop: asyncio.AbstractEventLoop | None = None
        # Plain flags that one thread sets and others read.
        self.is_draining = False
        self.is_broken = False

    def attach(self) -> None:
        """Let the engine's events come to the running event loop."""
        self._loop = asyncio.get_running_loop()

    @property
    def status(self) -> str:
        """The server's state in a word; ``"ok"`` where it takes requests."""
        if self.is_broken:
            return "failed"
        return "draining" if self.is_draining else "ok"

    def check_room(self, num_choices: int) -> None:
        """Refuse what there is no room for; before any work is done for it.

        Args:
            num_choices: How many a request asks for.

        Raises:
            AnswerError: There is no room, or new requests are not taken.
        """
        if self.is_broken:
            raise engine_failed()
        if self.is_draining:
            raise AnswerError(503, SHUTTING_DOWN, retry_after=_RETRY_S)
        if num_choices > self._max_open:
            raise bad_request(
                f"a request must have at most {self._max_open} choices, n for each "
                f"prompt: got {num_choices}. Send several.",
                "n",
            )
        num_taken = len(self._open) + self._num_prepared
        if num_taken + num_choices > self._max_open:
            raise AnswerError(
                429,
                f"too many requests: {num_taken} decode or wait, at most "
                f"{self._max_open} may. Try again later.",
                code="rate_limit_exceeded",
                retry_after=_RETRY_S,
            )

    @contextmanager
    def room(self, num_choices: int) -> Iterator[None]:
        """Keep room for choices while their prompts are made.

        Raises:
            AnswerError: See ``check_room``.
        """
        self.check_room(num_choices)
        self._num_prepared += num_choices
        try:
            yield
        finally:
            self._num_prepared -= num_choices

    def submit(self, reply: Reply) -> None:
        """Hand a request's choices to the engine, all or none.

        Raises:
            AnswerError: See ``check_room``.
        """
        self.check_room(len(reply.jobs))
        for job in reply.jobs:
            self._open.add(job)
            self._mailbox.put(Submit(job))

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Let go of jobs, those that have ended included."""
        for job in jobs:
            if job in self._open:
                self._open.discard(job)
                self._mailbox.put(Cancel(job))

    @property
    def num_open(self) -> int:
        """Choices that decode or wait for it."""
        return len(self._open)

    def post(self, events: list[tuple[Job, Event]], report: StepReport) -> None:
        """Send what a step gave; called in the engine's thread."""
        loop = self._loop
        if loop is None:
            return
        try:
            loop.call_soon_threadsafe(self._deliver, events, report)
        except RuntimeError:  # the loop has ended, and every reader with it
            logger.debug("%d events had no reader", len(events))

    def end_all(self, failure: AnswerError) -> None:
        """End every request with an error; what the engine still says of it is lost.

        May be called from any thread.
        """
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._fail_all, failure)

    def _fail_all(self, failure: AnswerError) -> None:
        jobs, self._open = self._open, set()
        for job in jobs:
            job.reply.fail(failure)

    def _deliver(self, events: list[tuple[Job, Event]], report: StepReport) -> None:
        """Give every reply its part; runs in the event loop."""
        for job, event in events:
            if job not in self._open:  # let go of while this was on its way
                continue
            job.reply.push(job.index, event)
            if job.reply.failure is not None:
                self.cancel(job.reply.jobs)
            elif isinstance(event, Piece) and event.finish_reason is not None:
                self._open.discard(job)
        self.metrics.observe(report)
