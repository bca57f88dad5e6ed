"""What a process decides before it traces anything.

Run: python -m pytest tests/matmuls/test_decide.py
"""

from __future__ import annotations

import logging
import sys

import mlx.core as mx
import pytest

from mlx_gemma_mtp.kernels import common, matmul
from mlx_gemma_mtp.kernels.matmul import DENSE, MAX_ROWS, Form
from mlx_gemma_mtp.matmuls import decide as module
from mlx_gemma_mtp.matmuls import kept as kept_module
from mlx_gemma_mtp.matmuls.bench import Products
from mlx_gemma_mtp.matmuls.choices import STOCK, Choice, Choices, Shape
from mlx_gemma_mtp.matmuls.decide import decide
from mlx_gemma_mtp.matmuls.kept import Kept
from tests.matmuls.matrices import EIGHT_BIT, LARGE, PLAIN, SMALL, StandIn
from tests.metal.run import run_on_cpu

SHAPES = {SMALL: 4, LARGE: 2, PLAIN: 1}
UNKNOWN = Shape(64, 100, Form(4, 64, mx.bfloat16))
M1, M2, M3, M5 = (f"applegpu_g{generation}s" for generation in (13, 14, 15, 17))
not_on_macs = pytest.mark.skipif(
    sys.platform == "darwin", reason="the harness is not for Macs"
)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    """Every test is a process on Metal that knows nothing."""
    monkeypatch.setattr(kept_module, "_known", {})
    monkeypatch.setattr(module, "_ran", set())
    monkeypatch.setattr(module, "_WINDOW_S", 0.0)
    monkeypatch.setattr(common, "backend", lambda: "metal")


@pytest.fixture
def on(monkeypatch):
    """Puts the process on a chip."""

    def put(architecture):
        info = {"architecture": architecture, "memory_size": 2**34}
        monkeypatch.setattr(mx, "device_info", lambda: info)

    return put


@pytest.fixture
def kernel(monkeypatch):
    """Plain operations in the kernel's place."""
    stand_in = StandIn()
    monkeypatch.setattr(matmul, "multiply", stand_in)
    return stand_in


@pytest.fixture
def times(monkeypatch):
    """What products take: MLX's 1, the kernel's what a test says."""
    found = {"own": 0.5}
    asked: list[tuple[Shape, int, int | None]] = []

    def product_s(self, shape, num_rows, columns, window_s):
        asked.append((shape, num_rows, columns))
        return 1.0 if columns is None else found["own"]

    monkeypatch.setattr(Products, "product_s", product_s)
    found["asked"] = asked  # type: ignore[assignment]
    return found


@pytest.mark.parametrize("backend", ["ops", "cuda"])
def test_mlx_multiplies_where_there_is_no_metal(
    backend, monkeypatch, on, kernel, tmp_path
):
    on(M1)
    monkeypatch.setattr(common, "backend", lambda: backend)
    Kept(tmp_path).keep(SMALL, Choice())
    assert decide(SHAPES, folder=tmp_path) == STOCK
    assert kernel.calls == []
    assert Kept(tmp_path).choices(SHAPES)  # it holds where there is Metal


def test_shapes_that_no_kernel_multiplies_are_mlx(on, kernel, tmp_path):
    on(M1)
    assert decide({UNKNOWN: 3}, folder=tmp_path) == STOCK
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("architecture", [M3, M5, "applegpu_g99z", "x86_64"])
def test_later_chips_are_mlx_until_tuned(architecture, on, kernel, tmp_path):
    on(architecture)
    assert decide(SHAPES, folder=tmp_path) == STOCK
    assert kernel.calls == []
    assert not Kept(tmp_path).is_decided(SMALL)


@pytest.mark.parametrize("architecture", [M1, M2])
def test_m1_and_m2_take_the_kernel_after_a_check(
    architecture, on, kernel, times, tmp_path
):
    on(architecture)
    found = decide({**SHAPES, UNKNOWN: 3}, folder=tmp_path)
    assert found == Choices(dict.fromkeys(SHAPES, Choice(first_row=2)))
    assert {shape for shape, _, _ in times["asked"]} == {LARGE}  # most of the bytes
    assert {(m, r) for _, m, r in times["asked"]} == {(3, None), (3, 4)}
    kernel.calls.clear()
    times["asked"].clear()
    assert decide(SHAPES, folder=tmp_path) == found
    assert kernel.calls == []
    assert times["asked"] == []


def test_the_check_looks_at_two_forms(on, kernel, times, tmp_path):
    on(M1)
    decide({LARGE: 9, SMALL: 1, EIGHT_BIT: 1}, folder=tmp_path)
    first_two = kernel.calls[:2]
    assert {form for form, _, _ in first_two} == {SMALL.form, EIGHT_BIT.form}


def test_the_check_really_times(on, kernel, monkeypatch, tmp_path):
    on(M1)
    monkeypatch.setattr(module, "_MOST_BYTES", 200_000)
    decide(SHAPES, folder=tmp_path)  # whatever it finds
    assert all(Kept(tmp_path).is_decided(shape) for shape in SHAPES)


def test_huge_matrices_are_not_timed_in_the_check(on, kernel, times, monkeypatch):
    on(M1)
    monkeypatch.setattr(module, "_MOST_BYTES", SMALL.num_bytes)
    decide({SMALL: 1, LARGE: 9}, folder=None)
    assert {shape for shape, _, _ in times["asked"]} == {SMALL}
    monkeypatch.setattr(kept_module, "_known", {})
    monkeypatch.setattr(module, "_MOST_BYTES", 1)
    times["asked"].clear()
    decide({SMALL: 1, LARGE: 9}, folder=None)
    assert {shape for shape, _, _ in times["asked"]} == {SMALL}


def test_a_kernel_that_is_not_faster_is_not_taken(on, kernel, times, tmp_path):
    on(M1)
    times["own"] = 0.98
    assert decide(SHAPES, folder=tmp_path) == STOCK
    kept = Kept(tmp_path)
    assert all(kept.is_decided(shape) for shape in SHAPES)
    assert not any(kept.is_bad(shape) for shape in SHAPES)


def test_a_kernel_that_is_wrong_is_bad(on, kernel, times, tmp_path, caplog):
    on(M1)
    kernel.change = lambda y, *_: y * 2
    with caplog.at_level(logging.WARNING, "mlx_gemma_mtp"):
        assert decide(SHAPES, folder=tmp_path) == STOCK
    assert all(Kept(tmp_path).is_bad(shape) for shape in SHAPES)
    assert len(caplog.messages) == 1
    assert "is wrong here, MLX's own takes its place" in caplog.text
    assert times["asked"] == []


def test_a_kernel_that_raises_in_the_check_is_bad(on, kernel, tmp_path, caplog):
    on(M1)

    def fails(*_):
        raise RuntimeError("no\nsuch library")

    kernel.fails = fails
    with caplog.at_level(logging.WARNING, "mlx_gemma_mtp"):
        assert decide(SHAPES, folder=tmp_path) == STOCK
    assert all(Kept(tmp_path).is_bad(shape) for shape in SHAPES)
    (message,) = caplog.messages
    assert message.endswith("RuntimeError: no such library")


def test_what_was_tuned_holds(on, kernel, tmp_path, caplog):
    on(M1)
    kept = Kept(tmp_path)
    kept.keep(SMALL, Choice(1))
    kept.keep(LARGE, None)
    kept.mark_bad([PLAIN], "raised")
    with caplog.at_level(logging.DEBUG, "mlx_gemma_mtp"):
        assert decide(SHAPES, folder=tmp_path) == Choices({SMALL: Choice(1)})
    assert caplog.messages == []


def test_only_new_shapes_are_checked(on, kernel, times, tmp_path):
    on(M1)
    Kept(tmp_path).keep(LARGE, None)
    Kept(tmp_path).keep(SMALL, Choice(1))
    found = decide(SHAPES, folder=tmp_path)
    assert found == Choices({SMALL: Choice(1), PLAIN: Choice(2)})
    assert {shape for shape, _, _ in times["asked"]} == {PLAIN}


@pytest.mark.parametrize("first_row", [1, 2])
def test_every_kernel_of_a_round_runs_alone_first(first_row, on, kernel, tmp_path):
    on(M5)
    columns = (2, 2, 3, 3, 4, 4, 3, 3, 3)
    Kept(tmp_path).keep(SMALL, Choice(first_row, columns))
    Kept(tmp_path).keep(LARGE, Choice(first_row, columns))
    Kept(tmp_path).keep(PLAIN, Choice(first_row))
    decide(SHAPES, folder=tmp_path)
    rows = range(first_row, MAX_ROWS + 1)
    assert sorted(str(c) for c in kernel.calls) == sorted(
        str((shape.form, m, choice[m - 1]))
        for shape, choice in ((SMALL, columns), (PLAIN, Choice().columns))
        for m in rows
    )
    kernel.calls.clear()
    decide(SHAPES, folder=tmp_path)  # once in a process
    assert kernel.calls == []


def test_a_kernel_that_raises_alone_is_bad_with_its_shapes(
    on, kernel, tmp_path, caplog
):
    on(M5)
    other = (4, 2, 2, 2, 2, 2, 2, 2, 2)
    alike = Shape(70, 128, SMALL.form)
    chosen = {SMALL: Choice(), alike: Choice(1), LARGE: Choice(2, other)}
    for shape, choice in (chosen | {PLAIN: Choice()}).items():
        Kept(tmp_path).keep(shape, choice)

    def fails(form, num_rows, columns):
        if (form.bits, num_rows, columns) == (4, 6, 4):
            raise RuntimeError("threadgroup is too large")

    kernel.fails = fails
    with caplog.at_level(logging.WARNING, "mlx_gemma_mtp"):
        found = decide({**SHAPES, alike: 1}, folder=tmp_path)
    assert set(found.by_shape) == {LARGE, PLAIN}
    (message,) = caplog.messages
    assert "'matmul_4bit_g64_bfloat16_6x4' does not run here" in message
    assert Kept(tmp_path).is_bad(SMALL)
    assert Kept(tmp_path).is_bad(alike)


def test_nothing_on_disk_is_decided_once_in_a_process(on, kernel, times):
    on(M1)
    found = decide(SHAPES, folder=None)
    assert found
    times["asked"].clear()
    assert decide(SHAPES, folder=None) == found
    assert times["asked"] == []


@not_on_macs
def test_on_metals_own_text(on, times, tmp_path, monkeypatch):
    on(M1)
    monkeypatch.setattr(common, "launch", run_on_cpu)
    monkeypatch.setattr(module, "MAX_ROWS", 3)  # each takes seconds to compile
    shapes = {SMALL: 4, Shape(40, 64, Form(DENSE, 0, mx.bfloat16)): 1}
    found = decide(shapes, folder=tmp_path)
    assert found == Choices(dict.fromkeys(shapes, Choice(2)))
    assert len(module._ran) == 4
