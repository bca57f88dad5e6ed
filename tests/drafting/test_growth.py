"""What several rows cost over one: by MLX, and by the package's kernel.

Run: python -m pytest tests/drafting/test_growth.py
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_gemma_mtp.drafting.chips import CHIPS
from mlx_gemma_mtp.drafting.growth import (
    MAX_KERNEL_ROWS,
    cautious_slots,
    constants_of,
    slots_per_weight,
    with_kernel,
)
from mlx_gemma_mtp.kernels.matmul import MAX_ROWS
from scripts.roofline import designed_slots

ROUNDING = 1 + 1e-12

chips = st.sampled_from(list(CHIPS.values()))
slots = st.sampled_from([cautious_slots, designed_slots])
few = st.integers(1, MAX_KERNEL_ROWS)
widths = st.sampled_from([4, 8, 16])


def by_kernel(chip, slots=cautious_slots):
    return with_kernel(constants_of(chip), slots)


def test_the_kernel_takes_as_many_rows_as_it_is_written_for():
    assert MAX_KERNEL_ROWS == MAX_ROWS


@pytest.mark.parametrize("make", [constants_of, by_kernel])
@given(chip=chips, rows=st.integers(1, 300))
def test_growth_is_between_one_pass_and_one_a_row(make, chip, rows):
    growth = make(chip).growth(rows, chip)
    assert 1 <= growth <= rows
    assert growth <= make(chip).growth(rows + 1, chip) * ROUNDING


def test_rows_past_the_limit_cost_a_tile():
    chip = CHIPS["M1 Max"]
    growths = [constants_of(chip).growth(rows, chip) for rows in (5, 6, 32, 33)]
    assert growths[0] < growths[1] == growths[2] == growths[3] / 2


@given(chips, st.integers(MAX_KERNEL_ROWS + 1, 300), widths)
def test_rows_past_the_kernel_are_of_mlx(chip, rows, bits):
    last = by_kernel(chip).growth(MAX_KERNEL_ROWS, chip, bits)
    expected = max(last, constants_of(chip).growth(rows, chip, bits))
    assert by_kernel(chip).growth(rows, chip, bits) == expected


def test_slots_of_a_weight_by_hand():
    # M1 Max: 32 cores of 128 lanes at 1.296 GHz, of which 70 % count, and 400 GB/s, of
    # which 55 % are reached; 4 bits and a share of 32 more for every 64 weights.
    slots_per_s = 0.7 * 32 * 128 * 1.296e9
    weights_per_s = 0.55 * 400e9 / (4.5 / 8)
    available = slots_per_weight(CHIPS["M1 Max"], 4, 0.55)
    assert available == pytest.approx(slots_per_s / weights_per_s)
    dense = slots_per_weight(CHIPS["M1 Max"], 16, 0.55)
    assert dense == pytest.approx(available * 16 / 4.5)


@given(chips, slots, few, widths)
def test_growth_by_hand(chip, slots, rows, bits):
    constants = by_kernel(chip, slots)
    available = slots_per_weight(chip, bits, constants.efficiency)
    times = [math.cbrt(1 + (slots(m) / available) ** 3) for m in (1, rows)]
    expected = times[1] / times[0]
    assert constants.growth(rows, chip, bits) == pytest.approx(expected)


@given(chips, slots, few)
def test_a_gpu_of_many_cores_reads_and_one_of_few_computes(chip, slots, rows):
    many, one = (replace(chip, gpu_cores=n) for n in (10**9, 1e-9))
    constants = by_kernel(chip, slots)
    assert constants.growth(rows, many) == pytest.approx(1)
    assert constants.growth(rows, one) == pytest.approx(slots(rows) / slots(1))


@given(chips, few, widths, widths)
def test_wider_weights_never_grow_more(chip, rows, one, other):
    low, high = sorted((one, other))
    growth = by_kernel(chip).growth
    assert growth(rows, chip, high) <= growth(rows, chip, low) * ROUNDING


@given(chips, few)
def test_caution_is_never_below_the_design(chip, rows):
    assert cautious_slots(rows) > designed_slots(rows)
    designed = by_kernel(chip, designed_slots).growth(rows, chip)
    assert designed <= by_kernel(chip).growth(rows, chip) * ROUNDING


@given(st.sampled_from([c for c in CHIPS.values() if c.generation < 15]), few)
def test_before_m3_even_caution_beats_mlx(chip, rows):
    assert by_kernel(chip).growth(rows, chip) <= constants_of(chip).growth(rows, chip)
