"""What all routes work with, and what each of them does with a request.

Knows nothing of what a body holds, or of how an answer is written.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from fastapi import Request
from fastapi.responses import Response

from ..structure.masks import BoundConstraint
from .answer_parser import Dialogue
from .body_parser import BodyParser
from .bridge import Bridge
from .choice import Choice
from .errors import AnswerError, bad_request
from .forced_calls import ForcedCalls
from .forms import Form, Forms
from .lanes import LIMIT_S, Lanes
from .openai_format import dumps
from .prompts import Prompts
from .reply import Reply
from .responses import Answer, Writer
from .settings import Settings
from .stream import EventStream, unless_gone
from .vocabulary import Vocabulary

T = TypeVar("T")


@dataclass(frozen=True)
class Desk:
    """What the routes work with.

    Attributes:
        settings: The command's.
        bridge: The way to the engine.
        body_parser: Makes choices.
        prompts: Makes prompts, in ``lanes``.
        dialogue: How answers are marked.
        forced_calls: Finds which calls an answer must have.
        vocabulary: The tokens' texts.
        forms: Compiles what answers must be, in ``lanes``.
        lanes: The threads of both.
    """

    settings: Settings
    bridge: Bridge
    body_parser: BodyParser
    prompts: Prompts
    dialogue: Dialogue
    forced_calls: ForcedCalls
    vocabulary: Vocabulary
    forms: Forms
    lanes: Lanes

    async def prepared(
        self,
        request: Request,
        num_choices: int,
        size: int,
        function: Callable[[], T],
        form: Form | None,
    ) -> tuple[T, BoundConstraint | None]:
        """Let the tokenizer work for a request as long as its client is there.

        Args:
            request: The request.
            num_choices: For which room is kept meanwhile.
            size: What there is to do, in characters.
            function: What uses the tokenizer.
            form: What the answer must be; None for anything.

        Returns:
            What the function returns, and the form, compiled.

        Raises:
            AnswerError: There is no room, the client has gone, the form cannot be
                compiled, or something takes too long.
        """
        with self.bridge.room(num_choices):
            constraint = None
            if form is not None:
                compiled = self.lanes.compile(size, lambda: self.forms.compiled(form))
                late = form.refused(
                    f"it must be compiled within {LIMIT_S:.0f} s: it was not. Make it "
                    "simpler."
                )
                constraint = await _waited(request, compiled, late)
            late = bad_request(
                f"the prompt must be made of the request within {LIMIT_S:.0f} s: "
                "it was not. Send fewer messages, or less text.",
                "messages",
            )
            found = await _waited(request, self.lanes.run(size, function), late)
        return found, constraint

    async def answered(
        self,
        request: Request,
        choices: Sequence[Choice],
        writer: Writer,
        arrived: float,
        *,
        num_choices: int = 1,
        is_stream: bool,
    ) -> Response:
        """Let the engine work, and send what it makes.

        Args:
            request: The request.
            choices: What it asks for.
            writer: How the answer is written.
            arrived: When the request came, seconds of ``time.perf_counter``.
            num_choices: Choices of each prompt.
            is_stream: Whether the answer is sent as it comes.

        Raises:
            AnswerError: There is no room, or the engine has refused or not finished it.
        """
        reply = Reply(choices, arrived)
        answer = Answer(reply, writer, num_choices=num_choices)
        self.bridge.submit(reply)

        def let_go() -> None:
            self.bridge.cancel(reply.jobs)

        try:
            await reply.accepted()
            if is_stream:
                return EventStream(answer.events(), let_go)
            whole = await unless_gone(answer.whole(), request.receive)
        except BaseException:
            let_go()
            raise
        let_go()
        if whole is None:
            return Response(status_code=499)  # nobody waits for it
        return Response(dumps(whole), media_type="application/json")


async def _waited(request: Request, work: Awaitable[T], late: AnswerError) -> T:
    """What work gives, as long as its client is there.

    Raises:
        AnswerError: The client has gone; or ``late``, where it takes too long.
    """
    try:
        found = await unless_gone(work, request.receive)
    except TimeoutError:
        raise late from None
    if found is None:
        raise AnswerError(499, "nobody waits for the answer.")
    return found
