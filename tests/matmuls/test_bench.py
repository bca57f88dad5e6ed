"""Products of this machine: chains, copies, checked numbers.

Run: python -m pytest tests/matmuls/test_bench.py
"""

from __future__ import annotations

import sys
from functools import partial
from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest

from mlx_gemma_mtp.kernels import common, matmul
from mlx_gemma_mtp.matmuls import bench
from mlx_gemma_mtp.matmuls.bench import Bench, Products, _Matrix
from mlx_gemma_mtp.matmuls.choices import STOCK, Choice, Choices
from mlx_gemma_mtp.matmuls.tuner import tune
from tests.matmuls.matrices import EIGHT_BIT, LARGE, PLAIN, SMALL, StandIn
from tests.metal.run import run_on_cpu

ALL = (SMALL, LARGE, EIGHT_BIT, PLAIN)
not_on_macs = pytest.mark.skipif(
    sys.platform == "darwin", reason="the harness is not for Macs"
)


@pytest.fixture
def kernel(monkeypatch):
    """Plain operations in the kernel's place."""
    stand_in = StandIn()
    monkeypatch.setattr(matmul, "multiply", stand_in)
    return stand_in


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(bench, "_EMPTY_S", 0.0)
    monkeypatch.setattr(bench, "_CHAIN_S", 1e-4)


# ------------------------------------------------------------------------- the matrices


@pytest.mark.parametrize("shape", ALL, ids=str)
def test_the_truth_is_the_product_in_float64(shape):
    matrix = _Matrix(shape, 1)
    weight, *scales = matrix.copies[0]
    assert weight.shape[0] == shape.num_outputs
    if scales:
        bits, group_size = shape.form.bits, shape.form.group_size
        words = np.array(weight).view(np.uint32)
        places = np.arange(32 // bits, dtype=np.uint32) * bits
        levels = (words[..., None] >> places) & (2**bits - 1)
        levels = levels.reshape(shape.num_outputs, -1, group_size).astype(np.float64)
        step, bias = (np.array(a.astype(mx.float32)).astype(np.float64) for a in scales)
        exact = levels * step[..., None] + bias[..., None]
        exact = exact.reshape(shape.num_outputs, -1)
        assert len(np.unique(levels)) == min(2**bits, levels.size)
    else:
        exact = np.array(weight.astype(mx.float32)).astype(np.float64)
    inputs = np.array(matrix.inputs.astype(mx.float32)).astype(np.float64)
    truth = inputs @ exact.T
    assert np.abs(np.array(matrix.truth) - truth).max() < 1e-5
    assert 0.8 < truth.std() < 1.25


def test_copies_are_all_there_and_differ():
    matrix = _Matrix(LARGE, 10 * LARGE.num_bytes - 1)
    assert len(matrix.copies) == 10
    for first, second in pairwise(matrix.copies):
        assert [a.shape for a in first] == [a.shape for a in second]
        assert not mx.array_equal(first[0], second[0])
    assert sum(a.nbytes for copy in matrix.copies for a in copy) >= 9 * LARGE.num_bytes


def test_a_large_matrix_is_held_once():
    """A head has gigabytes, and the model is there too."""
    band = mx.random.normal((bench._BAND, 1024)).astype(mx.bfloat16)
    mx.eval(band)
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    matrix = bench.filled(band, 5000)
    assert mx.get_peak_memory() - before < 1.1 * matrix.nbytes
    assert mx.array_equal(matrix, mx.tile(band, (20, 1))[:5000])


def test_only_the_kernel_runs_in_what_checks_it(kernel, monkeypatch):
    """What MLX itself has to make or to multiply is there before."""
    products = Products(copy_bytes=1)
    products.prepare(SMALL)
    assert kernel.calls == []

    def fails(*_, **__):
        raise RuntimeError("[malloc] Unable to allocate 8 bytes.")

    monkeypatch.setattr(bench, "filled", fails)
    monkeypatch.setattr(mx, "quantized_matmul", fails)
    assert products.is_right(SMALL, 3, 4)
    with pytest.raises(RuntimeError, match="allocate"):
        products.prepare(LARGE)


@pytest.mark.parametrize("shape", ALL, ids=str)
@pytest.mark.parametrize("num_rows", [1, 3])
def test_a_chain_depends_on_all_of_it(shape, num_rows):
    """Each product takes what the one before gave, and the next copy."""
    matrix = _Matrix(shape, 3 * shape.num_bytes)
    seen: list[mx.array] = []
    copies: list[mx.array] = []

    def product(x, copy):
        seen.append(x)
        copies.append(copy[0])
        return bench._product(x, copy, shape, None)

    x = matrix.chain(product, num_rows, 4)
    assert x.shape == (num_rows, shape.num_inputs)
    assert x.dtype == shape.form.dtype
    own = matrix.inputs[:num_rows]
    for given, copy in zip(seen, (0, 1, 2, 0), strict=True):
        assert mx.array_equal(given, own)
        y = bench._product(own, matrix.copies[copy], shape, None)
        repeats = -(-shape.num_inputs // shape.num_outputs)
        own = mx.tile(y, (1, repeats))[:, : shape.num_inputs]
    assert mx.array_equal(x, own)
    assert mx.abs(x).max() < 1e3  # neither grows nor shrinks away
    assert all(
        mx.array_equal(a, b) for a, b in zip(copies[:1], copies[3:], strict=True)
    )
    empty = matrix.no_product(own, matrix.copies[0])
    assert empty.shape == (num_rows, shape.num_outputs)


@pytest.mark.parametrize("shape", ALL, ids=str)
def test_numbers_of_a_long_chain_keep_their_size(shape):
    matrix = _Matrix(shape, 5 * shape.num_bytes)
    product = partial(bench._product, shape=shape, columns=None)
    x = matrix.chain(product, 3, 60).astype(mx.float32)
    size = float(np.sqrt(np.mean(np.array(x) ** 2)))
    assert 0.05 < size < 20


# ----------------------------------------------------------------------------- the time


def test_a_product_is_timed_by_mlx_and_by_the_kernel(kernel):
    products = Products(copy_bytes=3 * SMALL.num_bytes)
    assert products.product_s(SMALL, 3, None, 0.0) > 0
    assert kernel.calls == []
    assert products.product_s(SMALL, 3, 2, 0.0) > 0
    assert set(kernel.calls) == {(SMALL.form, 3, 2)}


def test_the_time_of_a_chain_without_products_is_taken_off(monkeypatch):
    taken = {"empty": 2e-6, "product": 5e-6}

    def window(chain, length, window_s):
        is_product = isinstance(chain.args[0], partial)
        return taken["product" if is_product else "empty"]

    monkeypatch.setattr(bench, "_window", window)
    found = Products(1).product_s(SMALL, 1, None, 0.4)
    assert found == pytest.approx(3e-6)
    taken["empty"] = 1.0
    assert 0 < Products(1).product_s(SMALL, 1, None, 0.4) < 1e-6


def test_chains_are_long_enough(monkeypatch):
    made: list[int] = []
    clock = iter(range(10**6))
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(clock) * 1e-3)

    def chain(length):
        made.append(length)
        return mx.zeros(1)

    monkeypatch.setattr(bench, "_CHAIN_S", 5e-3)
    # Every evaluation takes a millisecond here, whatever its length.
    monkeypatch.setattr(bench, "_MAX_CHAIN", 64)
    assert bench._length(chain) == 64
    assert made == [1, 1, 2, 4, 8, 16, 32]
    made.clear()
    assert bench._window(chain, 5, 0.019) == pytest.approx(1e-3 / 5)
    assert len(made) == 10  # two looks at the clock for each, in 20 ms


def test_another_shape_is_another_matrix(kernel):
    products = Products(copy_bytes=1)
    assert products.is_right(SMALL, 5, 4)
    assert products.is_right(LARGE, 5, 4)
    assert products.product_s(PLAIN, 1, None, 0.0) > 0
    assert products.is_right(SMALL, 3, 4)


# -------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize("shape", ALL, ids=str)
def test_right_numbers_are_right(shape, kernel):
    products = Products(copy_bytes=1)
    for num_rows, columns in ((5, 4), (9, 2), (1, 2), (9, 3)):
        assert products.is_right(shape, num_rows, columns)


WRONG = {
    "one number off": lambda y, *_: y + 0.5 * (mx.arange(y.size) == 7).reshape(y.shape),
    "all a little off": lambda y, *_: y * 1.03,
    "a number missing": lambda y, *_: y * (mx.arange(y.shape[1]) != y.shape[1] - 1),
    "rows exchanged": lambda y, *_: y[::-1],
    "not a number": lambda y, *_: y + mx.array(float("nan"), y.dtype),
    "endless": lambda y, *_: y + mx.array(float("inf"), y.dtype),
    "zeros": lambda y, *_: mx.zeros_like(y),
}


@pytest.mark.parametrize("shape", ALL, ids=str)
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_numbers_are_wrong(wrong, shape, kernel):
    kernel.change = lambda y, *pipeline: WRONG[wrong](y, *pipeline).astype(y.dtype)
    assert not Products(copy_bytes=1).is_right(shape, 3, 4)


@pytest.mark.parametrize("order", [((3, 4), (9, 2)), ((9, 2), (3, 4))])
def test_rows_with_other_bits_beside_others_are_wrong(order, kernel):
    def change(y, form, num_rows, columns):
        bits = y.view(mx.uint16) ^ mx.array(num_rows == 9, mx.uint16)
        return bits.view(y.dtype)

    kernel.change = change
    products = Products(copy_bytes=1)
    assert products.is_right(PLAIN, *order[0])
    assert not products.is_right(PLAIN, *order[1])


@not_on_macs
def test_the_kernel_itself_is_right(monkeypatch):
    monkeypatch.setattr(common, "launch", run_on_cpu)
    products = Products(copy_bytes=1)
    assert products.is_right(SMALL, 2, 4)
    assert products.is_right(SMALL, 3, 4)


# -------------------------------------------------------------------------- the machine


def test_the_tuner_takes_this_machine(kernel, monkeypatch):
    """All of it, with windows of no time."""
    passes: list[tuple[Choices, int, bool]] = []
    lines: list[str] = []
    monkeypatch.setattr("mlx_gemma_mtp.matmuls.windows.WINDOW_S", 0.0)
    monkeypatch.setattr("mlx_gemma_mtp.matmuls.windows.WARM_UP_S", 0.0)
    machine = Bench(lambda *a: passes.append(a), lambda: "", copy_bytes=1)
    shapes = {SMALL: 2}
    found = tune(shapes, machine, in_passes=shapes, budget_s=600, progress=lines.append)
    assert set(found.decided) == {SMALL}
    assert found.bad == {}
    assert {num_rows for _, num_rows, _ in passes} == set(range(1, 10))
    assert {(m, r) for _, m, r in kernel.calls} >= {(5, 4), (5, 2), (9, 2), (9, 3)}


def test_passes_run_until_the_window_is_over(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(clock) * 0.1)
    passes: list[tuple[Choices, int, bool]] = []
    machine = Bench(lambda *a: passes.append(a), lambda: "hot", copy_bytes=1)
    choices = Choices({SMALL: Choice()})
    assert machine.pass_s(choices, 3, 0.4) == pytest.approx(0.1)
    assert passes == [(choices, 3, False)] * 4
    assert machine.pass_s(STOCK, 1, 0.0, is_long=True) == pytest.approx(0.1)
    assert passes[4:] == [(STOCK, 1, True)]
    assert machine.disturbed() == "hot"
    assert machine.clock() < machine.clock()
