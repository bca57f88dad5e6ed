"""The whole engine on Metal's text: what kernels choose is what plain operations do.

Every launch runs in the harness, on the CPU. Near ties between floats could be decided
differently; with the seeds here none is.

Run: python -m pytest tests/test_fused.py
"""

from __future__ import annotations

import sys
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_gemma_mtp import fused
from mlx_gemma_mtp.config import SamplingParams
from mlx_gemma_mtp.decoder import Decoder, Request
from mlx_gemma_mtp.kernels import common
from mlx_gemma_mtp.rounds import Rounds
from mlx_gemma_mtp.sampling import sampling_rows, sampling_rule
from mlx_gemma_mtp.tokens import generate_tokens
from tests.metal.run import run_on_cpu
from tests.tiny import reference_pair, uncompiled

if sys.platform == "darwin":
    pytest.skip("MLX's own Metal runs here", allow_module_level=True)

PROMPTS = [[2, 17, 300, 45], [9]]
SETTINGS: list[dict[str, Any]] = [
    {"top_k": 64, "top_p": 0.95},  # Gemma's own
    {"top_k": 20, "top_p": 0.8, "min_p": 0.01},
    {},
    {"top_p": 0.7},
    {"min_p": 0.05, "top_p": 0.95},
]


@pytest.fixture(autouse=True, scope="module")
def _uncompiled():
    with uncompiled():
        yield


@pytest.fixture
def launches(monkeypatch):
    """Kernels run in the harness; their names as they are launched."""
    names: list[str] = []

    def launch(kernel, inputs, **settings):
        names.append(kernel.name)
        assert all(array.size >= 8 for array in inputs)
        return run_on_cpu(kernel, inputs, **settings)

    monkeypatch.setattr(common, "backend", lambda: "metal")
    monkeypatch.setattr(common, "launch", launch)
    return names


def decode(family, num_draft_tokens, **settings):
    is_listed = "top_k" in settings  # the other kernels take long in the harness
    stream = generate_tokens(
        reference_pair(family),
        PROMPTS if is_listed else PROMPTS[:1],
        max_tokens=10 if is_listed else 5,
        num_draft_tokens=num_draft_tokens,
        eos_token_ids=(),
        **settings,
    )
    return [list(row) for row in zip(*stream, strict=True)]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("reproducible", [True, False])
def test_text_is_that_of_plain_operations(
    reproducible, settings, launches, monkeypatch
):
    family = "12b" if "min_p" in settings else "e2b"  # dense and centroid heads
    settings = {"temp": 1.0, "seed": 3, "reproducible": reproducible, **settings}
    by_kernels = [decode(family, k, **settings) for k in (0, 3)]
    assert launches
    monkeypatch.setattr(common, "backend", lambda: "ops")
    launches.clear()
    assert by_kernels == [decode(family, k, **settings) for k in (0, 3)]
    assert not launches


def test_neighbours_change_nothing(launches):
    """Rows of every rule together, and each alone."""
    params = [
        SamplingParams(0.0),
        SamplingParams(1.0, 0.9, 30, seed=5),
        SamplingParams(0.8, 1.0, 64, seed=6, reproducible=False),
        SamplingParams(1.3, 0.95, 8, 0.01, seed=7, reproducible=False),
    ]

    def text(*rows):
        pair = reference_pair("12b")
        requests = [Request(PROMPTS[0], 10, row) for row in rows]
        found: list[list[int]] = [[] for _ in rows]
        rounds = Rounds(pair.rounds.target, pair.drafter)
        for emissions in Decoder(rounds, requests, num_draft_tokens=3).run():
            for emission in emissions:
                found[emission.row.index] += emission.tokens
        return found

    together = text(*params)
    assert launches
    assert together == [text(row)[0] for row in params]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"top_k": 64, "top_p": 0.95}, ["select", "decide"]),
        ({"top_p": 0.95}, ["threshold", "judge", "resample"]),
    ],
)
def test_launches_of_a_decision(settings, expected, launches):
    """Never more than three; a row of more than 8,192 tokens is selected in two."""
    params = [SamplingParams(1.0, seed=1, reproducible=False, **settings)]
    rule, rows = sampling_rule(params), sampling_rows(params)
    (group,) = rule.groups
    offset = mx.array([7])
    chance = np.random.default_rng(0)
    for vocab_size, num_steps in ((300, 0), (9000, 1)):
        logits = mx.array(chance.normal(size=(1, 2, vocab_size)).astype(np.float32))
        drafted = mx.array(chance.normal(size=(1, 1, vocab_size)).astype(np.float32))
        draft = fused.propose_one(
            drafted, rows, group=rule.of_drafts, offset=offset, step=1, token_ids=None
        )
        launches.clear()
        fused.decide_all(draft, logits, rows, group=group, offset=offset)
        is_listed = "select" in expected
        assert launches == [*["select"] * (num_steps * is_listed), *expected]
        assert len(launches) <= 3


LISTED, WHOLE = SamplingParams(1.0, top_k=64), SamplingParams(1.0)
MANY, XTC = SamplingParams(1.0, top_k=65), SamplingParams(1.0, xtc_probability=0.5)


@pytest.mark.parametrize(
    ("params", "is_served"),
    [
        ([SamplingParams()], []),
        ([WHOLE], [True]),
        ([LISTED], [True]),
        ([MANY], [False]),
        ([XTC], [False]),
        ([LISTED, SamplingParams()], [True]),
        ([WHOLE, LISTED], [True, True]),
        ([LISTED, MANY], [True, False]),
        ([LISTED, XTC], [True, False]),
    ],
)
def test_what_kernels_serve(params, is_served, launches):
    rule = sampling_rule(params)
    assert [fused.decides(group) for group in rule.groups] == is_served
    assert not is_served or fused.proposes(rule.of_drafts) == (XTC not in params)


def test_no_kernel_runs_on_the_cpu():
    assert common.backend() == "ops" or mx.default_device() == mx.gpu
