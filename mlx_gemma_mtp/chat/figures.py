"""What the figures of a chat say, in words.

Numbers in, text out.
"""

from __future__ import annotations

from ..generation.figures import describe_rounds, drafts, speed
from .session import Session, Totals, Turn


def describe_turn(turn: Turn) -> str:
    """An answer's figures, one line."""
    response = turn.response
    if response is None:
        return "no answer yet"
    return (
        f"{response.generation_tokens} tokens, {speed(response)}; drafts: "
        f"{drafts(response.stats)}; {_prompt(turn.num_prompt, turn.num_cached)}"
    )


def describe_session(session: Session) -> str:
    """The figures of the last answer and of all, several lines."""
    turn, totals = session.last, session.totals
    if turn is None or turn.response is None:
        return "No answer yet."
    response = turn.response
    last = [
        f"Prompt: {_prompt(turn.num_prompt, turn.num_cached)}, {turn.prompt_s:.2f} s "
        "to the first token",
        f"Speed: {speed(response)} ({response.generation_tokens} tokens)",
        *describe_rounds(response.stats),
    ]
    return "\n".join(
        [
            "Last answer:",
            *(f"  {line}" for line in last),
            *_describe_totals(totals),
            f"Memory: peak {response.peak_memory:.3f} GB, the drafter's weights "
            f"{response.drafter_memory:.3f} GB, {len(session.kept)} kept caches "
            f"{session.kept.num_bytes / 1e9:.3f} GB",
            f"Drafts of the next answer: {session.num_draft_tokens}",
        ]
    )


def _describe_totals(totals: Totals) -> list[str]:
    """The figures of all answers; none of their own where there is only one."""
    if totals.answers < 2:
        return []
    lines = [
        f"Prompts: {_prompt(totals.num_prompt, totals.num_cached)}",
        f"Speed: {totals.tokens / totals.seconds:.1f} tokens per second "
        f"({totals.tokens} tokens)",
        *describe_rounds(totals.stats),
    ]
    return [f"All {totals.answers} answers:", *(f"  {line}" for line in lines)]


def _prompt(num_tokens: int, num_cached: int) -> str:
    return (
        f"{num_tokens} prompt tokens, {num_cached} of them kept from before, "
        f"{num_tokens - num_cached} read"
    )
