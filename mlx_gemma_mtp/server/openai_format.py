"""Answers and their parts in the form of OpenAI's API.

Plain data in, plain data out: knows nothing of how they are sent.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .._version import __version__
from .answer_parser import Delta
from .choice import Piece, Tally
from .vocabulary import Places, Vocabulary

if TYPE_CHECKING:
    from ..sampling.logprobs import TokenLogprobs

FINGERPRINT = f"mlx_gemma_mtp-{__version__}"
_IMPOSSIBLE = -9999.0
DONE = b"data: [DONE]\n\n"
_ALIVE = b": keepalive\n\n"


def dumps(value: Any) -> bytes:
    """A value as compact JSON."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode(
        "utf-8", "replace"
    )


def event(value: Any) -> bytes:
    """A value as a server-sent event."""
    return b"data: " + dumps(value) + b"\n\n"


def named_event(value: dict[str, Any]) -> bytes:
    """A value as a server-sent event whose name is the value's type."""
    return b"event: " + value["type"].encode() + b"\ndata: " + dumps(value) + b"\n\n"


def keepalive(num_read: int, num_to_read: int) -> bytes:
    """A comment that says how much of a prompt is read, as mlx-lm's server does.

    Args:
        num_read: Tokens of prompts that were read.
        num_to_read: All of them.
    """
    is_reading = 0 < num_read < num_to_read
    return (
        f": keepalive {num_read}/{num_to_read}\n\n".encode() if is_reading else _ALIVE
    )


def usage(
    num_prompt_tokens: int,
    num_tokens: int,
    tallies: Sequence[Tally],
    *,
    num_choices: int,
) -> dict[str, Any]:
    """What an answer took.

    Args:
        num_prompt_tokens: Tokens of the prompts, each counted once.
        num_tokens: Tokens of all choices.
        tallies: One for each choice.
        num_choices: Choices of each prompt.
    """
    cached = sum(tally.num_cached for tally in tallies[::num_choices])
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_tokens,
        "total_tokens": num_prompt_tokens + num_tokens,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {
            "reasoning_tokens": sum(tally.num_reasoning for tally in tallies),
            "accepted_prediction_tokens": sum(t.num_predicted for t in tallies),
            "rejected_prediction_tokens": sum(t.num_not_predicted for t in tallies),
        },
    }


def speculative(tallies: Sequence[Tally]) -> dict[str, Any]:
    """What drafting did for an answer."""
    rounds = sum(tally.rounds for tally in tallies)
    accepted = sum(tally.accepted for tally in tallies)
    return {
        "rounds": rounds,
        "drafted": sum(tally.drafted for tally in tallies),
        "accepted": accepted,
        "acceptance_length": 1 + accepted / rounds if rounds else 0.0,
        "rule": "; ".join(dict.fromkeys(tally.rule for tally in tallies)),
    }


@dataclass(frozen=True)
class Envelope:
    """What every part of one answer has.

    Attributes:
        kind: ``"chat.completion"`` or ``"text_completion"``.
        model: What the model is called.
        id: The answer's name.
        created: Seconds since 1970.
    """

    kind: str
    model: str
    id: str
    created: int = field(default_factory=lambda: int(time.time()))

    @classmethod
    def of_chat(cls, model: str) -> Envelope:
        """An answer of ``/v1/chat/completions``."""
        return cls("chat.completion", model, f"chatcmpl-{secrets.token_hex(12)}")

    @classmethod
    def of_completion(cls, model: str) -> Envelope:
        """An answer of ``/v1/completions``."""
        return cls("text_completion", model, f"cmpl-{secrets.token_hex(12)}")

    def around(
        self, choices: list[Any], *, is_chunk: bool, **fields: Any
    ) -> dict[str, Any]:
        """An answer, or a part of one, with these choices."""
        is_chat_chunk = is_chunk and self.kind == "chat.completion"
        return {
            "id": self.id,
            "object": f"{self.kind}.chunk" if is_chat_chunk else self.kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": FINGERPRINT,
            "choices": choices,
            **fields,
        }


def chat_logprobs(vocabulary: Vocabulary, piece: Piece) -> dict[str, Any]:
    """Log-probabilities as ``/v1/chat/completions`` has them."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        return {
            "token": vocabulary.text_of(token),
            "logprob": _finite(logprob),
            "bytes": list(vocabulary.bytes_of(token)),
        }

    return {
        "content": [
            {
                **entry(token, logprobs.token),
                "top_logprobs": [entry(*best) for best in logprobs.top],
            }
            for token, logprobs in _listed(piece)
        ],
        "refusal": None,
    }


def completion_logprobs(
    vocabulary: Vocabulary, piece: Piece, places: Places
) -> dict[str, Any]:
    """Log-probabilities as ``/v1/completions`` has them.

    Args:
        vocabulary: The tokens' texts.
        piece: Tokens.
        places: Of the text; it goes on by them.
    """
    listed = _listed(piece)
    return {
        "tokens": [vocabulary.text_of(token) for token, _ in listed],
        "token_logprobs": [_finite(logprobs.token) for _, logprobs in listed],
        "top_logprobs": [
            {vocabulary.text_of(token): _finite(value) for token, value in logprobs.top}
            for _, logprobs in listed
        ],
        "text_offset": [places.add(vocabulary.bytes_of(token)) for token, _ in listed],
    }


def _listed(piece: Piece) -> list[tuple[int, TokenLogprobs]]:
    return list(zip(piece.tokens, piece.logprobs, strict=True))


def _finite(logprob: float) -> float:
    """A log-probability as JSON can say it: OpenAI's number for an impossible token."""
    return logprob if logprob > _IMPOSSIBLE else _IMPOSSIBLE


def chat_delta(delta: Delta, *, is_first: bool) -> dict[str, Any]:
    """What a chunk adds to a message."""
    found: dict[str, Any] = {"role": "assistant", "content": ""} if is_first else {}
    if delta.content:
        found["content"] = delta.content
    if delta.reasoning:
        found["reasoning"] = delta.reasoning
    if delta.tool_calls:
        found["tool_calls"] = delta.tool_calls
    return found


def chat_message(delta: Delta) -> dict[str, Any]:
    """A whole message."""
    found: dict[str, Any] = {"role": "assistant", "content": delta.content or None}
    if not delta.content and not delta.tool_calls:
        found["content"] = ""
    found["refusal"] = None
    if delta.reasoning:
        found["reasoning"] = delta.reasoning
    if delta.tool_calls:
        found["tool_calls"] = delta.tool_calls
    return found
