"""Print what several Macs that share a target are modelled to hold, say and gain.

    python -m scripts.several_macs             the tables of docs/several-macs.md
    python -m scripts.several_macs --context 32000

Bytes are counted, speeds are modelled: nothing here is measured. What a sum over a link
takes was published by others (`mlx_gemma_mtp/drafting/links.py` names each source).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

from mlx_gemma_mtp.checkpoints.shard_plan import ShardPlan, shard_plans
from mlx_gemma_mtp.constants import MAX_DRAFT_TOKENS
from mlx_gemma_mtp.drafting.chips import CHIPS
from mlx_gemma_mtp.drafting.links import JACCL, JACCL_FAST, RING
from mlx_gemma_mtp.drafting.speed_model import (
    Model,
    default_draft_bits,
    model,
    sums_of_a_layer,
)
from mlx_gemma_mtp.models.families import FAMILIES, VOCAB_SIZE
from mlx_gemma_mtp.models.published import text_config
from scripts.roofline import row_of, table

# Those with Thunderbolt 5.
SHOWN = ("M4 Pro", "M4 Max", "M3 Ultra", "M5 Max")
SPEEDS = (("e4b", 8), ("12b", 4), ("12b", 8), ("26b-a4b", 8), ("31b", 4), ("31b", 8))
SIZES = (2, 4)
BITS = (4, 8)
_WINDOW_SLOTS = 2 * MAX_DRAFT_TOKENS + 2  # of a sliding layer, beside its window
_KV_TOKENS = 32_000
_ROWS = 5  # of a pass of 4 drafts
_GB = 1e9
_LOGIT_BYTES = 2
_LIST_LENGTH = 64


@cache
def plans(name: str, size: int, bits: int) -> tuple[ShardPlan, ...]:
    """What each rank of a published pair holds, quantized as by the converter."""
    family = FAMILIES[name]
    quantization: dict[str, Any] = {"bits": bits, "group_size": 64}
    if family.target_text["num_experts"]:
        router = {"bits": 8, "group_size": 64}
        for layer in range(len(family.layer_types)):
            quantization[f"model.layers.{layer}.router.proj"] = router
    drafter = {
        "model_type": f"{family.kind}_assistant",
        "backbone_hidden_size": family.target["hidden_size"],
        "use_ordered_embeddings": family.has_centroid_head,
        "text_config": family.drafter_text,
        "quantization": {"bits": default_draft_bits(family), "group_size": 64},
    }
    target = text_config(name) | {"quantization": quantization}
    return shard_plans(target, size, drafter_config=drafter)


def bytes_lines() -> Iterator[str]:
    """Memory of weights and of K/V, by family and number of machines."""
    heads = [f"weights, {bits} bits" for bits in BITS]
    yield from table("GB on each Mac", [*heads, f"K/V of {_KV_TOKENS:,} tokens"])
    for family in FAMILIES.values():
        window = family.target_text["sliding_window"] + _WINDOW_SLOTS
        for size in (1, *SIZES):
            found = {bits: plans(family.name, size, bits) for bits in BITS}
            kept = found[4][0].kv_bytes(_KV_TOKENS, window)
            cells = [_each(found[bits]) for bits in BITS]
            first_cell = f"{family.size}: one" if size == 1 else f"{size} Macs"
            yield row_of(first_cell, [*cells, f"{kept / _GB:.2f}"])


def _each(found: tuple[ShardPlan, ...]) -> str:
    """The most and, where it differs, the least that a rank holds."""
    sizes = [plan.weight_bytes / _GB for plan in found]
    most, least = f"{max(sizes):.1f}", f"{min(sizes):.1f}"
    return most if most == least else f"{most} to {least}"


def sums_lines() -> Iterator[str]:
    """What a round of four drafts says to the other machines."""
    heads = ["sums of a pass", "of a round", "KB a sum", "MB of logits", "MB a round"]
    yield from table("2 Macs, 4 drafts", heads)
    for family in FAMILIES.values():
        layer, num_layers = sums_of_a_layer(family), len(family.layer_types)
        passed = len(layer) * num_layers
        each = _ROWS * family.target_text["hidden_size"] * 2
        kilobytes = " and ".join(f"{count * each / 1e3:.0f}" for count in {*layer})
        logits = _ROWS * VOCAB_SIZE // 2 * 2
        cells = [
            str(passed),
            f"{passed} + 2 + 1 gather",
            kilobytes,
            f"{logits / 1e6:.1f}",
            f"{(sum(layer) * num_layers * each + logits) / 1e6:.1f}",
        ]
        yield row_of(family.size, cells)


def speed_lines(context: int = 0) -> Iterator[str]:
    """Tokens a second of one Mac, and what two and four of them gain."""
    heads = [f"{FAMILIES[name].size}, {bits} bits" for name, bits in SPEEDS]
    yield from table("modelled, not measured", heads)
    for chip in SHOWN:
        alone = [
            model(CHIPS[chip], FAMILIES[name], bits=bits, context=context)
            for name, bits in SPEEDS
        ]
        yield row_of(f"{chip}: one", [f"{best(one):.0f} ({_k(one)})" for one in alone])
        for size, link in ((2, JACCL), (4, JACCL), (2, JACCL_FAST), (2, RING)):
            together = [replace(one, size=size, link=link) for one in alone]
            pairs = zip(together, alone, strict=True)
            gains = [f"{best(two) / best(one):.2f}x ({_k(two)})" for two, one in pairs]
            yield row_of(f"{size}, {link.name}", gains)


def gathered_share(speed: Model, num_draft_tokens: int) -> float:
    """The part of a round that logits take beyond lists of 64 in their place.

    Both are gathered once; what differs is their bytes.
    """
    rows, size = num_draft_tokens + 1, speed.size
    logits = _LOGIT_BYTES * (rows * VOCAB_SIZE // size)
    lists = rows * _LIST_LENGTH * (4 + 4)  # a number and a token
    more_s = speed.link.gather_s(logits, size) - speed.link.gather_s(lists, size)
    return more_s / speed.round_s(num_draft_tokens)


def best(speed: Model) -> float:
    """Tokens a second with the best number of drafts, on prose."""
    return speed.tokens_per_second(_k(speed), speed.family.acceptance)


def _k(speed: Model) -> int:
    return speed.best_draft_tokens(speed.family.acceptance)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description="What several Macs hold, say and gain; nothing is measured."
    )
    parser.add_argument("--context", type=int, default=0, help="tokens in the cache")
    args = parser.parse_args()
    parts = (bytes_lines(), sums_lines(), speed_lines(args.context))
    print("\n\n".join("\n".join(lines) for lines in parts))


if __name__ == "__main__":
    main()
