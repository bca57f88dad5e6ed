"""How long ranks may be silent in work whose length nobody knows before.

A rank counts its own work too, as it hears of the others only behind it. So what may be
long on a slow machine is measured: whoever works must never be taken for dead, and who
is dead is missed the sooner, the faster the others are. Knows nothing of what is done.
"""

from __future__ import annotations

from .watchdog import LIMIT_S

FIRST_S = 60.0  # that a rank may take longer to trace and to compile something
LOADING_S = 3600.0  # that it may take longer to load
_UNKNOWN_S = 600.0  # that it may take for a piece while no rank knows the speed
_SLOWER = 10.0  # times as long as before: more to look at, a hot or a busy machine


class Patience:
    """How long pieces of one kind of work may take, such as chunks of prompts."""

    def __init__(self) -> None:
        self._known: set[int] = set()  # sizes, in binary digits
        self._unit_s: float | None = None  # of the last piece: they change slowly

    def limit_s(self, size: int) -> float:
        """Seconds that a rank may be silent in the next piece.

        Args:
            size: Of the piece. Much more or less than before may need other kernels.
        """
        if self._unit_s is None:
            return _UNKNOWN_S
        base_s = LIMIT_S if size.bit_length() in self._known else FIRST_S
        return base_s + _SLOWER * self._unit_s * size

    def note(self, size: int, took_s: float) -> None:
        """A piece of a size has taken so many seconds.

        A small one takes longer for its size than a large one: what it says of others
        is too much, not too little.
        """
        self._known.add(size.bit_length())
        self._unit_s = took_s / size
