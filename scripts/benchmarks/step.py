"""What every engine of the benchmark does: decode prompts step by step.

Knows no engine and no library.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol


class UnavailableError(Exception):
    """An engine cannot do what is asked for: why, one line."""


@dataclass(frozen=True)
class Step:
    """What a round, or the prefill, emitted for all rows together.

    Attributes:
        num_tokens: Tokens emitted.
        rounds: Rounds counted once for each live row; 0 for a prefill.
        drafted: Draft tokens proposed.
        accepted: Draft tokens accepted.
    """

    num_tokens: int
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0


class Engine(Protocol):
    """A way to decode."""

    @property
    def is_adaptive(self) -> bool:
        """Whether it learns as it goes, so that only a whole request warms it up."""

    def steps(
        self, prompts: list[list[int]], max_tokens: int, sampling: dict[str, Any]
    ) -> Iterator[Step]:
        """Decode prompts together; the first step is or includes the prefill.

        Raises:
            UnavailableError: It cannot.
        """
