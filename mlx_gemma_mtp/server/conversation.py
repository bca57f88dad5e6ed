"""From the checked body of a conversation to what can be decoded, for every dialect.

Each dialect translates its own body to that of ``/v1/chat/completions``; from there on
all of them are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import Request

from ..structure.masks import BoundConstraint
from .answer_parser import Reader
from .choice import Choice
from .desk import Desk
from .forms import form_beside
from .prompts import Prompt, continues
from .schema import ChatBody


@dataclass(frozen=True)
class Conversation:
    """A conversation that the model can read.

    Attributes:
        body: What was asked for.
        prompt: Its tokens.
        tools: The tools that the model may call.
        constraint: What the answer must be; None for anything.
    """

    body: ChatBody
    prompt: Prompt
    tools: Sequence[dict[str, Any]]
    constraint: BoundConstraint | None

    def choices(self, desk: Desk) -> list[Choice]:
        """What is to be decoded.

        Raises:
            AnswerError: Something is asked for that cannot be.
        """
        return desk.body_parser.of_chat(self.body, self.prompt, self.constraint)

    def readers(self, desk: Desk) -> list[Reader]:
        """What reads the answers, one for each choice."""
        body = self.body
        return desk.dialogue.readers(
            self.tools,
            body.n or 1,
            opening=self.prompt.opening,
            has_numbers=bool(body.stream),
            max_calls=1 if body.parallel_tool_calls is False else None,
        )


async def conversation_of(
    request: Request, desk: Desk, body: ChatBody, *, opens_answer: bool = True
) -> Conversation:
    """Make the prompt of a conversation, and compile what its answer must be.

    Args:
        request: The request.
        desk: What the routes work with.
        body: The request's body, or what it was translated to.
        opens_answer: Whether the prompt ends where an answer begins.

    Raises:
        AnswerError: Something is asked for that cannot be, there is no room, or the
            client has gone.
    """
    desk.body_parser.check(body)
    desk.bridge.check_room(body.n or 1)
    messages = [message.plain() for message in body.messages]
    prediction = body.prediction.text if body.prediction else ""
    desk.prompts.check_messages(messages, prediction)
    tools = desk.body_parser.tools_of(body, has_tools=desk.prompts.has_tools)
    is_begun = continues(messages, body.continue_final_message)
    beginning = messages[-1].get("content") if is_begun else None
    form = desk.forced_calls.of(body, tools, form_beside(body, beginning))
    prompt, constraint = await desk.prepared(
        request,
        body.n or 1,
        # Templates look back and forth from each message.
        len(await request.body()) + len(messages) ** 2,
        lambda: desk.prompts.of_messages(
            messages,
            tools=tools,
            template_args=desk.body_parser.template_args_of(body),
            continues_last=body.continue_final_message,
            opens_answer=opens_answer,
            prediction=prediction,
        ),
        form,
    )
    return Conversation(body, prompt, tools, constraint)
