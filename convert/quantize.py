"""Which tensors get how many bits, and why: one table.

A rule speaks of the modules whose path its pattern finds; the first that matches
counts. What no rule names gets the format that was asked for. Vectors and scalars are
never quantized: MLX packs matrices only, and they are next to nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlx_gemma_mtp.quantization import Format

TARGET, DRAFTER = "target", "drafter"


@dataclass(frozen=True)
class Rule:
    """What one kind of tensor gets.

    Attributes:
        part: ``TARGET`` or ``DRAFTER``.
        pattern: Found in the paths of the modules that it speaks of.
        what: Those modules, for a reader.
        min_bits: The fewest bits of affine quantization they get, None for none: they
            stay as they are.
        why: The reason, for a reader.
    """

    part: str
    pattern: str
    what: str
    min_bits: int | None
    why: str


RULES = (
    Rule(
        TARGET,
        r"\.router\.proj$",
        "target: the router of a mixture",
        8,
        "at 4 bits 59 % of tokens get another set of experts, at 8 bits 6 %",
    ),
    Rule(
        DRAFTER,
        r"^masked_embedding\.centroids$",
        "drafter: centroids (E2B, E4B)",
        None,
        "at 4 bits 10 % of the candidates are lost; they are 1 MB",
    ),
    Rule(
        DRAFTER,
        r"^(pre|post)_projection$",
        "drafter: `pre_projection`, `post_projection`",
        8,
        "every draft step goes through both: 4 bits there cost half of what 4 bits "
        "cost the whole drafter",
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
    """

    part: str
    base: Format | None

    def format_of(self, path: str, num_columns: int) -> Format | None:
        """Return the format of one matrix, None to leave it as it is.

        Args:
            path: The module's path, without ``.weight``.
            num_columns: Length of its rows.
        """
        if self.base is None:
            return None
        wanted = self.base
        rule = _rule_of(self.part, path)
        if rule is not None and rule.min_bits is None:
            return None
        if rule is not None and rule.min_bits is not None:
            is_enough = wanted.mode == "affine" and wanted.bits >= rule.min_bits
            wanted = wanted if is_enough else Format(rule.min_bits, 64)
        return _fitting(wanted, num_columns)


def _rule_of(part: str, path: str) -> Rule | None:
    for rule in RULES:
        if rule.part == part and re.search(rule.pattern, path):
            return rule
    return None


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
