"""Replies of the engine as answers: whole, or in chunks as they come."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol

from ..markup.answer import plain
from . import openai_format as formats
from .answer_parser import Reader
from .choice import Choice, Piece, Tally
from .openai_format import Envelope
from .reply import Reply
from .vocabulary import Places, Vocabulary

# A stream that has nothing to say for so long says that it is alive, seconds: proxies
# close connections that are silent for a minute.
PATIENCE_S = 15.0


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


class Answer:
    """One answer on its way.

    Args:
        reply: What comes from the engine.
        style: How choices are written.
        num_choices: Choices of each prompt.
    """

    def __init__(self, reply: Reply, style: Style, *, num_choices: int) -> None:
        self._reply = reply
        self._style = style
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
        choices = [self._style.whole(i, piece) for i, piece in enumerate(pieces)]
        return self._style.envelope.around(choices, is_chunk=False, **self._figures())

    async def chunks(self, *, has_usage: bool) -> AsyncIterator[bytes]:
        """The answer as server-sent events.

        Args:
            has_usage: Whether the last chunk says what the answer took.

        Raises:
            AnswerError: The engine could not finish it.
        """
        envelope = self._style.envelope
        blank = {"usage": None} if has_usage else {}
        while not self._is_over:
            pieces = await self._reply.pieces(PATIENCE_S)
            if not pieces:
                yield formats.KEEPALIVE
            for index, piece in pieces:
                self._count(index, piece)
                choice = self._style.chunk(index, piece)
                if choice is not None:
                    yield formats.event(
                        envelope.around([choice], is_chunk=True, **blank)
                    )
        if has_usage:
            yield formats.event(envelope.around([], is_chunk=True, **self._figures()))
        yield formats.DONE

    @property
    def _is_over(self) -> bool:
        return len(self._tallies) == len(self._reply.jobs)

    def _count(self, index: int, piece: Piece) -> None:
        self._num_tokens += len(piece.tokens)
        if piece.tally is not None:
            self._tallies[index] = piece.tally

    def _figures(self) -> dict[str, Any]:
        """What the answer took."""
        tallies = [self._tallies[i] for i in range(len(self._tallies))]
        prompts: list[Choice] = [job.choice for job in self._reply.jobs]
        num_prompt_tokens = sum(
            len(choice.prompt) for choice in prompts[:: self._num_choices]
        )
        return {
            "usage": formats.usage(
                num_prompt_tokens,
                self._num_tokens,
                tallies,
                num_choices=self._num_choices,
            ),
            "speculative": formats.speculative(tallies),
        }
