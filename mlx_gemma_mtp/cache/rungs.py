"""Rungs: places inside long prompts whose caches are kept.

Past the sliding window caches cannot be cut back. A prompt that parts from an earlier
one somewhere in the middle reads on from the last rung before that place.

Rungs stand at the ends of chunks, every 1,024 to 4,096 tokens, so reading is cut
nowhere else. A rung costs one copy of the sliding windows; the full layers' arrays are
those of the whole prompt. Which rungs go when memory is short: see worth.py.
"""

from __future__ import annotations

RUNG = "rung"  # a kind of place, beside those in entries.py
_SHORTEST, _LONGEST = 1024, 4096  # tokens between two rungs


def rung_interval(step_size: int) -> int:
    """Tokens between two rungs.

    Args:
        step_size: Most tokens of a chunk.
    """
    return min(max(step_size, _SHORTEST), _LONGEST)


def rungs_between(first: int, last: int, interval: int) -> range:
    """The rungs behind the first tokens of a prompt, and before its last place.

    Their places depend on nothing else, so two prompts that begin alike are read in the
    same chunks.

    Args:
        first: Tokens that need not be read.
        last: Tokens before the last place that is kept in any case.
        interval: Tokens between two rungs.
    """
    return range((first // interval + 1) * interval, last, interval)
