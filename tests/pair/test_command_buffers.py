"""Rounds are queued ahead only where none copies its caches, by the user's limits.

Run: python -m pytest tests/pair/test_command_buffers.py
"""

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_gemma_mtp.engine import pipeline
from mlx_gemma_mtp.engine.command_buffers import LEAST_BUFFERS, Limits, num_buffers
from mlx_gemma_mtp.generation.tokens import generate_tokens, make_batch_decoder
from mlx_gemma_mtp.machine import command_buffer_limits
from mlx_gemma_mtp.pair import planning
from mlx_gemma_mtp.pair.planning import can_look_ahead
from tests.tiny import reference_pair

MB = 2**20
OPERATIONS, MEGABYTES = "MLX_MAX_OPS_PER_BUFFER", "MLX_MAX_MB_PER_BUFFER"


@pytest.fixture
def on_a_mac(monkeypatch):
    monkeypatch.setattr(planning, "gpu", lambda: "metal")
    monkeypatch.setattr(mx, "device_info", lambda: {"architecture": "applegpu_g15s"})
    planning._tell_of_buffers.cache_clear()


@pytest.mark.parametrize(
    ("architecture", "settings", "limits"),
    [
        ("applegpu_g15s", {}, None),
        ("applegpu_g13g", {OPERATIONS: "1000"}, (1000, 40)),
        ("applegpu_g15s", {MEGABYTES: "400"}, (50, 400)),
        ("applegpu_g14d", {OPERATIONS: "7", MEGABYTES: "8"}, (7, 8)),
        ("other", {OPERATIONS: "12 or so"}, (12, 40)),
        (None, {OPERATIONS: "many"}, (0, 40)),  # as C reads it
    ],
)
def test_the_limits_are_mlxs_or_the_users(monkeypatch, architecture, settings, limits):
    for name in (OPERATIONS, MEGABYTES):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert command_buffer_limits(architecture) == limits


def test_a_pass_of_the_smallest_pair_fills_enough_buffers():
    """E2B in 4 bits: 35 layers; matrices of a layer, and the head."""
    layer = [1536 * 6144 * 9 // 16] * 3 + [1536 * 2048 * 9 // 16] * 2
    sizes = [*layer * 35, 262144 * 1536 * 9 // 16]
    assert num_buffers(sizes, 35, Limits(50, 50)) >= 12
    assert num_buffers(sizes, 35, Limits(1000, 50)) >= 12
    assert num_buffers(sizes, 35, Limits(1000, 400)) < 12


@given(
    sizes=st.lists(st.integers(0, 300 * MB), max_size=30),
    layers=st.integers(1, 60),
    operations=st.integers(0, 2000),
    megabytes=st.integers(0, 2000),
)
def test_buffers_as_mlx_fills_them_are_no_fewer(sizes, layers, operations, megabytes):
    """MLX's rule, step by step: an operation for each array, then the rest of them."""
    inputs = sizes + [0] * max(11 * layers - len(sizes), 0)
    filled = held = count = 0
    for size in inputs:
        held, count = held + size, count + 1
        if count > operations or (held >> 20) > megabytes:
            filled, held, count = filled + 1, 0, 0
    found = num_buffers(sizes, layers, Limits(operations, megabytes))
    assert found <= filled


def test_limits_that_would_copy_the_caches_end_look_ahead(
    on_a_mac, monkeypatch, caplog
):
    pair = reference_pair()
    assert can_look_ahead(pair)
    monkeypatch.setenv(OPERATIONS, "0")
    assert can_look_ahead(pair)
    monkeypatch.setenv(OPERATIONS, "1000")
    assert not can_look_ahead(pair)
    assert not can_look_ahead(pair)
    (said,) = caplog.messages
    assert said.startswith("rounds are not queued ahead: MLX_MAX_OPS_PER_BUFFER")
    assert f"fill {LEAST_BUFFERS} command buffers" in said


def test_elsewhere_no_limit_counts(monkeypatch):
    monkeypatch.setenv(OPERATIONS, "1000")
    assert can_look_ahead(reference_pair())


@pytest.mark.parametrize("limit", ["0", "1000"])
def test_decoders_follow(on_a_mac, monkeypatch, limit):
    made = []
    init = pipeline.RoundPipeline.__init__

    def recorded(self, *arrays, look_ahead, **options):
        made.append(look_ahead)
        init(self, *arrays, look_ahead=look_ahead, **options)

    monkeypatch.setattr(pipeline.RoundPipeline, "__init__", recorded)
    monkeypatch.setenv(OPERATIONS, limit)
    pair = reference_pair()
    next(
        generate_tokens(
            pair, [[2, 5]], max_tokens=1, num_draft_tokens=1, exactness="fast"
        )
    )
    make_batch_decoder(pair, num_draft_tokens=1)
    assert made == [limit == "0"] * 2
