"""The tables of docs/kernels.md, on counts of which the figures are known.

Run: python -m pytest tests/scripts/test_kernel_tables.py
"""

from __future__ import annotations

import json

import pytest

from scripts import kernel_tables

COUNTS = {
    **{"columns": 4, "bytes": 1.0, "scale_bytes": 8.0},  # no instructions
    **{"load": 0.5, "fma": 3.0, "logic": 1.0, "shift": 0.25, "from_short": 1.0},
}


@pytest.mark.parametrize(
    ("generation", "has_free_halves", "want"),
    [(15, True, 4.75), (15, False, 5.75), (13, True, 5.5), (13, False, 9.5)],
)
def test_slots(generation, has_free_halves, want):
    """Shifts and conversions take four before M3."""
    assert want == kernel_tables.slots(
        COUNTS, generation=generation, has_free_halves=has_free_halves
    )


def test_costs(monkeypatch, tmp_path):
    """Rows that need nothing cost what reading costs; each line has all rows."""
    record = tmp_path / "counts.json"
    rows = [{"columns": 4, "load": 0.0}] * 8 + [{"columns": 2, "load": 1e6}]
    record.write_text(json.dumps({"matmul": {"4bit_g64_bfloat16": rows}}))
    monkeypatch.setattr(kernel_tables, "RECORD", record)
    kernel_tables._record.cache_clear()
    try:
        lines = list(kernel_tables.costs_lines())
    finally:
        kernel_tables._record.cache_clear()
    head, _, *chips = lines
    assert head.endswith("| 1 | 2 | 3 | 4 | 5 | 6 | 7 | 8 | 9 |")
    assert len(chips) == 5
    for line in chips:
        *few, last = line.split(" | ")[1:]
        assert few == ["1.00"] * 8
        assert float(last.rstrip(" |")) > 1e4
