"""The whole engine on Metal's text: what kernels choose is what plain operations do.

Every launch runs in the harness, on the CPU. Near ties between floats could be decided
differently; with the seeds here none is.

Run: python -m pytest tests/sampling/test_fused.py
"""

from __future__ import annotations

import io
import re
import sys
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_gemma_mtp.engine.decoder import Decoder, Request
from mlx_gemma_mtp.engine.rounds import Rounds
from mlx_gemma_mtp.generation.tokens import generate_tokens
from mlx_gemma_mtp.kernels import common, trial
from mlx_gemma_mtp.sampling import fused
from mlx_gemma_mtp.sampling.acceptance import accept_block
from mlx_gemma_mtp.sampling.decision import decide, joined, propose
from mlx_gemma_mtp.sampling.graph import sampling_arrays, sampling_graph
from mlx_gemma_mtp.sampling.logprobs import log_probabilities
from mlx_gemma_mtp.sampling.params import SamplingParams
from tests.engine.test_masked import rules
from tests.metal.run import run_on_cpu
from tests.tiny import SHORT, reference_pair

if sys.platform == "darwin":
    pytest.skip("MLX's own Metal runs here", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("plain_graphs")

PROMPTS = [[2, 17, 300, 45], [9]]
SETTINGS: list[dict[str, Any]] = [
    {"top_k": 64, "top_p": 0.95},  # Gemma's own
    {"top_k": 20, "top_p": 0.8, "min_p": 0.01},
    {},
    {"top_p": 0.7},
    {"min_p": 0.05, "top_p": 0.95},
]


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
        max_tokens=4 if is_listed else 3,
        num_draft_tokens=num_draft_tokens,
        eos_token_ids=(),
        **settings,
    )
    return [list(row) for row in zip(*stream, strict=True)]


@pytest.mark.parametrize(
    ("reproducible", "settings"),
    [
        (True, SETTINGS[0]),
        (False, SETTINGS[0]),
        (False, SETTINGS[1]),
        (True, SETTINGS[2]),
        (False, SETTINGS[3]),
        (True, SETTINGS[4]),
    ],
    ids=str,
)
def test_text_is_that_of_plain_operations(
    reproducible, settings, launches, monkeypatch
):
    family = SHORT if "min_p" in settings else "e2b"  # dense and centroid heads
    settings = {"temp": 1.0, "seed": 3, "reproducible": reproducible, **settings}
    by_kernels = [decode(family, k, **settings) for k in (0, 3)]
    assert launches
    monkeypatch.setattr(common, "backend", lambda: "ops")
    launches.clear()
    assert by_kernels == [decode(family, k, **settings) for k in (0, 3)]
    assert not launches


@pytest.mark.parametrize(
    ("reproducible", "settings"),
    [(True, SETTINGS[0]), (False, SETTINGS[0]), (False, SETTINGS[3])],
    ids=str,
)
def test_masked_text_is_that_of_plain_operations(
    reproducible, settings, launches, monkeypatch
):
    """Banned logits are minus infinity; some tokens are forced, and proposed so."""

    def text(num_draft_tokens):
        sampling = SamplingParams(1.0, seed=3, reproducible=reproducible, **settings)
        max_tokens = 12 if "top_k" in settings else 4
        request = Request([2, 17], max_tokens, sampling, constraint=rules())
        decoder = Decoder(
            reference_pair("12b").rounds, [request], num_draft_tokens=num_draft_tokens
        )
        return [token for (output,) in decoder.run() for token in output.tokens]

    by_kernels = [text(k) for k in (0, 3)]
    assert launches
    monkeypatch.setattr(common, "backend", lambda: "ops")
    assert by_kernels == [text(k) for k in (0, 3)]


BY_LISTS = [
    SamplingParams(0.0),
    SamplingParams(1.0, 0.9, 30, seed=5),
    SamplingParams(0.8, 1.0, 64, seed=6, reproducible=False),
    SamplingParams(1.3, 0.95, 8, 0.01, seed=7, reproducible=False),
]
# Rows that draw from lists, and from the vocabulary by kernels or without.
IN_TWO_WAYS = [
    SamplingParams(0.0),
    SamplingParams(1.0, 0.9, 30, seed=5, reproducible=False),
    SamplingParams(1.0, 0.9, seed=6, reproducible=False),
]
BESIDE_XTC = [*IN_TWO_WAYS[1:2], SamplingParams(1.0, seed=7, xtc_probability=0.5)]


@pytest.mark.parametrize(
    ("params", "max_tokens", "kernels"),
    [
        (BY_LISTS, 6, {"select", "propose", "decide"}),
        (
            IN_TWO_WAYS,
            3,
            {"select", "propose", "decide", "threshold", "judge", "resample"},
        ),
        (BESIDE_XTC, 4, {"select", "decide"}),
    ],
)
def test_neighbours_change_nothing(params, max_tokens, kernels, launches):
    """Rows of every rule together, and each alone."""

    def text(*rows):
        pair = reference_pair()
        requests = [Request(PROMPTS[0], max_tokens, row) for row in rows]
        found: list[list[int]] = [[] for _ in rows]
        rounds = Rounds(pair.rounds.target, pair.drafter)
        for emissions in Decoder(rounds, requests, num_draft_tokens=3).run():
            for emission in emissions:
                found[emission.sequence.index] += emission.tokens
        return found

    fused.decides(sampling_graph(params).groups[0])  # tries what is not tried yet
    launches.clear()
    together = text(*params)
    assert set(launches) == kernels
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
    graph, rows = sampling_graph(params), sampling_arrays(params)
    (group,) = graph.groups
    offset = mx.array([7])
    chance = np.random.default_rng(0)
    for vocab_size, num_steps in ((300, 0), (9000, 1)):
        logits = mx.array(chance.normal(size=(1, 2, vocab_size)).astype(np.float32))
        drafted = mx.array(chance.normal(size=(1, 1, vocab_size)).astype(np.float32))
        draft = fused.propose_one(
            drafted, rows, group=graph.of_drafts, offset=offset, step=1, token_ids=None
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
    graph = sampling_graph(params)
    assert [fused.decides(group) for group in graph.groups] == is_served
    assert not is_served or fused.proposes(graph.of_drafts) == (XTC not in params)


def decided(params, logits, drafted):
    """One draft of each row and what is decided of it."""
    graph, rows = sampling_graph(params), sampling_arrays(params)
    offset = mx.arange(5, 5 + len(params))
    draft = propose(drafted, rows, graph=graph, offset=offset, step=1, token_ids=None)
    accepted = decide(
        joined([draft]),
        logits,
        rows,
        graph=graph,
        offset=offset,
        verification=accept_block,
    )
    return accepted.num_accepted, accepted.next_token


def some_logits(num_rows, num_tokens):
    chance = np.random.default_rng(3)
    return mx.array(chance.normal(size=(num_rows, num_tokens, 300)).astype(np.float32))


# Those of lists, and those of whole rows.
TRIED = ("select", "propose", "decide", "threshold", "judge", "resample")


@pytest.mark.parametrize("name", TRIED)
def test_a_kernel_that_does_not_run_is_replaced(name, launches, monkeypatch, caplog):
    """It is tried once, said so once, and everything is as it was."""
    run = common.launch
    tries = []

    def launch(kernel, inputs, **settings):
        if kernel.name == name:
            tries.append(kernel)
            raise ValueError("Thread group size (256) is greater than\nthe maximum")
        return run(kernel, inputs, **settings)

    monkeypatch.setattr(common, "launch", launch)
    monkeypatch.setattr(trial, "_is_working", {})
    logits, drafted = some_logits(3, 2), some_logits(3, 1)
    for _ in range(2):
        found = decided(IN_TWO_WAYS, logits, drafted)
        log_probabilities(logits, mx.zeros((3, 2), dtype=mx.int32), num_logprobs=5)
    assert len(tries) == 1
    assert [record.getMessage() for record in caplog.records] == [
        f"kernel {name!r} does not run here, plain operations take its place, which is "
        "slower: ValueError: Thread group size (256) is greater than the maximum"
    ]
    others = TRIED[3:] if name in TRIED[:3] else TRIED[:3]
    assert set(others) <= set(launches)
    monkeypatch.setattr(common, "backend", lambda: "ops")
    for array, plain in zip(found, decided(IN_TWO_WAYS, logits, drafted), strict=True):
        assert array.tolist() == plain.tolist()


def test_kernels_are_small_enough_for_every_chip(launches, monkeypatch):
    """In the largest form of each, which is the one that is tried."""
    sizes = {}
    run = common.launch

    def launch(kernel, inputs, **settings):
        x, y, z = settings["threadgroup"]
        sizes[kernel.name] = x * y * z
        return run(kernel, inputs, **settings)

    monkeypatch.setattr(common, "launch", launch)
    monkeypatch.setattr(trial, "_is_working", {})
    assert all(fused.decides(group) for group in sampling_graph(IN_TWO_WAYS).groups)
    assert fused.proposes(sampling_graph(IN_TWO_WAYS).of_drafts)
    assert set(sizes) == set(TRIED)
    assert max(sizes.values()) <= 256


@pytest.mark.parametrize(
    "params",
    [
        [LISTED, MANY],
        [SamplingParams(1.0, 0.9, 100, 0.1, seed=1, reproducible=False), LISTED],
        [LISTED, XTC],
        [WHOLE, LISTED],
    ],
)
def test_no_row_of_the_vocabulary_is_sorted_on_a_gpu(params, launches):
    """MLX sorts there for a partition too."""
    logits = some_logits(len(params), 2)
    logprobs = log_probabilities(
        logits, mx.zeros((len(params), 2), dtype=mx.int32), num_logprobs=64
    )
    text = io.StringIO()
    found = decided(params, logits, some_logits(len(params), 1))
    mx.export_to_dot(text, *found, *logprobs.named.values())
    assert not re.findall("Sort|Partition", text.getvalue())


def test_no_kernel_runs_on_the_cpu():
    assert common.backend() == "ops" or mx.default_device() == mx.gpu
