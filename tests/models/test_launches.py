"""Launches of published models, counted as Metal would run them; see the benchmark.

Run: python -m pytest tests/models/test_launches.py
"""

import re
from pathlib import Path

import pytest

from mlx_gemma_mtp.kernels.ways import (
    ADD_NORM,
    EXPERTS,
    GATE_UP,
    NORM_ROPE,
    PACKED,
    QKV,
    ROUTE,
    SPLIT,
    STOCK_WAYS,
    WAYS,
)
from mlx_gemma_mtp.models.families import FAMILIES
from scripts.benchmarks.launches import Counted, Launches

PAGE = Path(__file__).parents[2] / "docs" / "kernels.md"
# Before, and with all ways but packed heads: the target's pass of five rows, a step.
COUNTS = {
    "e2b": (Launches(992, 74), Launches(549, 48)),
    "e4b": (Launches(1083, 74), Launches(588, 48)),
    "12b": (Launches(1109, 69), Launches(543, 43)),
    "26b-a4b": (Launches(1244, 69), Launches(471, 43)),
    "31b": (Launches(1379, 69), Launches(671, 43)),
}

ALWAYS = (ADD_NORM, NORM_ROPE, GATE_UP, QKV)
WAYS_OF = {
    "e2b": (*ALWAYS, SPLIT),
    "e4b": (*ALWAYS, PACKED),
    "12b": ALWAYS,
    "26b-a4b": (*ALWAYS, ROUTE, EXPERTS, PACKED),
    "31b": (*ALWAYS, PACKED),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_counts(family):
    counted = Counted(FAMILIES[family])
    assert counted.ways == WAYS_OF[family]
    found = counted.launches(STOCK_WAYS), counted.launches(frozenset(WAYS) - {PACKED})
    assert found == COUNTS[family]


def test_the_page_has_these_counts():
    rows = re.findall(
        r"^\| (\S+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$", PAGE.read_text(), re.M
    )
    found = {
        name.lower(): (Launches(int(a), int(c)), Launches(int(b), int(d)))
        for name, a, b, c, d in rows
    }
    assert found == COUNTS
