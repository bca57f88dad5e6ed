"""What a generation's figures say, in a few plain sentences.

Commands share them: the closing lines of ``generate``, the figures in ``chat``. All
that was counted is in ``describe`` (text.py) and ``to_dict``. Numbers in, text out.
"""

from __future__ import annotations

from ..cpu_kernels import compile_seconds, num_compiled
from ..engine.stats import RoundStats
from .text import GenerationResponse

_ONLY_PLAIN = "exact: plain decoding"
_TELLING_S = 1.0  # that compiling took
_EXACT, _INEXACT = "exact: ", "not exact: "  # how what is known of the text begins


def summary(response: GenerationResponse) -> str:
    """What a newcomer asks of a generation, a few lines of text."""
    stats = response.stats
    lines = [
        f"Speed: {speed(response)} ({response.generation_tokens} tokens after a prompt "
        f"of {response.prompt_tokens})",
        f"Drafts: {drafts(stats)}",
        f"Text: {sameness(stats)}",
    ]
    if compile_seconds() >= _TELLING_S:
        lines.append(
            f"Compiled: {num_compiled()} kernels for this CPU in "
            f"{compile_seconds():.0f} s, once; the speed is without that"
        )
    return "\n".join(lines)


def speed(response: GenerationResponse) -> str:
    """How fast tokens came, and how much faster than without drafts where known."""
    if response.generation_tokens < 2:
        return "one token tells none"
    per_second = f"{response.generation_tps:.1f} tokens per second"
    times = response.times_plain
    if times is None:
        return per_second
    return f"{per_second}, {times:.1f} times plain decoding"


def drafts(stats: RoundStats) -> str:
    """What drafts brought, or why there were none."""
    if not stats.engaged:
        return f"none: {stats.why_not_engaged}"
    return (
        f"{stats.acceptance_length:.2f} tokens per round, {stats.acceptance_rate:.0%} "
        f"of {stats.drafted} drafts accepted"
    )


def sameness(stats: RoundStats) -> str:
    """Whether the text is that of plain decoding, and how that is known."""
    known = stats.exactness
    if known == _ONLY_PLAIN:
        return known.removeprefix(_EXACT)
    if known.startswith(_EXACT):
        return f"the same as by plain decoding; {known.removeprefix(_EXACT)}"
    if known.startswith(_INEXACT):
        return f"may differ from plain decoding; {known.removeprefix(_INEXACT)}"
    return known
