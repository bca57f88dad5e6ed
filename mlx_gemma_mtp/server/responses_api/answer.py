"""Answers in the form of OpenAI's Responses: whole, or in events.

Plain data: knows nothing of how it is sent.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ...markup.answer import REASONING, Part
from ..answer_parser import Reader
from ..choice import Piece
from ..errors import AnswerError
from ..openai_format import named_event
from ..responses import Figures
from .items import CUT, DONE, OPEN, CallOfTool, Item, TextItem, ThoughtItem
from .schema import ResponsesBody
from .tools import ToolNames

ENCRYPTED = "reasoning.encrypted_content"
_CODES = {429: "rate_limit_exceeded"}


class ResponseWriter:
    """One answer of ``/v1/responses``; see ``Writer``.

    Args:
        body: What was asked for.
        reader: Reads the answer.
        tools: The request's tools.
        model: What the model is called.
    """

    def __init__(
        self, body: ResponsesBody, reader: Reader, tools: ToolNames, *, model: str
    ) -> None:
        self._body = body
        self._reader = reader
        self._tools = tools
        self._model = model
        self._id = f"resp_{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._items: list[Item] = []
        self._kind: str | None = None  # of the item that is open
        self._number = 0  # of the next event
        self._status = OPEN
        self._error: dict[str, Any] | None = None
        self._usage: dict[str, Any] | None = None

    def whole(self, pieces: Sequence[Piece], figures: Figures) -> dict[str, Any]:
        """See ``Writer``."""
        (piece,) = pieces
        for _ in self.add(0, piece):
            pass  # what matters is what becomes of the items
        self._usage = _usage(figures)
        return self._response()

    def begin(self) -> Iterable[bytes]:
        """See ``Writer``."""
        yield self._event("response.created", response=self._response())
        yield self._in_progress()

    def add(self, index: int, piece: Piece) -> Iterable[bytes]:
        """See ``Writer``."""
        is_last = piece.finish_reason is not None
        for part in self._reader.parts(piece.text, is_last=is_last):
            if part.call is not None or part.kind != self._kind:
                yield from self._end_item(DONE)
                yield from self._begin_item(part)
            if part.call is None:
                yield from self._own(self._items[-1].add(part.text))
        if is_last:
            is_cut = piece.finish_reason == "length"
            self._status = CUT if is_cut else DONE
            yield from self._end_item(self._status)

    def end(self, figures: Figures) -> Iterable[bytes]:
        """See ``Writer``."""
        self._usage = _usage(figures)
        yield self._event(f"response.{self._status}", response=self._response())

    def alive(self, num_read: int, num_to_read: int) -> bytes:
        """See ``Writer``: an event, as clients do not count comments."""
        return self._in_progress()

    def failed(self, failure: AnswerError) -> bytes:
        """See ``Writer``."""
        self._status = "failed"
        code = failure.code or _CODES.get(failure.status, "server_error")
        self._error = {"code": code, "message": failure.message}
        return self._event("response.failed", response=self._response())

    def _in_progress(self) -> bytes:
        return self._event("response.in_progress", response=self._response())

    def _begin_item(self, part: Part) -> Iterator[bytes]:
        item: Item
        if part.call is not None:
            item = CallOfTool(part.call, self._tools.origin(part.call.name))
        elif part.kind == REASONING:
            asked = self._body.reasoning
            item = ThoughtItem(
                is_summary=asked is not None and asked.summary is not None,
                is_wrapped=ENCRYPTED in (self._body.include or ()),
            )
        else:
            item = TextItem()
        self._items.append(item)
        self._kind = part.kind
        yield self._item_event("response.output_item.added")
        yield from self._own(item.begin())

    def _end_item(self, status: str) -> Iterator[bytes]:
        if self._kind is not None:
            self._kind = None
            yield from self._own(self._items[-1].end(status))
            yield self._item_event("response.output_item.done")

    def _own(self, events: Iterable[tuple[str, dict[str, Any]]]) -> Iterator[bytes]:
        """The events of the last item, which say whose they are."""
        index = len(self._items) - 1
        for kind, fields in events:
            whose = {"item_id": self._items[-1].body["id"], "output_index": index}
            yield self._event(kind, **whose, **fields)

    def _item_event(self, kind: str) -> bytes:
        index = len(self._items) - 1
        return self._event(kind, output_index=index, item={**self._items[-1].body})

    def _event(self, kind: str, **fields: Any) -> bytes:
        number, self._number = self._number, self._number + 1
        return named_event({"type": kind, "sequence_number": number, **fields})

    def _response(self) -> dict[str, Any]:
        body, is_cut = self._body, self._status == CUT
        is_over = self._status in (DONE, CUT)
        asked = body.model_dump(by_alias=True, exclude_none=True)
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "completed_at": int(time.time()) if self._status == DONE else None,
            "status": self._status,
            "background": False,
            "error": self._error,
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": self._model,
            "output": [item.body for item in self._items] if is_over else [],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {
                "effort": None,
                "summary": None,
                **asked.get("reasoning", {}),
            },
            "store": False,
            "temperature": body.temperature,
            "text": {"format": {"type": "text"}, **asked.get("text", {})},
            "tool_choice": body.tool_choice or "auto",
            "tools": asked.get("tools", []),
            "top_p": body.top_p,
            "truncation": "disabled",
            "usage": self._usage,
            "user": body.user,
        }


def _usage(figures: Figures) -> dict[str, Any]:
    """What an answer took."""
    num_read, num_written = figures.num_prompt_tokens, figures.num_tokens
    return {
        "input_tokens": num_read,
        "input_tokens_details": {
            "cached_tokens": figures.num_cached,
            "cache_write_tokens": 0,
        },
        "output_tokens": num_written,
        "output_tokens_details": {"reasoning_tokens": figures.num_reasoning},
        "total_tokens": num_read + num_written,
    }
