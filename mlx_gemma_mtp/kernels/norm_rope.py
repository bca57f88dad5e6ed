"""Norm and rotation of queries and keys, and the norm of values, in one launch.

A simdgroup has a head of a row. It loads the head once, adds up its squares, and turns
the normed numbers by the row's position: numbers i and i + D / 2 are a pair, and a lane
has some pairs that stand beside each other. Heads come out one behind the other, rows
within them, as attention reads them.

Numbers are rounded to the head's type where MLX's own operations round them: the norm,
its product with the weight, and the turned number. Angles are those of ``mx.fast.rope``
on Metal: float32, of the same frequencies. What a simdgroup adds up depends on D alone:
a row has the same bits whatever rows and heads are beside it.

This file knows nothing of layers and caches.
"""

from __future__ import annotations

import math
from functools import cache

import mlx.core as mx

from . import common
from .common import Kernel

MAX_DIMS = 512  # D
_SIMDGROUPS = 4  # of a threadgroup
_THREADS = 32 * _SIMDGROUPS
_DTYPES = (mx.float32, mx.float16, mx.bfloat16)
QUERIES, SHARED, SEPARATE = "queries", "shared", "separate"  # what is beside queries


def norm_rope(
    q: mx.array,
    k: mx.array | None = None,
    v: mx.array | None = None,
    *,
    q_weight: mx.array,
    k_weight: mx.array | None = None,
    eps: float,
    offset: mx.array,
    base: float | None = None,
    freqs: mx.array | None = None,
) -> tuple[mx.array, mx.array | None, mx.array | None]:
    """Norm and turn queries and keys, and norm values without a weight.

    Where there are no kernels, or none for the arrays, MLX's operations give it.

    Args:
        q: [B, L, Hq, D].
        k: [B, L, G, D]; None for a layer without keys of its own.
        v: [B, L, G, D], the very array ``k`` where keys are values; None with ``k``.
        q_weight: [D].
        k_weight: [D]; None with ``k``.
        eps: What is added to mean squares.
        offset: int32 [B] or more: the position of each row's first token. If it is
            ``common.padded`` once, no launch pads it.
        base: Of the rotation; None where there are ``freqs``.
        freqs: [D / 2] float32, tokens per radian, inf for pairs that do not turn; None
            where there is a ``base``.

    Returns:
        Queries [B, Hq, L, D], keys [B, G, L, D], and values [B, G, L, D]; None where
        there are none.
    """
    arrays = [a for a in (q, k, v, q_weight, k_weight) if a is not None]
    if common.backend() == "ops" or not _are_known(q, arrays):
        return plain(
            q,
            k,
            v,
            q_weight=q_weight,
            k_weight=k_weight,
            eps=eps,
            offset=offset,
            base=base,
            freqs=freqs,
        )
    B, L, num_queries, D = q.shape
    inputs, heads, kind = [q, q_weight], [num_queries], QUERIES
    if k is not None:
        assert v is not None
        assert k_weight is not None
        assert v.shape == k.shape == (B, L, k.shape[2], D), (q.shape, k.shape, v.shape)
        kind = SHARED if v is k else SEPARATE
        heads += [k.shape[2]] * 2
        inputs += [k, k_weight] if v is k else [k, k_weight, v]
    num_tasks = B * L * sum(heads[: 2 if kind == SHARED else 3])
    outputs = common.launch(
        kernel(kind, freqs is not None),
        [
            *inputs,
            common.padded(offset),
            *([] if freqs is None else [freqs]),
        ],
        template=[
            ("T", q.dtype),
            ("D", D),
            ("PAIRS", -(-D // 64)),
            ("EPS", common.bits_of(eps)),
            ("LOG2_BASE", 0 if base is None else common.bits_of(math.log2(base))),
        ],
        grid=(-(-num_tasks // _SIMDGROUPS) * _THREADS, 1, 1),
        threadgroup=(_THREADS, 1, 1),
        output_shapes=[(B, count, L, D) for count in heads],
        output_dtypes=[q.dtype] * len(heads),
    )
    turned, *others = outputs
    keys, values = others or (None, None)
    return turned, keys, values


def plain(
    q: mx.array,
    k: mx.array | None = None,
    v: mx.array | None = None,
    *,
    q_weight: mx.array,
    k_weight: mx.array | None = None,
    eps: float,
    offset: mx.array,
    base: float | None = None,
    freqs: mx.array | None = None,
) -> tuple[mx.array, mx.array | None, mx.array | None]:
    """The same by MLX's operations, bit by bit as mlx-lm's Gemma 4 attention has it."""
    offset = offset[: q.shape[0]]

    def normed(x: mx.array, weight: mx.array | None) -> mx.array:
        return mx.fast.rms_norm(x, weight, eps).transpose(0, 2, 1, 3)

    def turned(x: mx.array, weight: mx.array | None) -> mx.array:
        return mx.fast.rope(
            normed(x, weight),
            x.shape[-1],
            traditional=False,
            base=base,
            scale=1.0,
            offset=offset,
            freqs=freqs,
        )

    if k is None or v is None:
        return turned(q, q_weight), None, None
    return turned(q, q_weight), turned(k, k_weight), normed(v, None)


def _are_known(q: mx.array, arrays: list[mx.array]) -> bool:
    """Whether the kernel takes them: one type, heads of simdgroups' numbers."""
    D = q.shape[-1]
    return (
        q.dtype in _DTYPES
        and all(array.dtype == q.dtype for array in arrays)
        and D % 32 == 0
        and 32 <= D <= MAX_DIMS
        and q.size > 0
    )


@cache
def kernel(kind: str, has_freqs: bool) -> Kernel:
    """The kernel of queries alone, of keys that are values, or of separate ones."""
    names = {
        QUERIES: ("q", "q_weight"),
        SHARED: ("q", "q_weight", "k", "k_weight"),
        SEPARATE: ("q", "q_weight", "k", "k_weight", "v"),
    }[kind]
    outputs = ("q_out",) if kind == QUERIES else ("q_out", "k_out", "v_out")
    return Kernel(
        name=f"norm_rope_{kind}{'_freqs' if has_freqs else ''}",
        input_names=(*names, "offset", *(("freqs",) if has_freqs else ())),
        output_names=outputs,
        source=_source(kind, has_freqs),
        helpers="",
    )


def kernels() -> list[Kernel]:
    """All of them."""
    kinds = (QUERIES, SHARED, SEPARATE)
    return [kernel(kind, has) for kind in kinds for has in (False, True)]


def _source(kind: str, has_freqs: bool) -> str:
    """The body."""
    either = "(is_query ? q_weight[{at}] : k_weight[{at}])"
    weight = "q_weight[{at}]" if kind == QUERIES else either
    texts = {
        "COUNT": _COUNTS[kind],
        "POINTERS": _POINTERS[kind],
        "VALUES": _VALUES[kind],
        "LOW_WEIGHT": weight.format(at="pair"),
        "HIGH_WEIGHT": weight.format(at="pair + HALF"),
        "FREQUENCY": "1.0f / freqs[pair]" if has_freqs else _OF_BASE,
    }
    source = _SOURCE
    for name, text in texts.items():
        source = source.replace(f"<{name}>", text)
    return source


_OF_BASE = "exp2(-(float(pair) / float(HALF)) * as_type<float>(LOG2_BASE))"

# Heads of a row, of which a simdgroup has one.
_COUNTS = {
    QUERIES: "Q",
    SHARED: "Q + uint(k_shape[2])",
    SEPARATE: "Q + 2u * uint(k_shape[2])",
}

# Where the numbers of a simdgroup's head are, and go to: as values from `start` on.
_POINTERS = {
    QUERIES: """\
  auto x = q + (row * Q + head) * uint(D);
  auto out = q_out + ((batch * Q + head) * L + place) * uint(D);""",
    SHARED: """\
  uint G = uint(k_shape[2]);
  bool is_query = head < Q;
  uint own = is_query ? 0u : head - Q;
  uint start = ((batch * G + own) * L + place) * uint(D);
  auto x = is_query ? q + (row * Q + head) * uint(D) : k + (row * G + own) * uint(D);
  auto out =
      is_query ? q_out + ((batch * Q + head) * L + place) * uint(D) : k_out + start;""",
    SEPARATE: """\
  uint G = uint(k_shape[2]);
  bool is_query = head < Q;
  bool is_value = head >= Q + G;
  uint own = is_query ? 0u : (head - Q) % G;
  uint start = ((batch * G + own) * L + place) * uint(D);
  auto x = is_query ? q + (row * Q + head) * uint(D)
                    : (is_value ? v : k) + (row * G + own) * uint(D);
  auto out =
      is_query ? q_out + ((batch * Q + head) * L + place) * uint(D) : k_out + start;""",
}

# What becomes of values, which have a norm alone.
_VALUES = {
    QUERIES: "",
    SHARED: """
    if (!is_query) {
      v_out[start + pair] = T(low[i]);
      v_out[start + pair + HALF] = T(high[i]);
    }""",
    SEPARATE: """
    if (is_value) {
      v_out[start + pair] = T(low[i]);
      v_out[start + pair + HALF] = T(high[i]);
      continue;
    }""",
}

_SOURCE = """\
  // D: numbers of a head. PAIRS: of a lane. EPS, LOG2_BASE: bits.
  const uint HALF = uint(D) / 2u;
  uint lane = thread_index_in_simdgroup;
  uint L = uint(q_shape[1]);
  uint Q = uint(q_shape[2]);
  uint heads = <COUNT>;
  uint task = threadgroup_position_in_grid.x * 4u + simdgroup_index_in_threadgroup;
  if (task >= uint(q_shape[0]) * L * heads) return;  // the whole simdgroup
  uint head = task % heads;
  uint row = task / heads;
  uint batch = row / L;
  uint place = row % L;
<POINTERS>

  float low[PAIRS];
  float high[PAIRS];
  float sum = 0.0f;
  #pragma unroll
  for (int i = 0; i < PAIRS; i++) {
    uint pair = lane * uint(PAIRS) + uint(i);
    bool is_inside = pair < HALF;
    low[i] = is_inside ? float(x[pair]) : 0.0f;
    high[i] = is_inside ? float(x[pair + HALF]) : 0.0f;
    sum = fma(low[i], low[i], sum);
    sum = fma(high[i], high[i], sum);
  }
  float inverse = rsqrt(simd_sum(sum) / float(D) + as_type<float>(EPS));
  float position = float(uint(offset[batch]) + place);
  #pragma unroll
  for (int i = 0; i < PAIRS; i++) {
    uint pair = lane * uint(PAIRS) + uint(i);
    if (pair >= HALF) continue;
    low[i] = float(T(low[i] * inverse));
    high[i] = float(T(high[i] * inverse));<VALUES>
    float a = float(T(low[i] * float(<LOW_WEIGHT>)));
    float b = float(T(high[i] * float(<HIGH_WEIGHT>)));
    float angle = position * (<FREQUENCY>);
    float c = TURN_COS(angle);
    float s = TURN_SIN(angle);
    out[pair] = T(fma(a, c, -(b * s)));
    out[pair + HALF] = T(fma(a, s, b * c));
  }
"""
