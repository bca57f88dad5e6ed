"""The results as lines of text, section by section, and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from ..cli.tables import duration
from .names import MACHINE
from .result import FAIL, PASS, Result, status_of

FORM = 1  # of the JSON
_WIDTH = 110


TITLE = "mlx_gemma_mtp self-test"


def section(result: Result) -> str:
    """The lines of one section."""
    lines = [
        f"[{result.status}] {result.name:<10} {result.sentence} "
        f"({duration(result.seconds)})"
    ]
    lines += [f"    {_cut(line)}" for line in result.lines]
    if result.caution:
        lines.append(f"    do not rely on these timings: {result.caution}")
    return "\n".join(lines)


def verdict(results: Sequence[Result]) -> str:
    """What all results come to, one line."""
    took = duration(sum(result.seconds for result in results))
    failed = [result.name for result in results if result.status == FAIL]
    if failed:
        return f"FAIL: {', '.join(failed)} ({took})"
    held = [result.name for result in results if result.status == PASS]
    holds = f"what must hold does: {', '.join(held)}" if held else "nothing failed"
    skipped = [result.name for result in results if result.status == "skip"]
    rest = f"; not looked at: {', '.join(skipped)}" if skipped else ""
    busy = [result.name for result in results if result.caution]
    rest += f"; timed on a busy machine: {', '.join(busy)}" if busy else ""
    return f"PASS: {holds}{rest} ({took})"


def to_json(results: Sequence[Result]) -> str:
    """Everything, as JSON.

    An object with ``form``, ``status`` (pass or fail), ``verdict``, ``seconds``,
    ``machine`` and ``versions``, and ``sections``: each has the fields of ``Result``.
    """
    found = next((r.figures for r in results if r.name == MACHINE), {})
    document = {
        "form": FORM,
        "status": FAIL if status_of(r.status for r in results) == FAIL else PASS,
        "verdict": verdict(results),
        "seconds": sum(result.seconds for result in results),
        "machine": found,
        "versions": found.get("versions", {}),
        "sections": [result.to_dict() for result in results],
    }
    return json.dumps(_finite(document), indent=2, allow_nan=False) + "\n"


def _cut(line: str) -> str:
    return line if len(line) <= _WIDTH else f"{line[: _WIDTH - 3]}..."


def _finite(value: Any) -> Any:
    """The value as JSON takes it: a number that is none becomes its name."""
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)
