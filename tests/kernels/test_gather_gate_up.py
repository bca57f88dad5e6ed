"""Gates and values of chosen experts in one launch, from the Metal text on the CPU.

Compared                    with                                    tolerance
each row and expert         products and gelu in numpy              0: every bit
rows, schedules             each other                              0: every bit
the same                    mlx-lm's experts, quantized             bfloat16's

Run: python -m pytest tests/kernels/test_gather_gate_up.py
     python -m pytest -m slow tests/kernels/test_gather_gate_up.py    every form
"""

import sys
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import gemma4_text
from mlx_lm.models.switch_layers import SwitchGLU

if sys.platform == "darwin":
    pytest.skip("MLX runs kernels on Metal itself here", allow_module_level=True)

from mlx_gemma_mtp.kernels import common
from mlx_gemma_mtp.kernels.matmul import Form
from mlx_gemma_mtp.kernels.matmul_fused import default_gated_columns, gather_gate_up
from tests.kernels.launches import LANES, counted
from tests.kernels.matmul_mistakes import Mistake
from tests.kernels.products import FORMS, as_float32, same_bits
from tests.kernels.test_counts import check_loads, check_outputs_written_once
from tests.kernels.test_matmul_counts import exchanges
from tests.kernels.test_matmul_fused import (
    FEW_FORMS,
    PLAIN,
    gate_and_up,
    gated_bits,
    rows_of,
)
from tests.kernels.test_matmul_mistakes import by_name
from tests.metal.lint import lint
from tests.metal.run import MetalError, run_on_cpu, run_schedules
from tests.metal.text import metal_text
from tests.metal.tsan import run_under_tsan

E, N, K = 3, 19, 640  # outputs do not fill the last threadgroup
CHOSEN = np.array([[2, 0, 2], [1, 2, 0], [0, 0, 1]], np.uint32)  # some of them twice

by_few_forms = pytest.mark.parametrize("form", FEW_FORMS, ids=str)


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch):
    monkeypatch.setattr(common, "launch", run_on_cpu)


class Experts:
    """Gates and values of some experts, for one x.

    Args:
        form: How they are stored.
        M: Rows of x.
    """

    def __init__(self, form, M=3, N=N, K=K):
        pairs = [gate_and_up(form, M, N, K, seed=10 * e) for e in range(E)]
        x = pairs[0][0].x
        self.form = form
        self.products = [[p.but(x=x) for p in pair] for pair in pairs]
        self.x = rows_of(self.products[0][0], form)

    def matrices(self, which):
        """The arrays of all gates, 0, or values, 1."""
        arrays = zip(*(pair[which].matrix for pair in self.products), strict=True)
        return tuple(mx.stack(list(parts)) for parts in arrays)

    def run(self, chosen=CHOSEN, rows=slice(None)):
        found = gather_gate_up(
            self.x[rows],
            self.matrices(0),
            self.matrices(1),
            mx.array(chosen[rows]),
            form=self.form,
        )
        return as_float32(found)

    def bits(self, chosen=CHOSEN):
        """[M, C, N]: bit by bit."""
        every = [
            gated_bits(gate.bits, up.bits, self.form.dtype)
            for gate, up in self.products
        ]
        rows = np.arange(len(chosen))[:, None]
        return np.ascontiguousarray(np.stack(every, axis=1)[rows, chosen])


def check(form):
    experts = Experts(form)
    assert same_bits(experts.run(), experts.bits())


# -------------------------------------------------------------------------- bits


@by_few_forms
def test_bits(form):
    check(form)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_bits_of_every_form(form):
    check(form)


def test_rows_have_the_bits_of_one_row():
    experts = Experts(PLAIN)
    found = experts.run()
    for m in range(3):
        rows = slice(m, m + 1)
        assert same_bits(experts.run(rows=rows), found[rows])


@pytest.mark.parametrize("N", [1, 8])
def test_other_numbers_of_outputs(N):
    experts = Experts(PLAIN, N=N, K=128)
    assert same_bits(experts.run(), experts.bits())


def test_schedules(monkeypatch):
    monkeypatch.setattr(common, "launch", run_schedules)
    check(PLAIN)


def test_contraction_has_nothing_to_fuse(monkeypatch):
    monkeypatch.setattr(common, "launch", partial(run_on_cpu, contract=True))
    check(FEW_FORMS[1])


def test_it_is_what_mlx_lms_experts_compute():
    """Before the last matrix, which is left away here; leading dimensions stay."""
    glu: Any = SwitchGLU(64, 32, 4, activation=gemma4_text.GeGLU())
    for number, name in enumerate(("gate_proj", "up_proj")):
        layer = glu[name]
        layer.weight = mx.random.normal((4, 32, 64), key=mx.random.key(number)) / 8
        layer.set_dtype(mx.bfloat16)
        glu[name] = layer.to_quantized(group_size=32, bits=4)
    glu.down_proj = lambda x, *_, **__: x
    x = mx.random.normal((1, 3, 64), key=mx.random.key(2)).astype(mx.bfloat16)
    chosen = mx.array([[[2, 0], [1, 3], [3, 2]]], dtype=mx.uint32)
    want = as_float32(glu(x, chosen))
    gate, up = (
        (layer.weight, layer.scales, layer.biases)
        for layer in (glu.gate_proj, glu.up_proj)
    )
    y = gather_gate_up(x, gate, up, chosen, form=Form(4, 32, mx.bfloat16))
    assert (y.shape, y.dtype) == ((1, 3, 2, 32), mx.bfloat16)
    assert (np.abs(as_float32(y) - want) <= 0.03 * np.abs(want).max()).all()


# -------------------------------------------------------------------------- text


def looked_at(look, monkeypatch, form):
    """What a function says of a launch, which is not run."""
    answers = []

    def launch(kernel, inputs, **options):
        answers.append(look(kernel, inputs, **options))
        pairs = zip(options["output_shapes"], options["output_dtypes"], strict=True)
        return [mx.zeros(shape, dtype=dtype) for shape, dtype in pairs]

    monkeypatch.setattr(common, "launch", launch)
    Experts(form).run()
    return answers[0]


@by_few_forms
def test_lint(form, monkeypatch):
    assert lint(looked_at(metal_text, monkeypatch, form)) == []


@pytest.mark.tsan
@by_few_forms
def test_no_races(form, monkeypatch):
    assert looked_at(run_under_tsan, monkeypatch, form) == []


def test_counts():
    """Of the chosen matrices every byte once for each row that has chosen them."""
    N, K, num_chosen = 16, 512, 2  # whole threadgroups and steps
    experts = Experts(PLAIN, M=2, N=N, K=K)
    chosen = mx.array([[2, 1], [1, 2]], dtype=mx.uint32)  # the first by nobody
    (counts,) = counted(
        gather_gate_up,
        experts.x,
        experts.matrices(0),
        experts.matrices(1),
        mx.array(chosen),
        form=PLAIN,
    )
    pairs, of_one = 2 * num_chosen, N * K // 2  # bytes of 4 bits
    for name in ("w", "w1"):
        loads = counts.loads[name]
        assert loads.by_width == {4: pairs * of_one // 4}
        assert loads.unique_bytes == 2 * of_one
    R = default_gated_columns(1)
    assert counts.loads["x"].by_width == {16: pairs * N // R * K // 8}
    simdgroups = pairs * N // R
    check_loads(counts, "experts", simdgroups * LANES, unique=pairs)
    check_outputs_written_once(counts, "y")
    calls = exchanges(2 * R) + 1  # the gate's partner
    assert counts.calls == {"simd_shuffle_xor": calls * simdgroups * LANES}
    weights = 2 * pairs * N * K
    assert counts.operations["fma"] == 2 * weights + 2 * weights // 8


# ---------------------------------------------------------------------- mistakes

WRONG = (
    Mistake("the first expert for all", "uint(experts[pair])", "uint(experts[0])"),
    Mistake("experts by row", "uint(experts[pair])", "uint(experts[row])"),
    Mistake("every pair with the first row", "x + 0u * chunks + row", "x + 0u * row"),
    Mistake(
        "scales of the first expert",
        "(expert * outputs + base) * groups",
        "base * groups",
    ),
    Mistake(
        "weights of the first expert",
        "(expert * outputs + base) * chunks",
        "base * chunks",
    ),
    Mistake("rows of pairs", "pair / uint(CHOSEN)", "pair % uint(CHOSEN)"),
    Mistake("results of the first pair", "y[pair * outputs + n]", "y[n]"),
)
STOPPING = (
    Mistake(
        "groups that end with a row",
        "(outputs + 7u) / 8u",
        "outputs / 8u",
        r"memory fault|written up to",
    ),
)


def mistaken(mistake, launch, monkeypatch):
    monkeypatch.setattr(
        common, "launch", lambda kernel, *a, **k: launch(mistake.of(kernel), *a, **k)
    )
    return Experts(PLAIN, K=128)


@by_name(WRONG, most=3)
def test_bits_are_wrong(mistake, monkeypatch):
    experts = mistaken(mistake, run_on_cpu, monkeypatch)
    assert not same_bits(experts.run(), experts.bits())


@by_name(STOPPING)
def test_the_launch_stops(mistake, monkeypatch):
    experts = mistaken(mistake, run_schedules, monkeypatch)
    with pytest.raises(MetalError, match=mistake.error):
        experts.run()
