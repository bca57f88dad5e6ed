"""Stop strings over text that arrives in pieces.

Text that could be the beginning of a stop string is held back until it is known, so
that no part of a stop string is ever shown. Knows nothing of tokens.

The text stops where the first stop string is complete, whatever pieces it came in: of
all places where one stands, the one that ends first counts, and of several that end
there the longest.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import RequestError


class StopStrings:
    """Cuts a stream of text before the first stop string.

    Args:
        stops: The string to stop at, or several, none of them empty; None for none.

    Attributes:
        found: The stop string that ended the text; None where none has.

    Raises:
        RequestError: A stop string is empty, or no string.
    """

    def __init__(self, stops: str | Sequence[str] | None = ()) -> None:
        self._stops = (stops,) if isinstance(stops, str) else tuple(stops or ())
        for stop in self._stops:
            if not isinstance(stop, str) or not stop:
                raise RequestError(
                    "a stop string must hold at least one character: got "
                    f"{stop!r}. Leave it out."
                )
        self._held = ""
        self._num_free = 0  # characters of what is held, in which none ends
        self.found: str | None = None

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string was found: nothing more is shown."""
        return self.found is not None

    def add(self, text: str, *, is_free: bool = False) -> str:
        """Add a piece of text; return what is safe to show, nothing after the stop.

        Args:
            text: The next piece.
            is_free: Whether stop strings that end in it do not count; one may begin.
        """
        if self.is_stopped:
            return ""
        self._held += text
        if is_free:
            self._num_free = len(self._held)
        found = [
            (start + len(stop), start, stop)
            for stop in self._stops
            if (start := self._held.find(stop, self._first_start(stop))) >= 0
        ]
        if found:
            _, start, self.found = min(found)
            shown, self._held = self._held[:start], ""
            return shown
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        shown, self._held = (
            self._held[: len(self._held) - keep],
            self._held[len(self._held) - keep :],
        )
        self._num_free = max(self._num_free - len(shown), 0)
        return shown

    def _first_start(self, stop: str) -> int:
        """The first place of what is held at which a stop string counts."""
        return max(self._num_free - len(stop) + 1, 0)

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
