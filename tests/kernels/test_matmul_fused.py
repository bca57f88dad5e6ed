"""A few rows times several matrices in one launch, from the Metal text on the CPU.

Compared                    with                                    tolerance
gate_up, gate_by            products and gelu in numpy              0: every bit
the same                    MLX's gelu_approx of the products       a last place, rare
qkv                         a launch for each matrix                0: every bit
M = 1 to 9, R, schedules,
contraction                 each other                              0: every bit

Run: python -m pytest tests/kernels/test_matmul_fused.py
     python -m pytest -m slow tests/kernels/test_matmul_fused.py    every form
"""

import sys
from functools import partial

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx import nn

if sys.platform == "darwin":
    pytest.skip("MLX runs kernels on Metal itself here", allow_module_level=True)

from mlx_gemma_mtp.kernels import common, matmul
from mlx_gemma_mtp.kernels.matmul import COLUMNS, DENSE, MAX_ROWS, MAX_SUMS, Form
from mlx_gemma_mtp.kernels.matmul_fused import (
    GATED_COLUMNS,
    default_gated_columns,
    gate_by,
    gate_up,
    qkv,
)
from tests.kernels import matmul_mistakes as mistakes
from tests.kernels.launches import LANES, counted
from tests.kernels.products import (
    FORMS,
    as_float32,
    random_product,
    rounded,
    same_bits,
)
from tests.kernels.test_counts import check_loads, check_outputs_written_once
from tests.kernels.test_matmul_counts import exchanges
from tests.kernels.test_matmul_mistakes import by_name
from tests.metal.lint import lint
from tests.metal.run import MetalError, run_on_cpu, run_schedules
from tests.metal.text import metal_text
from tests.metal.tsan import run_under_tsan

PLAIN = Form(4, 64, mx.bfloat16)
FEW_FORMS = [PLAIN, Form(8, 32, mx.float16), Form(DENSE, 0, mx.bfloat16)]
SIZES = (19, 5, 33)  # outputs of query, key and value: none fills its threadgroups
GATED_TILES = [
    (rows, columns)
    for rows in range(1, MAX_ROWS + 1)
    for columns in GATED_COLUMNS
    if rows * 2 * columns <= MAX_SUMS
]
by_form = pytest.mark.parametrize("form", FORMS, ids=str)
by_few_forms = pytest.mark.parametrize("form", FEW_FORMS, ids=str)


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch):
    monkeypatch.setattr(common, "launch", run_on_cpu)


def products_of(form, M, sizes, K=640, seed=0):
    """Products of one x by matrices of so many outputs."""
    first, *others = (
        random_product(form, M, size, K, seed=seed + i) for i, size in enumerate(sizes)
    )
    return [first, *(other.but(x=first.x) for other in others)]


def gate_and_up(form, M, N, K=640, seed=0):
    """Products of which the gate's are near 1, where gelu bends."""
    gate, up = products_of(form, M, (N, N), K, seed)
    size = max(np.abs(gate.bits).max(), 1)
    power = np.float32(2.0 ** (2 - np.round(np.log2(size))))

    def smaller(values):
        return rounded(values * power, form.dtype)

    if form.bits == DENSE:
        return gate.but(weight=smaller(gate.weight)), up
    return gate.but(scales=smaller(gate.scales), biases=smaller(gate.biases)), up


def rows_of(product, form):
    return mx.array(product.x).astype(form.dtype)


def run_gated(products, form, **options):
    gate, up = (tuple(p.matrix) for p in products)
    return as_float32(
        gate_up(rows_of(products[0], form), gate, up, form=form, **options)
    )


def values_of(form, M, N):
    """What a gate lets through: as its own product would be."""
    values = mx.random.normal((M, N), key=mx.random.key(M))
    return values.astype(form.dtype)


def run_gated_by(gate, form, **options):
    x, M, N = rows_of(gate, form), len(gate.x), len(gate.weight)
    values = values_of(form, MAX_ROWS, N)[:M]
    return as_float32(gate_by(x, tuple(gate.matrix), values, form=form, **options))


def run_apart(products, form, **options):
    matrices = [tuple(p.matrix) for p in products]
    found = qkv(rows_of(products[0], form), matrices, form=form, **options)
    return [as_float32(y) for y in found]


def gated_bits(gate, up, dtype):
    """Gelu of a product times the other, float32, as its comment says."""

    def of_type(values):
        return rounded(np.asarray(values, np.float32), dtype)

    with np.errstate(all="ignore"):
        cube = of_type(gate.astype(np.float64) ** 3)
        share = of_type(of_type(0.044715) * cube)
        angle = of_type(of_type(np.sqrt(2 / np.pi)) * of_type(gate + share))
        bend = of_type(np.tanh(angle.astype(np.float64)))
        gelu = of_type(of_type(np.float32(0.5) * gate) * of_type(1 + bend))
        return of_type(gelu * up)


def check_gated(form, M, N, K=640, seed=0, **options):
    products = gate_and_up(form, M, N, K, seed)
    y = run_gated(products, form, **options)
    gate, up = products
    want = gated_bits(gate.bits, up.bits, form.dtype)
    assert same_bits(y, want)


def check_gated_by(form, M, N, K=640, seed=0, **options):
    gate, _ = gate_and_up(form, M, N, K, seed)
    y = run_gated_by(gate, form, **options)
    values = as_float32(values_of(form, MAX_ROWS, N)[:M])
    assert same_bits(y, gated_bits(gate.bits, values, form.dtype))


def check_apart(form, M, sizes=SIZES, K=640, seed=0, **options):
    products = products_of(form, M, sizes, K, seed)
    found = run_apart(products, form, **options)
    for y, product in zip(found, products, strict=True):
        assert same_bits(y, product.bits)


# -------------------------------------------------------------------------- bits


@by_few_forms
def test_gate_up(form):
    check_gated(form, 5, 24)


@by_few_forms
def test_gate_by(form):
    check_gated_by(form, 5, 24)


@by_few_forms
def test_qkv(form):
    number = FEW_FORMS.index(form)
    sizes = SIZES if number else SIZES[:2]
    check_apart(form, 5, sizes, num_columns=COLUMNS[number])


@pytest.mark.slow
@by_form
def test_bits_of_every_text(form):
    for number, (rows, columns) in enumerate(GATED_TILES):
        check_gated(form, rows, 24, seed=number, num_columns=columns)
        check_gated_by(form, rows, 24, seed=number, num_columns=2 * columns)
        for sizes in (SIZES, SIZES[1:]):
            check_apart(form, rows, sizes, seed=number)


@by_few_forms
def test_gate_up_is_as_mlx_has_it(form):
    """On a CPU, whose functions differ in a last place of float32."""
    products = gate_and_up(form, 5, 16)
    gate, up = (
        mx.array(np.ascontiguousarray(p.bits)).astype(form.dtype) for p in products
    )
    want = as_float32(nn.gelu_approx(gate) * up)
    y = run_gated(products, form)
    assert (y != want).mean() < 0.02
    assert (np.abs(y - want) <= mx.finfo(form.dtype).eps * np.abs(want)).all()


def test_rows_have_the_bits_of_one_row():
    pair, three = gate_and_up(PLAIN, MAX_ROWS, 8), products_of(PLAIN, 9, SIZES)

    def part(products, rows):
        return [p.but(x=p.x[rows]) for p in products]

    gated = run_gated(pair, PLAIN, num_columns=1)
    gated_by = run_gated_by(pair[0], PLAIN)
    apart = run_apart(three, PLAIN)
    for rows in (slice(0, 1), slice(8, 9), slice(2, 7)):
        assert same_bits(run_gated(part(pair, rows), PLAIN), gated[rows])
        if rows.start == 0:  # values are of the first rows
            (gate,) = part(pair[:1], rows)
            assert same_bits(run_gated_by(gate, PLAIN), gated_by[rows])
        found = run_apart(part(three, rows), PLAIN)
        assert all(
            same_bits(y, all_rows[rows])
            for y, all_rows in zip(found, apart, strict=True)
        )


@pytest.mark.parametrize(
    "outputs", [1, 9, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 3, 8))]
)
def test_any_number_of_outputs(outputs):
    for columns in GATED_COLUMNS:
        check_gated(PLAIN, 5, outputs, 128, num_columns=columns)
    check_apart(PLAIN, 5, (outputs, 17, outputs), 128)
    check_gated_by(PLAIN, 5, outputs, 128)


@by_few_forms
def test_schedules(form, monkeypatch):
    monkeypatch.setattr(common, "launch", run_schedules)
    check_gated(form, 5, 24)
    check_gated_by(form, 5, 24)
    check_apart(form, 5)


@pytest.mark.parametrize("form", FEW_FORMS[1:2], ids=str)
def test_contraction_has_nothing_to_fuse(form, monkeypatch):
    monkeypatch.setattr(common, "launch", partial(run_on_cpu, contract=True))
    check_gated(form, 3, 24)
    check_gated_by(form, 3, 24)
    check_apart(form, 3)


@pytest.mark.slow
def test_every_number_of_rows_has_the_bits_of_one_row():
    pair, three = gate_and_up(PLAIN, MAX_ROWS, 8), products_of(PLAIN, 9, SIZES)
    gated = [
        run_gated([p.but(x=p.x[m : m + 1]) for p in pair], PLAIN) for m in range(9)
    ]
    apart = [
        run_apart([p.but(x=p.x[m : m + 1]) for p in three], PLAIN) for m in range(9)
    ]
    for rows, columns in GATED_TILES:
        y = run_gated([p.but(x=p.x[:rows]) for p in pair], PLAIN, num_columns=columns)
        assert same_bits(y, np.concatenate(gated[:rows]))
        found = run_apart([p.but(x=p.x[:rows]) for p in three], PLAIN)
        for y, *each in zip(found, *apart[:rows], strict=True):
            assert same_bits(y, np.concatenate(each))


@pytest.mark.slow
@given(
    st.sampled_from([1, 5]), st.integers(1, 30), st.integers(1, 30), st.integers(1, 9)
)
@settings(max_examples=12, deadline=None, derandomize=True)
def test_any_matrices(M, first, second, units):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "launch", run_on_cpu)
        check_gated(PLAIN, M, first, 64 * units, seed=first)
        check_apart(PLAIN, M, (first, second, first), 64 * units, seed=second)


@pytest.mark.parametrize("value", [0.0, -0.0, 3.0, -3.0, 50.0, -50.0, np.inf, np.nan])
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_gates(value, dtype):
    """A gate that is a number itself: K is 8, and one weight is 1."""
    form = Form(DENSE, 0, dtype)
    weight = np.zeros((8, 8), np.float32)
    weight[:, 0] = 1
    product = random_product(form, 1, 8, 8)
    x = np.zeros((1, 8), np.float32)
    x[0, 0] = value
    both = [product.but(x=x, weight=weight)] * 2
    y = run_gated(both, form)
    gate = rows_of(both[0], form)[:, :1]
    want = np.broadcast_to(as_float32(nn.gelu_approx(gate) * gate), y.shape)
    assert same_bits(y, np.ascontiguousarray(want))


def test_leading_dimensions():
    products = products_of(PLAIN, 6, (9, 9))
    x = rows_of(products[0], PLAIN).reshape(2, 3, -1)
    gate, up = (tuple(p.matrix) for p in products)
    y = gate_up(x, gate, up, form=PLAIN)
    assert (y.shape, y.dtype) == ((2, 3, 9), mx.bfloat16)
    for part in qkv(x, [gate, up], form=PLAIN):
        assert (part.shape, part.dtype) == ((2, 3, 9), mx.bfloat16)


def test_default_columns_are_of_a_kernel():
    for rows in range(1, MAX_ROWS + 1):
        assert (rows, default_gated_columns(rows)) in GATED_TILES


# -------------------------------------------------------------------------- text


def launches(form, rows, launch):
    """Launch gate_up, gate_by and qkv by a function."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "launch", launch)
        pair = gate_and_up(form, rows, 24)
        run_gated(pair, form)
        run_gated_by(pair[0], form)
        for sizes in (SIZES, SIZES[1:]):
            run_apart(products_of(form, rows, sizes), form)


def findings_of(form, rows):
    findings = []

    def launch(kernel, inputs, **options):
        findings.extend(lint(metal_text(kernel, inputs, **options)))
        pairs = zip(options["output_shapes"], options["output_dtypes"], strict=True)
        return [mx.zeros(shape, dtype=dtype) for shape, dtype in pairs]

    launches(form, rows, launch)
    return findings


@by_few_forms
def test_lint(form):
    assert findings_of(form, 5) == []


@pytest.mark.slow
@by_form
def test_lint_of_every_text(form):
    for rows in range(1, MAX_ROWS + 1):
        assert findings_of(form, rows) == []


@pytest.mark.tsan
@by_few_forms
def test_no_races(form):
    races = []

    def launch(kernel, inputs, **options):
        races.append(run_under_tsan(kernel, inputs, **options))
        return run_on_cpu(kernel, inputs, **options)

    launches(form, 5, launch)
    assert races == [[]] * 4


# ------------------------------------------------------------------------ counts

N, K = 32, 1536  # whole threadgroups and steps


def check_weights(counts, form, names):
    """Every byte of the matrices once, in pieces of a chunk."""
    for name in names:
        loads = counts.loads[name]
        assert loads.by_width == {form.bits: N * K // 8}
        assert loads.num_bytes == loads.unique_bytes == counts.sizes[name]


@pytest.mark.parametrize(
    ("form", "M"),
    [
        (PLAIN, 5),
        (PLAIN, 9),
        pytest.param(PLAIN, 1, marks=pytest.mark.slow),
        pytest.param(FEW_FORMS[2], 5, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_gate_up_counts(form, M):
    products = products_of(form, M, (N, N), K)
    x, (gate, up) = rows_of(products[0], form), (tuple(p.matrix) for p in products)
    (counts,) = counted(gate_up, x, gate, up, form=form)
    R = default_gated_columns(M)
    check_weights(counts, form, ("w", "w1"))
    # Both matrices take the same numbers of x: half of what two launches load.
    assert counts.loads["x"].by_width == {16: N // R * K // 8 * M}
    assert counts.loads["x"].unique_bytes == counts.sizes["x"]
    check_outputs_written_once(counts, "y")
    simdgroups = N // R
    calls = exchanges(M * 2 * R) + 1  # the gate's partner
    assert counts.calls == {"simd_shuffle_xor": calls * simdgroups * LANES}
    assert counts.operations["function"] == N * M  # bends
    weights = 2 * N * K
    making = 0 if form.bits == DENSE else weights + 2 * weights // 8
    assert counts.operations["fma"] == weights * M + making


@pytest.mark.parametrize("M", [pytest.param(1, marks=pytest.mark.slow), 5])
def test_gate_by_counts(M):
    (product,) = products_of(PLAIN, M, (N,), K)
    x, values = rows_of(product, PLAIN), values_of(PLAIN, M, N)
    (counts,) = counted(gate_by, x, tuple(product.matrix), values, form=PLAIN)
    check_weights(counts, PLAIN, ("w",))
    check_loads(counts, "values", N * M, unique=N * M, width=2)
    check_outputs_written_once(counts, "y")
    calls = exchanges(M * 4) * N // 4 * LANES
    assert counts.calls == {"simd_shuffle_xor": calls}
    assert counts.operations["function"] == N * M


@pytest.mark.parametrize("M", [pytest.param(1, marks=pytest.mark.slow), 5])
def test_qkv_counts(M):
    products = products_of(PLAIN, M, (N, N, N), K)
    matrices = [tuple(p.matrix) for p in products]
    (counts,) = counted(qkv, rows_of(products[0], PLAIN), matrices, form=PLAIN)
    check_weights(counts, PLAIN, ("w", "w1", "w2"))
    R = matmul.default_columns(M)
    assert counts.loads["x"].by_width == {16: 3 * N // R * K // 8 * M}
    check_outputs_written_once(counts, "y", "y1", "y2")
    calls = exchanges(M * R) * 3 * N // R * LANES
    assert counts.calls == {"simd_shuffle_xor": calls}
    assert counts.operations["fma"] == 3 * N * K * M + 3 * N * K * 10 // 8


# ---------------------------------------------------------------------- mistakes


@pytest.fixture
def _mistaken(mistake, monkeypatch):
    """Launches have the mistake of a test in their text."""

    def launch(kernel, inputs, **options):
        return run_on_cpu(mistake.of(kernel), inputs, **options)

    monkeypatch.setattr(common, "launch", launch)


@by_name(mistakes.GATED, most=4)
@pytest.mark.usefixtures("_mistaken")
def test_mistakes_of_gate_up_are_seen(mistake):
    gate, up = gate_and_up(PLAIN, 3, 64, 704)
    y = run_gated((gate, up), PLAIN)
    assert not same_bits(y, gated_bits(gate.bits, up.bits, PLAIN.dtype))


@by_name(mistakes.GATED_BY)
@pytest.mark.usefixtures("_mistaken")
def test_mistakes_of_gate_by_are_seen(mistake):
    gate, _ = gate_and_up(PLAIN, 3, 64, 704)
    y = run_gated_by(gate, PLAIN)
    values = as_float32(values_of(PLAIN, MAX_ROWS, 64)[:3])
    assert not same_bits(y, gated_bits(gate.bits, values, PLAIN.dtype))


@by_name(mistakes.APART, most=2)
@pytest.mark.usefixtures("_mistaken")
def test_mistakes_of_qkv_are_seen(mistake):
    products = products_of(PLAIN, 3, (19, 19, 19), 704)
    found = run_apart(products, PLAIN)
    assert not all(map(same_bits, found, (p.bits for p in products)))


@by_name(mistakes.APART_STOPPING)
@pytest.mark.usefixtures("_mistaken")
def test_mistakes_of_qkv_stop_the_launch(mistake):
    products = products_of(PLAIN, 3, (33, 5, 19), 704)
    with pytest.raises(MetalError, match=mistake.error):
        run_apart(products, PLAIN)
