"""What docs/several-macs.md concludes is what the model says.

Run: python -m pytest tests/scripts/test_several_macs.py
"""

import sys
from dataclasses import replace
from itertools import product

import pytest

from mlx_gemma_mtp.drafting.chips import CHIPS
from mlx_gemma_mtp.drafting.links import JACCL, JACCL_FAST, LINKS, RING
from mlx_gemma_mtp.drafting.speed_model import model
from mlx_gemma_mtp.models.families import FAMILIES
from scripts import several_macs
from scripts.several_macs import (
    SHOWN,
    SIZES,
    best,
    gathered_share,
    plans,
    speed_lines,
    sums_lines,
)


def gain(chip, name, bits, link=JACCL):
    """What a second Mac gains."""
    chip, family = CHIPS[chip], FAMILIES[name]
    alone = model(chip, family, bits=bits)
    return best(model(chip, family, bits=bits, size=2, link=link)) / best(alone)


def test_when_a_second_mac_is_worth_it():
    assert [round(gain(chip, "31b", 8), 1) for chip in SHOWN] == [1.5, 1.3, 1.1, 1.2]
    assert round(gain("M4 Pro", "31b", 4), 1) == 1.3
    assert round(gain("M4 Pro", "12b", 8), 1) == 1.2
    worth = {("31b", 8), ("31b", 4), ("12b", 8)}
    for chip in SHOWN:
        for name in FAMILIES:
            for bits in (4, 8):
                if (name, bits) not in worth or (chip, bits) != ("M4 Pro", bits):
                    is_worth = (name, bits) == ("31b", 8)
                    assert is_worth or gain(chip, name, bits) < 1.05
                assert gain(chip, name, bits, RING) < 1.05


@pytest.mark.parametrize("chip", SHOWN)
def test_fast_synch_gains_for_every_large_family(chip):
    for name in ("12b", "31b"):
        for bits in (4, 8):
            fast = gain(chip, name, bits, JACCL_FAST)
            assert fast > max(1.1, gain(chip, name, bits))


def test_four_m3_ultra_without_drafts():
    """Nearly 3 times is published for another family of that size."""
    gains = []
    for bits in (4, 8, 16):
        alone = model(CHIPS["M3 Ultra"], FAMILIES["31b"], bits=bits)
        four = replace(alone, size=4, link=JACCL_FAST)
        gains.append(round(alone.round_s(0) / four.round_s(0), 1))
    assert gains == [1.8, 2.3, 2.8]


def test_lists_in_place_of_logits_would_spare_little():
    """With the best number of drafts, and with at most 2.6 % with any."""
    shares, of_any = [], []
    for chip, family, bits, size, link in product(
        CHIPS.values(), FAMILIES.values(), (4, 8, 16), SIZES, LINKS
    ):
        speed = model(chip, family, bits=bits, size=size, link=link)
        best_k = speed.best_draft_tokens(family.acceptance)
        shares.append(gathered_share(speed, best_k))
        of_any += [gathered_share(speed, k) for k in range(9)]
    assert round(100 * max(shares), 2) == 1.65
    assert round(100 * max(of_any), 1) == 2.6


def test_a_list_and_logits_by_hand():
    """Five rows of half the table in two bytes each, over 64 numbers and tokens."""
    speed = model(CHIPS["M4 Max"], FAMILIES["31b"], size=2, link=JACCL)
    spared_s = 5 * (131072 * 2 - 64 * 8) / 6.2e9
    assert gathered_share(speed, 4) == pytest.approx(spared_s / speed.round_s(4))


def test_sums_of_31b_by_hand():
    """5 rows of 5376 numbers of 2 bytes, 120 times, and of half the logits."""
    (line,) = (line for line in sums_lines() if line.startswith("| 31B"))
    assert line == "| 31B | 120 | 120 + 2 + 1 gather | 54 | 1.3 | 7.8 |"


def test_26b_has_a_router_of_eight_bits():
    router = 30 * 128 * 2816  # weights
    (one,) = plans("26b-a4b", 1, 4)
    assert one.whole_bytes == pytest.approx(430.8e6 + router / 2, rel=1e-3)


def test_the_command_prints_all_tables(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["several_macs", "--context", "50000"])
    several_macs.main()
    printed = capsys.readouterr().out
    assert printed.count("|---") == 4 + 6 + 7
    assert "\n".join(sums_lines()) in printed
    assert "\n".join(speed_lines(50_000)) in printed
    assert "\n".join(speed_lines()) not in printed
