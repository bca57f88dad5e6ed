"""The words of the kernels' dialect that move and convert numbers, in the harness.

Run: python -m pytest tests/kernels/test_words.py
"""

import re
import sys

import mlx.core as mx
import numpy as np
import pytest

if sys.platform == "darwin":
    pytest.skip("MLX runs kernels on Metal itself here", allow_module_level=True)

from mlx_gemma_mtp.kernels.common import Kernel
from tests.metal.lint import lint
from tests.metal.run import MetalError, run_on_cpu
from tests.metal.text import metal_text

WORDS = np.arange(256, dtype=np.uint32) * np.uint32(2654435761)
# Every number of 16 bits, the NaNs among them, as words of two.
ALL = np.arange(2**16, dtype=np.uint16)
THREADS = 256


def arguments(body, inputs, *, size, dtype=mx.uint32):
    """A kernel of one input ``x`` that writes ``size`` elements of ``y``."""
    kernel = Kernel(
        "words", ("x",), ("y",), f"uint i = thread_position_in_grid.x;\n{body}\n"
    )
    return (kernel, [inputs]), {
        "template": [],
        "grid": (size, 1, 1),
        "threadgroup": (min(size, THREADS), 1, 1),
        "output_shapes": [(size,)],
        "output_dtypes": [dtype],
    }


def run(body, inputs, *, size, dtype=mx.uint32):
    given, options = arguments(body, inputs, size=size, dtype=dtype)
    (y,) = run_on_cpu(*given, **options)
    return np.array(y)


@pytest.mark.parametrize(("word", "width"), [("LOAD2", 2), ("LOAD4", 4)])
def test_a_piece_of_an_input_is_what_stands_there(word, width):
    parts = "xyzw"[:width]
    for number, part in enumerate(parts):
        y = run(f"y[i] = {word}(x, i).{part};", mx.array(WORDS), size=64)
        np.testing.assert_array_equal(y, WORDS[number : 64 * width : width])


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_a_piece_of_16_bit_numbers_is_words(dtype):
    x = mx.array(WORDS.view(np.uint16)).view(dtype)
    y = run("y[i] = LOAD4(x + 8, i).z;", x, size=32)
    np.testing.assert_array_equal(y, WORDS[6 : 6 + 32 * 4 : 4])


@pytest.mark.parametrize(
    ("word", "offset", "wanted"), [("LOAD4", 2, 16), ("LOAD4", 1, 16), ("LOAD2", 1, 8)]
)
def test_a_piece_that_is_not_aligned_stops_the_launch(word, offset, wanted):
    with pytest.raises(
        MetalError,
        match=rf"^an address must be a multiple of {wanted} at line \d+ "
        rf"`y\[i\] = {word}\(x \+ {offset}, i\)\.x;`: buffer 'x' at byte \d+ of 1024 "
        r"\(thread \d+\)$",
    ):
        run(f"y[i] = {word}(x + {offset}, i).x;", mx.array(WORDS), size=32)


@pytest.mark.parametrize(("word", "width"), [("LOAD2", 2), ("LOAD4", 4)])
def test_a_piece_past_the_end_stops_the_launch(word, width):
    with pytest.raises(MetalError, match="memory fault: buffer 'x' at byte 1024 of"):
        run(f"y[i] = {word}(x, i + 1u).x;", mx.array(WORDS), size=256 // width)


@pytest.mark.parametrize(
    ("kind", "dtype"), [("HALF", mx.float16), ("BFLOAT", mx.bfloat16)]
)
def test_numbers_of_words(kind, dtype):
    """Each of the 65536, bit by bit, as the low one, the high one and alone."""
    x = mx.array(ALL).view(dtype)
    want = np.array(x.astype(mx.float32)).view(np.uint32)
    is_nan = (want & 0x7FFFFFFF) > 0x7F800000
    for value in (
        f"{kind}_OF(x[i])",
        f"{kind}_LOW(0xABCD0000u | as_type<ushort>(x[i]))",
        f"{kind}_HIGH(uint(as_type<ushort>(x[i])) << 16 | 0x1234u)",
    ):
        y = run(f"y[i] = as_type<uint>({value});", x, size=2**16)
        np.testing.assert_array_equal(y[~is_nan], want[~is_nan])
        assert ((y[is_nan] & 0x7FFFFFFF) > 0x7F800000).all()


@pytest.mark.parametrize(
    ("body", "findings"),
    [
        ("y[i] = LOAD4(x, i).w + LOAD2(x, i).y;", []),
        ("float f = HALF_LOW(x[i]) + HALF_HIGH(x[i]);\ny[i] = uint(f);", []),
        ("y[i] = as_type<uint>(BFLOAT_LOW(x[i]) + BFLOAT_HIGH(x[i]));", []),
        ("auto row = x + 4u;\ny[i] = LOAD4(row, i).w;", []),
        (
            "y[i] = ((const uint4*)(x))[i].w;",
            ["without address space: const uint4", "'const uint4 .* is not allowed"],
        ),
        (
            "threadgroup uint z[8];\ny[i] = LOAD4(z, i).w;",
            [r"to 'const .*\(1\)\)\) uint4 \*' is not allowed"],
        ),
        ("y[i] = ushort2(1, 2, 3).x;", ["no matching function .* 'make_ushort2'"]),
    ],
)
def test_lint_knows_the_words(body, findings):
    given, options = arguments(body, mx.array(WORDS), size=32)
    found = lint(metal_text(*given, **options))
    assert len(found) == len(findings), found
    for finding, wanted in zip(found, findings, strict=True):
        assert re.search(wanted, finding), found
