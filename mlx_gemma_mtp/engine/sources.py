"""Where the drafts of a batch's rows may come from: the drafter, or the text itself.

It knows what rows ask for: nothing of arrays, nor of which source is faster.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..constants import DRAFTER, LOOKUP, MIXED
from .sequence import TokenSequence


def sources_of(
    live: Sequence[TokenSequence], *, has_drafter: bool, has_text: bool
) -> tuple[str, ...]:
    """Where all drafts of the next round may come from.

    Args:
        live: The rows.
        has_drafter: Whether there is one.
        has_text: Whether their tokens stand beside their keys and values.
    """
    asked = {sequence.request.draft_source for sequence in live}
    if not has_drafter:  # who asks for one has no drafts, and keeps nobody from theirs
        return (LOOKUP,) if has_text and asked - {DRAFTER} else ()
    if not has_text:
        return (DRAFTER,)
    if asked == {LOOKUP}:
        return (LOOKUP,)
    return (DRAFTER,) if DRAFTER in asked else (DRAFTER, LOOKUP)


def round_source(source: str, looking_up: Sequence[bool]) -> str:
    """The source of a round's graph, see ``RoundShape``.

    Args:
        source: Where drafts come from.
        looking_up: See there.
    """
    return MIXED if source == DRAFTER and any(looking_up) else source


def looking_up(sequences: Sequence[TokenSequence | None]) -> tuple[bool, ...]:
    """Which rows look up beside others that do not: see ``RowSettings``."""
    return tuple(
        s is not None and s.is_live and s.request.draft_source == LOOKUP
        for s in sequences
    )
