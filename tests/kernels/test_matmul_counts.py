"""What the matmul of few rows reads, writes and issues: each figure is derived.

Per simdgroup, of R outputs of all M rows: every weight once, every number of x once.
K is as in the models, N three threadgroups and a ragged end, which is why the last
simdgroup repeats an output of the one before it.

Run: python -m pytest tests/kernels/test_matmul_counts.py
     python -m pytest -m slow tests/kernels/test_matmul_counts.py    all forms, a head
"""

import json
import sys

import mlx.core as mx
import pytest

if sys.platform == "darwin":
    pytest.skip("MLX runs kernels on Metal itself here", allow_module_level=True)

from mlx_gemma_mtp.kernels.matmul import (
    CHUNK,
    DENSE,
    GROUP_SIZES,
    MAX_ROWS,
    Form,
    default_columns,
)
from scripts.count_kernels import all_counts, product_counts
from scripts.kernel_tables import RECORD
from tests.kernels.launches import LANES, SIMDGROUPS, Product, replacing
from tests.kernels.test_counts import check_outputs_written_once
from tests.metal import launch as metal_launch

G64 = Form(4, 64, mx.bfloat16)
FORMS = [
    Form(bits, size, dtype)
    for dtype in (mx.bfloat16, mx.float16)
    for bits, size in (
        (DENSE, 0),
        *((bits, size) for bits in (4, 8) for size in GROUP_SIZES),
    )
]


def check_reads(counts, product):
    """Bytes: of weights and scales over their floor, which is the arrays' size."""
    form, steps = product.form, product.num_columns * product.num_chunks
    weights = counts.loads["w"]
    assert weights.by_width == {form.bits: steps}
    assert weights.unique_bytes == counts.sizes["w"]
    floor = product.N * product.K * form.bits // 8
    assert counts.sizes["w"] == floor
    assert weights.num_bytes / floor == product.num_columns / product.N
    assert weights.lines == product.lines_of_weights.sum()
    assert weights.most_lines == product.lines_of_weights.max()

    x = counts.loads["x"]
    num_weights = product.num_columns * product.K
    assert x.by_width == {16: num_weights // (CHUNK * product.R) * product.M}
    assert x.unique_bytes == counts.sizes["x"]
    for name in ("scales", "biases") if form.group_size else ():
        loads = counts.loads[name]
        assert loads.by_width == {2: steps}
        assert loads.unique_bytes == counts.sizes[name]
        # Neighbouring lanes share one; the cache's line is read once.
        assert counts.sizes[name] == product.N * product.K // form.group_size * 2
        times = loads.num_bytes / counts.sizes[name]
        assert times == form.group_size / CHUNK * product.num_columns / product.N


def check_arithmetic(counts, product):
    """Operations: a multiply-add per weight and row, and those that make the weight."""
    form, M = product.form, product.M
    operations = dict(counts.operations)
    steps = product.num_columns * product.num_chunks
    num_weights = steps * CHUNK
    # Constants of a chunk: the bias less 1024 scales, and for bits above also 64.
    constants = {4: 2, 8: 1, DENSE: 0}[form.bits]
    making = 0 if form.bits == DENSE else num_weights + constants * steps
    assert operations.pop("fma") == num_weights * M + making
    # Numbers of the form's type: half of those in words stand high, half low.
    in_words = num_weights // product.R * M + (num_weights if making == 0 else 0)
    alone = 2 * steps if form.group_size else 0  # scales and biases
    num_quantized = num_weights if form.group_size else 0
    is_bfloat = form.dtype == mx.bfloat16
    num_halves = num_quantized + (0 if is_bfloat else in_words + alone)
    assert operations.pop("from_short") == num_halves
    assert operations.pop("to_short") == product.N * M
    assert operations.pop("pack") == (in_words // 2 + alone if is_bfloat else 0)
    exchanged = exchanges(M * product.R)
    # Which of two sums a lane keeps, at five levels.
    logic = 5 * LANES * product.num_simdgroups
    logic += in_words // 2 if is_bfloat else 0
    assert operations.pop("logic") == logic + num_quantized
    shifts = num_weights // (8 if form.bits == 4 else 4) if form.group_size else 0
    assert operations.pop("shift") == shifts
    lanes = LANES * product.num_simdgroups
    assert operations.pop("add") == exchanged * lanes
    assert counts.calls == {"simd_shuffle_xor": exchanged * lanes}  # and no barrier
    assert not any(operations.values()), operations  # no conversion of a whole number


def exchanges(num_sums):
    """Sums that a lane gives away until 32 lanes have added up each of so many."""
    total = 0
    for _ in range(5):
        num_sums = -(-num_sums // 2)
        total += num_sums
    return total


def check(counts, product):
    check_reads(counts, product)
    check_arithmetic(counts, product)
    check_outputs_written_once(counts, "y")


@pytest.mark.parametrize(
    "product",
    [
        Product.ragged(G64, 1),
        Product.ragged(G64, 5),
        Product.ragged(G64, 9),
        Product.ragged(G64, 5, R=2, K=704),
        Product.ragged(Form(8, 32, mx.float16), 3, K=2112),
        Product.ragged(Form(DENSE, 0, mx.bfloat16), 2, K=2816),
    ],
    ids=str,
)
def test_counts(product):
    check(product.run(), product)


def test_floor_where_outputs_fill_simdgroups():
    """The figures as such: 31B's width, whole outputs, rows that are whole lines."""
    product = Product(G64, 5, 4, 48, 5376)
    counts = product.run()
    weights = counts.loads["w"]
    assert weights.num_bytes == weights.unique_bytes == 48 * 5376 // 2
    assert weights.lines == weights.instructions  # each a line
    assert counts.loads["scales"].num_bytes / counts.sizes["scales"] == 8
    assert counts.loads["x"].count <= 48 * 5376 // (8 * 4) * 5
    assert counts.operations["fma"] == 48 * 5376 * (5 + 1 + 2 / 8)
    assert counts.operations["from_integer"] == 0


@pytest.mark.parametrize(("bits", "lines"), [(4, 1), (8, 2), (DENSE, 4)])
def test_lines_of_a_load(bits, lines):
    """32 lanes times a chunk of 8 weights."""
    product = Product(Form(bits, 0, mx.bfloat16), 1, 4, 4, 5376)
    assert (product.lines_of_weights == lines).all()


@pytest.mark.parametrize("M", [1, 5])
def test_the_page_is_current(M):
    """Where it fails: make counts."""
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    assert product_counts(G64, M) == record["matmul"][str(G64)][M - 1]


# ---------------------------------------------------------------------------- slow


@pytest.mark.slow
def test_all_of_the_page_is_current():
    assert all_counts() == json.loads(RECORD.read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_counts_of_all(form):
    short = 640 if form.group_size == 128 else 704  # not whole steps of all lanes
    for M in range(1, MAX_ROWS + 1):
        for R in {default_columns(M), 2}:
            product = Product.ragged(form, M, R, K=short if M % 2 else 2560)
            check(product.run(), product)


@pytest.mark.slow
def test_counts_of_a_head(monkeypatch):
    """E2B's tied head."""
    monkeypatch.setattr(metal_launch, "TIME_LIMIT_S", 600)
    product = Product(G64, 2, 4, 262144, 1536)
    check(product.run(), product)


# ------------------------------------------------------------------------ mistakes

CHANGES = {
    "weights twice": ("uint p0 = w_row0[at]", "uint p0 = w_row0[at] & w_row0[at]"),
    "a conversion": ("float w1_0 = fma(HALF_LOW(h1_0)", "float w1_0 = fma(float(h1_0)"),
    "a barrier": ("bool is_high_16", "BARRIER();\n  bool is_high_16"),
    "a lane's chunks beside each other": (
        "for (uint c = lane; c < chunks; c += 32u)",
        "for (uint c = lane * (chunks / 32u); c < (lane + 1u) * (chunks / 32u); c++)",
    ),
    "x in halves": (
        "LOAD4(x_row0, c)",
        "uint4(LOAD2(x_row0, 2u * c), LOAD2(x_row0, 2u * c + 1u))",
    ),
    "x again for an output": (
        "float c1 =",
        "x0 = LOAD4(x_row0, c);\n    float c1 =",
    ),
    "a weight again for a row": (
        "a1_0 = fma(w0_0,",
        "a1_0 = fma(fma(HALF_LOW(h0_0), s0, c0),",
    ),
    "outputs twice": ("if (is_first && ", "if ("),
    "a function": ("float c0 = fma(", "float c0 = log(exp(0.0f)) + fma("),
    "one scale for a row": ("scales_row0[g]", "scales_row0[base * groups]"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_mistakes_are_seen(change):
    # Whole simdgroups and steps, so that most of these give the same product.
    product = Product(G64, 2, 2, 3 * SIMDGROUPS * 2, 1536)
    counts = product.run(change=replacing(*CHANGES[change]), is_checked=False)
    with pytest.raises(AssertionError):
        check(counts, product)


def test_the_product_of_the_mistakes_is_none():
    product = Product(G64, 2, 2, 3 * SIMDGROUPS * 2, 1536)
    check(product.run(), product)
