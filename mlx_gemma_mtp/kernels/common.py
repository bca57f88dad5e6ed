"""What kernels share: the launch, the device's dialect, random numbers, the order.

A body is written once, in Metal's words. ``_CUDA`` says the same words in CUDA, so the
body also builds there. The rules that keep it so, and that keep Metal's compilers of
all versions content:

- ASCII only, float arithmetic only, values converted to float where they are loaded;
- ``threadgroup`` arrays are declared in the body, helpers take values, no pointers, and
  nothing says ``device``;
- every input has at least ``MIN_ELEMENTS`` elements;
- a threadgroup is one-dimensional and whole simdgroups, ``MAX_THREADS`` at most: more
  may not fit beside what the registers of a kernel leave on M1 and M2.

This file knows nothing of what the kernels compute.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import mlx.core as mx

VARIABLE = "MLX_GEMMA_MTP_KERNELS"

MAX_THREADS = 256  # of a threadgroup
MIN_ELEMENTS = 8  # of an input; Metal passes fewer in another address space
LIST = 64  # tokens of a row that a decision looks at
NO_ID = 0x7FFFFFFF  # of what fills a list that has fewer
ROW_FLOATS = 8  # temp, top_p, min_p, and room
ROW_WORDS = 8  # seed (low, high), mode, top_k, offset, and room
GREEDY, COUPLED, BLOCK = 0, 1, 2  # modes of a row

# Metal's words in CUDA, all but "device", which __device__ itself is made of. A warp is
# a simdgroup. Every warp function needs all lanes.
_CUDA = r"""
#ifndef INFINITY
#define INFINITY __int_as_float(0x7F800000)
#endif
typedef unsigned int uint;
#define threadgroup __shared__
#define thread_index_in_threadgroup (threadIdx.x)
#define thread_index_in_simdgroup (threadIdx.x & 31u)
#define simdgroup_index_in_threadgroup (threadIdx.x >> 5)
#define threadgroup_position_in_grid blockIdx
#define HELPER __device__ inline
#define BARRIER() __syncthreads()
#define mulhi(a, b) __umulhi(a, b)
template <class D, class S> __device__ inline D as_type(S value) {
  static_assert(sizeof(D) == sizeof(S), "as_type keeps the size");
  D result;
  memcpy(&result, &value, sizeof(D));
  return result;
}
template <class T> __device__ inline T simd_sum(T x) {
  for (int o = 16; o; o >>= 1) x = x + __shfl_xor_sync(0xFFFFFFFFu, x, o);
  return x;
}
template <class T> __device__ inline T simd_max(T x) {
  for (int o = 16; o; o >>= 1) {
    T other = __shfl_xor_sync(0xFFFFFFFFu, x, o);
    x = other > x ? other : x;
  }
  return x;
}
template <class T> __device__ inline T simd_min(T x) {
  for (int o = 16; o; o >>= 1) {
    T other = __shfl_xor_sync(0xFFFFFFFFu, x, o);
    x = other < x ? other : x;
  }
  return x;
}
template <class T> __device__ inline T simd_prefix_exclusive_sum(T x) {
  T sum = x;
  for (uint o = 1; o < 32; o <<= 1) {
    T other = __shfl_up_sync(0xFFFFFFFFu, sum, o);
    if ((threadIdx.x & 31u) >= o) sum = sum + other;
  }
  T before = __shfl_up_sync(0xFFFFFFFFu, sum, 1);
  return (threadIdx.x & 31u) ? before : T(0);
}
template <class T> __device__ inline T simd_broadcast(T x, unsigned short lane) {
  return __shfl_sync(0xFFFFFFFFu, x, lane);
}
template <class T> __device__ inline T simd_shuffle_xor(T x, unsigned short mask) {
  return __shfl_xor_sync(0xFFFFFFFFu, x, mask);
}
#define LOAD2(name, index) (((const uint2*)(name))[index])
#define LOAD4(name, index) (((const uint4*)(name))[index])
#define HALF_LOW(word) __low2float(as_type<__half2>(word))
#define HALF_HIGH(word) __high2float(as_type<__half2>(word))
#define BFLOAT_LOW(word) __uint_as_float((word) << 16)
#define BFLOAT_HIGH(word) __uint_as_float((word) & 0xFFFF0000u)
#define HALF_OF(value) float(value)
#define BFLOAT_OF(value) float(value)
#define TURN_COS(angle) cos(angle)
#define TURN_SIN(angle) sin(angle)
"""

# LOAD2, LOAD4: piece `index` of 8 or 16 bytes of an input, by one instruction; the
# input must be aligned to them. HALF_, BFLOAT_: one of the two numbers in a word as a
# float; _OF: a number that stands alone. A bfloat is neither shifted nor converted:
# either would cost M1 and M2 four cycles. TURN_: as MLX's own rotation has them.
_METAL = r"""
#include <metal_simdgroup>
#define HELPER inline
#define BARRIER() threadgroup_barrier(mem_flags::mem_threadgroup)
#define LOAD2(name, index) (((const device uint2*)(name))[index])
#define LOAD4(name, index) (((const device uint4*)(name))[index])
#define HALF_LOW(word) float(as_type<half2>(word).x)
#define HALF_HIGH(word) float(as_type<half2>(word).y)
#define BFLOAT_LOW(word) as_type<float>(ushort2(0, as_type<ushort2>(word).x))
#define BFLOAT_HIGH(word) as_type<float>((word) & 0xFFFF0000u)
#define HALF_OF(value) float(value)
#define BFLOAT_OF(value) as_type<float>(ushort2(0, as_type<ushort>(value)))
#define TURN_COS(angle) metal::fast::cos(angle)
#define TURN_SIN(angle) metal::fast::sin(angle)
"""

# The numbers of noise.py, the order of sampling.most_likely, mlx-lm's soft-cap.
_SHARED = r"""
struct Words {
  uint a, b, c, d;
};

// Philox 4x32-10 (Salmon et al. 2011).
HELPER Words philox(uint c0, uint c1, uint c2, uint c3, uint k0, uint k1) {
  for (int i = 0; i < 10; i++) {
    uint hi0 = mulhi(0xD2511F53u, c0);
    uint lo0 = 0xD2511F53u * c0;
    uint hi1 = mulhi(0xCD9E8D57u, c2);
    uint lo1 = 0xCD9E8D57u * c2;
    c0 = hi1 ^ c1 ^ k0;
    c1 = lo1;
    c2 = hi0 ^ c3 ^ k1;
    c3 = lo0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  Words words;
  words.a = c0;
  words.b = c1;
  words.c = c2;
  words.d = c3;
  return words;
}

HELPER float uniform_of(uint bits) {
  return (float(bits >> 9) + 0.5f) * 1.1920928955078125e-07f;
}

// The noise of one token; four neighbouring ids share a block, a word each.
HELPER float gumbel_of(Words words, uint id) {
  uint word = id & 3u;
  uint bits = word < 2u ? (word == 0u ? words.a : words.b)
                        : (word == 2u ? words.c : words.d);
  return -log(-log(uniform_of(bits)));
}

HELPER float uniform_at(uint position, uint stream, uint offset, uint k0, uint k1) {
  return uniform_of(philox(0u, position, stream, offset, k0, k1).a);
}

HELPER float gumbel_at(
    uint id, uint position, uint stream, uint offset, uint k0, uint k1) {
  return gumbel_of(philox(id >> 2, position, stream, offset, k0, k1), id);
}

// Whole numbers that sort like floats, smallest first.
HELPER uint order_of(float value) {
  uint bits = as_type<uint>(value);
  return (bits >> 31) ? ~bits : (bits | 0x80000000u);
}

HELPER float value_of(uint order) {
  return as_type<float>((order >> 31) ? (order & 0x7FFFFFFFu) : ~order);
}

HELPER float capped(float value, float cap) {
  return cap > 0.0f ? cap * tanh(value / cap) : value;
}

// The fold of all threads' values, for threadgroups of 8 simdgroups. The body names
// its lane and simdgroup, gives 8 cells of threadgroup memory, and says what changes no
// fold.
#define REDUCE(result, fold, cells, value, nothing)  \
  {                                                  \
    auto folded = fold(value);                       \
    if (lane == 0u) cells[simdgroup] = folded;       \
    BARRIER();                                       \
    result = fold(lane < 8u ? cells[lane] : nothing); \
    BARRIER();                                       \
  }
"""


@dataclass(frozen=True)
class Kernel:
    """One kernel's text.

    Attributes:
        name: What it is called.
        input_names: Names of the inputs in the source.
        output_names: Names of the outputs in the source.
        source: The body.
        helpers: What it calls, in the words of both dialects.
    """

    name: str
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    source: str
    helpers: str = _SHARED

    @property
    def header(self) -> str:
        """What stands before the body on Metal."""
        return _METAL + self.helpers

    @property
    def cuda_header(self) -> str:
        """What stands before the body on CUDA."""
        return _CUDA + self.helpers


def bits_of(number: float) -> int:
    """A positive float32 as a whole number, which a kernel's template can have.

    A number in the text costs no launch; ``as_type<float>`` makes a float of it.
    """
    return int.from_bytes(struct.pack("<f", number), "little")


def padded(array: mx.array) -> mx.array:
    """An array without its shape, zeros behind it where it is too small an input."""
    flat = array.reshape(-1) if array.size else mx.zeros((1,), dtype=array.dtype)
    missing = MIN_ELEMENTS - flat.size
    return mx.pad(flat, (0, missing)) if missing > 0 else flat


def gpu() -> str | None:
    """What runs MLX's own operations: ``"metal"``, ``"cuda"``, None for the CPU."""
    if mx.default_device() != mx.gpu:
        return None
    if mx.metal.is_available():
        return "metal"
    return "cuda" if mx.cuda.is_available() else None


def backend() -> str:
    """Where kernels run: ``"metal"``, ``"cuda"``, or ``"ops"`` for plain operations.

    The variable ``MLX_GEMMA_MTP_KERNELS`` set to ``off`` leaves all to MLX.
    """
    is_off = os.environ.get(VARIABLE, "").strip().lower() == "off"
    return "ops" if is_off else gpu() or "ops"


def launch(
    kernel: Kernel,
    inputs: list[mx.array],
    *,
    template: Sequence[tuple[str, mx.Dtype | int | bool]],
    grid: tuple[int, int, int],
    threadgroup: tuple[int, int, int],
    output_shapes: Sequence[tuple[int, ...]],
    output_dtypes: Sequence[mx.Dtype],
) -> list[mx.array]:
    """Queue a kernel.

    Args:
        kernel: The kernel.
        inputs: Its inputs, each of eight elements or more.
        template: Values of the names that the source leaves open.
        grid: Threads, a multiple of ``threadgroup`` in every dimension.
        threadgroup: Threads of a group.
        output_shapes: Shapes of the outputs.
        output_dtypes: Types of the outputs.

    Returns:
        The outputs; every element is written by the kernel.
    """
    outputs = _built(kernel, backend())(
        inputs=inputs,
        template=list(template),
        grid=grid,
        threadgroup=threadgroup,
        output_shapes=list(output_shapes),
        output_dtypes=list(output_dtypes),
    )
    return list(outputs)


@cache
def _built(kernel: Kernel, where: str) -> Callable[..., Any]:
    """MLX's object of a kernel; each text is compiled once by MLX."""
    build: Callable[..., Any] = (
        mx.fast.cuda_kernel if where == "cuda" else mx.fast.metal_kernel
    )
    return build(
        name=f"mtp_{kernel.name}",
        input_names=list(kernel.input_names),
        output_names=list(kernel.output_names),
        source=kernel.source,
        header=kernel.cuda_header if where == "cuda" else kernel.header,
    )
