"""What multiplies in a pair: decided once, kept apart, given up where it fails.

Run: python -m pytest tests/pair/test_choices.py
"""

import gc
from weakref import ref

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_gemma_mtp.drafting.speed_model import MLX_ALONE
from mlx_gemma_mtp.engine.decoder import Decoder
from mlx_gemma_mtp.errors import KernelError
from mlx_gemma_mtp.kernels import common
from mlx_gemma_mtp.matmuls.choices import STOCK, Choice, Choices
from mlx_gemma_mtp.matmuls.kept import Kept as Decisions
from mlx_gemma_mtp.pair import pair as pair_module
from mlx_gemma_mtp.pair.pair import Pair, pair_of
from mlx_gemma_mtp.pair.planning import verdict_of
from tests.engine.test_few_rows import every_matrix, half_pair


@pytest.fixture
def decided(monkeypatch, tmp_path):
    """Everything is the kernel's where it is asked for; what was asked."""
    asked = []

    def decide(shapes, sizes, *, folder):
        asked.append(shapes)
        return Choices({shape: Choice() for shape in shapes})

    monkeypatch.setattr(pair_module, "decide", decide)
    monkeypatch.setattr(pair_module, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(pair_module, "blame", lambda *_, **__: None)
    return asked


def test_on_the_cpu_mlx_multiplies():
    pair = half_pair("12b")
    assert pair.rounds.choices == STOCK
    assert pair.kept.matmuls == MLX_ALONE


def test_is_decided_once_for_the_same_weights(decided):
    pair = half_pair("12b")
    shapes = decided[-1]
    decided.clear()
    assert pair.rounds.choices == every_matrix(pair, first_row=2)
    assert pair.kept.matmuls.has_kernel
    pair.refresh()
    assert not decided
    again = pair_of(pair.target)
    assert len(decided) == 1  # a model that carries nothing gets a pair of its own
    assert pair_of(pair.target).rounds.choices == again.rounds.choices
    assert len(decided) == 1
    pair.target.layers[0].self_attn.q_proj = nn.Linear(96, 64)
    pair.refresh()
    assert len(decided) == 2
    assert decided[1] != shapes


def test_statistics_say_what_the_kernel_multiplies(decided):
    pair = half_pair("12b")
    named = {str(shape): 2 for shape in decided[-1]}
    assert Decoder(pair.rounds, num_draft_tokens=0).stats.matmuls == named
    assert "96x256 4bit_g32_bfloat16" in named


def test_what_was_learnt_is_kept_apart(decided, monkeypatch):
    pair = half_pair("12b")
    learnt = pair.calibration
    learnt.give_up_probe(1)
    pair.kept.give_up_kernel()
    assert pair.calibration is not learnt
    assert not pair.calibration.has_given_up_probe(1)


def test_kernel_that_failed_is_blamed_and_gives_way(decided, tmp_path, monkeypatch):
    pair = half_pair("12b")
    choices, blamed = pair.rounds.choices, []
    monkeypatch.setattr(
        pair_module,
        "blame",
        lambda choices, sizes, *, folder: blamed.append((choices, folder)),
    )
    with pytest.raises(KernelError, match="no such pipeline"), pair.rounds.watched():
        raise ValueError("no such pipeline")
    assert blamed == [(choices, tmp_path)]
    assert pair.rounds.choices == STOCK
    assert pair.kept.matmuls == MLX_ALONE
    decided.clear()
    pair.refresh()
    assert pair.rounds.choices == STOCK
    assert not decided


def test_another_device_is_decided_anew(decided, monkeypatch):
    pair = half_pair("12b")
    learnt = pair.calibration
    decided.clear()
    monkeypatch.setattr(pair_module, "backend", lambda: "metal")
    pair.refresh()
    assert len(decided) == 1
    assert pair.calibration is learnt  # the choices are the same
    monkeypatch.setattr(pair_module, "backend", lambda: "ops")
    monkeypatch.setattr(pair_module, "decide", lambda *_, **__: STOCK)
    pair.refresh()
    assert pair.rounds.choices == STOCK
    assert pair.calibration is not learnt


def test_kernel_text_is_part_of_what_was_learnt(decided, monkeypatch):
    pair = half_pair("12b")
    pair.calibration.give_up_probe(1)
    pair.calibration.save()
    keys = []

    def learnt_key(_, *, matmuls):
        keys.append(matmuls)
        return {}

    monkeypatch.setattr(pair_module, "learnt_key", learnt_key)
    for digest in ("a", "b"):
        monkeypatch.setattr(pair_module, "kernels_digest", lambda text=digest: text)
        pair.kept.calibration = None
        assert pair.calibration
    assert keys[0] != keys[1]


def test_few_of_many_matrices_are_no_new_prior(decided, monkeypatch):
    pair = half_pair("12b")
    shapes = sorted(decided[-1], key=lambda shape: decided[-1][shape] * shape.num_bytes)
    for chosen, has_kernel in ((shapes[:1], False), (shapes[1:], True)):
        found = Choices({shape: Choice() for shape in chosen})
        monkeypatch.setattr(pair_module, "decide", lambda *_, found=found, **__: found)
        pair.kept.choices = None
        pair.refresh()
        assert pair.kept.matmuls.has_kernel == has_kernel


@pytest.mark.usefixtures("plain_graphs")
def test_kernel_that_fails_in_the_probe_gives_way(decided, monkeypatch):
    pair = half_pair("12b")

    def fail(*_, **__):
        raise RuntimeError("too many threads")

    monkeypatch.setattr(common, "launch", fail)
    with pytest.raises(KernelError, match="too many threads"):
        verdict_of(pair, 1, budget_s=20)
    assert pair.kept.choices == pair.rounds.choices == STOCK


def test_measured_passes_are_the_prior(decided, tmp_path, monkeypatch):
    shapes = set(every_matrix(half_pair("12b")).by_shape)
    kept = Decisions(tmp_path)
    for shape in shapes:
        kept.keep(shape, Choice())
    kept.keep_passes(shapes, {1: 0.01, 3: 0.02, 5: 0.03, 9: 0.05})
    monkeypatch.setattr(
        pair_module, "decide", lambda s, sizes, *, folder: kept.choices(s)
    )
    pair = half_pair("12b")
    assert pair.kept.matmuls.pass_seconds == {1: 0.01, 3: 0.02, 5: 0.03, 9: 0.05}


def test_nothing_keeps_the_target(decided):
    pair = half_pair("12b")
    assert pair.calibration
    target = ref(pair.target)
    kept = pair.kept
    del pair
    gc.collect()
    assert target() is None
    assert kept.choices


def test_variable_switches_kernels_off(monkeypatch):
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    assert common.backend() == common.gpu() == "metal"
    monkeypatch.setenv("MLX_GEMMA_MTP_KERNELS", " Off")
    assert (common.backend(), common.gpu()) == ("ops", "metal")
    monkeypatch.setenv("MLX_GEMMA_MTP_KERNELS", "on")
    assert common.backend() == "metal"


def test_pair_without_a_drafter_decides_too(decided):
    made = half_pair("12b")
    decided.clear()
    pair = Pair(made.target)
    assert pair.rounds.choices
