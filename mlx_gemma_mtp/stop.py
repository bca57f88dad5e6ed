"""Stop strings over text that arrives in pieces.

Text that could be the beginning of a stop string is held back until it is known, so
that no part of a stop string is ever shown. Knows nothing of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

from .errors import RequestError


class StopStrings:
    """Cuts a stream of text before the first stop string.

    Args:
        stops: The strings to stop at, none of them empty.

    Raises:
        RequestError: A stop string is empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if any(not stop for stop in stops):
            raise RequestError(
                "a stop string must hold at least one character: got ''. Leave it out."
            )
        self._stops = tuple(stops)
        self._held = ""
        self.is_stopped = False

    def add(self, text: str) -> str:
        """Add a piece of text; return what is safe to show."""
        self._held += text
        found = [i for stop in self._stops if (i := self._held.find(stop)) >= 0]
        if found:
            self.is_stopped = True
            shown, self._held = self._held[: min(found)], ""
            return shown
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        shown, self._held = (
            self._held[: len(self._held) - keep],
            self._held[len(self._held) - keep :],
        )
        return shown

    def finish(self) -> str:
        """Return what is still held back: the text ended without a stop string."""
        shown, self._held = self._held, ""
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop`` without being it."""
    return next(
        (
            n
            for n in range(min(len(text), len(stop) - 1), 0, -1)
            if text.endswith(stop[:n])
        ),
        0,
    )
