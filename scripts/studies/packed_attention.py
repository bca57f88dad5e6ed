"""Time attention with packed heads against MLX's own, one full layer of each family.

    python scripts/studies/packed_attention.py
    python scripts/studies/packed_attention.py --family 31b --keys 1024

Random queries, keys and values in the sizes of the published models, over slabs that
are full but for a few slots. Both take turns; medians of ratios are shown. On the CPU
results must also have the same bytes: the exit status is 1 where they have not.
"""

from __future__ import annotations

import argparse
import sys
import time
from statistics import median

import mlx.core as mx

from mlx_gemma_mtp.constants import FULL
from mlx_gemma_mtp.drafting.bytes_read import num_kv_heads
from mlx_gemma_mtp.machine import describe_machine
from mlx_gemma_mtp.models.attention import SharedKV, packed
from mlx_gemma_mtp.models.families import FAMILIES, GLOBAL_HEAD_DIM, Family

_KEYS = (1024, 8192, 32768)
_QUERIES = (1, 5)
_FREE = 20  # slots behind the newest token
_TURNS = 7


def main() -> int:
    """Measure and print; the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--family", nargs="+", choices=FAMILIES, default=FAMILIES)
    parser.add_argument("--keys", nargs="+", type=int, default=_KEYS)
    args = parser.parse_args()
    print(describe_machine(str(mx.default_device())))
    print(
        f"{'family':8} {'type':9} {'keys':>6} {'queries':>7} {'MLX ms':>8} {'ratio':>6}"
    )
    is_same = True
    for dtype in (mx.bfloat16, mx.float32):
        for name in args.family:
            for keys in args.keys:
                for queries in _QUERIES:
                    is_same &= _compare(FAMILIES[name], dtype, keys, queries)
    return 0 if is_same else 1


def _compare(family: Family, dtype: mx.Dtype, keys: int, queries: int) -> bool:
    """One line; whether the bytes are the same, or need not be."""
    heads = family.target["num_attention_heads"]
    shape = (1, num_kv_heads(family, FULL), keys, GLOBAL_HEAD_DIM)
    q = mx.random.normal((1, heads, queries, GLOBAL_HEAD_DIM)).astype(dtype)
    k, v = ((mx.random.normal(shape) * s).astype(dtype) for s in (0.1, 1.0))
    newest = keys - _FREE + mx.arange(queries)
    kv = SharedKV(k, v, (mx.arange(keys) <= newest[:, None])[None, None])
    mx.eval(q, kv.keys, kv.values, kv.mask)
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(_TURNS):
        order = (0, 1) if turn % 2 else (1, 0)
        found = [mx.array(0), mx.array(0)]
        for side in order:
            start = time.perf_counter()
            found[side] = packed(q, kv, 1.0) if side else _by_mlx(q, kv)
            mx.eval(found[side])
            times[side].append(time.perf_counter() - start)
    ratio = median(own / stock for stock, own in zip(*times, strict=True))
    kind = str(dtype).rpartition(".")[2]
    print(
        f"{family.name:8} {kind:9} {keys:6} {queries:7} {median(times[0]) * 1e3:8.2f} "
        f"{ratio:6.2f}",
        flush=True,
    )
    is_on_cpu = mx.default_device() == mx.Device(mx.cpu)
    return not is_on_cpu or bool(mx.array_equal(found[0], found[1]).item())


def _by_mlx(queries: mx.array, kv: SharedKV) -> mx.array:
    return mx.fast.scaled_dot_product_attention(
        queries, kv.keys, kv.values, scale=1.0, mask=kv.mask
    )


if __name__ == "__main__":
    sys.exit(main())
