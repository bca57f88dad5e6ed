"""The model of speed: its bytes, its order, its error, the priors made of it.

Run: python -m pytest tests/test_roofline.py
"""

from __future__ import annotations

import json
import math
import os
import re
import statistics
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_gemma_mtp.drafting.controller import DEFAULT_PRIOR
from mlx_gemma_mtp.drafting.speed_model import (
    CHIPS,
    acceptance_length,
    chip_of,
    constants_of,
    dense_weights,
    draft_weights,
    expert_weights,
    experts_read,
    kv_bytes,
    matrix_limit,
    model,
    prior,
)
from mlx_gemma_mtp.models.families import FAMILIES, family_of
from tests.published import published, without_shared_kv

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "speed-model.md").read_text(encoding="utf-8")
REPOSITORIES = {
    name: f"google/gemma-4-{size}-it"
    for name, size in (
        ("e2b", "E2B"),
        ("e4b", "E4B"),
        ("12b", "12B"),
        ("26b-a4b", "26B-A4B"),
        ("31b", "31B"),
    )
}
MACHINES = [f"applegpu_g{n}{letter}" for n in range(13, 18) for letter in "pgsd"]
ROUNDING = 1 + 1e-12
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

chips = st.sampled_from(list(CHIPS.values()))
families = st.sampled_from(list(FAMILIES.values()))
acceptances = st.floats(0, 1)
counts = st.integers(0, 8)
speeds = st.builds(
    model,
    chips,
    families,
    bits=st.sampled_from([4, 6, 8, 16]),
    draft_bits=st.sampled_from([None, 4, 16]),
    batch_size=st.integers(1, 16),
    context=st.integers(0, 100_000),
)


def run_script(*arguments, cwd):
    command = [sys.executable, str(ROOT / "scripts" / "roofline.py"), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env=environment,
        timeout=60,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def num_weights(tensors, pattern):
    """Weights of the matrices whose names match."""
    return sum(
        math.prod(shape)
        for name, (_, shape) in tensors.items()
        if len(shape) > 1 and re.search(pattern, name)
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_target_weights_are_those_of_the_published_checkpoint(name):
    family = FAMILIES[name]
    text_keys = family.target_text
    checkpoint = published(REPOSITORIES[name])
    if text_keys["num_kv_shared_layers"]:
        checkpoint = without_shared_kv(checkpoint)
    text = r"language_model\.(?!embed_tokens_per_layer)(?!.*experts)"
    assert dense_weights(family) == num_weights(checkpoint.tensors, text)
    experts = num_weights(checkpoint.tensors, r"\.experts\.")
    if experts:
        experts = experts * text_keys["top_k_experts"] // text_keys["num_experts"]
    assert expert_weights(family) == experts


@pytest.mark.parametrize("name", FAMILIES)
def test_drafter_weights_are_those_of_the_published_checkpoint(name):
    tensors = published(f"{REPOSITORIES[name]}-assistant").tensors
    whole = num_weights(tensors, r"weight$")
    if FAMILIES[name].has_centroid_head:  # of the head, 32 groups of 128 rows
        whole -= (262144 - 4096) * 256
    assert draft_weights(FAMILIES[name]) == whole


@pytest.mark.parametrize(
    ("name", "gigabytes"),
    [("e2b", 1.28), ("e4b", 2.61), ("26b-a4b", 2.15), ("31b", 17.3)],
)
def test_bytes_of_a_pass(name, gigabytes):
    family = FAMILIES[name]
    read = (dense_weights(family) + expert_weights(family)) * 4.5 / 8
    assert read / 1e9 == pytest.approx(gigabytes, rel=0.005)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("context", [100, 5000])
def test_kv_bytes_are_those_of_the_published_config(name, context):
    text = published(REPOSITORIES[name]).config["text_config"]
    num_bytes = 0
    for kind in text["layer_types"]:
        if kind == "full_attention":
            heads = text.get("num_global_key_value_heads")
            heads = heads or text["num_key_value_heads"]
            num_bytes += 2 * 2 * heads * text["global_head_dim"] * context
        else:
            seen = min(context, text["sliding_window"])
            num_bytes += 2 * 2 * text["num_key_value_heads"] * text["head_dim"] * seen
    assert kv_bytes(FAMILIES[name], context) == num_bytes


@pytest.mark.parametrize("name", FAMILIES)
def test_family_is_told_from_the_config(name):
    text = published(REPOSITORIES[name]).config["text_config"]
    assert family_of(text) == name
    assert family_of(text | {"num_hidden_layers": 7}) is None
    assert family_of(text | {"enable_moe_block": name != "26b-a4b"}) is None
    assert family_of({}) is None


@given(speeds, counts, st.floats(1, 10))
def test_more_bandwidth_is_never_slower(speed, k, times):
    chip = replace(speed.chip, bandwidth=speed.chip.bandwidth * times)
    assert replace(speed, chip=chip).round_s(k) <= speed.round_s(k)


@given(speeds, acceptances, acceptances)
def test_more_acceptance_is_never_slower(speed, one, other):
    low, high = sorted((one, other))
    for k in range(9):
        slower = speed.tokens_per_second(k, low)
        assert slower <= speed.tokens_per_second(k, high) * ROUNDING
    assert speed.speedup(low) <= speed.speedup(high) * ROUNDING


@given(speeds)
def test_more_drafts_take_longer(speed):
    times = [speed.round_s(k) for k in range(9)]
    assert times == sorted(times)
    assert times[0] > 0
    assert speed.relative_cost(0) == 1.0


@given(speeds, acceptances)
def test_best_number_of_drafts_is_never_slower_than_none(speed, acceptance):
    assert speed.speedup(acceptance) >= 1


@given(chips, st.integers(1, 300))
def test_growth_is_between_one_pass_and_one_a_row(chip, rows):
    growth = constants_of(chip).growth(rows, matrix_limit(chip))
    assert 1 <= growth <= rows
    assert growth <= constants_of(chip).growth(rows + 1, matrix_limit(chip))


def test_rows_past_the_limit_cost_a_tile():
    chip = CHIPS["M1 Max"]
    growths = [constants_of(chip).growth(rows, 6) for rows in (5, 6, 32, 33)]
    assert growths[0] < growths[1] == growths[2] == growths[3] / 2


def test_experts_read():
    assert experts_read(1, 8, 128) == 1
    assert experts_read(10_000, 8, 128) == pytest.approx(1 + 0.75 * 15)


def test_acceptance_length():
    for k in range(9):
        assert acceptance_length(k, 0.0) == 1
        assert acceptance_length(k, 1.0) == k + 1
        assert acceptance_length(k, 0.6) == pytest.approx((1 - 0.6 ** (k + 1)) / 0.4)


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


@pytest.mark.parametrize("family", [*FAMILIES, None, "another"])
def test_priors(family):
    sizes = ((1, 0), (8, 30_000))
    for machine, (batch_size, context) in product(MACHINES, sizes):
        expected = prior(machine, family, batch_size=batch_size, context=context)
        costs = expected.relative_cost
        assert len(costs) == 9
        assert costs[0] == 1.0
        assert all(math.isfinite(cost) and cost >= 1 for cost in costs)
        assert 0 < expected.acceptance < 1


@pytest.mark.parametrize("machine", UNKNOWN)
@pytest.mark.parametrize("family", ["31b", None])
def test_unknown_machines_get_the_default(machine, family):
    assert prior(machine, family, batch_size=3, context=99) == DEFAULT_PRIOR


@pytest.mark.parametrize("family", FAMILIES)
def test_m5_drafts_more_than_m1(family):
    def best(machine):
        costs = prior(machine, family).relative_cost
        lengths = [acceptance_length(k, 0.6) for k in range(9)]
        return max(range(9), key=lambda k: lengths[k] / costs[k])

    for letter in "gsd":
        assert best(f"applegpu_g13{letter}") <= 2
    assert best("applegpu_g17s") > best("applegpu_g13s")


def test_the_page_has_what_the_script_prints(tmp_path):
    part = run_script("--markdown", cwd=tmp_path)
    assert part in PAGE, part


def test_figures_and_the_error_stated(tmp_path):
    file = tmp_path / "figures.json"
    printed = run_script("--json", str(file), cwd=tmp_path)
    assert "not measured" in printed
    figures = json.loads(file.read_text(encoding="utf-8"))
    for use, words in (
        ("fit", "the constants were fitted to"),
        ("same runs", "of the same runs, not fitted to"),
        ("check", "of other runs"),
    ):
        rows = [row for row in figures["check"] if row["use"] == use]
        errors = [abs(row["modelled"] / row["value"] - 1) for row in rows]
        median = statistics.median(errors)
        stated = re.search(
            rf"^\| {words} \| (\d+) \| .* \| median (\d+)%, worst (\d+)% \|$",
            PAGE,
            re.MULTILINE,
        )
        assert stated is not None
        assert stated.groups() == (
            str(len(rows)),
            f"{median * 100:.0f}",
            f"{max(errors) * 100:.0f}",
        )
        assert median < 0.25
    for source in ("mlxcel #216", "Rapid-MLX #3593", "Rapid-MLX #1013"):
        rows = [row for row in figures["check"] if row["source"] == source]
        for row in rows:
            if row["kind"] == "speedup":
                assert f"{row['value']:.2f}x" in PAGE
                assert f"{row['modelled']:.2f}x" in PAGE
    assert all(row["relative_cost"][0] == 1.0 for row in figures["modelled"])


def test_settings_of_the_script(tmp_path):
    settings = ("--bits", "8", "--draft-bits", "16", "--batch-size", "4")
    printed = run_script(*settings, "--context", "8000", cwd=tmp_path)
    assert "8-bit target, 16 bits of the drafter, batch 4, context 8000" in printed


def test_constants_are_those_that_fit(tmp_path):
    printed = run_script("--fit", cwd=tmp_path)
    used, fitted = (
        [float(n) for line in re.findall(rf"^{word}:(.*)", printed, re.MULTILINE)
         for n in re.findall(r"\d[\d.e-]*", line)]
        for word in ("used", "fitted")
    )  # fmt: skip
    assert used == pytest.approx(fitted, rel=0.02)
