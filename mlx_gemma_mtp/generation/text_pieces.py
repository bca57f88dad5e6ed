"""From tokens to the text that they make certain, up to a stop string."""

from __future__ import annotations

from typing import Any

from ..markup.answer import Marks, cut, spelled
from .stop import StopStrings


class TextPieces:
    """The text of one sequence, token by token.

    Args:
        detokenizer: mlx-lm's, fresh.
        stops: The strings that end the text.
        marks: The control tokens, which the text tells from what ordinary tokens spell:
            ``plain`` makes it what is to be seen, ``AnswerReader`` reads it.
        min_tokens: Tokens at the beginning that no stop string ends.
    """

    def __init__(
        self,
        detokenizer: Any,
        stops: StopStrings,
        marks: Marks,
        *,
        min_tokens: int = 0,
    ) -> None:
        self._detokenizer = detokenizer
        self._stops = stops
        self._num_free = min_tokens
        self._marks = marks.tokens
        self._held = ""  # what stop strings hold back

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string was found: the text ends before it."""
        return self._stops.is_stopped

    @property
    def stop(self) -> str | None:
        """The stop string that was found, if one was."""
        return self._stops.found

    def add(self, token: int, finish_reason: str | None) -> str:
        """The text that a token makes certain.

        Args:
            token: The next one.
            finish_reason: Why the sequence ends with it; None where it does not.
        """
        is_text = finish_reason != "stop"  # an end-of-sequence token has none
        if is_text:
            self._detokenizer.add_token(token)
        if finish_reason is not None:
            self._detokenizer.finalize()
        segment = self._detokenizer.last_segment
        self._held += self._told_apart(
            segment, self._marks.get(token) if is_text else None
        )
        shown = self._stops.add(segment, is_free=self._num_free > 0)
        self._num_free -= 1
        if finish_reason is not None and not self._stops.is_stopped:
            shown += self._stops.finish()
        found, self._held = cut(self._held, len(shown))
        return found

    def _told_apart(self, segment: str, mark: str | None) -> str:
        """A segment in which text of ordinary tokens is no mark."""
        if not self._marks:
            return segment
        if mark is not None and segment.endswith(mark):
            return spelled(segment[: -len(mark)]) + mark
        return spelled(segment)
