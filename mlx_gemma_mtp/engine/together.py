"""Which short prompts are worth reading in one forward, padded to the longest of them.

It knows numbers of tokens: nothing of models or of who waits.
"""

from __future__ import annotations

from collections.abc import Sequence

# Tokens that take about as long as what a forward costs beside its tokens: weights are
# read, kernels are launched. On Linux's CPU 8 to 25 were measured; modelled, a Mac's
# GPU has more. With too few, prompts are read alone that could have been read together.
PASS_TOKENS = 16


def companions(first: int, others: Sequence[int], *, most: int) -> list[int]:
    """Choose who is read in one forward with a prompt.

    Args:
        first: The prompt's tokens.
        others: The tokens of those who could be.
        most: How many of them at most.

    Returns:
        Their numbers in ``others``, by which the most time is saved; none where the
        prompt is read as soon alone.
    """
    chosen: list[int] = []
    most_saved = 0
    for longest in sorted({first, *(size for size in others if size > first)}):
        padded = ((longest - size, i) for i, size in enumerate(others))
        near = sorted((pad, i) for pad, i in padded if 0 <= pad < PASS_TOKENS)[:most]
        # Each saves a forward, and costs its padding; the first one costs only that.
        saved = sum(PASS_TOKENS - pad for pad, _ in near) - (longest - first)
        if saved > most_saved:
            chosen, most_saved = sorted(i for _, i in near), saved
    return chosen
