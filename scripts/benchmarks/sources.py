"""What drafts from the text itself add to those of the drafter, by kind of text.

The drafter alone and the faster of both sources in each round (``draft_source="auto"``)
take turns, a few tokens each, so that a machine that slows down slows both. Each has a
pair of its own: what one learns the other does not know. The drafter alone runs twice,
once with each of two pairs: how far these are from each other is what chance does, as
controllers may settle on other numbers of drafts. Traces are made and the controllers
have learnt of another text of the kind before anything is timed.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

from mlx_gemma_mtp.constants import AUTO, DRAFTER
from mlx_gemma_mtp.generation.encoding import encode_text
from mlx_gemma_mtp.pair.pair import Pair

from .prompts import read_kinds
from .speed import own_tokens, seconds_in_turn, show

_SOURCES = {"once": DRAFTER, "again": DRAFTER, AUTO: AUTO}
_TURN = 18  # tokens
_WARM_UPS = 3  # texts: rounds of many numbers of drafts must be traced and compiled
_SAMPLED = {"temp": 1.0, "top_k": 64, "top_p": 0.95}
_BEGINNING = 3  # a text is said again from so small a part on
_RENAMED = (("values", "numbers"), ("self", "this"), ("return", "yield"))


def source_prompts(tokenizer: Any) -> dict[str, tuple[list[list[int]], dict[str, Any]]]:
    """Prompts of each kind as token ids, and how their texts are sampled."""
    texts = {
        kind: [f"{p.before}{p.text}{p.after}" for p in prompts]
        for kind, prompts in read_kinds().items()
    }
    kinds: dict[str, tuple[list[str], dict[str, Any]]] = {
        "new code": (texts["code"], _SAMPLED),
        "edit": ([_again(text, _renamed(text)) for text in texts["code"]], {}),
        "re-emission": ([_again(text, text) for text in texts["json"]], {}),
        "quoting": (texts["echo"], {}),
        "prose": (texts["prose"], _SAMPLED),
        "repetition": ([_again(2 * text, text) for text in texts["prose"]], {}),
    }
    return {
        kind: ([encode_text(tokenizer, prompt) for prompt in prompts], settings)
        for kind, (prompts, settings) in kinds.items()
    }


def _again(text: str, other: str) -> str:
    """A text, and behind it the beginning of another one."""
    return f"{text}\n\n{other[: len(other) // _BEGINNING]}"


def _renamed(text: str) -> str:
    """A text with a few other names."""
    for old, new in _RENAMED:
        text = text.replace(old, new)
    return text


def sources(
    pair: Pair, tokenizer: Any, args: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """How many times as fast as with the drafter alone texts are with both sources."""
    if pair.drafter is None:
        raise SystemExit("the pair must have a drafter for the text to compete with")
    show(f"\n{'over the drafter alone':24} drafter and text          drafter again")
    figures = {}
    for kind, (prompts, settings) in source_prompts(tokenizer).items():
        pairs = source_pairs(pair)
        first, *others = prompts
        for _ in range(_WARM_UPS):
            side_by_side(pairs, first, args.max_tokens, **settings)
        ratios, again = list[float](), list[float]()
        for prompt in others[: args.repeats]:
            seconds = side_by_side(pairs, prompt, args.max_tokens, **settings)
            alone = (seconds["once"] + seconds["again"]) / 2
            ratios.append(alone / seconds[AUTO])
            again.append(seconds["once"] / seconds["again"])
        show(f"{kind:24} {_described(ratios):25} {_described(again)}")
        median = statistics.median(ratios)
        figures[kind] = {"x_drafter": median, "ratios": ratios, "again": again}
    return figures


def _described(ratios: list[float]) -> str:
    """The median and the range."""
    median = statistics.median(ratios)
    return f"{median:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def source_pairs(pair: Pair) -> dict[str, Pair]:
    """A pair of its own for each that takes turns."""
    return {name: Pair(pair.target, pair.drafter) for name in _SOURCES}


def side_by_side(
    pairs: dict[str, Pair], prompt: list[int], max_tokens: int, **settings: Any
) -> dict[str, float]:
    """Seconds with each pair, a few tokens of one and of the other in turn."""
    texts = {
        name: own_tokens(
            pair, prompt, max_tokens, AUTO, draft_source=_SOURCES[name], **settings
        )
        for name, pair in pairs.items()
    }
    return seconds_in_turn(texts, max_tokens, turn=_TURN)
