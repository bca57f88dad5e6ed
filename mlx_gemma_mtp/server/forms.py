"""The form that an answer must have: found in a body, and compiled.

Compiling takes milliseconds, or up to seconds where somebody means harm: it is done in
a thread beside the event loop's. Knows nothing of HTTP.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..errors import RequestError
from ..structure.constraint import (
    Constraint,
    choice,
    grammar,
    json_object,
    json_schema,
    regex,
)
from ..structure.masks import BoundConstraint
from ..structure.tokenizer import grammar_tokenizer
from .errors import AnswerError, bad_request
from .schema import ChatBody, CompletionBody, ResponseFormat, StructuredOutputs

logger = logging.getLogger("mlx_gemma_mtp.server")

_RESPONSE_FORMAT = "response_format"
_STRUCTURED_OUTPUTS = "structured_outputs"


@dataclass(frozen=True)
class Form:
    """What an answer must be, not compiled yet.

    Attributes:
        place: The field of the body that says it.
        make: Compiles it for any tokenizer; RequestError where that cannot be done.
    """

    place: str
    make: Callable[[], Constraint]

    def made(self) -> Constraint:
        """What the answer must be.

        Raises:
            AnswerError: It cannot be compiled.
        """
        try:
            return self.make()
        except RequestError as error:
            raise self.refused(str(error)) from error

    def refused(self, reason: str) -> AnswerError:
        """A request whose form is not made."""
        return bad_request(f"{self.place}: {reason}", self.place)


class Forms:
    """Compiles forms for a model's tokens.

    Args:
        tokenizer: mlx-lm's.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def prepare(self) -> None:
        """Build what grammars need of the tokenizer, before anybody is answered.

        Later it would let all streams stand still for seconds. Where it cannot be built
        each request with a form is told why.
        """
        try:
            grammar_tokenizer(self.tokenizer)
        except RequestError as error:
            logger.debug("answers have no given form: %s", error)
        except Exception:  # whatever it is, answers without a form need none of it
            logger.exception("the tokenizer could not be built for given forms")

    def compiled(self, form: Form) -> BoundConstraint:
        """A form that rows can follow; called beside the event loop's thread.

        Raises:
            AnswerError: It cannot be compiled; the message names the place.
        """
        constraint = form.made()
        try:
            return BoundConstraint(constraint, self.tokenizer)
        except RequestError as error:
            raise form.refused(str(error)) from error


def form_of(body: ChatBody | CompletionBody) -> Form | None:
    """The form that a body asks for, if any.

    Raises:
        AnswerError: Two are asked for, or something that no form can stand beside.
    """
    forms = (
        _of_response_format(body.response_format),
        _of_structured_outputs(body.structured_outputs),
    )
    found = [form for form in forms if form is not None]
    if not found:
        return None
    check_end(body)
    if len(found) > 1:
        raise bad_request(
            f"{_STRUCTURED_OUTPUTS} must stand without {_RESPONSE_FORMAT}: got both. "
            "Leave out one of them.",
            _STRUCTURED_OUTPUTS,
        )
    return found[0]


def form_beside(body: ChatBody, beginning: str | None) -> Form | None:
    """The form that a chat asks for, if any.

    Args:
        body: The chat's.
        beginning: Text of the answer that the prompt has already; None or empty where
            there is none. It would stand before the form, which is the whole answer.

    Raises:
        AnswerError: See ``form_of``; or there is a beginning and a form.
    """
    form = form_of(body)
    if form is not None and beginning:
        field = form.place.partition(".")[0]
        raise bad_request(
            f"{field} must stand without a beginning of the answer: got a last message "
            "of the assistant's with text. Leave out one of them.",
            field,
        )
    return form


def check_end(body: ChatBody | CompletionBody) -> None:
    """Refuse what would go on where a form, or forced calls, end an answer.

    Raises:
        AnswerError: It is asked for.
    """
    if body.ignore_eos:
        raise bad_request(
            "ignore_eos must be left out where an answer has a given form or forced "
            "calls: it ends where they do. Leave out one of them.",
            "ignore_eos",
        )


def _of_response_format(asked: ResponseFormat | None) -> Form | None:
    """The form that OpenAI's field asks for.

    Raises:
        AnswerError: A schema is asked for, and there is none.
    """
    if asked is None or asked.type == "text":
        return None
    if asked.type == "json_object":
        return Form(_RESPONSE_FORMAT, json_object)
    given = asked.json_schema
    if given is None:
        raise bad_request(
            f"{_RESPONSE_FORMAT}.json_schema must hold a schema: got nothing. Add it, "
            "or ask for json_object.",
            f"{_RESPONSE_FORMAT}.json_schema",
        )
    make = partial(json_schema, given.schema_, strict=bool(given.strict))
    return Form(f"{_RESPONSE_FORMAT}.json_schema.schema", make)


def _of_structured_outputs(asked: StructuredOutputs | None) -> Form | None:
    """The form that vLLM's field asks for.

    Raises:
        AnswerError: None is asked for, or several.
    """
    if asked is None:
        return None
    makers: dict[str, tuple[Any, Callable[[Any], Constraint]]] = {
        "json": (asked.json_, json_schema),
        "regex": (asked.regex, regex),
        "choice": (asked.choice, choice),
        "grammar": (asked.grammar, grammar),
        "json_object": (asked.json_object or None, lambda _: json_object()),
    }
    found = [
        Form(f"{_STRUCTURED_OUTPUTS}.{name}", partial(make, value))
        for name, (value, make) in makers.items()
        if value is not None
    ]
    if len(found) != 1:
        got = " and ".join(form.place.partition(".")[2] for form in found)
        raise bad_request(
            f"{_STRUCTURED_OUTPUTS} must hold one of {', '.join(makers)}: got "
            f"{got or 'none'}. Send exactly one.",
            _STRUCTURED_OUTPUTS,
        )
    return found[0]
