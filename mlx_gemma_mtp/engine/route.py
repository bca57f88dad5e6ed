"""How rounds are run so that the text does not depend on the number of drafts.

A kernel may round one row differently from several. Byte equality is then bought by
sending plain decoding through the same kernels: its rounds are filled up to two rows.
A probe (probe.py) tells for which numbers of drafts the bytes are equal, for plain
rounds as they are and for filled ones; this file draws the conclusions. It knows
nothing of models or arrays.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..constants import ALL_DRAFTS, MODES
from ..errors import RequestError


def check_mode(mode: object) -> str:
    """Check a request's ``exactness``.

    Raises:
        RequestError: It is not one of ``MODES``.
    """
    if isinstance(mode, str) and mode in MODES:
        return mode
    raise RequestError(
        f"exactness must be auto, exact or fast: got {mode!r}. auto takes the fastest "
        "setting that was proved."
    )


@dataclass(frozen=True)
class Route:
    """How the rounds of a request are run.

    Attributes:
        min_rows: Rows that the target verifies at least; a plain round of one token is
            filled up to it.
        allowed: The numbers of drafts that a round may have.
        is_exact: Whether bytes were proved equal for all of them.
        max_difference: Largest difference of a logit that the probe has seen; None
            where it has not come to its end.
        pads_prompts: Whether short prompts may be padded and read in one forward, which
            a kernel may round otherwise than each alone.
        state: What was proved, or why nothing was, in words.
    """

    min_rows: int = 1
    allowed: tuple[int, ...] = ALL_DRAFTS
    is_exact: bool = False
    pads_prompts: bool = False
    max_difference: float | None = None
    state: str = field(default="", compare=False)

    @property
    def has_drafts(self) -> bool:
        """Whether a round may have drafts."""
        return max(self.allowed) > 0


# All numbers of drafts, nothing compared.
ANY_ROUTE = Route(pads_prompts=True, state="not exact: nothing was compared")
# Plain decoding of the caller's choice: nothing to compare with.
PLAIN = Route(allowed=(0,), state="plain decoding")


def inexact_route(reason: str, *, max_difference: float | None = None) -> Route:
    """All numbers of drafts, whatever bytes they give."""
    return Route(
        pads_prompts=True,
        max_difference=max_difference,
        state=f"not exact: {reason}",
    )
