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
from mlx_gemma_mtp.matmuls.decide import blame, decide
from mlx_gemma_mtp.matmuls.kept import Kept
from tests.matmuls.matrices import EIGHT_BIT, LARGE, PLAIN, SMALL, StandIn
from tests.metal.run import run_on_cpu

SHAPES = {SMALL: 4, LARGE: 2, PLAIN: 1}
AFFINE = {SMALL: 4, LARGE: 2}
NO_MEMORY = "[malloc] Unable to allocate 2818572288 bytes."
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
    monkeypatch.setattr(module, "_CLIFF_WINDOW_S", 0.0)
    monkeypatch.setattr(module, "_MOST_BYTES", 200_000)
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
    found: dict[object, float] = {"own": 0.5}
    asked: list[tuple[Shape, int, int | None]] = []

    def product_s(self, shape, num_rows, columns, window_s):
        asked.append((shape, num_rows, columns))
        return 1.0 if columns is None else found.get(num_rows, found["own"])

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
    """Where it was timed, for quantized matrices: MLX reads others once itself."""
    on(architecture)
    found = decide({**SHAPES, UNKNOWN: 3}, folder=tmp_path)
    assert found == Choices(dict.fromkeys(AFFINE, Choice(first_row=2)))
    assert not Kept(tmp_path).is_decided(PLAIN)
    assert {shape for shape, _, _ in times["asked"]} == {LARGE}  # most of the bytes
    assert {(m, r) for _, m, r in times["asked"]} == {
        (m, r) for m in range(2, MAX_ROWS + 1) for r in (None, Choice().columns[m - 1])
    }
    kernel.calls.clear()
    times["asked"].clear()
    assert decide(SHAPES, folder=tmp_path) == found
    assert kernel.calls == []
    assert times["asked"] == []


def test_the_check_is_of_two_forms_in_a_process(on, kernel, times, tmp_path):
    on(M1)
    third = Shape(40, 128, Form(8, 64, mx.bfloat16))
    shapes = {LARGE: 9, SMALL: 1, EIGHT_BIT: 1, third: 2}
    found = decide(shapes, folder=tmp_path)
    assert set(found.by_shape) == {LARGE, SMALL, third}
    assert {shape for shape, _, _ in times["asked"]} == {LARGE, third}
    assert not Kept(tmp_path).is_decided(EIGHT_BIT)
    assert set(decide(shapes, folder=tmp_path).by_shape) == set(shapes)


def test_only_the_form_that_is_faster_is_taken(on, kernel, monkeypatch, tmp_path):
    on(M1)

    def product_s(self, shape, num_rows, columns, window_s):
        return 1.0 if columns is None else 0.5 if shape.form == SMALL.form else 3.0

    monkeypatch.setattr(Products, "product_s", product_s)
    found = decide({LARGE: 9, EIGHT_BIT: 3}, folder=tmp_path)
    assert set(found.by_shape) == {LARGE}
    assert Kept(tmp_path).is_decided(EIGHT_BIT)


def test_the_check_really_times(on, kernel, tmp_path):
    on(M1)
    decide(SHAPES, folder=tmp_path)  # whatever it finds
    assert all(Kept(tmp_path).is_decided(shape) for shape in AFFINE)


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


@pytest.mark.parametrize("num_rows", [3, 2, 4, 6, 7, 8, 9])
def test_a_kernel_that_is_slower_for_some_rows_is_not_taken(
    num_rows, on, kernel, times, tmp_path
):
    on(M1)
    times[num_rows] = 0.98 if num_rows == 3 else 1.01
    assert decide(SHAPES, folder=tmp_path) == STOCK
    kept = Kept(tmp_path)
    assert all(kept.is_decided(shape) for shape in AFFINE)
    assert not any(kept.is_bad(shape) for shape in SHAPES)


@pytest.mark.parametrize("num_rows", range(2, MAX_ROWS + 1))
def test_a_kernel_that_is_wrong_for_some_rows_is_bad(
    num_rows, on, kernel, times, tmp_path, caplog
):
    on(M1)
    kernel.change = lambda y, form, m, r: y * 2 if m == num_rows else y
    with caplog.at_level(logging.WARNING, "mlx_gemma_mtp"):
        assert decide(SHAPES, folder=tmp_path) == STOCK
    assert all(Kept(tmp_path).is_bad(shape) for shape in AFFINE)
    assert not Kept(tmp_path).is_decided(PLAIN)
    (message,) = caplog.messages
    assert message.endswith(f"slower: wrong numbers for {num_rows} rows")
    assert times["asked"] == []


def test_a_kernel_that_raises_in_the_check_is_bad(on, kernel, tmp_path, caplog):
    on(M1)

    def fails(*_):
        raise RuntimeError("no\nsuch library")

    kernel.fails = fails
    with caplog.at_level(logging.WARNING, "mlx_gemma_mtp"):
        assert decide(SHAPES, folder=tmp_path) == STOCK
    assert all(Kept(tmp_path).is_bad(shape) for shape in AFFINE)
    (message,) = caplog.messages
    assert message.endswith("RuntimeError: no such library")


def test_a_kernel_that_raises_while_it_is_timed_is_bad(
    on, kernel, monkeypatch, tmp_path
):
    on(M1)

    def product_s(self, shape, num_rows, columns, window_s):
        raise RuntimeError("no such pipeline")

    monkeypatch.setattr(Products, "product_s", product_s)
    assert decide({SMALL: 1}, folder=tmp_path) == STOCK
    assert Kept(tmp_path).is_bad(SMALL)


# ---------------------------------------------------------------------- short memory


@pytest.mark.parametrize("place", ["prepare", "is_right", "product_s"])
@pytest.mark.parametrize("chip", [M1, M5])
def test_short_memory_leaves_it_to_mlx_for_a_while(
    place, chip, on, kernel, times, monkeypatch, tmp_path, caplog
):
    on(chip)
    if chip == M5:
        Kept(tmp_path).keep(SMALL, Choice())

    def fails(self, *_):
        raise RuntimeError(NO_MEMORY)

    with monkeypatch.context() as patch, caplog.at_level("INFO", "mlx_gemma_mtp"):
        patch.setattr(Products, place, fails)
        is_free = place == "product_s" and chip == M5  # nothing is timed there
        assert bool(decide({SMALL: 1}, folder=tmp_path)) == is_free
    assert not Kept(tmp_path).is_bad(SMALL)
    assert all(record.levelname == "INFO" for record in caplog.records)
    assert bool(caplog.messages) != is_free
    assert decide({SMALL: 1}, folder=tmp_path) == Choices({SMALL: Choice()})


@pytest.mark.parametrize(
    "message",
    [
        NO_MEMORY,
        "[metal::malloc] Attempting to allocate 8 bytes which is greater than the "
        "maximum allowed buffer size of 4 bytes.",
        "[metal::malloc] Resource limit (499000) exceeded.",
        "[METAL] Command buffer execution failed: Insufficient Memory (00000008)",
        "[METAL] Command buffer execution failed: Impacting Interactivity (0000000e)",
        "[METAL] Command buffer execution failed: Caused GPU Timeout Error (00000002)",
        "[METAL] Discarded (victim of GPU error/recovery) (00000005)",
    ],
)
def test_what_tells_nothing_of_a_kernel_is_not_its_fault(message, on, kernel, tmp_path):
    on(M5)
    Kept(tmp_path).keep(SMALL, Choice())

    def fails(*_):
        raise RuntimeError(message)

    kernel.fails = fails
    assert decide({SMALL: 1}, folder=tmp_path) == STOCK
    assert not Kept(tmp_path).is_bad(SMALL)


# ------------------------------------------------------------------------ what is kept


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
    found = decide({**SHAPES, EIGHT_BIT: 1}, folder=tmp_path)
    assert found == Choices({SMALL: Choice(1), EIGHT_BIT: Choice(2)})
    assert {shape for shape, _, _ in times["asked"]} == {EIGHT_BIT}


@pytest.mark.parametrize("first_row", [1, 2])
def test_every_kernel_of_a_round_runs_alone_first(first_row, on, kernel, tmp_path):
    on(M5)
    columns = (2, 2, 3, 3, 4, 4, 3, 3, 3)
    Kept(tmp_path).keep(SMALL, Choice(first_row, columns))
    Kept(tmp_path).keep(LARGE, Choice(first_row, columns))
    Kept(tmp_path).keep(PLAIN, Choice(first_row))
    decide(SHAPES, folder=tmp_path)
    rows = range(first_row, MAX_ROWS + 1)
    expected = [
        (shape.form, m, choice[m - 1])
        for shape, choice in ((SMALL, columns), (PLAIN, Choice().columns))
        for m in rows
    ]
    assert sorted(map(str, kernel.calls)) == sorted(map(str, expected))
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


@pytest.mark.parametrize("num_rows", range(1, MAX_ROWS + 1))
@pytest.mark.parametrize("shape", [SMALL, EIGHT_BIT, PLAIN], ids=str)
def test_a_kernel_that_is_wrong_alone_is_bad(
    shape, num_rows, on, kernel, tmp_path, caplog
):
    """Far off, or in one bit."""
    on(M5)
    other = LARGE if shape.form != LARGE.form else EIGHT_BIT
    for off in (lambda y: y * 2, lambda y: (y.view(mx.uint16) ^ 1).view(y.dtype)):
        kept = Kept(tmp_path / str(off))
        kept.keep(shape, Choice(1))
        kept.keep(other, Choice(1))
        module._ran.clear()

        def change(y, form, m, r, off=off):
            return off(y) if (form, m) == (shape.form, num_rows) else y

        kernel.change = change
        with caplog.at_level(logging.WARNING, "mlx_gemma_mtp"):
            found = decide({shape: 1, other: 1}, folder=tmp_path / str(off))
        assert set(found.by_shape) == {other}
        assert Kept(tmp_path / str(off)).is_bad(shape)
        assert "wrong numbers for" in caplog.messages[-1]


# ---------------------------------------------------------- behind a round that failed


def test_only_what_fails_again_is_blamed(on, kernel, tmp_path, caplog):
    on(M5)
    chosen = {SMALL: Choice(), LARGE: Choice(), PLAIN: Choice(1), EIGHT_BIT: Choice()}
    for shape, choice in chosen.items():
        Kept(tmp_path).keep(shape, choice)
    choices = decide(chosen, folder=tmp_path)
    assert set(choices.by_shape) == set(chosen)
    blame(choices, folder=tmp_path)  # the round had failed for want of memory
    assert not any(map(Kept(tmp_path).is_bad, chosen))

    def fails(form, num_rows, columns):
        if (form, num_rows) == (PLAIN.form, 1):
            raise RuntimeError("threadgroup is too large")

    kernel.fails = fails
    kernel.change = lambda y, form, m, r: y * (2 if (form.bits, m) == (8, 7) else 1)
    with caplog.at_level(logging.WARNING, "mlx_gemma_mtp"):
        blame(choices, folder=tmp_path)
    kept = Kept(tmp_path)
    assert {shape for shape in chosen if kept.is_bad(shape)} == {PLAIN, EIGHT_BIT}
    assert len(caplog.messages) == 2
    assert set(decide(chosen, folder=tmp_path).by_shape) == {SMALL, LARGE}


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
    plain = next(shape for shape in shapes if shape != SMALL)
    Kept(tmp_path).keep(plain, Choice(2))
    found = decide(shapes, folder=tmp_path)
    assert found == Choices(dict.fromkeys(shapes, Choice(2)))
    assert len(module._ran) == 4
