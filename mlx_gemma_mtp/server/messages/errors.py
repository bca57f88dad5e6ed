"""What goes wrong with a request, in Anthropic's words."""

from __future__ import annotations

from typing import Any

from ..errors import ENGINE_FAILED, AnswerError
from ..request_log import current_id

PATH = "/v1/messages"

OVERLOADED = 529
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    OVERLOADED: "overloaded_error",
}
# By these words its clients know that a conversation must be made shorter.
_TOO_LONG = "prompt is too long: "


def status_of(failure: AnswerError) -> int:
    """HTTP's status: who is to come again later is told so by a number of its own.

    Its clients come again and again for that number, so an engine that has failed has
    another one.
    """
    if failure.status != 503:
        return failure.status
    return 500 if failure.code == ENGINE_FAILED else OVERLOADED


def body_of(failure: AnswerError) -> dict[str, Any]:
    """The answer's body, also as the event that ends a stream."""
    status = status_of(failure)
    kind = "api_error" if status >= 500 else "invalid_request_error"
    is_long = failure.code == "context_length_exceeded"
    message = _TOO_LONG + failure.message if is_long else failure.message
    return {
        "type": "error",
        "error": {"type": _TYPES.get(status, kind), "message": message},
        "request_id": current_id(),
    }
