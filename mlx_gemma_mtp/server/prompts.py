"""From texts and messages to token ids, by the model's tokenizer and chat template.

Called in one thread of its own: a long prompt takes a while, and tokenizers are not
made for several threads at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..chat_template import apply_chat_template
from ..encoding import encode_text
from ..errors import RequestError
from .failures import AnswerError, bad_request
from .kept import MIN_TOKENS
from .order import Place

# Arguments of a tokenizer's apply_chat_template that are no variables of a template.
_RESERVED = frozenset(
    {
        "add_generation_prompt",
        "chat_template",  # a template of the client's could run for ever
        "continue_final_message",
        "conversation",
        "documents",
        "max_length",
        "messages",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "tokenize",
        "tokenizer_kwargs",
        "tools",
        "truncation",
    }
)
# Tokens at the end of a prompt among which its reasoning may begin; mlx-lm's number.
_TAIL = 11


@dataclass(frozen=True)
class Prompt:
    """A prompt that the model can read.

    Attributes:
        tokens: Token ids.
        places: Where caches are worth keeping.
        is_reasoning: Whether the answer begins inside its reasoning.
    """

    tokens: list[int]
    places: tuple[Place, ...] = ()
    is_reasoning: bool = False


class Prompts:
    """Makes prompts.

    Args:
        tokenizer: mlx-lm's.
        template_args: More arguments for the chat template.
    """

    def __init__(self, tokenizer: Any, template_args: Mapping[str, Any]) -> None:
        self._tokenizer = tokenizer
        self._template_args = dict(template_args)

    @property
    def has_tools(self) -> bool:
        """Whether the chat template has tools."""
        return bool(self._tokenizer.has_tool_calling)

    def of_text(self, text: str) -> Prompt:
        """The prompt of a text, with the begin-of-sequence token unless it is there."""
        return self.of_tokens(encode_text(self._tokenizer, text))

    def of_tokens(self, tokens: list[int]) -> Prompt:
        """The prompt of token ids."""
        return Prompt(tokens, _places(len(tokens) - 1))

    def of_messages(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Any] | None = None,
        template_args: Mapping[str, Any] | None = None,
    ) -> Prompt:
        """The prompt of a conversation.

        Args:
            messages: Content as text, arguments of calls as objects.
            tools: Tools that the model may call, as the request has them.
            template_args: More arguments for the template.

        Raises:
            AnswerError: There is no chat template, or it does not take them.
        """
        if not self._tokenizer.has_chat_template:
            raise bad_request(
                "messages need a chat template: this model has none. Use "
                "/v1/completions, or start the server with --chat-template.",
                "messages",
            )
        settings = {**self._template_args, **(template_args or {})}
        reserved = sorted(_RESERVED & set(settings))
        if reserved:
            raise bad_request(
                f"chat_template_kwargs must hold variables of the template: got "
                f"{reserved[0]}, which is none. Leave it out.",
                "chat_template_kwargs",
            )
        settings["tools"] = list(tools) if tools else None
        tokens = self._apply(messages, settings)
        system_end = self._system_end(messages, settings, tokens)
        answer_start = self._answer_start(tokens)
        return Prompt(
            tokens,
            _places(answer_start, system_end),
            is_reasoning=self._is_reasoning(tokens),
        )

    def _apply(
        self, messages: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]
    ) -> list[int]:
        """The tokens that the template makes of messages."""
        advice = "Change messages, tools or chat_template_kwargs."
        try:
            return apply_chat_template(
                self._tokenizer, messages, settings, advice=advice
            )
        except RequestError as error:
            raise bad_request(str(error), "messages") from error

    def _system_end(
        self,
        messages: Sequence[Mapping[str, Any]],
        settings: Mapping[str, Any],
        tokens: list[int],
    ) -> int:
        """Tokens that every conversation with these instructions begins with."""
        num_system = 0
        while num_system < len(messages) and _is_system(messages[num_system]):
            num_system += 1
        if not (num_system or settings["tools"]) or num_system == len(messages):
            return 0
        other = [*messages[:num_system], {"role": "user", "content": ""}]
        try:
            start = self._apply(other, settings)
        except AnswerError:  # a template may want more of a conversation
            return 0
        pairs = zip(start, tokens, strict=False)
        return next((i for i, (a, b) in enumerate(pairs) if a != b), len(start))

    def _answer_start(self, tokens: list[int]) -> int:
        """Where the next turn's prompt may differ: before the reasoning's mark."""
        if self._tokenizer.has_thinking:
            start = self._tokenizer.rfind_think_start(tokens, start=len(tokens) - _TAIL)
            if start >= 0:
                return int(start)
        return len(tokens) - 1

    def _is_reasoning(self, tokens: list[int]) -> bool:
        if not self._tokenizer.has_thinking:
            return False
        start = self._tokenizer.rfind_think_start(tokens)
        return bool(start > self._tokenizer.rfind_think_end(tokens))


def _is_system(message: Mapping[str, Any]) -> bool:
    return message["role"] in ("system", "developer")


def _places(end: int, system_end: int = 0) -> tuple[Place, ...]:
    """The places worth keeping: after the instructions, and at the prompt's end."""
    places = []
    if MIN_TOKENS <= system_end < end:
        places.append(Place(system_end, "system"))
    if MIN_TOKENS <= end:
        places.append(Place(end, "user"))
    return tuple(places)
