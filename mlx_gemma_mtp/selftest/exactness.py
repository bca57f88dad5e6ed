"""Section ``exactness``: do rounds with drafts give the bytes of plain decoding here?

The probe of ``exactness.probe`` tells on the embedded pair, and on random weights
in the shapes of a published family. Kernels that round one row differently from several
are no failure: exact decoding then takes other rounds, and the page says which. But
where the probe says equal, greedy texts must be.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import mlx.core as mx

from ..constants import ALL_DRAFTS
from ..engine.decoder import Decoder, Request
from ..engine.route import Route
from ..errors import RequestError
from ..exactness.probe import probe
from ..exactness.verdict import PLAIN_ROWS, Verdict, exact_routes
from ..models.published import text_config
from ..pair.pair import Pair
from .machine import is_on_cpu, memory_bytes
from .random_pair import random_pair
from .result import FAIL, INFO, PASS, SKIP, Result, status_of

_NUM_TOKENS = 40
_DRAFTS = (1, 4, 8)  # whose texts are compared
_PROMPT = (2, 5, 6, 7)
_NUM_LAYERS = 4
_FEW_TOKENS = 16384  # of a vocabulary where the whole would be too much
_VOCABULARY_SHARE = 0.25  # of memory
# Each shape is compiled before it runs; on the CPU that takes longer than running it.
_COMPILED_SHARE = 0.25


def look(pair: Pair, family: str, allowance_s: float) -> Result:
    """Probe the embedded pair and random ones.

    Args:
        pair: The embedded pair.
        family: Whose shapes random pairs have.
        allowance_s: A probe that would take longer is left out, seconds.
    """
    start = time.perf_counter()
    statuses: list[str] = []
    lines: list[str] = []
    figures: dict[str, dict[str, Any]] = {}

    def add(label: str, found: tuple[str, str, dict[str, Any]]) -> None:
        statuses.append(found[0])
        lines.append(f"{label}: {found[1]}")
        figures[label] = found[2]

    add("embedded pair", examined(pair, None))
    # bfloat16 sums on the CPU take ten times as long: quantized weights have float32.
    quantized_dtype = mx.float32 if is_on_cpu() else mx.bfloat16
    for label, bits, dtype in (
        (f"{family} 4-bit", 4, quantized_dtype),
        (f"{family} bfloat16", None, mx.bfloat16),
    ):
        left = allowance_s - (time.perf_counter() - start)
        if left <= 0:
            add(label, (SKIP, "skipped, no time left", {}))
            continue
        add(label, _examined_random(family, bits, dtype, left))
    return Result(
        "exactness",
        status_of(statuses),
        _sentence(statuses, figures),
        tuple(lines),
        figures,
    )


def _sentence(statuses: list[str], figures: dict[str, Any]) -> str:
    """What all of it comes to."""
    routes = [found["route"] for found in figures.values() if "route" in found]
    if FAIL in statuses:
        return "texts differ where the probe found equal bytes"
    if not routes:
        return "nothing was probed"
    fewest = min(len(route["allowed"]) for route in routes)
    if fewest == 1:
        return "some rounds with drafts give other bytes than plain ones, for every K"
    if fewest < len(ALL_DRAFTS):
        return "exact decoding is left some K only, whose rounds give plain bytes"
    if any(route["min_rows"] > 1 for route in routes):
        return "rounds with drafts give the bytes of plain ones of several rows"
    return "rounds with drafts give the bytes of plain ones"


def _examined_random(
    family: str, bits: int | None, dtype: mx.Dtype, budget_s: float
) -> tuple[str, str, dict[str, Any]]:
    """Examine a few layers of random weights."""
    num_layers = 2 if is_on_cpu() else _NUM_LAYERS
    config = text_config(family, num_layers=num_layers)
    width = config["hidden_size"] + num_layers * config["hidden_size_per_layer_input"]
    table_bytes = 2 * config["vocab_size"] * width
    is_large = is_on_cpu() or table_bytes > _VOCABULARY_SHARE * memory_bytes()
    vocab_size = _FEW_TOKENS if is_large else None
    try:
        pair = random_pair(
            family, num_layers=num_layers, vocab_size=vocab_size, bits=bits, dtype=dtype
        )
    except RequestError as error:  # a type that the device does not have
        return SKIP, f"skipped, {error}", {}
    budget_s *= _COMPILED_SHARE if is_on_cpu() else 1
    status, sentence, figures = examined(pair, budget_s)
    cut = f" ({num_layers} layers, {pair.vocab_size} tokens, {_name(dtype)})"
    return status, sentence + cut, figures


def examined(
    pair: Pair, budget_s: float | None, drafts: Iterable[int] = _DRAFTS
) -> tuple[str, str, dict[str, Any]]:
    """Status, sentence and figures of one pair.

    Args:
        pair: The pair.
        budget_s: Longest time for a probe, seconds; None for any.
        drafts: The numbers of drafts whose texts are compared, where proved.
    """
    verdict = probe(pair.rounds, budget_s=budget_s, is_whole=True)
    if verdict is None:
        return SKIP, "skipped, the probe would take too long", {}
    route = exact_routes(verdict)[0]
    figures = {
        **verdict.to_dict(),
        "route": {"min_rows": route.min_rows, "allowed": list(route.allowed)},
    }
    differing: list[int] = []
    if pair.drafter is not None and budget_s is None:
        plain = greedy_text(pair, 0, route)
        proved = [k for k in drafts if k in route.allowed]
        differing = [k for k in proved if greedy_text(pair, k, route) != plain]
        figures["texts_compared"] = proved
        figures["texts_differing"] = differing
    if differing:
        return FAIL, f"greedy texts of {_listed(differing)} differ", figures
    return (PASS if route.has_drafts else INFO), describe(verdict), figures


def describe(verdict: Verdict) -> str:
    """What the probe found, in words."""
    found = {rows: _listed(verdict.equal[rows]) for rows in PLAIN_ROWS}
    if len(set(found.values())) == 1:
        text = f"bytes equal at {found[1]}"
    else:
        parts = (f"{ks} for plain rounds of {n} row(s)" for n, ks in found.items())
        text = f"bytes equal at {', '.join(parts)}"
    if verdict.max_difference:
        text += f"; logits differ by up to {verdict.max_difference:.2g}"
    return text


def greedy_text(pair: Pair, num_draft_tokens: int, route: Route) -> list[int]:
    """A short greedy text."""
    decoder = Decoder(
        pair.rounds,
        [Request(list(_PROMPT), _NUM_TOKENS)],
        num_draft_tokens=num_draft_tokens,
        route=route,
    )
    return [token for (output,) in decoder.run() for token in output.tokens]


def _listed(drafts: Iterable[int]) -> str:
    """Numbers of drafts in words: K = 1-8, or K = 1, 2, 5, or no K."""
    numbers = sorted(drafts)
    if not numbers:
        return "no K"
    if len(numbers) > 2 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"K = {numbers[0]}-{numbers[-1]}"
    return f"K = {', '.join(map(str, numbers))}"


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")
