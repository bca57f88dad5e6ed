"""Refuses what is too long for certain, by its characters: before it is encoded.

Encoding takes seconds and gigabytes where a text is much too long. A token stands for
so many characters at most, so a text of more than fit has more tokens than fit. What
may fit is never refused here: it is counted where it is encoded.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import RequestError
from ..generation.chat_template import render_chat_template
from ..generation.encoding import least_tokens, longest_token
from .errors import AnswerError

# No template writes them by itself.
_PROBES = ("first marble", "second marble", "third marble")


class Lengths:
    """What is known of texts by their characters alone.

    Args:
        tokenizer: mlx-lm's.
        limit: Most tokens of prompt and answer together; None for any number.
        template_args: What the chat template is given beside messages.
    """

    def __init__(
        self,
        tokenizer: Any,
        limit: int | None,
        template_args: Mapping[str, Any],
    ) -> None:
        self._tokenizer = tokenizer
        self._limit = limit or sys.maxsize
        self._longest = longest_token(tokenizer)
        self._keeps_messages = self._longest is not None and _keeps_messages(
            tokenizer, template_args
        )

    def check_text(self, text: str, param: str = "prompt") -> None:
        """Refuse a text that does not fit.

        Args:
            text: What is to be encoded, whole.
            param: The field that it comes from.

        Raises:
            AnswerError: It has too many tokens for certain.
        """
        if self._longest is None or len(text) < self._limit:
            return
        self._check(least_tokens(self._tokenizer, text, self._longest), param)

    def check_messages(self, messages: Sequence[Mapping[str, Any]]) -> None:
        """Refuse messages of which the user's alone do not fit.

        Templates write them as they are, without the white space around them; what
        else they write, and what they leave out of the others, is theirs to say.

        Raises:
            AnswerError: They have too many tokens for certain.
        """
        if self._longest is None or not self._keeps_messages:
            return
        texts = (m["content"].strip() for m in messages if m["role"] == "user")
        self._check(sum(map(len, texts)) // self._longest, "messages")

    def _check(self, num_tokens: int, param: str) -> None:
        """Refuse so many tokens or more, where the answer has no room beside them."""
        if num_tokens >= self._limit:
            raise AnswerError(
                400,
                f"prompt and answer must have at most {self._limit} tokens: got "
                f"a prompt of at least {num_tokens}. Shorten it.",
                param=param,
                code="context_length_exceeded",
            )


def _keeps_messages(tokenizer: Any, template_args: Mapping[str, Any]) -> bool:
    """Whether a chat template writes what a user has said, earlier turns included."""
    roles = ("user", "assistant", "user")
    messages = [
        {"role": role, "content": text}
        for role, text in zip(roles, _PROBES, strict=True)
    ]
    if not tokenizer.has_chat_template:
        return False
    try:
        text = render_chat_template(
            tokenizer, messages, template_args, advice="", opens_answer=True
        )
    except RequestError:  # it wants more of a conversation
        return False
    return all(probe in text for probe in _PROBES[::2])
