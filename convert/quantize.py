"""Which tensors get how many bits, and why: one table.

A rule speaks of the modules whose path its pattern finds; the first that matches
counts. What no rule names gets the format that was asked for. What formats cost in
tokens and choices is measured by ``scripts/studies/quantization.py``; shares of bytes
are computed from the published shapes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlx_gemma_mtp.checkpoints.quantization import Format

TARGET, DRAFTER = "target", "drafter"
AS_ASKED = 0


@dataclass(frozen=True)
class Rule:
    """What one kind of tensor gets.

    Attributes:
        part: ``TARGET`` or ``DRAFTER``; None for both.
        pattern: Found in the paths of the modules that it speaks of.
        what: Those tensors, for a reader.
        min_bits: The fewest bits of affine quantization they get; ``AS_ASKED`` for the
            format that was asked for, None for none: they stay as they are.
        why: The reason, for a reader.
    """

    part: str | None
    pattern: str
    what: str
    min_bits: int | None
    why: str

    @property
    def treatment(self) -> str:
        """What they get, for a reader."""
        if self.min_bits is None:
            return "not quantized"
        if self.min_bits == AS_ASKED:
            return "as asked for"
        return f"at least {self.min_bits} bits, affine"


RULES = (
    Rule(
        None,
        r"norm$|\blayer_scalar$|\bscale$|\bper_expert_scale$",
        "norms, scales and scalars",
        None,
        "MLX packs matrices only; less than 0.1 % of a model",
    ),
    Rule(
        DRAFTER,
        r"^masked_embedding\.token_ordering$",
        "drafter: `token_ordering` (E2B, E4B)",
        None,
        "token ids, no weights; written as int32",
    ),
    Rule(
        DRAFTER,
        r"^masked_embedding\.centroids$",
        "drafter: centroids (E2B, E4B)",
        None,
        "at 4 bits 10 % of the candidates change; they are 1 MB",
    ),
    Rule(
        DRAFTER,
        r"^(pre|post)_projection$",
        "drafter: `pre_projection`, `post_projection`",
        8,
        "every draft step goes through both; 4 bits there cost half of what 4 bits "
        "cost the whole drafter",
    ),
    Rule(
        DRAFTER,
        r"^model\.embed_tokens$",
        "drafter: head",
        AS_ASKED,
        "8 bits instead of 4 win 0.5 % of the tokens a round and cost 6 % of a "
        "26B-A4B's bytes a draft step",
    ),
    Rule(
        TARGET,
        r"\brouter\.proj$",
        "target: the router of a mixture",
        8,
        "at 4 bits 59 % of tokens get another set of experts, at 8 bits 6 %",
    ),
    Rule(
        TARGET,
        r"\bembed_tokens_per_layer$",
        "target: per-layer embedding tables (E2B, E4B)",
        AS_ASKED,
        "the least sensitive part of all at equal size",
    ),
)


def default_format(config: Mapping[str, Any]) -> Format:
    """Return the format of a part where none is asked for.

    A drafter with the centroid head reads about 10 M weights a step, 0.4 % of an E2B's
    bytes more at 8 bits than at 4, and at 8 bits it loses no drafts. One with a dense
    head reads 0.4 G: at 4 bits it loses 1 % of its drafts and saves 10 % of a 26B-A4B's
    bytes.

    Args:
        config: The checkpoint's parsed ``config.json``.
    """
    has_centroids = config.get("use_ordered_embeddings") is True
    return Format(8 if has_centroids else 4, 64)


@dataclass(frozen=True)
class Choice:
    """What happens to the matrices of one part.

    Attributes:
        part: ``TARGET`` or ``DRAFTER``.
        base: The format asked for; None leaves every tensor as it is.
        is_dequantized: Whether matrices that are packed already are written in full.
    """

    part: str
    base: Format | None
    is_dequantized: bool = False

    def format_of(self, path: str, num_columns: int) -> Format | None:
        """Return the format of one matrix, None to leave it as it is.

        Args:
            path: The module's path, without ``.weight``.
            num_columns: Length of its rows.
        """
        if self.base is None:
            return None
        wanted = self.base
        min_bits = _min_bits(self.part, path)
        if min_bits is None:
            return None
        is_enough = wanted.mode == "affine" and wanted.bits >= min_bits
        if min_bits != AS_ASKED and not is_enough:
            wanted = Format(min_bits, 64)
        return _fitting(wanted, num_columns)


def _min_bits(part: str, path: str) -> int | None:
    for rule in RULES:
        if rule.part in (part, None) and re.search(rule.pattern, path):
            return rule.min_bits
    return AS_ASKED


def _fitting(wanted: Format, num_columns: int) -> Format | None:
    """Return the format, with smaller groups where rows are no multiple of its own.

    26B-A4B has expert rows of 704 weights: groups of 128 would leave 5 GB as they are.
    """
    sizes = [wanted.group_size]
    if wanted.mode == "affine":
        sizes += [size for size in (64, 32) if size < wanted.group_size]
    for size in sizes:
        smaller = Format(wanted.bits, size, wanted.mode)
        if smaller.fits(num_columns):
            return smaller
    return None
