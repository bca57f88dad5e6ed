"""Conversations to the text of a prompt and that of the answer, by the chat template.

Knows nothing of tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import DataError, RequestError
from ...generation.chat_template import render_chat_template
from .lines import Place
from .records import ChatRecord, is_answer

_MARK = "\x02an answer\x03"  # what no answer says
_ADVICE = "Mend or remove the record, or change --chat-template-config."


class Conversations:
    """Writes conversations as a tokenizer's chat template does.

    Args:
        tokenizer: mlx-lm's.
        config: More arguments for the template.
    """

    def __init__(self, tokenizer: Any, config: Mapping[str, Any]) -> None:
        self._tokenizer = tokenizer
        self._config = dict(config)

    def prompt(self, record: ChatRecord, place: Place) -> str:
        """What asks for the last answer, or for the next one where there is none.

        Raises:
            DataError: There is no chat template, no question, or the template does
                not take the messages.
        """
        messages = record.messages
        asked = messages[:-1] if messages and is_answer(messages[-1]) else messages
        if not asked:
            found = "an answer alone" if messages else "no answer"
            next_step = "Add what is missing, or remove the record."
            constraint = "a question before an answer"
            raise place.error("the messages", constraint, found, next_step)
        return self._render(asked, record, place, opens_answer=True)

    def split(self, record: ChatRecord, place: Place) -> tuple[str, str]:
        """The prompt of a conversation's last answer, and that answer.

        Templates may open an answer in another way than they write it later: Gemma's
        puts an empty thought before it. What follows the prompt then is what the
        template writes from the message's own text on.

        Raises:
            DataError: As ``prompt``, or there is no answer, or it is not told apart.
        """
        record = record.up_to_answer()
        prompt = self.prompt(record, place)
        whole = self._render(record.messages, record, place, opens_answer=False)
        if whole.startswith(prompt):
            return prompt, whole[len(prompt) :]
        *asked, last = record.messages
        marked = self._render(
            [*asked, {**last, "content": _MARK}], record, place, opens_answer=False
        )
        before, _, after = marked.rpartition(_MARK)
        is_found = before and whole.startswith(before) and whole.endswith(after)
        if not is_found or "tool_calls" in last:  # calls may stand before the text
            raise place.error(
                "the last answer",
                "what the chat template writes behind its prompt",
                "a conversation that it begins in another way",
                "Remove the record, or change --chat-template-config.",
            )
        return prompt, whole[len(before) :]

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        record: ChatRecord,
        place: Place,
        *,
        opens_answer: bool,
    ) -> str:
        if not self._tokenizer.has_chat_template:
            raise place.error(
                "the record",
                'a {"prompt": ...} or {"text": ...}',
                "messages, for a target that has no chat template",
                "Write it so, or take a checkpoint with a chat template.",
            )
        tools = {"tools": record.tools} if record.tools else {}
        try:
            return render_chat_template(
                self._tokenizer,
                messages,
                {**self._config, **tools},
                advice=_ADVICE,
                opens_answer=opens_answer,
            )
        except RequestError as error:
            raise DataError(f"{place}: {error}") from error
