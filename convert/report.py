"""Plan and result of a conversion as text."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from mlx_gemma_mtp.cli.tables import aligned, size

from .divergence import Divergence
from .pipeline import Conversion, Part
from .plan import PartPlan

_TABLE_HEAD = ("part", "parameters", "before", "after", "bits per weight")


@dataclass(frozen=True)
class Group:
    """Tensors that differ in the number of their layer only.

    Attributes:
        name: Their name, with ``*`` for the number.
        num_tensors: How many.
        what: Their format or type.
        num_bytes: Bytes written.
    """

    name: str
    num_tensors: int
    what: str
    num_bytes: int


def groups(plan: PartPlan) -> list[Group]:
    """Return the plan in groups of tensors of the same name and format.

    Args:
        plan: A part's plan.
    """
    found: dict[tuple[str, str], Group] = {}
    for parameter in plan.parameters:
        name = re.sub(r"\.\d+\.", ".*.", parameter.name)
        what = parameter.arrays[0].dtype
        if parameter.format is not None:
            what = parameter.format.name
        elif parameter.packing is not None:
            what = f"{what} of {parameter.packing.format.name}"
        old = found.get((name, what), Group(name, 0, what, 0))
        found[name, what] = Group(
            name,
            old.num_tensors + 1,
            what,
            old.num_bytes + parameter.num_bytes,
        )
    return list(found.values())


def describe_plan(conversion: Conversion) -> str:
    """Return the plan: every group of tensors, its format and its bytes.

    Args:
        conversion: The plan.
    """
    lines = []
    for part in conversion.parts:
        lines += [*_describe_part(part), ""]
    lines.append(f"pairing: {conversion.pairing}")
    if conversion.is_in_place:
        lines.append("the target stays as it is; only the drafter is written")
    is_taken = os.path.lexists(conversion.place)
    note = " (something stands there; see --force)" if is_taken else ""
    lines.append(f"to be written to {conversion.place}{note}")
    lines += ["", *_table(conversion)]
    return "\n".join(lines)


def describe_result(conversion: Conversion, divergence: Divergence | str) -> str:
    """Return the closing table.

    Args:
        conversion: The plan that was carried out.
        divergence: How far the result is from its source, or why that is unknown.
    """
    found = _describe_divergence(divergence, is_target_kept=conversion.is_in_place)
    lines = [
        *_table(conversion),
        "",
        f"predictions: {found}",
    ]
    lines.append(f"written to {conversion.place}")
    return "\n".join(lines)


def _describe_part(part: Part) -> list[str]:
    plan = part.plan
    revision = f" at {part.source.revision}" if part.source.revision else ""
    lines = [f"{plan.part}: {part.source.name}{revision}"]
    rows = [("tensors", "name", "format", "bytes")]
    rows += [
        (str(group.num_tensors), group.name, group.what, f"{group.num_bytes:,}")
        for group in groups(plan)
    ]
    lines += aligned(rows, left=(1, 2))
    reasons: dict[str, list[str]] = {}
    for name, reason in plan.unused.items():
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        num_bytes = sum(
            part.source.checkpoint.tensors[name].num_bytes for name in names
        )
        lines.append(f"  left out: {len(names)} tensors, {num_bytes:,} bytes: {reason}")
    num_tensors = len(part.source.checkpoint.tensors)
    lines.append(f"  all {num_tensors} tensors of the checkpoint are accounted for")
    return lines


def _table(conversion: Conversion) -> list[str]:
    rows = [_TABLE_HEAD]
    total = [0, 0, 0]
    for part in conversion.parts:
        plan = part.plan
        figures = [plan.num_weights, plan.num_source_bytes, plan.num_bytes]
        total = [a + b for a, b in zip(total, figures, strict=True)]
        rows.append(_row(plan.part, figures))
    if len(conversion.parts) > 1:
        rows.append(_row("total", total))
    return aligned(rows, left=(0,))


def _row(name: str, figures: Sequence[int]) -> tuple[str, str, str, str, str]:
    num_weights, before, after = figures
    bits = f"{8 * after / max(1, num_weights):.2f}"
    return (name, f"{num_weights:,}", size(before), size(after), bits)


def _describe_divergence(divergence: Divergence | str, *, is_target_kept: bool) -> str:
    if isinstance(divergence, str):
        return divergence
    text = "the target's are unchanged"
    if not is_target_kept:
        text = (
            f"{divergence.kl:.4f} nats from the source's (mean of "
            f"{divergence.num_tokens} tokens), the same most likely token in "
            f"{divergence.top_agreement:.0%}"
        )
    if divergence.draft_agreement is not None:
        text += f"; drafts agree in {divergence.draft_agreement:.0%}"
    return text
