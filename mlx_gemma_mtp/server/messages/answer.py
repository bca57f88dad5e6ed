"""Answers in the form of Anthropic's Messages: whole, or in events.

Plain data: knows nothing of how it is sent.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ...markup.answer import CALL, REASONING, Part
from ..answer_parser import Reader, written
from ..choice import Piece
from ..errors import AnswerError
from ..openai_format import named_event
from ..responses import Figures
from .errors import body_of

# Nothing is signed: a thought that comes back is read as it is.
SIGNATURE = "unsigned"
_REASONS = {"length": "max_tokens", "stop": "end_turn"}


class MessageWriter:
    """One answer of ``/v1/messages``; see ``Writer``.

    Args:
        reader: Reads the answer.
        model: What the model is called.
        num_prompt_tokens: Tokens of the prompt.
    """

    def __init__(self, reader: Reader, *, model: str, num_prompt_tokens: int) -> None:
        self._reader = reader
        self._model = model
        self._num_prompt_tokens = num_prompt_tokens
        self._id = f"msg_{secrets.token_hex(12)}"
        self._index = -1  # of the block that was begun last
        self._kind: str | None = None  # of the block that is open
        self._end: dict[str, Any] = {"stop_reason": None, "stop_sequence": None}

    def whole(self, pieces: Sequence[Piece], figures: Figures) -> dict[str, Any]:
        """See ``Writer``."""
        (piece,) = pieces
        blocks: list[dict[str, Any]] = []
        kind = None
        for part in self._read(piece):
            if part.kind == CALL or part.kind != kind:
                blocks.append(_block(part))
            else:
                blocks[-1][_FIELDS[kind]] += part.text
            kind = part.kind
        for block in blocks:
            if block["type"] == "thinking":
                block["signature"] = SIGNATURE
        return self._message(blocks, _usage(figures))

    def begin(self) -> Iterable[bytes]:
        """See ``Writer``."""
        usage = {"input_tokens": self._num_prompt_tokens, "output_tokens": 0}
        usage |= {"cache_creation_input_tokens": 0, "cache_read_input_tokens": 0}
        yield _event("message_start", message=self._message([], usage))
        yield _event("ping")

    def add(self, index: int, piece: Piece) -> Iterable[bytes]:
        """See ``Writer``."""
        for part in self._read(piece):
            if part.kind == CALL or part.kind != self._kind:
                yield from self._stop_block()
                yield self._start_block(part)
            yield self._delta(_delta(part))

    def end(self, figures: Figures) -> Iterable[bytes]:
        """See ``Writer``."""
        yield from self._stop_block()
        yield _event("message_delta", delta=self._end, usage=_usage(figures))
        yield _event("message_stop")

    def alive(self, num_read: int, num_to_read: int) -> bytes:
        """See ``Writer``."""
        return _event("ping")

    def failed(self, failure: AnswerError) -> bytes:
        """See ``Writer``."""
        return named_event(body_of(failure))

    def _read(self, piece: Piece) -> list[Part]:
        """The parts of a piece; the last one says why the answer has ended."""
        reason = piece.finish_reason
        found = self._reader.parts(piece.text, is_last=reason is not None)
        if reason is not None:
            word = _REASONS[reason]
            if reason == "stop" and self._reader.has_calls:
                word = "tool_use"
            elif piece.stop is not None:
                word = "stop_sequence"
                self._end["stop_sequence"] = piece.stop
            self._end["stop_reason"] = word
        return found

    def _message(
        self, blocks: list[dict[str, Any]], usage: dict[str, Any]
    ) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": blocks,
            **self._end,
            "usage": usage,
        }

    def _start_block(self, part: Part) -> bytes:
        self._index += 1
        self._kind = part.kind
        block = _block(part)
        field = _FIELDS[part.kind]
        block[field] = type(block[field])()  # what it holds follows
        return self._block_event("content_block_start", content_block=block)

    def _stop_block(self) -> Iterator[bytes]:
        if self._kind == REASONING:
            yield self._delta({"type": "signature_delta", "signature": SIGNATURE})
        if self._kind is not None:
            yield self._block_event("content_block_stop")
        self._kind = None

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return self._block_event("content_block_delta", delta=delta)

    def _block_event(self, kind: str, **fields: Any) -> bytes:
        return _event(kind, index=self._index, **fields)


_FIELDS = {"content": "text", REASONING: "thinking", CALL: "input"}


def _block(part: Part) -> dict[str, Any]:
    """A part as a block."""
    if part.call is not None:
        return {
            "type": "tool_use",
            "id": f"toolu_{secrets.token_hex(12)}",
            "name": part.call.name,
            "input": dict(part.call.arguments),
        }
    if part.kind == REASONING:
        return {"type": "thinking", "thinking": part.text, "signature": ""}
    return {"type": "text", "text": part.text}


def _delta(part: Part) -> dict[str, Any]:
    """What a part adds to its block."""
    if part.call is not None:
        return {"type": "input_json_delta", "partial_json": written(part.call)}
    if part.kind == REASONING:
        return {"type": "thinking_delta", "thinking": part.text}
    return {"type": "text_delta", "text": part.text}


def _usage(figures: Figures) -> dict[str, Any]:
    """What an answer took: tokens from kept caches are counted apart."""
    return {
        "input_tokens": figures.num_prompt_tokens - figures.num_cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": figures.num_cached,
        "output_tokens": figures.num_tokens,
        "output_tokens_details": {"thinking_tokens": figures.num_reasoning},
    }


def _event(kind: str, **fields: Any) -> bytes:
    return named_event({"type": kind, **fields})
