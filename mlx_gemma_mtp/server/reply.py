"""What comes back for one HTTP request: the pieces of its choices, as they arrive.

Everything here happens in the event loop's thread. Pieces that nobody has taken yet are
joined, so a reader that is behind gets larger ones; one that is too far behind is let
go of.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextvars import copy_context

from .choice import Accepted, Choice, Event, Piece
from .errors import AnswerError

# Tokens that may wait for a reader. A connection's own buffers hold thousands more.
MAX_PENDING_TOKENS = 16384
_TOO_SLOW = "the answer was read too slowly. Read it as it comes, or do not stream."


class Job:
    """A choice on its way, with the reply that it belongs to.

    Args:
        choice: What to decode.
        reply: Where its pieces go.
        index: The choice's number in the reply.
        arrived: When the request came, seconds of ``time.perf_counter``.

    Attributes:
        context: What is logged within names the request.
        num_read: Tokens of the prompt that the model knows by now. A plain number that
            the engine's thread sets and others read: it wakes nobody.
    """

    def __init__(
        self, choice: Choice, reply: Reply, index: int, arrived: float
    ) -> None:
        self.choice = choice
        self.reply = reply
        self.index = index
        self.arrived = arrived
        self.context = copy_context()
        self.num_read = 0


class Reply:
    """The choices of one request.

    Args:
        choices: All that were asked for.
        arrived: When the request came, seconds of ``time.perf_counter``.

    Attributes:
        jobs: One for each choice.
        failure: Why there is no more to come, if something went wrong.
    """

    def __init__(self, choices: Sequence[Choice], arrived: float) -> None:
        self.jobs = [Job(choice, self, i, arrived) for i, choice in enumerate(choices)]
        self.failure: AnswerError | None = None
        self._num_accepted = 0
        self._num_finished = 0
        self._pending: dict[int, Piece] = {}
        self._news = asyncio.Event()

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come from the engine."""
        return self.failure is not None or self._num_finished == len(self.jobs)

    @property
    def num_read(self) -> int:
        """Tokens of all prompts that the model knows by now."""
        return sum(job.num_read for job in self.jobs)

    @property
    def num_to_read(self) -> int:
        """Tokens of all prompts, one for each choice."""
        return sum(len(job.choice.prompt) for job in self.jobs)

    def push(self, index: int, event: Event) -> None:
        """Take what the engine says of a choice."""
        if isinstance(event, Accepted):
            self._num_accepted += 1
        elif isinstance(event, AnswerError):
            self.fail(event)
        else:
            self._add(index, event)
        self._news.set()

    def fail(self, failure: AnswerError) -> None:
        """End the reply; the first failure counts."""
        if not self.is_over:
            self.failure = failure
        self._news.set()

    async def accepted(self) -> None:
        """Wait until every choice was checked.

        Raises:
            AnswerError: One was refused.
        """
        while self._num_accepted < len(self.jobs) and self.failure is None:
            await self._next_news(None)
        if self.failure is not None:
            raise self.failure

    async def pieces(self, patience: float | None = None) -> list[tuple[int, Piece]]:
        """Wait for more of any choice.

        Args:
            patience: Longest time to wait, seconds; None for ever.

        Returns:
            The choices that have more, and what; nothing where time ran out, or where
            all have ended.

        Raises:
            AnswerError: Nothing more will come.
        """
        time_left = True
        while time_left and not self._pending and not self.is_over:
            time_left = await self._next_news(patience)
        if self.failure is not None and not self._pending:
            raise self.failure
        pending, self._pending = self._pending, {}
        return sorted(pending.items())

    def _add(self, index: int, piece: Piece) -> None:
        known = self._pending.get(index)
        if known is None:
            self._pending[index] = piece
        else:
            known.add(piece)
            if len(known.tokens) > MAX_PENDING_TOKENS:
                self.fail(AnswerError(408, _TOO_SLOW))
        if piece.finish_reason is not None:
            self._num_finished += 1

    async def _next_news(self, patience: float | None) -> bool:
        """Wait for an event; False where time ran out."""
        alarm = None
        if patience is not None:
            alarm = asyncio.get_running_loop().call_later(patience, self._news.set)
        try:
            await self._news.wait()
        finally:
            if alarm is not None:
                alarm.cancel()
        self._news.clear()
        return alarm is None or alarm.when() > asyncio.get_running_loop().time()
