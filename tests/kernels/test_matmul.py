"""The kernel that multiplies a few rows by a matrix, from its Metal text on the CPU.

Compared                       with                            tolerance
every form, M and R            the kernel's sums in numpy      0: every bit
the same                       float64                         products.Product.error
quantized by MLX               MLX's float32                   the same
M = 1 to 9, R, schedules,
contraction, noise             each other                      0: every bit

Run: python -m pytest tests/kernels/test_matmul.py            a few texts of each kind
     python -m pytest -m slow tests/kernels/test_matmul.py    all 364 of them
"""

import re
import sys
from functools import partial

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

if sys.platform == "darwin":
    pytest.skip("MLX runs kernels on Metal itself here", allow_module_level=True)

from mlx_gemma_mtp.kernels import common, matmul
from mlx_gemma_mtp.kernels.matmul import COLUMNS, DENSE, MAX_ROWS, MAX_SUMS, Form
from tests.kernels.products import (
    FORMS,
    Product,
    as_float32,
    random_product,
    same_bits,
)
from tests.metal.lint import lint
from tests.metal.run import run_on_cpu, run_schedules
from tests.metal.text import metal_text
from tests.metal.tsan import run_under_tsan

PLAIN = Form(4, 64, mx.bfloat16)
FEW_FORMS = [
    PLAIN,
    Form(4, 32, mx.float16),
    Form(8, 64, mx.bfloat16),
    Form(DENSE, 0, mx.bfloat16),
]
# Of the five families: whole steps of 32 lanes, and steps that leave lanes idle.
INPUTS = (64, 704, 1536, 2112, 2816, 5376)
TILES = [
    (rows, columns)
    for rows in range(1, MAX_ROWS + 1)
    for columns in COLUMNS
    if rows * columns <= MAX_SUMS
]
by_form = pytest.mark.parametrize("form", FORMS, ids=str)
by_few_forms = pytest.mark.parametrize("form", FEW_FORMS, ids=str)


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch):
    monkeypatch.setattr(common, "launch", run_on_cpu)


def inputs_of(form, number):
    """One of ``INPUTS`` that whole groups fill."""
    unit = max(form.group_size, 64)
    return -(-INPUTS[number % len(INPUTS)] // unit) * unit


def ragged(columns):
    """Outputs of three threadgroups, of which the last simdgroup has one of its own."""
    return 9 * columns + 1


def check(product, **options):
    """Every bit of the kernel's rows, and how near they come."""
    y = product.run(**options)
    assert same_bits(y, product.bits[: len(y)])
    assert (np.abs(y - product.exact[: len(y)]) <= product.error[: len(y)]).all()
    return y


# -------------------------------------------------------------------------- bits


@by_form
def test_bits(form):
    """A text of each form: M, R and K differ from form to form."""
    number = FORMS.index(form)
    rows, columns = TILES[(7 * number + 3) % len(TILES)]
    product = random_product(form, rows, ragged(columns), inputs_of(form, number))
    check(product, num_columns=columns)


@pytest.mark.slow
@by_form
def test_bits_of_every_text(form):
    for number, (rows, columns) in enumerate(TILES):
        product = random_product(
            form, rows, ragged(columns), inputs_of(form, number), seed=number
        )
        check(product, num_columns=columns)


@pytest.mark.slow
@by_form
def test_bits_of_every_length(form):
    for number in range(len(INPUTS)):
        check(random_product(form, 5, ragged(4), inputs_of(form, number), seed=number))


def test_rows_have_the_bits_of_one_row():
    product = random_product(PLAIN, MAX_ROWS, 13, 704)
    one = [
        product.but(x=product.x[m : m + 1]).run(num_columns=4) for m in range(MAX_ROWS)
    ]
    for rows, columns in ((9, 2), (5, 4)):
        y = product.run(num_rows=rows, num_columns=columns)
        assert same_bits(y, np.concatenate(one[:rows]))


@pytest.mark.slow
@by_form
def test_every_number_of_rows_has_the_bits_of_one_row(form):
    for number in range(len(INPUTS)):
        product = random_product(form, MAX_ROWS, ragged(2), inputs_of(form, number))
        every = [product.but(x=product.x[m : m + 1]).run() for m in range(MAX_ROWS)]
        for rows, columns in TILES:
            y = product.run(num_rows=rows, num_columns=columns)
            assert same_bits(y, np.concatenate(every[:rows])), (rows, columns)


@pytest.mark.parametrize("outputs", [1, 2, 3, 4, 5, 15, 16, 17])
def test_any_number_of_outputs(outputs):
    for columns in COLUMNS:
        check(random_product(PLAIN, 5, outputs, 128), num_columns=columns)


@by_few_forms
def test_schedules(form, monkeypatch):
    monkeypatch.setattr(common, "launch", run_schedules)
    check(random_product(form, 5, ragged(4), 704))


@pytest.mark.parametrize("form", [PLAIN, Form(8, 32, mx.float16)], ids=str)
def test_contraction_has_nothing_to_fuse(form, monkeypatch):
    monkeypatch.setattr(common, "launch", partial(run_on_cpu, contract=True))
    check(random_product(form, 3, ragged(2), 704), num_columns=2)


@pytest.mark.slow
@by_form
def test_contraction_has_nothing_to_fuse_in_any_text(form, monkeypatch):
    monkeypatch.setattr(common, "launch", partial(run_on_cpu, contract=True))
    for rows, columns in TILES:
        check(random_product(form, rows, ragged(columns), 256), num_columns=columns)


@by_form
def test_the_text_has_no_function_that_may_differ(form):
    """And no product beside a sum, which a compiler may fuse or not."""
    for rows, columns in TILES:
        source = matmul.kernel(form, rows, columns).source
        called = set(re.findall(r"\b([a-z]\w*)\(", source)) - {"for", "if"}
        assert called <= {"fma", "min", "max", "uint", "simd_shuffle_xor", "float"}
        floats = [line for line in source.splitlines() if "float " in line]
        assert not any(" * " in line for line in floats)


def test_noise_changes_nothing(monkeypatch):
    monkeypatch.setattr(common, "launch", partial(run_on_cpu, noise_ulps=4))
    check(random_product(PLAIN, 5, ragged(4), 704))


# Few texts, so that few are compiled: what differs is what they are given.
FEW_TILES = [(5, 4), (9, 2)]


def check_with_harness(form, tile, outputs, units, seed):
    rows, columns = tile
    unit = max(form.group_size, 64)
    product = random_product(form, rows, outputs, units * unit, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "launch", partial(run_on_cpu, seed=seed + 1))
        check(product, num_columns=columns)


@given(
    st.sampled_from(FEW_FORMS),
    st.sampled_from(FEW_TILES),
    st.integers(1, 40),
    st.integers(1, 20),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=15, deadline=None, derandomize=True)
def test_any_matrix(form, tile, outputs, units, seed):
    check_with_harness(form, tile, outputs, units, seed)


@pytest.mark.slow
@given(
    st.sampled_from(FORMS),
    st.sampled_from(TILES),
    st.integers(1, 70),
    st.integers(1, 40),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=400, deadline=None, derandomize=True)
def test_any_matrix_of_any_form(form, tile, outputs, units, seed):
    check_with_harness(form, tile, outputs, units, seed)


# ------------------------------------------------------------------------ parity


@by_few_forms
def test_as_near_as_mlx(form):
    """What MLX quantized, beside what MLX makes of it in float32."""
    mx.random.seed(0)
    w = (mx.random.normal((35, 1536)) / 30).astype(form.dtype)
    x = as_float32(mx.random.normal((5, 1536)).astype(form.dtype))
    if form.bits == DENSE:
        product, exact = Product(form, x, as_float32(w)), w.astype(mx.float32)
    else:
        size = {"group_size": form.group_size, "bits": form.bits}
        words, scales, biases = mx.quantize(w, **size)
        product = Product(
            form, x, np.array(words), as_float32(scales), as_float32(biases)
        )
        wide = (scales.astype(mx.float32), biases.astype(mx.float32))
        exact = mx.dequantize(words, *wide, **size)
        np.testing.assert_allclose(product.exact_weights, exact, rtol=1e-5, atol=1e-6)
    y = check(product)
    want = np.array(mx.array(x) @ exact.T)
    assert (np.abs(y - want) <= 2 * product.error).all()


def test_leading_dimensions_and_rows_that_stand_apart():
    product = random_product(PLAIN, 5, 10, 128)
    x = mx.array(product.x).astype(PLAIN.dtype)[None]
    apart = mx.concatenate([x, mx.zeros_like(x)], axis=-1)[..., :128]
    y = matmul.multiply(apart, *product.matrix, form=PLAIN)
    assert (y.shape, y.dtype) == ((1, 5, 10), PLAIN.dtype)
    assert same_bits(as_float32(y)[0], product.bits)


# ---------------------------------------------------------------- special values


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("form", [PLAIN, Form(DENSE, 0, mx.float16)], ids=str)
def test_a_row_that_is_no_number_leaves_the_others(form, value):
    product = random_product(form, 5, 9, 704)
    x = product.x.copy()
    x[2, 3::50] = value
    y = product.but(x=x).run()
    others = [0, 1, 3, 4]
    assert not np.isfinite(y[2]).any()
    assert same_bits(y[others], product.bits[others])
    assert same_bits(y, product.but(x=x).bits)


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_a_scale_that_is_no_number_leaves_other_outputs(value):
    product = random_product(PLAIN, 5, 9, 704)
    scales = product.scales.copy()
    scales[4, 1] = value
    y = product.but(scales=scales).run()
    others = [n for n in range(9) if n != 4]
    assert np.isnan(y[:, 4]).all()
    assert same_bits(y[:, others], product.bits[:, others])


@by_few_forms
@pytest.mark.parametrize(
    "changed",
    [
        lambda p: {"x": p.x * 0},
        lambda p: {"x": -p.x * 0},
        lambda p: {"scales": p.scales * 0, "biases": p.biases * 0},
        lambda p: {"scales": -np.abs(p.scales), "biases": -np.abs(p.biases)},
        lambda p: {"weight": p.weight * 0},
        lambda p: {"biases": -8 * p.scales},
    ],
    ids=["no x", "minus no x", "no matrix", "negative", "no weight", "symmetric"],
)
def test_numbers(form, changed):
    product = random_product(form, 5, 9, 256)
    check(product.but(**changed(product)))


@pytest.mark.parametrize("power", [100, -80])
def test_sizes(power):
    """Scales near what a bfloat ends at; the kernel needs 1024 times their size."""
    product = random_product(PLAIN, 5, 9, 256)
    factor = np.float32(2.0**power)
    check(product.but(scales=product.scales * factor, biases=product.biases * factor))


def test_a_float16_becomes_infinite_where_it_ends():
    product = random_product(Form(4, 32, mx.float16), 5, 9, 256)
    product = product.but(x=np.abs(product.x), scales=product.scales * 0 + 6e4)
    y = product.run()
    assert same_bits(y, np.full_like(y, np.inf))


def test_scales_too_small_to_count_are_zero():
    product = random_product(PLAIN, 5, 9, 256)
    tiny = np.full_like(product.scales, 2.0**-130)
    y = product.but(scales=tiny, biases=-tiny).run()
    assert (np.abs(y) < 2.0**-116).all()  # 0 where subnormal numbers are flushed
    beside = product.but(scales=tiny).run()
    assert same_bits(beside, product.but(scales=product.scales * 0).run())


# -------------------------------------------------------------------------- text


def launches(form, rows, columns, launch):
    """Launch a product of one text by a function."""
    product = random_product(form, rows, ragged(columns), 256)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "launch", launch)
        product.run(num_columns=columns)


def findings_of(form, tiles):
    findings = []

    def launch(kernel, inputs, **options):
        findings.extend(lint(metal_text(kernel, inputs, **options)))
        (shape,), (dtype,) = options["output_shapes"], options["output_dtypes"]
        return [mx.zeros(shape, dtype=dtype)]

    for rows, columns in tiles:
        launches(form, rows, columns, launch)
    return findings


@by_form
def test_lint(form):
    assert findings_of(form, [(1, 4), (9, 3)]) == []


@pytest.mark.slow
@by_form
def test_lint_of_every_text(form):
    assert findings_of(form, TILES) == []


@pytest.mark.tsan
@by_few_forms
@pytest.mark.parametrize("columns", COLUMNS)
def test_no_races(form, columns):
    races = []

    def launch(kernel, inputs, **options):
        races.append(run_under_tsan(kernel, inputs, **options))
        return run_on_cpu(kernel, inputs, **options)

    launches(form, 5, columns, launch)
    assert races == [[]]


def test_names_of_forms():
    names = [str(form) for form in FORMS]
    assert [matmul.parse_form(name) for name in names] == FORMS
    assert names[:2] == ["bfloat16", "4bit_g32_bfloat16"]
    assert all(form.is_known for form in FORMS)
    assert not Form(4, 16, mx.bfloat16).is_known
    with pytest.raises(ValueError, match="a form must be one of a kernel: got '5bit'"):
        matmul.parse_form("5bit")


def test_default_columns_are_of_a_kernel():
    for rows in range(1, MAX_ROWS + 1):
        assert (rows, matmul.default_columns(rows)) in TILES
