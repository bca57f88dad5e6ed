"""Replies of the engine as answers: whole, or in events as they come.

How an answer is written is its dialect's to say: ``Writer``. Here are OpenAI's first
two.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..markup.answer import plain
from . import openai_format as formats
from .answer_parser import Reader
from .choice import Piece, Tally
from .errors import AnswerError
from .openai_format import Envelope
from .reply import Reply
from .vocabulary import Places, Vocabulary

# A stream that has nothing to say for so long says that it is alive, seconds: proxies
# close connections that are silent for a minute.
PATIENCE_S = 15.0


@dataclass(frozen=True)
class Figures:
    """What an answer took.

    Attributes:
        num_prompt_tokens: Tokens of the prompts, each counted once.
        num_tokens: Tokens of all choices.
        tallies: One for each choice.
        num_choices: Choices of each prompt.
    """

    num_prompt_tokens: int
    num_tokens: int
    tallies: Sequence[Tally]
    num_choices: int

    @property
    def num_cached(self) -> int:
        """Tokens of the prompts that kept caches held."""
        return sum(tally.num_cached for tally in self.tallies[:: self.num_choices])

    @property
    def num_reasoning(self) -> int:
        """Tokens of thoughts."""
        return sum(tally.num_reasoning for tally in self.tallies)


class Writer(Protocol):
    """How one answer is written: the only thing that a dialect says of it."""

    def whole(self, pieces: Sequence[Piece], figures: Figures) -> dict[str, Any]:
        """An answer of which everything is known, one piece for each choice."""

    def begin(self) -> Iterable[bytes]:
        """The events before anything is known of the answer."""

    def add(self, index: int, piece: Piece) -> Iterable[bytes]:
        """The events that more of a choice makes."""

    def end(self, figures: Figures) -> Iterable[bytes]:
        """The events behind the last piece."""

    def alive(self, num_read: int, num_to_read: int) -> bytes:
        """What says that the answer goes on, where there is nothing else to say.

        Args:
            num_read: Tokens of prompts that were read.
            num_to_read: All of them.
        """

    def failed(self, failure: AnswerError) -> bytes:
        """The event that ends the stream with a failure: its status is sent by then."""


class Style(Protocol):
    """How the choices of one answer are written."""

    envelope: Envelope

    def whole(self, index: int, piece: Piece) -> dict[str, Any]:
        """A choice of which everything is known."""

    def chunk(self, index: int, piece: Piece) -> dict[str, Any] | None:
        """What more of a choice adds to it; None where that is nothing to see."""


class ChatStyle:
    """Answers of ``/v1/chat/completions``.

    Args:
        envelope: What stands around.
        readers: One for each choice.
        vocabulary: The tokens' texts.
        has_logprobs: Whether log-probabilities were asked for.
    """

    def __init__(
        self,
        envelope: Envelope,
        readers: Sequence[Reader],
        vocabulary: Vocabulary,
        *,
        has_logprobs: bool,
    ) -> None:
        self.envelope = envelope
        self._readers = readers
        self._vocabulary = vocabulary
        self._has_logprobs = has_logprobs
        self._begun: set[int] = set()

    def whole(self, index: int, piece: Piece) -> dict[str, Any]:
        """See ``Style``."""
        delta = self._readers[index].read(piece.text, is_last=True)
        return {
            "index": index,
            "message": formats.chat_message(delta),
            **self._rest(index, piece),
        }

    def chunk(self, index: int, piece: Piece) -> dict[str, Any] | None:
        """See ``Style``."""
        is_last = piece.finish_reason is not None
        delta = self._readers[index].read(piece.text, is_last=is_last)
        is_first = index not in self._begun
        self._begun.add(index)
        if not (delta or is_first or is_last or piece.logprobs):
            return None
        return {
            "index": index,
            "delta": formats.chat_delta(delta, is_first=is_first),
            **self._rest(index, piece),
        }

    def _rest(self, index: int, piece: Piece) -> dict[str, Any]:
        reason = piece.finish_reason
        if reason == "stop" and self._readers[index].has_calls:
            reason = "tool_calls"
        logprobs = None
        if self._has_logprobs:
            logprobs = formats.chat_logprobs(self._vocabulary, piece)
        return {"logprobs": logprobs, "finish_reason": reason}


class CompletionStyle:
    """Answers of ``/v1/completions``.

    Args:
        envelope: What stands around.
        vocabulary: The tokens' texts.
        has_logprobs: Whether log-probabilities were asked for.
    """

    def __init__(
        self, envelope: Envelope, vocabulary: Vocabulary, *, has_logprobs: bool
    ) -> None:
        self.envelope = envelope
        self._vocabulary = vocabulary
        self._has_logprobs = has_logprobs
        self._places: dict[int, Places] = {}

    def whole(self, index: int, piece: Piece) -> dict[str, Any]:
        """See ``Style``."""
        logprobs = None
        if self._has_logprobs:
            places = self._places.setdefault(index, Places())
            logprobs = formats.completion_logprobs(self._vocabulary, piece, places)
        return {
            "index": index,
            "text": plain(piece.text),
            "logprobs": logprobs,
            "finish_reason": piece.finish_reason,
        }

    def chunk(self, index: int, piece: Piece) -> dict[str, Any] | None:
        """See ``Style``."""
        if not (piece.text or piece.logprobs or piece.finish_reason):
            return None
        return self.whole(index, piece)


class ChoiceWriter:
    """Answers that are choices, each of them in a style.

    Args:
        style: How a choice is written.
        has_usage: Whether the last event of a stream says what the answer took.
    """

    def __init__(self, style: Style, *, has_usage: bool) -> None:
        self._style = style
        self._has_usage = has_usage

    def whole(self, pieces: Sequence[Piece], figures: Figures) -> dict[str, Any]:
        """See ``Writer``."""
        choices = [self._style.whole(i, piece) for i, piece in enumerate(pieces)]
        said = _said(figures)
        return self._style.envelope.around(choices, is_chunk=False, **said)

    def begin(self) -> Iterable[bytes]:
        """See ``Writer``."""
        return ()

    def add(self, index: int, piece: Piece) -> Iterable[bytes]:
        """See ``Writer``."""
        choice = self._style.chunk(index, piece)
        if choice is not None:
            blank = {"usage": None} if self._has_usage else {}
            yield self._event([choice], **blank)

    def end(self, figures: Figures) -> Iterable[bytes]:
        """See ``Writer``."""
        if self._has_usage:
            yield self._event([], **_said(figures))
        yield formats.DONE

    def alive(self, num_read: int, num_to_read: int) -> bytes:
        """See ``Writer``."""
        return formats.keepalive(num_read, num_to_read)

    def failed(self, failure: AnswerError) -> bytes:
        """See ``Writer``."""
        return formats.event(failure.body())

    def _event(self, choices: list[Any], **fields: Any) -> bytes:
        chunk = self._style.envelope.around(choices, is_chunk=True, **fields)
        return formats.event(chunk)


def _said(figures: Figures) -> dict[str, Any]:
    """What an answer says of what it took."""
    return {
        "usage": formats.usage(
            figures.num_prompt_tokens,
            figures.num_tokens,
            figures.tallies,
            num_choices=figures.num_choices,
        ),
        "speculative": formats.speculative(figures.tallies),
    }


class Answer:
    """One answer on its way.

    Args:
        reply: What comes from the engine.
        writer: How it is written.
        num_choices: Choices of each prompt.
    """

    def __init__(self, reply: Reply, writer: Writer, *, num_choices: int) -> None:
        self._reply = reply
        self._writer = writer
        self._num_choices = num_choices
        self._num_tokens = 0
        self._tallies: dict[int, Tally] = {}

    async def whole(self) -> dict[str, Any]:
        """The answer once all of it is there.

        Raises:
            AnswerError: The engine could not finish it.
        """
        pieces = [Piece() for _ in self._reply.jobs]
        while not self._is_over:
            for index, piece in await self._reply.pieces():
                self._count(index, piece)
                pieces[index].add(piece)
        return self._writer.whole(pieces, self._figures())

    async def events(self) -> AsyncIterator[bytes]:
        """The answer as server-sent events; the last one may say why there is no more.

        A stream's status is sent before anything can go wrong in it.
        """
        try:
            for event in self._writer.begin():
                yield event
            while not self._is_over:
                pieces = await self._reply.pieces(PATIENCE_S)
                if not pieces:
                    reply = self._reply
                    yield self._writer.alive(reply.num_read, reply.num_to_read)
                for index, piece in pieces:
                    self._count(index, piece)
                    for event in self._writer.add(index, piece):
                        yield event
            for event in self._writer.end(self._figures()):
                yield event
        except AnswerError as failure:
            yield self._writer.failed(failure)

    @property
    def _is_over(self) -> bool:
        return len(self._tallies) == len(self._reply.jobs)

    def _count(self, index: int, piece: Piece) -> None:
        self._num_tokens += len(piece.tokens)
        if piece.tally is not None:
            self._tallies[index] = piece.tally

    def _figures(self) -> Figures:
        """What the answer took."""
        return Figures(
            sum(
                len(job.choice.prompt) for job in self._reply.jobs[:: self._num_choices]
            ),
            self._num_tokens,
            [self._tallies[i] for i in range(len(self._tallies))],
            self._num_choices,
        )
