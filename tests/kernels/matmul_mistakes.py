"""Mistakes to seed into the text of the kernel that multiplies rows by a matrix.

They are seeded into a text of 3 rows and 2 outputs at a time; each says what must find
it: wrong bits, an error of the launch, ThreadSanitizer, the lint, or that a compiler's
choice changes bits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import mlx.core as mx

from mlx_gemma_mtp.kernels.common import Kernel
from mlx_gemma_mtp.kernels.matmul import DENSE, Form

FOUR = Form(4, 64, mx.bfloat16)
EIGHT = Form(8, 64, mx.bfloat16)
WHOLE = Form(DENSE, 0, mx.bfloat16)
HALVES = Form(DENSE, 0, mx.float16)
ROWS, COLUMNS = 3, 2
OUTPUTS, INPUTS = 19, 704


@dataclass(frozen=True)
class Mistake:
    """One change of the text.

    Attributes:
        name: What is wrong.
        old: What stands in the text.
        new: What stands there instead, everywhere.
        error: What a MetalError, a race or a finding must match, where there is one.
        form: Of the text.
        outputs: N.
        inputs: K.
    """

    name: str
    old: str
    new: str
    error: str = ""
    form: Form = FOUR
    outputs: int = OUTPUTS
    inputs: int = INPUTS

    def of(self, kernel: Kernel) -> Kernel:
        """A kernel with this mistake."""
        source = kernel.source.replace(self.old, self.new)
        assert source != kernel.source, f"{self.old!r} does not occur in the text"
        return replace(kernel, name=f"{kernel.name}_mistake", source=source)


# The launch ends, and bits are wrong.
WRONG = (
    Mistake("nibbles taken from four bits higher", "p0 >> 8", "p0 >> 4"),
    Mistake("a mask that misses a bit", "0x000F000Fu", "0x000F0007u"),
    Mistake("bits beside another power of two", "0x54005400u", "0x64006400u"),
    Mistake("halves of a bfloat word exchanged", "BFLOAT_LOW(x1", "BFLOAT_HIGH(x1"),
    Mistake("weights in the order of x", "BFLOAT_LOW(x0.z)", "BFLOAT_LOW(x0.y)"),
    Mistake("groups twice as long", "lane / 8u", "lane / 16u"),
    Mistake("a step of the tree left out", "T(r4_0)", "T(r3_0)"),
    Mistake(
        "terms from the last to the first",
        "uint c = lane; c < chunks; c += 32u",
        "uint c = lane + (chunks - 1u - lane) / 32u * 32u; c < chunks; c -= 32u",
        form=WHOLE,
    ),
    Mistake("two masks exchanged", "(p1 & 0x000F000Fu)", "(p1 & 0x00F000F0u)"),
    Mistake("bytes of the wrong word", "p0.x >> 8", "p0.y >> 8", form=EIGHT),
    Mistake(
        "halves of a pair exchanged", "w0_0 = fma(HALF_LOW", "w0_0 = fma(HALF_HIGH"
    ),
    Mistake("a dense word twice", "(p0.y)", "(p0.x)", form=WHOLE),
    Mistake("a bfloat read as a half", "HALF_LOW", "BFLOAT_LOW", form=HALVES),
    Mistake("the constant of a bias left out", "fma(-1024.0f, s0, b0)", "b0"),
    Mistake("the constant of the other bits", "fma(-64.0f,", "fma(-1024.0f,"),
    Mistake("scales of another output", "scales_row1[g]", "scales_row0[g]"),
    Mistake("groups that stand still", "g += 4u;", ""),
    Mistake("rows of x too near", "x + 8u * chunks", "x + 4u * chunks * 2u - 8u"),
    Mistake("steps that overlap", "c += 32u", "c += 31u"),
    Mistake("a step too few", "c < chunks", "c + 32u < chunks"),
    Mistake("one row's sum in another's place", "x2_0, a2_0)", "x1_0, a2_0)"),
    Mistake("a step of the tree twice", "(r2_0, 2u)", "(r2_0, 4u)"),
    Mistake("what is kept is given", "(is_high_16 ? a0_0 : a0_1)", "a0_1"),
    Mistake(
        "outputs and rows exchanged", "place / 2u * outputs + n", "n * 3u + place / 2u"
    ),
)

# The launch stops and says why.
STOPPING = (
    Mistake(
        "outputs past the last one",
        "min(first, max(outputs, 2u) - 2u)",
        "first",
        r"memory fault: buffer '(w|scales|biases)' at byte \d+",
    ),
    Mistake(
        "a row too many where outputs are few",
        "min(1u, outputs - 1u)",
        "1u",
        r"memory fault: buffer 'w' at byte \d+ of 352",
        outputs=1,
    ),
    Mistake(
        "a store without its guard",
        " && n < outputs",
        "",
        r"buffer 'y' written up to 16 bytes past its end",
        outputs=1,
    ),
    Mistake(
        "a step too many",
        "c < chunks",
        "c < chunks + 32u",
        r"memory fault: buffer '\w+' at byte \d+",
    ),
    Mistake(
        "lanes without work return",
        "float a0_0 = 0.0f;",
        "if (lane >= chunks) return;\n  float a0_0 = 0.0f;",
        r"divergent simd_shuffle_xor at line \d+ `float r0_0",
        inputs=64,
    ),
    Mistake(
        "a row of x that begins within a piece",
        "x + 8u * chunks",
        "x + 8u * chunks - 4u",
        r"an address must be a multiple of 16 at line \d+ `uint4 x1 = LOAD4",
    ),
    Mistake(
        "groups that begin with the outputs to store",
        "base * groups",
        "first * groups",
        r"memory fault: buffer '(scales|biases)' at byte \d+",
    ),
    Mistake(
        "weights that begin with the outputs to store",
        "base * chunks",
        "first * chunks",
        r"memory fault: buffer 'w' at byte \d+",
    ),
    Mistake(
        "some lanes exchange",
        "float r4_0 = r3_0 +",
        "float r4_0 = r3_0;\n  if (is_high_2) r4_0 = r3_0 +",
        r"divergent simd_shuffle_xor",
    ),
)

# Bits are right, in this schedule: what ThreadSanitizer reports.
RACING = (
    Mistake(
        "outputs that two simdgroups store",
        "n >= first && ",
        "",
        r"write at line \d+ `y\[place.*write at line \d+ `y\[place",
    ),
    Mistake(
        "lanes that store the same sum",
        "is_first && n",
        "n",
        r"write at line \d+ `y\[place.*write at line \d+ `y\[place",
    ),
)

# Bits are right only if a compiler fuses.
LEFT_TO_THE_COMPILER = (
    Mistake(
        "a sum that a compiler may fuse",
        "a0_0 = fma(w0_0, x0_0, a0_0);",
        "a0_0 = w0_0 * x0_0 + a0_0;",
        form=Form(8, 32, mx.float16),
    ),
    Mistake(
        "sums that a compiler may fuse",
        "a1_1 = fma(w1_7, x1_7, a1_1);",
        "a1_1 += w1_7 * x1_7;",
        form=Form(8, 32, mx.float16),
    ),
)

# What Metal's compiler refuses.
REFUSED = (
    Mistake(
        "a pointer without address space",
        "auto x_row1 =",
        "const bfloat16_t* x_row1 =",
        r"pointer or reference without address space: x_row1",
    ),
    Mistake(
        "a cast without address space",
        "LOAD4(x_row0, c)",
        "((const uint4*)(x_row0))[c]",
        r"pointer or reference without address space: const uint4",
    ),
    Mistake("a double", "float s0", "double s0", r"'float' to 'double'"),
    Mistake(
        "a swizzle of what is no vector",
        "p1.x",
        "w_row1[at].x",
        r"member reference base type .* is not a structure",
        form=EIGHT,
    ),
    Mistake(
        "a word of CUDA",
        "simd_shuffle_xor(",
        "__shfl_xor_sync(0xFFFFFFFFu, ",
        r"use of undeclared identifier '__shfl_xor_sync'",
    ),
)

# Several matrices in one launch: of 3 rows, by 2 outputs of both, or of one.
GATED = (
    Mistake("the gate for what it lets through", "simd_shuffle_xor(r4_0, 16u)", "r4_0"),
    Mistake("gate and up exchanged", "place % 2u == 0u", "place % 2u == 1u"),
    Mistake(
        "a partner one step nearer",
        "simd_shuffle_xor(r4_0, 16u)",
        "simd_shuffle_xor(r4_0, 8u)",
    ),
    Mistake("the gate's weights twice", "w_row1 = w1", "w_row1 = w"),
    Mistake(
        "the gate's scales for up", "scales_row1 = scales1", "scales_row1 = scales"
    ),
    Mistake(
        "the gate's biases for up", "biases_row3 = biases1", "biases_row3 = biases"
    ),
    Mistake(
        "outputs of up one further", "w_row1 = w1 + min(0u", "w_row1 = w1 + min(1u"
    ),
    Mistake("a constant of float32", "float(T(0.044715f))", "0.044715f"),
    Mistake(
        "a product that is not rounded",
        "float gate = float(T(r4_0))",
        "float gate = r4_0",
    ),
    Mistake("a square for a cube", "gate * gate * gate", "gate * gate"),
    Mistake("gelu without its half", "0.5f * gate", "gate"),
    Mistake("a sigmoid's place", "1.0f + bend", "bend"),
)
GATED_BY = (
    Mistake("values of the first row", "values[place / 4u * outputs + n]", "values[n]"),
    Mistake("values that are gates", "0.5f * gate", "0.5f * float(values[n])"),
)
APART = (
    Mistake("the first matrix for all", "own_w = w1", "own_w = w"),
    Mistake("scales of the first", "own_scales = scales1", "own_scales = scales"),
    Mistake("biases of the last", "own_biases = biases1", "own_biases = biases2"),
    Mistake("a matrix too early", "group >= groups1", "group + 1u >= groups1"),
    Mistake("groups counted from the first matrix", "group -= groups2;", ""),
)
APART_STOPPING = (
    Mistake(
        "as many outputs as the first matrix",
        "outputs = uint(w1_shape[0]);",
        "",
        r"memory fault: buffer '\w+' at byte \d+|written up to 16 bytes past its end",
    ),
)
