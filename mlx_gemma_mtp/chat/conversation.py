"""A conversation: a system prompt, and questions with their answers.

Knows nothing of tokens, of the model or of the terminal.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from ..errors import RequestError, shorten

Message = dict[str, str]
_THOUGHT = "reasoning"  # as templates and servers call it
_FORM = '{"messages": [{"role": "user", "content": "..."}, ...]}'


@dataclass(frozen=True)
class Exchange:
    """What the user said, and what the model answered.

    Attributes:
        question: The user's words.
        answer: The model's, without marks.
        thought: What it said to itself before; perhaps nothing.
    """

    question: str
    answer: str
    thought: str = ""


class Conversation:
    """What was said so far.

    Args:
        system: The system prompt; None for none.

    Attributes:
        system: The same; it may be changed while the conversation goes on.
    """

    def __init__(self, system: str | None = None) -> None:
        self.system = system
        self._exchanges: list[Exchange] = []

    def __len__(self) -> int:
        return len(self._exchanges)

    def add(self, question: str, answer: str, thought: str = "") -> None:
        """Add an exchange."""
        self._exchanges.append(Exchange(question, answer, thought))

    def undo(self) -> Exchange:
        """Take the last exchange away, and return it.

        Raises:
            RequestError: There is none.
        """
        if not self._exchanges:
            raise RequestError(
                "the conversation must have an exchange to take back: got an empty "
                "conversation. Say something first."
            )
        return self._exchanges.pop()

    def messages(self, *further: str) -> list[Message]:
        """What a chat template takes.

        Args:
            further: What is said next, user and assistant in turn.
        """
        found = [] if self.system is None else [_message("system", self.system)]
        for exchange in self._exchanges:
            found.append(_message("user", exchange.question))
            thought = {_THOUGHT: exchange.thought} if exchange.thought else {}
            found.append(_message("assistant", exchange.answer) | thought)
        roles = ("user", "assistant")
        return found + [_message(roles[i % 2], text) for i, text in enumerate(further)]

    def to_json(self) -> str:
        """The conversation as text, for ``from_json``."""
        return json.dumps({"messages": self.messages()}, indent=2, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str, *, source: str) -> Conversation:
        """Read what ``to_json`` wrote, or another program in the same form.

        Args:
            text: JSON.
            source: Where it came from, for messages.

        Raises:
            RequestError: It is no conversation.
        """
        messages = _messages(text, source)
        roles = [message["role"] for message in messages]
        system = messages.pop(0)["content"] if roles[:1] == ["system"] else None
        roles = [message["role"] for message in messages]
        if roles != ["user", "assistant"] * (len(roles) // 2):
            raise RequestError(
                f"messages in {source} must be user and assistant in turn, after at "
                f"most one system message, the last one an assistant's: got "
                f"{shorten(', '.join(roles))}. Add or remove messages."
            )
        found = cls(system)
        for question, answer in zip(messages[::2], messages[1::2], strict=True):
            found.add(
                question["content"], answer["content"], answer.get(_THOUGHT) or ""
            )
        return found


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _messages(text: str, source: str) -> list[dict[str, Any]]:
    """The messages of a file, each with a role and a text."""
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(
            f"{source} must be JSON: got {error}. /save writes such a file."
        ) from error
    messages = parsed.get("messages") if isinstance(parsed, dict) else None
    if not isinstance(messages, list):
        raise RequestError(
            f"{source} must hold messages, {_FORM}: got {shorten(parsed)}. /save "
            "writes such a file."
        )
    for message in messages:
        is_message = isinstance(message, dict) and all(
            isinstance(message.get(key, ""), str)
            for key in ("role", "content", _THOUGHT)
        )
        is_message = is_message and {"role", "content"} <= message.keys()
        if not is_message:
            raise RequestError(
                f"a message in {source} must have a role and a content, both text: "
                f"got {shorten(message)}. /save writes such a file."
            )
    return messages
