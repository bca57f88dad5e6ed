"""From tokens to the text that they make certain, up to a stop string."""

from __future__ import annotations

from typing import Any

from .stop import StopStrings


class TextPieces:
    """The text of one sequence, token by token.

    Args:
        detokenizer: mlx-lm's, fresh.
        stops: The strings that end the text.
    """

    def __init__(self, detokenizer: Any, stops: StopStrings) -> None:
        self._detokenizer = detokenizer
        self._stops = stops

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string was found: the text ends before it."""
        return self._stops.is_stopped

    def add(self, token: int, finish_reason: str | None) -> str:
        """The text that a token makes certain.

        Args:
            token: The next one.
            finish_reason: Why the sequence ends with it; None where it does not.
        """
        if finish_reason != "stop":  # an end-of-sequence token has no text
            self._detokenizer.add_token(token)
        if finish_reason is None:
            return self._stops.add(self._detokenizer.last_segment)
        self._detokenizer.finalize()
        text = self._stops.add(self._detokenizer.last_segment)
        return text if self._stops.is_stopped else text + self._stops.finish()
