"""From texts and messages to token ids, by the model's tokenizer and chat template.

Called in the tokenizer's threads: a long prompt takes a while.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..cache.beginning import num_common
from ..errors import RequestError
from ..generation.chat_template import (
    ChatPrompt,
    apply_chat_template,
    render_chat_template,
)
from ..generation.encoding import encode_text
from ..markup.answer import CALL_START, AnswerReader, marks_of
from .choice import Place
from .errors import bad_request
from .lengths import Lengths
from .settings import RESERVED

# Reading fewer tokens takes about a round; a kept cache of them would push out a
# longer one.
MIN_TOKENS = 64
_ADVICE = "Change messages, tools or chat_template_kwargs."


@dataclass(frozen=True)
class Prompt:
    """A prompt that the model can read.

    Attributes:
        tokens: Token ids.
        places: Where caches are worth keeping.
        opening: What its end has written of the answer's turn.
        is_reasoning: Whether that has begun a thought.
        prediction: Token ids that the answer may have.
    """

    tokens: list[int]
    places: tuple[Place, ...] = ()
    opening: str = ""
    is_reasoning: bool = False
    prediction: tuple[int, ...] = ()


class Prompts:
    """Makes prompts.

    Args:
        tokenizer: mlx-lm's.
        template_args: More arguments for the chat template.
        limit: Most tokens of prompt and answer together; None for any number.
    """

    def __init__(
        self,
        tokenizer: Any,
        template_args: Mapping[str, Any],
        *,
        limit: int | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._marks = marks_of(tokenizer)
        self._template_args = dict(template_args)
        self._lengths = Lengths(tokenizer, limit, template_args)

    def check_texts(self, given: Sequence[str | list[int]]) -> None:
        """Refuse texts that are too long for certain; it takes no time.

        Raises:
            AnswerError: One is.
        """
        for each in given:
            if isinstance(each, str):
                self._lengths.check_text(each)

    def check_messages(
        self, messages: Sequence[Mapping[str, Any]], prediction: str = ""
    ) -> None:
        """Refuse a conversation that is too long for certain; it takes no time.

        Args:
            messages: Its messages.
            prediction: What the answer may be.

        Raises:
            AnswerError: One of the two is.
        """
        self._lengths.check_messages(messages)
        self._lengths.check_text(prediction, "prediction")

    @property
    def has_tools(self) -> bool:
        """Whether the chat template has tools, and calls them in Gemma's way."""
        return bool(self._tokenizer.tool_call_start == CALL_START)

    def of_text(self, text: str) -> Prompt:
        """The prompt of a text, with the begin-of-sequence token unless it is there."""
        return self.of_tokens(encode_text(self._tokenizer, text))

    def of_part(self, text: str) -> Prompt:
        """The tokens of a text that begins nothing."""
        return self.of_tokens(encode_text(self._tokenizer, text, continues=True))

    def of_tokens(self, tokens: list[int]) -> Prompt:
        """The prompt of token ids."""
        return Prompt(tokens, _places(len(tokens) - 1))

    def of_messages(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Any] | None = None,
        template_args: Mapping[str, Any] | None = None,
        continues_last: bool | None = None,
        opens_answer: bool = True,
        prediction: str = "",
    ) -> Prompt:
        """The prompt of a conversation.

        Args:
            messages: Content as text, arguments of calls as objects.
            tools: Tools that the model may call, as the request has them.
            template_args: More arguments for the template.
            continues_last: Whether the last message is the beginning of the answer;
                None where it is an assistant's text.
            opens_answer: Whether the prompt ends where an answer begins.
            prediction: What the answer may be.

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
        reserved = sorted(RESERVED & set(settings))
        if reserved:
            raise bad_request(
                f"chat_template_kwargs must hold variables of the template: got "
                f"{reserved[0]}, which is none. Leave it out.",
                "chat_template_kwargs",
            )
        settings["tools"] = list(tools) if tools else None
        if not opens_answer:
            return self.of_text(self._rendered(messages, settings))
        found = self._apply(messages, settings, continues(messages, continues_last))
        system_end = self._system_end(messages, settings, found.tokens)
        reader = AnswerReader(self._marks, opening=found.opening)
        return Prompt(
            found.tokens,
            _places(found.num_stable, system_end),
            found.opening,
            reader.is_thought,
            tuple(self.of_part(prediction).tokens),
        )

    def _rendered(
        self, messages: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]
    ) -> str:
        """The text of messages that no answer follows."""
        try:
            text = render_chat_template(
                self._tokenizer, messages, settings, advice=_ADVICE, opens_answer=False
            )
        except RequestError as error:
            raise bad_request(str(error), "messages") from error
        self._lengths.check_text(text, "messages")
        return text

    def _apply(
        self,
        messages: Sequence[Mapping[str, Any]],
        settings: Mapping[str, Any],
        continues_last: bool,
    ) -> ChatPrompt:
        """What the template makes of messages."""
        try:
            return apply_chat_template(
                self._tokenizer,
                messages,
                settings,
                advice=_ADVICE,
                continues_last=continues_last,
                check=lambda text: self._lengths.check_text(text, "messages"),
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
            start = render_chat_template(
                self._tokenizer, other, settings, advice="", opens_answer=False
            )
        except RequestError:  # a template may want more of a conversation
            return 0
        return num_common(encode_text(self._tokenizer, start), tokens)


def continues(messages: Sequence[Mapping[str, Any]], asked: bool | None) -> bool:
    """Whether the last message is the beginning of the answer.

    Raises:
        AnswerError: It is to be, and cannot.
    """
    last = messages[-1]
    is_text = last["role"] == "assistant" and not last.get("tool_calls")
    can_be = is_text and len(messages) > 1
    if asked and not can_be:
        raise bad_request(
            "continue_final_message must end a conversation with a text of the "
            f"assistant's: got {len(messages)} messages, the last one of role "
            f"{last['role'][:40]!r}. Leave it out.",
            "continue_final_message",
        )
    return can_be and asked is not False


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
