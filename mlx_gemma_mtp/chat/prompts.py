"""Conversations to tokens: by a chat template, or as plain text that goes on.

``num_stable`` says how far a prompt will also begin the next one, whatever the answer:
up to there a K/V cache can be used again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from ..cache.beginning import num_common
from ..errors import RequestError
from ..generation.chat_template import (
    DEFAULT_THINKING,
    THINKING,
    ChatPrompt,
    apply_chat_template,
)
from ..generation.encoding import encode_text
from .conversation import Conversation

_ADVICE = (
    "Change the system prompt (/system) or --chat-template-config, or use "
    "--ignore-chat-template."
)


class Prompts(Protocol):
    """Makes prompts of conversations.

    Attributes:
        answers: Answers that show how the next prompt may go on.
        thinks: Whether the template is told that the model thinks before it answers;
            None where there is no template.
    """

    answers: tuple[str, ...]
    thinks: bool | None

    def prompt(self, conversation: Conversation, *further: str) -> ChatPrompt:
        """The prompt of a conversation and what is said next."""


class TemplatePrompts:
    """Prompts by the tokenizer's chat template, each rendered as a whole.

    Args:
        tokenizer: A tokenizer of mlx-lm's that has a chat template.
        config: More arguments for the template.
    """

    # One is enough: templates put a mark between messages, a token of its own.
    answers: tuple[str, ...] = ("x",)

    def __init__(self, tokenizer: Any, config: Mapping[str, Any]) -> None:
        self._tokenizer = tokenizer
        self._config = {**config}

    @property
    def thinks(self) -> bool | None:
        """Whether the template is told that the model thinks before it answers."""
        return bool(self._config.get(THINKING, DEFAULT_THINKING))

    @thinks.setter
    def thinks(self, thinks: bool | None) -> None:
        self._config[THINKING] = thinks

    def prompt(self, conversation: Conversation, *further: str) -> ChatPrompt:
        """The prompt of a conversation and what is said next.

        Raises:
            RequestError: The template does not take it.
        """
        messages = conversation.messages(*further)
        return apply_chat_template(
            self._tokenizer, messages, self._config, advice=_ADVICE
        )


class PlainPrompts:
    """Prompts without a template: the text so far, each message on lines of its own.

    Args:
        tokenizer: The tokenizer.
    """

    # A space or a line end may become one token with the line end before it.
    answers: tuple[str, ...] = ("x", " ", "\n")
    thinks: bool | None = None

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def prompt(self, conversation: Conversation, *further: str) -> ChatPrompt:
        """The prompt of a conversation and what is said next."""
        text = ""
        for message in conversation.messages(*further):
            if text and not text.endswith("\n"):
                text += "\n"
            text += message["content"]
            if message["role"] != "assistant" and not text.endswith("\n"):
                text += "\n"
        tokens = encode_text(self._tokenizer, text)
        return ChatPrompt(tokens, "", len(tokens) - 1)


def num_stable(
    prompts: Prompts, conversation: Conversation, question: str, prompt: list[int]
) -> int:
    """How many tokens of a prompt the next turn's prompt will begin with too.

    The end of a prompt opens the answer, and templates may write that in another way
    once the answer is there; Gemma's leaves out the thinking of earlier turns.

    Args:
        prompts: What made the prompt.
        conversation: The conversation before the question.
        question: What the user said last.
        prompt: The prompt of both.

    Returns:
        The number, at most ``len(prompt) - 1``: one token must be left to read.
    """
    stable = len(prompt) - 1
    for answer in prompts.answers:
        try:
            later = prompts.prompt(conversation, question, answer, "x").tokens
        except RequestError:  # of these messages; the real ones may pass
            return 0
        stable = min(stable, num_common(prompt, later))
    return stable
