"""Section ``model``: a pair of the user's: does it load, is its text exact, how fast?

The greedy text of exact decoding must be the same without drafts and with them.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median
from typing import Any

import mlx.nn as nn

from ..cli.tables import duration
from ..errors import RequestError
from ..generation.chat_template import apply_chat_template
from ..generation.response import GenerationResponse
from ..generation.text import stream_generate
from ..matmuls.modules import shapes_of
from ..pair.load import load
from ..pair.pair import Pair, pair_of
from .exactness import describe
from .result import FAIL, PASS, Result
from .tuning import what_runs_of

PROMPT = "Write a short story about a lighthouse keeper who finds a letter."
MAX_TOKENS = 64
_MAX_REPEATS = 4
_AUTO = "auto"


@dataclass(frozen=True)
class Loaded:
    """A pair with its tokenizer."""

    model: nn.Module
    tokenizer: Any
    seconds: float

    @property
    def pair(self) -> Pair:
        """Target and drafter."""
        return pair_of(self.model)


@dataclass(frozen=True)
class _Text:
    """One generation: its tokens and its last response."""

    tokens: list[int]
    last: GenerationResponse


def open_model(path_or_id: str, draft_model: str | None) -> Loaded:
    """Load a pair, every tensor checked.

    Args:
        path_or_id: Folder or Hub id of the target.
        draft_model: The same of the drafter; None to find it.

    Raises:
        MTPError: It cannot be loaded, or has no drafter.
    """
    start = time.perf_counter()
    model, tokenizer = load(path_or_id, draft_model=draft_model)
    pair = pair_of(model)
    if pair.drafter is None:
        raise RequestError(
            f"--model must have a drafter: got {path_or_id}, {pair.drafter_source}. "
            "Name one with --draft-model."
        )
    return Loaded(model, tokenizer, time.perf_counter() - start)


def look(loaded: Loaded, allowance_s: float) -> Result:
    """Generate a short text with drafting and without.

    Args:
        loaded: The pair.
        allowance_s: The speed is measured again and again until then, seconds.
    """
    start = time.perf_counter()
    pair = loaded.pair
    fixed = pair.num_draft_tokens
    exact = {k: generate(loaded, k, "exact") for k in (0, _AUTO, fixed)}
    differing = [k for k in (_AUTO, fixed) if exact[k].tokens != exact[0].tokens]
    tps: dict[str, list[float]] = {str(k): [] for k in (0, _AUTO, fixed)}
    drafted = exact[fixed]
    for repeat in range(_MAX_REPEATS):
        begun = time.perf_counter()
        for k in (0, _AUTO, fixed):
            found = generate(loaded, k, _AUTO)
            tps[str(k)].append(found.last.generation_tps)
            drafted = found if k == fixed else drafted
        now = time.perf_counter()
        if repeat and now - start + (now - begun) > allowance_s:
            break
    # The first of each also traces its rounds.
    speeds = {k: median(values[1:]) for k, values in tps.items()}
    stats = drafted.last.stats
    verdict = pair.calibration.verdict(1)
    plain = speeds["0"]
    lines: tuple[str, ...] = (
        f"{pair.drafter_source}; loaded in {duration(loaded.seconds)}, peak memory "
        f"{drafted.last.peak_memory:.2f} GB",
        f"exactness: {describe(verdict) if verdict else 'not probed'}; exact text: "
        f"{exact[_AUTO].last.stats.exactness}",
        f"accepted by position at K = {fixed}: "
        + (", ".join(f"{r:.2f}" for r in stats.acceptance_by_position) or "nothing")
        + f"; {stats.acceptance_length:.2f} tokens per round",
        f"tokens/s: plain {plain:.1f}, auto {speeds[_AUTO]:.1f} "
        f"({speeds[_AUTO] / plain:.2f}x), K = {fixed} {speeds[str(fixed)]:.1f} "
        f"({speeds[str(fixed)] / plain:.2f}x)",
    )
    figures: dict[str, Any] = {
        "load_s": loaded.seconds,
        "num_draft_tokens": fixed,
        "tokens_per_second": speeds,
        "all_tokens_per_second": tps,
        "verdict": None if verdict is None else verdict.to_dict(),
        "exact_texts_differing": differing,
        "num_tokens": len(exact[0].tokens),
        "drafting": drafted.last.to_dict(),
        "auto": exact[_AUTO].last.to_dict(),
    }
    shapes = shapes_of([pair.target, pair.drafter])
    where, few_rows = what_runs_of(shapes)
    lines, figures = (*lines, *where), figures | few_rows
    if differing:
        named = ", ".join(f"K = {k}" for k in differing)
        sentence = f"exact greedy text with {named} differs from plain decoding's"
        return Result("model", FAIL, sentence, lines, figures)
    sentence = (
        f"exact greedy text of {len(exact[0].tokens)} tokens is the same without "
        f"drafts, with auto and K = {fixed}"
    )
    return Result("model", PASS, sentence, lines, figures)


def generate(loaded: Loaded, num_draft_tokens: int | str, exactness: str) -> _Text:
    """A greedy text."""
    tokens: list[int] = []
    last: GenerationResponse | None = None
    for last in stream_generate(
        loaded.model,
        loaded.tokenizer,
        _prompt(loaded.tokenizer),
        max_tokens=MAX_TOKENS,
        num_draft_tokens=num_draft_tokens,
        exactness=exactness,
    ):
        tokens.append(last.token)
    assert last is not None  # a text has one token at least
    return _Text(tokens, last)


def _prompt(tokenizer: Any) -> Any:
    """The prompt as the model takes it."""
    if not tokenizer.has_chat_template:
        return PROMPT
    messages = [{"role": "user", "content": PROMPT}]
    advice = "Leave --model out to check without it."
    return apply_chat_template(tokenizer, messages, {}, advice=advice).tokens
