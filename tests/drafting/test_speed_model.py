"""The model of speed: its bytes, its order, its error, the priors made of it.

Run: python -m pytest tests/drafting/test_speed_model.py
"""

from __future__ import annotations

import json
import math
import os
import re
import statistics
import subprocess
import sys
from collections import defaultdict
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_gemma_mtp.drafting.bytes_read import (
    dense_weights,
    draft_weights,
    expert_weights,
    key_bytes,
    sliding_bytes,
)
from mlx_gemma_mtp.drafting.chips import CHIPS, chip_of
from mlx_gemma_mtp.drafting.growth import constants_of, with_kernel
from mlx_gemma_mtp.drafting.prior import DEFAULT_PRIOR
from mlx_gemma_mtp.drafting.speed_model import (
    Matmuls,
    MeasuredModel,
    acceptance_length,
    experts_read,
    model,
    prior,
)
from mlx_gemma_mtp.models.families import FAMILIES, family_of
from scripts import roofline
from tests.drafting.test_chips import UNKNOWN
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
KERNEL = Matmuls(has_kernel=True)
TOOK_S = {1: 0.030, 3: 0.036, 5: 0.045, 9: 0.060}


def some_model(chip, family, *, has_kernel, **settings):
    constants = constants_of(chip)
    constants = with_kernel(constants) if has_kernel else constants
    return model(chip, family, constants=constants, **settings)


chips = st.sampled_from(list(CHIPS.values()))
families = st.sampled_from(list(FAMILIES.values()))
acceptances = st.floats(0, 1)
counts = st.integers(0, 8)
speeds = st.builds(
    some_model,
    chips,
    families,
    has_kernel=st.booleans(),
    bits=st.sampled_from([4, 6, 8, 16]),
    draft_bits=st.sampled_from([None, 4, 16]),
    batch_size=st.integers(1, 16),
    context=st.integers(0, 100_000),
)


@pytest.fixture
def run_script(monkeypatch, capsys, tmp_path):
    """What the script prints, run elsewhere."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["roofline.py", *arguments])
        roofline.main()
        return capsys.readouterr().out

    return run


def run_process(*arguments, cwd):
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
    family = FAMILIES[name]
    sliding = sliding_bytes(family, family.layer_types, context)
    assert sliding + context * key_bytes(family, family.layer_types) == num_bytes


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


@given(speeds, counts, st.integers(1024, 200_000), st.integers(1024, 200_000))
def test_each_token_of_context_takes_as_long_once_windows_are_full(speed, k, one, two):
    short, long = (replace(speed, context=n) for n in sorted((one, two)))
    added_s = long.round_s(k) - short.round_s(k)
    assert added_s == pytest.approx(abs(one - two) * speed.key_s(k), abs=1e-9)
    assert speed.key_s(k) >= speed.key_s(0) > 0


@given(st.sampled_from(MACHINES), st.sampled_from(list(FAMILIES)), counts)
def test_a_prior_is_the_line_that_rounds_follow(machine, family, k):
    known = prior(machine, family, batch_size=2, context=2000)
    chip = chip_of(machine)
    assert chip is not None
    for context in 1024, 2000, 64_000:
        speed = model(chip, FAMILIES[family], batch_size=2, context=context)
        costs, keys = known.costs
        ratio = (costs[k] + context * keys[k]) / (1 + context * keys[0])
        assert ratio == pytest.approx(speed.relative_cost(k))
        costs, keys = known.verify
        ratio = (costs[k] + context * keys[k]) / (1 + context * keys[0])
        assert ratio == pytest.approx(speed.pass_s(k + 1) / speed.pass_s(1))


def test_experts_read():
    assert experts_read(1, 8, 128) == 1
    assert experts_read(10_000, 8, 128) == pytest.approx(1 + 0.75 * 15)


def test_acceptance_length():
    for k in range(9):
        assert acceptance_length(k, 0.0) == 1
        assert acceptance_length(k, 1.0) == k + 1
        assert acceptance_length(k, 0.6) == pytest.approx((1 - 0.6 ** (k + 1)) / 0.4)


@pytest.mark.parametrize("matmuls", [Matmuls(), KERNEL, Matmuls(pass_seconds=TOOK_S)])
@pytest.mark.parametrize("family", [*FAMILIES, None, "another"])
def test_priors(family, matmuls):
    sizes = ((1, 0), (8, 30_000))
    for machine, (batch_size, context) in product(MACHINES, sizes):
        settings: dict[str, Any] = {"batch_size": batch_size, "context": context}
        expected = prior(machine, family, **settings, matmuls=matmuls)
        costs = expected.relative_cost
        assert len(costs) == 9
        assert costs[0] == 1.0
        assert all(math.isfinite(cost) and cost >= 1 for cost in costs)
        assert 0 < expected.acceptance < 1


@pytest.mark.parametrize("machine", UNKNOWN)
@pytest.mark.parametrize("family", ["31b", None])
def test_unknown_machines_get_the_default(machine, family):
    for matmuls in (Matmuls(), KERNEL, Matmuls(pass_seconds=TOOK_S)):
        found = prior(machine, family, batch_size=3, context=99, matmuls=matmuls)
        assert found == DEFAULT_PRIOR


def best_drafts(machine, family, matmuls):
    costs = prior(machine, family, matmuls=matmuls).relative_cost
    lengths = [acceptance_length(k, 0.6) for k in range(9)]
    return max(range(9), key=lambda k: lengths[k] / costs[k])


@pytest.mark.parametrize("family", FAMILIES)
def test_m5_drafts_more_than_m1(family):
    for letter in "gsd":
        assert best_drafts(f"applegpu_g13{letter}", family, Matmuls()) <= 2
    m5, m1 = (best_drafts(f"applegpu_g{n}s", family, Matmuls()) for n in (17, 13))
    assert m5 > m1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "machine", [f"applegpu_g{n}{x}" for n in (13, 14) for x in "gs"]
)
def test_before_m3_the_kernel_makes_every_round_cheaper(machine, family):
    stock = prior(machine, family).relative_cost
    ours = prior(machine, family, matmuls=KERNEL).relative_cost
    assert all(a < b for a, b in zip(ours[1:], stock[1:], strict=True))
    dense = family != "26b-a4b"  # whose experts the kernel does not multiply
    few = best_drafts(machine, family, Matmuls())
    assert best_drafts(machine, family, KERNEL) >= few + dense


@pytest.mark.parametrize("has_kernel", [False, True])
def test_measured_passes_stand_for_modelled_ones(has_kernel):
    matmuls = Matmuls(has_kernel=has_kernel, pass_seconds=TOOK_S)
    found = prior("applegpu_g13s", "31b", matmuls=matmuls).relative_cost
    modelled = model(CHIPS["M1 Max"], FAMILIES["31b"])
    step = modelled.step_s() / modelled.pass_s(1)
    passes = [30, 33, 36, 40.5, 45, 48.75, 52.5, 56.25, 60]  # ms, straight between
    expected = [took / 30 + k * step for k, took in enumerate(passes)]
    assert found == pytest.approx(expected)


@given(speeds, st.floats(1e-3, 1e3), st.sampled_from([(1, 9), tuple(range(1, 10))]))
def test_passes_measured_as_modelled_change_nothing(speed, times, counts):
    took_s = {rows: times * speed.rows_s(rows) for rows in counts}
    measured = MeasuredModel(**vars(speed), pass_seconds=took_s)
    for rows in {*counts, *range(10, 80, 7)}:
        assert measured.rows_s(rows) == pytest.approx(speed.rows_s(rows))
    assert measured.step_s() == speed.step_s()


def test_more_rows_than_were_measured_take_no_less():
    speed = model(CHIPS["M3 Max"], FAMILIES["31b"])
    slow = MeasuredModel(**vars(speed), pass_seconds={1: 1.0, 9: 100.0})
    assert slow.rows_s(10) == slow.rows_s(9) > speed.rows_s(10)


@pytest.mark.parametrize(
    "took_s", [{3: 1.0}, {1: 0.0}, {1: 1.0, 3: -1.0}, {1: math.nan}, {0: 1.0, 1: 1.0}]
)
def test_seconds_that_are_none_are_refused(took_s):
    with pytest.raises(ValueError, match="pass_seconds must be"):
        Matmuls(pass_seconds=took_s)


def test_the_page_has_what_the_script_prints(run_script):
    part = run_script("--markdown")
    assert part in PAGE, part


def test_figures_and_the_error_stated(run_script, tmp_path):
    file = tmp_path / "figures.json"
    printed = run_script("--json", str(file))
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
    plain = defaultdict(set)
    for row in figures["modelled"]:
        assert row["multiplier"] in printed
        plain[row["chip"], row["family"]].add(row["plain_tokens_per_second"])
    assert {len(speeds) for speeds in plain.values()} == {1}  # whatever multiplies


def test_settings_of_the_script(tmp_path):
    settings = ("--bits", "8", "--draft-bits", "16", "--batch-size", "4")
    printed = run_process(*settings, "--context", "8000", cwd=tmp_path)
    assert "8-bit target, 16 bits of the drafter, batch 4, context 8000" in printed


def test_constants_are_those_that_fit(run_script):
    printed = run_script("--fit")
    used, fitted = (
        [float(n) for line in re.findall(rf"^{word}:(.*)", printed, re.MULTILINE)
         for n in re.findall(r"\d[\d.e-]*", line)]
        for word in ("used", "fitted")
    )  # fmt: skip
    assert used == pytest.approx(fitted, rel=0.02)
