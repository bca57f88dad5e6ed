"""What a generation's figures say: in a few plain sentences, and all of them.

Commands share both: the closing lines of ``generate``, the figures in ``chat``. Numbers
in, text out.
"""

from __future__ import annotations

from ..constants import LOOKUP
from ..cpu_kernels import compile_seconds, num_compiled
from ..engine.stats import RoundStats
from .response import GenerationResponse

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


def describe(response: GenerationResponse) -> str:
    """The closing figures of a generation, a few lines of text."""
    stats = response.stats
    phases = stats.phases
    lines = [
        f"Prompt: {response.prompt_tokens} tokens, "
        f"{response.prompt_tps:.3f} tokens-per-sec",
        f"Generation: {response.generation_tokens} tokens, "
        f"{response.generation_tps:.3f} tokens-per-sec",
        *describe_rounds(stats),
        f"Time: prefill {phases.prefill_s:.2f} s, rounds {phases.rounds_s:.2f} s, host "
        f"{phases.host_s:.2f} s",
        f"Peak memory: {response.peak_memory:.3f} GB, the drafter's weights "
        f"{response.drafter_memory:.3f} GB",
    ]
    return "\n".join(lines)


def describe_rounds(stats: RoundStats) -> list[str]:
    """What rounds did, of one generation or of several: lines of text."""
    return [
        f"Rounds: {stats.rounds}, acceptance length {stats.acceptance_length:.2f} "
        f"tokens per round, acceptance rate {stats.acceptance_rate:.1%} of "
        f"{stats.drafted} drafted, rule: {stats.rule}",
        _describe_drafts(stats),
        f"Exactness: {stats.exactness}{_describe_difference(stats)}",
    ]


def _describe_drafts(stats: RoundStats) -> str:
    """How many drafts rounds had and how far they came, or why there were none."""
    if not stats.engaged:
        return f"Drafts: none, {stats.why_not_engaged}"
    rounds = ", ".join(
        f"{count} with K = {k}" for k, count in sorted(stats.num_draft_tokens.items())
    )
    rates = ", ".join(f"{rate:.2f}" for rate in stats.acceptance_by_position)
    return f"Drafts: rounds {rounds}; accepted by position {rates}{_from_text(stats)}"


def _from_text(stats: RoundStats) -> str:
    """How many drafts came from the text itself; empty where none did."""
    if not stats.drafted_from[LOOKUP]:
        return ""
    counts = f"{stats.accepted_from[LOOKUP]} of {stats.drafted_from[LOOKUP]}"
    return f"; {counts} from the text accepted"


def _describe_difference(stats: RoundStats) -> str:
    if not stats.max_difference:
        return ""
    return f"; largest difference that the probe saw: {stats.max_difference:.2g}"
