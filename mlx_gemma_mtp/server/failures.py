"""Answers that say what went wrong, each in the form of its path's dialect."""

from __future__ import annotations

from starlette.responses import Response

from .errors import AnswerError
from .messages import errors as messages
from .openai_format import dumps


def failure_response(failure: AnswerError, path: str) -> Response:
    """The answer that says what went wrong.

    Args:
        failure: What did.
        path: What was asked for.
    """
    headers = failure.headers()
    if path.startswith(messages.PATH):
        status, body = messages.status_of(failure), messages.body_of(failure)
    else:
        status, body = failure.status, failure.body()
    return Response(dumps(body), status, headers, media_type="application/json")
