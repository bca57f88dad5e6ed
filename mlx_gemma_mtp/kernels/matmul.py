"""A few rows times a quantized or dense matrix: the weights are read once for all rows.

y[m, n] = sum over k of x[m, k] * w[n, k], for 1 to 9 rows m. A simdgroup computes R
outputs n of all M rows; its 32 lanes share out k. A step of a lane is a chunk, 8
weights: it loads and converts 8 numbers of each row once and uses them R times, and
dequantizes 8 weights of each output once and uses them M times.

A quantized weight needs no conversion: its bits, or-ed into a half's, are the number
1024 + q (4 bits: also 64 + q, where they stand four higher), and one fma makes
s * q + b of it, with b - 1024 s computed once. That is off by 6e-5 of a quantization
step at most.

What a lane adds up, and how the lanes' sums are added, depends on (N, K) alone: a row
has the same bits whatever M and R are. That is why plain decoding and verifying give
the same text with it.

The method is known from llama.cpp (pull request 29110: rows kept in registers over
several outputs) and the half's bits from Kim et al. 2022, arXiv 2211.10017, section
3.1. The text is unrolled with named scalars: arrays with indices may leave registers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import mlx.core as mx

from . import common, matmul_parts
from .common import Kernel

# What one launch multiplies by, and what becomes of the products.
ALONE, GATED, GATED_BY, APART = "matmul", "gate_up", "gate_by", "qkv"
GATHERED = "gather_gate_up"  # as GATED, of the matrices that a row has chosen
MAX_ROWS = 9
MAX_SUMS = 32  # M * R: sums of a lane
COLUMNS = (2, 3, 4)  # R that kernels are made for
CHUNK = 8  # weights of a lane's step; K is a multiple of it
DENSE = 16  # bits of a weight that is not quantized
GROUP_SIZES = (32, 64, 128)
_SIMDGROUPS = 4  # of a threadgroup
_THREADS = 32 * _SIMDGROUPS
_FULL_ROWS = 4  # so many multiply-adds beside each other leave no gap, modelled
_DTYPES = {mx.bfloat16: "BFLOAT", mx.float16: "HALF"}

# The 8 numbers of a chunk in the order in which they are added up, and of which word of
# x (two numbers each) and which half of it each is: quantized weights come in pairs
# that stand 16 bits apart.
_ORDERS = {
    4: (0, 4, 1, 5, 2, 6, 3, 7),
    8: (0, 2, 1, 3, 4, 6, 5, 7),
    DENSE: (0, 1, 2, 3, 4, 5, 6, 7),
}


@dataclass(frozen=True)
class Form:
    """How the numbers of a product are stored.

    Attributes:
        bits: Of a weight: 4, 8, or 16 for one that is not quantized.
        group_size: Weights that share a scale and a bias; 0 where there are none.
        dtype: Of x, of y, and of scales and biases or dense weights.
    """

    bits: int
    group_size: int
    dtype: mx.Dtype

    def __str__(self) -> str:
        """A name for it, also of kernels."""
        kind = str(self.dtype).rpartition(".")[2]
        return f"{self.bits}bit_g{self.group_size}_{kind}" if self.group_size else kind

    @property
    def is_known(self) -> bool:
        """Whether there are kernels for it."""
        return self in FORMS


FORMS = tuple(
    Form(bits, group_size, dtype)
    for dtype in _DTYPES
    for bits, group_size in (
        (DENSE, 0),
        *((bits, size) for bits in (4, 8) for size in GROUP_SIZES),
    )
)


def parse_form(name: str) -> Form:
    """The form of a name.

    Raises:
        ValueError: There is no such form.
    """
    for form in FORMS:
        if str(form) == name:
            return form
    raise ValueError(f"a form must be one of a kernel: got {name!r:.80}")


def default_columns(num_rows: int) -> int:
    """R for M rows: so many sums that registers suffice, modelled."""
    if num_rows <= 6:
        return 4
    return 3 if num_rows <= 8 else 2


def multiply(
    x: mx.array,
    weight: mx.array,
    scales: mx.array | None = None,
    biases: mx.array | None = None,
    *,
    form: Form,
    num_columns: int | None = None,
) -> mx.array:
    """Multiply a few rows by a matrix, as ``quantized_matmul`` or ``x @ weight.T``.

    Args:
        x: [..., K] of the form's type, 1 to 9 rows in all; K a multiple of 8.
        weight: [N, K * bits / 32] uint32 as ``mx.quantize`` packs it, or [N, K].
        scales: [N, K / group_size]; None for dense weights.
        biases: [N, K / group_size]; None for dense weights.
        form: How they are stored, one that is known.
        num_columns: R, one of ``COLUMNS``; None for the default. It changes no bit.

    Returns:
        [..., N] of the form's type; sums are in float32.
    """
    num_outputs = weight.shape[0]
    rows = x.reshape(-1, x.shape[-1])
    num_rows = rows.shape[0]
    columns = default_columns(num_rows) if num_columns is None else num_columns
    inputs = [rows, weight]
    if form.bits != DENSE:
        assert scales is not None
        assert biases is not None
        inputs += [scales, biases]
    (y,) = launch(
        kernel(form, num_rows, columns),
        inputs,
        form=form,
        num_groups=groups_of(num_outputs, columns),
        output_shapes=[(num_rows, num_outputs)],
    )
    return y.reshape(*x.shape[:-1], num_outputs)


def groups_of(num_outputs: int, num_columns: int) -> int:
    """Threadgroups that N outputs take, R to a simdgroup."""
    return -(-num_outputs // (_SIMDGROUPS * num_columns))


def launch(
    text: Kernel,
    inputs: list[mx.array],
    *,
    form: Form,
    num_groups: int,
    output_shapes: list[tuple[int, ...]],
    numbers: Mapping[str, int] | None = None,
) -> list[mx.array]:
    """Queue one of the kernels on so many threadgroups, with numbers by name."""
    return common.launch(
        text,
        inputs,
        template=[("T", form.dtype), *(numbers or {}).items()],
        grid=(num_groups * _THREADS, 1, 1),
        threadgroup=(_THREADS, 1, 1),
        output_shapes=output_shapes,
        output_dtypes=[form.dtype] * len(output_shapes),
    )


@cache
def kernel(
    form: Form,
    num_rows: int,
    num_columns: int,
    fusion: str = ALONE,
    num_matrices: int = 1,
) -> Kernel:
    """The kernel for M rows that computes R outputs at a time.

    Args:
        form: How the numbers are stored.
        num_rows: M.
        num_columns: R; of ``GATED`` those of both matrices together.
        fusion: ``ALONE``; ``GATED`` for gelu(x @ gate.T) * (x @ up.T); ``GATED_BY``
            for gelu(x @ gate.T) * values; ``APART`` for matrices with an output each;
            ``GATHERED`` as ``GATED``, of one row at a time.
        num_matrices: 1; of ``GATED`` and ``GATHERED`` 2; of ``APART`` 2 or 3.
    """
    assert form.is_known, form
    assert 1 <= num_rows <= MAX_ROWS, num_rows
    assert num_columns in COLUMNS, num_columns
    assert num_rows * num_columns <= MAX_SUMS, (num_rows, num_columns)
    text = _Text(form, num_rows, num_columns, fusion, num_matrices)
    number = num_matrices if fusion == APART else ""
    return Kernel(
        name=f"{fusion}{number}_{form}_{num_rows}x{num_columns}",
        input_names=("x", *text.arrays),
        output_names=text.outputs,
        source=text.source(),
        helpers="",
    )


class _Text:
    """Writes the body of one kernel.

    Names: ``x{m}`` a row's chunk as words, ``x{m}_{i}`` its number i, ``p{r}`` an
    output's chunk as words, ``w{r}_{i}`` its weight i, ``a{m}_{r}`` the sum of row m
    and output r; ``x_row{m}``, ``w_row{r}`` ... where the rows of arrays begin.
    The arrays of matrices beside the first have its names and a number behind them. Of
    ``GATED`` the outputs r are the gate's and up's by turns, and of ``GATHERED`` too.

    Attributes:
        arrays: Names of the inputs beside x.
        outputs: Names of the outputs.
    """

    def __init__(
        self,
        form: Form,
        num_rows: int,
        num_columns: int,
        fusion: str = ALONE,
        num_matrices: int = 1,
    ) -> None:
        self._form = form
        self._fusion = fusion
        self._num_matrices = num_matrices
        # Matrices that one simdgroup takes outputs of, so many of each.
        self._beside = num_matrices if fusion in (GATED, GATHERED) else 1
        self._per_matrix = num_columns // self._beside
        num_outputs = num_matrices if fusion == APART else 1
        self._names = ("w", "scales", "biases") if form.group_size else ("w",)
        numbers = ["", *(str(i) for i in range(1, num_matrices))]
        self.arrays = tuple(f"{name}{i}" for i in numbers for name in self._names)
        self.arrays += {GATED_BY: ("values",), GATHERED: ("experts",)}.get(fusion, ())
        self.outputs = tuple(f"y{i}" for i in numbers[:num_outputs])
        self._rows = range(num_rows)
        self._columns = range(num_columns)
        self._order = _ORDERS[form.bits]

    def source(self) -> str:
        """The body."""
        lines = [
            *self._start(),
            "for (uint c = lane; c < chunks; c += 32u) {",
            *(f"  {line}" for line in self._step()),
            "}",
            *self._store(),
        ]
        return "".join(f"  {line}\n" for line in lines)

    def _start(self) -> list[str]:
        """Where this simdgroup's outputs are.

        The last simdgroup begins early enough to have R outputs, and stores its own.
        So every lane reads at one index of R arrays that begin a row apart: where they
        begin depends on no thread, and costs neither registers nor additions.
        """
        num_columns = self._per_matrix
        group = "threadgroup_position_in_grid.x"
        lines = ["uint lane = thread_index_in_simdgroup;"]
        wide = _SIMDGROUPS * num_columns
        axis, row, output = 0, "", "base"
        if self._fusion == APART:
            lines += matmul_parts.choice(self._names, self._num_matrices, wide)
            group = "group"
        elif self._fusion == GATHERED:
            lines += matmul_parts.gathered(wide)
            group, axis = "group", 1
            row, output = f" + row * {CHUNK}u * chunks", "(expert * outputs + base)"
        else:
            lines += ["uint outputs = uint(w_shape[0]);"]
        lines += [
            f"uint words = uint(w_shape[{axis + 1}]);",
            f"uint chunks = words{self._over(self._words_per_chunk)};",
            f"uint first = ({group} * {_SIMDGROUPS}u + "
            f"simdgroup_index_in_threadgroup) * {num_columns}u;",
            "if (first >= outputs) return;  // the whole simdgroup",
            f"uint base = min(first, max(outputs, {num_columns}u) - {num_columns}u);",
            f"uint start = {output} * chunks;",
        ]
        lines += [
            f"auto x_row{m} = x + {m * CHUNK}u * chunks{row};" for m in self._rows
        ]
        lines += self._row_starts("w", "words")
        if self._form.group_size:
            per_group = self._form.group_size // CHUNK
            lines += [
                f"uint groups = chunks / {per_group}u;",
                f"uint g = {output} * groups + lane / {per_group}u;",
                *self._row_starts("scales", "groups"),
                *self._row_starts("biases", "groups"),
            ]
        lines += [f"float a{m}_{r} = 0.0f;" for m in self._rows for r in self._columns]
        return lines

    @property
    def _words_per_chunk(self) -> int:
        """Elements of w in a chunk."""
        return CHUNK if self._form.bits == DENSE else CHUNK * self._form.bits // 32

    @staticmethod
    def _over(divisor: int) -> str:
        return f" / {divisor}u" if divisor > 1 else ""

    def _row_starts(self, name: str, length: str) -> list[str]:
        """Where rows begin; of fewer than R outputs the last one stands for others."""
        lines = []
        for r in self._columns:
            number, matrix = divmod(r, self._beside)
            array = f"{name}{matrix or ''}"
            if self._fusion == APART:
                array = f"own_{name}"
            start = f"{array} + min({number}u, outputs - 1u) * {length}"
            lines.append(f"auto {name}_row{r} = {start};")
        return lines

    def _step(self) -> list[str]:
        """One chunk: what comes from memory is asked for first, rows are cached.

        Half a chunk is computed at a time, to spare registers.
        """
        lines = ["uint at = start + c;", *self._loads()]
        lines += [f"uint4 x{m} = LOAD4(x_row{m}, c);" for m in self._rows]
        lines += self._constants()
        for half in range(2):
            places = self._order[4 * half : 4 * half + 4]
            for m in self._rows:
                lines += [
                    f"float x{m}_{i} = {self._number(f'x{m}', i)};" for i in places
                ]
            for columns in self._turns():
                for r in columns:
                    lines += self._weights(r, half, places)
                lines += [
                    f"a{m}_{r} = fma(w{r}_{i}, x{m}_{i}, a{m}_{r});"
                    for i in places
                    for r in columns
                    for m in self._rows
                ]
        return lines

    def _turns(self) -> list[range]:
        """The outputs that are computed at a time.

        A multiply-add waits for the one before it on the same sum: few rows leave a
        gap there that other outputs fill, many need the registers.
        """
        if len(self._rows) < _FULL_ROWS:
            return [self._columns]
        return [range(r, r + 1) for r in self._columns]

    def _loads(self) -> list[str]:
        """The chunk's weights of every output, with scale and bias."""
        load = {4: "uint p{r} = w_row{r}[at];", 8: "uint2 p{r} = LOAD2(w_row{r}, at);"}
        text = load.get(self._form.bits, "uint4 p{r} = LOAD4(w_row{r}, at);")
        lines = [text.format(r=r) for r in self._columns]
        if self._form.group_size:
            number = _DTYPES[self._form.dtype]
            for r in self._columns:
                lines += [
                    f"float s{r} = {number}_OF(scales_row{r}[g]);",
                    f"float b{r} = {number}_OF(biases_row{r}[g]);",
                ]
            lines += [f"g += {32 * CHUNK // self._form.group_size}u;"]
        return lines

    def _constants(self) -> list[str]:
        """What makes a weight of a half's bits, for every output."""
        lines = []
        if self._form.group_size:
            for r in self._columns:
                lines += [f"float c{r} = fma(-1024.0f, s{r}, b{r});"]
                if self._form.bits == 4:
                    lines += [f"float d{r} = fma(-64.0f, s{r}, b{r});"]
        return lines

    def _weights(self, r: int, half: int, places: tuple[int, ...]) -> list[str]:
        """Four weights of an output as floats."""
        if self._form.bits == DENSE:
            return [f"float w{r}_{i} = {self._number(f'p{r}', i)};" for i in places]
        lines = []
        if self._form.bits == 4:
            word = f"p{r}"
            if half:
                word = f"q{r}"
                lines += [f"uint {word} = p{r} >> 8;"]
            low, high = (word, "0x000F000Fu"), (word, "0x00F000F0u")
            pairs = ((*low, "0x64006400u", "c"), (*high, "0x54005400u", "d"))
        else:
            word = f"p{r}.{'xy'[half]}"
            rest = ("0x00FF00FFu", "0x64006400u", "c")
            pairs = ((word, *rest), (f"({word} >> 8)", *rest))
        for number, (bits, mask, power, bias) in enumerate(pairs):
            name = f"h{r}_{2 * half + number}"
            lines += [f"uint {name} = ({bits} & {mask}) | {power};"]
            for part, i in zip(("LOW", "HIGH"), places[2 * number :], strict=False):
                value = f"fma(HALF_{part}({name}), s{r}, {bias}{r})"
                lines += [f"float w{r}_{i} = {value};"]
        return lines

    def _number(self, words: str, place: int) -> str:
        """One number of a chunk of the form's type."""
        part = "HIGH" if place % 2 else "LOW"
        return f"{_DTYPES[self._form.dtype]}_{part}({words}.{'xyzw'[place // 2]})"

    def _store(self) -> list[str]:
        """The sums over lanes: a lane that has one stores it, if it is its own."""
        sums = [f"a{m}_{r}" for m in self._rows for r in self._columns]
        lines, total = matmul_parts.sums_over_lanes(sums)
        num_columns = self._per_matrix
        y = "own_y" if self._fusion == APART else "y"
        gate: list[str] = []
        at = f"place / {num_columns}u * outputs + n"
        if self._fusion == GATHERED:
            at = "pair * outputs + n"
        if self._fusion in (GATED, GATHERED):
            lines += matmul_parts.partner(total)
            gate = matmul_parts.gated(total, "beside")
        if self._fusion == GATED_BY:
            gate = matmul_parts.gated(total, f"values[{at}]")
        lines += [
            f"uint n = base + place % {num_columns}u;",
            "if (is_first && n >= first && n < outputs) {",
            *(f"  {line}" for line in gate),
            f"  {y}[{at}] = T({'gated' if gate else total});",
            "}",
        ]
        return lines
