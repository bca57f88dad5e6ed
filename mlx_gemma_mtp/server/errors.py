"""What goes wrong with a request, in OpenAI's words.

Knows nothing of how an answer is sent.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
}


class AnswerError(Exception):
    """An answer that is an error.

    Args:
        status: HTTP's status.
        message: What is wrong, what was expected, what to do; one line.
        param: The field of the body that is wrong, if one is.
        code: A word for programs, if there is one.
        retry_after: Seconds after which trying again makes sense; None for never.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        """The answer's body."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": self.message,
                "type": _TYPES.get(self.status, kind),
                "param": self.param,
                "code": self.code,
            }
        }

    def headers(self) -> dict[str, str]:
        """Headers that belong to it."""
        return (
            {} if self.retry_after is None else {"retry-after": f"{self.retry_after}"}
        )


def bad_request(message: str, param: str | None = None) -> AnswerError:
    """A request that can never be answered as it is."""
    return AnswerError(400, message, param=param)


@contextmanager
def renamed(names: Mapping[str, str]) -> Iterator[None]:
    """Let what goes wrong within be told with other names of fields.

    Args:
        names: Those of a chat's body, and what the request calls them.

    Raises:
        AnswerError: What went wrong.
    """
    try:
        yield
    except AnswerError as failure:
        field, space, rest = failure.message.partition(" ")
        for name, own in names.items():
            if name in field or name in (failure.param or ""):
                failure.message = field.replace(name, own) + space + rest
                failure.param = failure.param and failure.param.replace(name, own)
                break
        raise


SHUTTING_DOWN = "the server is shutting down. Try again later, or another one."
BROKEN = "the engine has failed; the server's log says why. It must be started again."
ENGINE_FAILED = "engine_failed"


def engine_failed() -> AnswerError:
    """A request that came after the engine has failed: it helps nobody to try again."""
    return AnswerError(503, BROKEN, code=ENGINE_FAILED)
