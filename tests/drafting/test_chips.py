"""Which chip MLX's name of a GPU is of.

Run: python -m pytest tests/drafting/test_chips.py
"""

import pytest

from mlx_gemma_mtp.drafting.chips import CHIPS, chip_of

UNKNOWN = [
    None,
    "",
    "x86_64",
    "arm64",
    "sm_90",
    "applegpu_g18s",
    "applegpu_g15",
    "g15s",
]


@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        ("applegpu_g13g", "M1"),
        ("applegpu_g14d", "M2 Ultra"),
        ("applegpu_g15s", "M3 Max"),
        ("applegpu_g16p", "M4"),
        ("applegpu_g17d", "M5 Max"),
        *((architecture, None) for architecture in UNKNOWN),
    ],
)
def test_chip_of_an_architecture(architecture, name):
    chip = chip_of(architecture)
    assert (chip.name if chip else None) == name


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [("M1", 2.65), ("M1 Max", 10.6), ("M2 Ultra", 27.2), ("M2 Max", 13.6)],
)
def test_slots_are_those_of_published_multiply_adds(name, teraflops):
    # A multiply-add is one slot and two operations.
    assert 2 * CHIPS[name].slots_per_s / 1e12 == pytest.approx(teraflops, rel=0.005)
