"""What masks cost, and what they give: text of a given form beside free text.

A grammar that any text follows bans nothing: the tokens are those of free decoding, and
what is more is the cost of the masks. Records of a fixed form have keys and punctuation
that are forced: those are proposed in place of drafts.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx

from mlx_gemma_mtp.constants import MAX_DRAFT_TOKENS
from mlx_gemma_mtp.engine import runner
from mlx_gemma_mtp.engine.prefill import DEFAULT_PREFILL_STEP_SIZE
from mlx_gemma_mtp.generation.requests import drafts_of, make_request
from mlx_gemma_mtp.generation.tokens import make_decoder
from mlx_gemma_mtp.pair.pair import Pair
from mlx_gemma_mtp.sampling.params import SamplingParams
from mlx_gemma_mtp.structure.constraint import Constraint, json_schema, regex
from mlx_gemma_mtp.structure.masks import BoundConstraint

from .prompts import prompts_of
from .speed import show

_ANY = r"(?s:.)*"
_FORM = {
    "type": "array",
    "minItems": 60,
    "items": {
        "type": "object",
        "properties": {
            "identifier": {"type": "integer", "minimum": 1, "maximum": 999},
            "colour": {"enum": ["red", "green", "blue", "yellow"]},
            "description": {"type": "string", "maxLength": 12},
            "is_available": {"type": "boolean"},
        },
        "required": ["identifier", "colour", "description", "is_available"],
        "additionalProperties": False,
    },
}


def structure(
    pair: Pair,
    documents: list[list[int]],
    rng: random.Random,
    args: argparse.Namespace,
    tokenizer: Any,
) -> dict[str, object]:
    """Time of rounds with masks over those without, and tokens per second of a form."""
    prompts = prompts_of(
        documents, rng, count=args.repeats, length=args.prompt_tokens[0]
    )
    anything = BoundConstraint(regex(_ANY), tokenizer)
    form = BoundConstraint(_form(), tokenizer)
    methods: dict[str, Callable[[list[int]], float]] = {}
    for count in (0, 4):
        for name, constraint in (("free", None), ("masked", anything)):
            methods[f"{name}, K = {count}"] = _timed(
                pair, count, args.max_tokens, constraint
            )
    choices: dict[str, int | None] = {"plain": 0, "auto": None, "K = 4": 4}
    for name, choice in choices.items():
        methods[f"form, {name}"] = _timed(pair, choice, args.max_tokens, form)
    methods["form, K = 4, drafter alone"] = _without_proposals(methods["form, K = 4"])
    for method in methods.values():  # compile, and learn, before anything is timed
        method(prompts[0])
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for i, prompt in enumerate(prompts):
        names = list(methods)
        for name in names[i % len(names) :] + names[: i % len(names)]:
            seconds[name].append(methods[name](prompt))
    return _report(seconds)


def _form() -> Constraint:
    return json_schema(json.dumps(_FORM))


def _timed(
    pair: Pair, num_draft_tokens: int | None, max_tokens: int, constraint: Any
) -> Callable[[list[int]], float]:
    """What a token takes, seconds, from the first one on."""

    def method(prompt: list[int]) -> float:
        request = make_request(
            pair,
            prompt,
            max_tokens=max_tokens,
            sampling=SamplingParams(temp=1.0, top_k=64, top_p=0.95, seed=1),
            eos=pair.eos_token_ids if constraint is not None else frozenset(),
            constraint=constraint,
        )
        emissions = _emitted(pair, request, num_draft_tokens)
        next(emissions)
        start = time.perf_counter()
        count = sum(emissions)
        return (time.perf_counter() - start) / count

    return method


def _emitted(pair: Pair, request: Any, num_draft_tokens: int | None) -> Iterator[int]:
    """How many tokens come at a time."""
    count = drafts_of(pair, "auto" if num_draft_tokens is None else num_draft_tokens)
    decoder = make_decoder(
        pair,
        [request],
        num_draft_tokens=count,
        exactness="fast",
        prefill_step_size=DEFAULT_PREFILL_STEP_SIZE,
    )
    for (output,) in decoder.run():
        output.check()
        yield len(output.tokens)


def _without_proposals(method: Callable[[list[int]], float]) -> Callable[..., float]:
    """The same without forced tokens in place of drafts."""

    def alone(prompt: list[int]) -> float:
        with _no_proposals():
            return method(prompt)

    return alone


@contextmanager
def _no_proposals() -> Iterator[None]:
    proposed = runner.proposed_tokens
    runner.proposed_tokens = lambda sequences, count, **_: mx.full(
        (len(sequences), MAX_DRAFT_TOKENS + 1, 1 + count), -1, dtype=mx.int32
    )
    try:
        yield
    finally:
        runner.proposed_tokens = proposed


def _report(seconds: dict[str, list[float]]) -> dict[str, object]:
    """Print and return medians, and medians of the ratios within each repeat."""
    pairs = {
        "masked, K = 0": "free, K = 0",
        "masked, K = 4": "free, K = 4",
        "form, auto": "form, plain",
        "form, K = 4": "form, plain",
        "form, K = 4, drafter alone": "form, plain",
    }
    show(f"\n{'text of a given form':28} {'ms a token':>10} {'x speed of':>12}")
    figures: dict[str, object] = {}
    for name, values in seconds.items():
        other = pairs.get(name, name)
        gain = statistics.median(
            b / a for a, b in zip(values, seconds[other], strict=True)
        )
        median = statistics.median(values)
        figures[name] = {"seconds_per_token": median, "speed": gain, "over": other}
        told = f"{gain:5.2f} {other}" if other != name else ""
        show(f"{name:28} {1000 * median:10.3f} {told}")
    return figures
