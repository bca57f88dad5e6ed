"""Which rung is worth the least.

A prompt that parts from an earlier one reads its own rest in any case. Without a rung
it also reads the gap, the tokens between the place before and the rung. If its rest is
as long as the earlier one's, the loss of the rung costs the share

    gap / (gap + rest)

of what is read. That is divided by 1 + the number of prompts that came since one began
with the rung: what nobody asks for goes, wherever it stands. The rung goes first that
costs the least for each byte of its own, which are its sliding windows and the end of
the full layers' arrays where nothing longer needs it. So where memory is short, rungs
become the thinner the farther they are from their prompt's end, and their number grows
with the logarithm of its length.
"""

from __future__ import annotations

from collections.abc import Sequence

from .entries import Entry, own_bytes


def next_rung_to_go(entries: Sequence[Entry], now: int) -> Entry:
    """The rung whose loss costs the least.

    The newest of several stays: while its prompt is read, no rest of that can be seen.

    Args:
        entries: All that is kept, the newest last; one of them at least is a rung.
        now: How many prompts were looked for.
    """
    before, end = _neighbours(entries)
    num_bytes = own_bytes(entries)

    def worth(entry: Entry) -> float:
        gap = entry.num_tokens - before[entry]
        rest = end[entry] - entry.num_tokens
        return gap / (gap + rest) / (1 + now - entry.used) / num_bytes[entry]

    rungs = [entry for entry in entries if entry.is_rung]
    return min(rungs[:-1] or rungs, key=worth)


def _neighbours(
    entries: Sequence[Entry],
) -> tuple[dict[Entry, int], dict[Entry, int]]:
    """What stands before and behind each entry's place in prompts that begin with it.

    Returns:
        How many tokens the longest entry has that its tokens begin with, 0 without one;
        and how many the longest entry has that begins with its tokens.
    """
    before: dict[Entry, int] = {}
    end: dict[Entry, int] = {}
    path: list[Entry] = []  # each one begins with the tokens of the one before
    for entry in sorted(entries, key=_order):
        while path and not path[-1].begins(entry):
            path.pop()
        before[entry] = path[-1].num_tokens if path else 0
        path.append(entry)
        for each in path:
            end[each] = max(end.get(each, 0), entry.num_tokens)
    return before, end


def _order(entry: Entry) -> tuple[bool, str, bytes]:
    """Puts entries behind those that they begin with."""
    return entry.salt is not None, entry.salt or "", entry.tokens
