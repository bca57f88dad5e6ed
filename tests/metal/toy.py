"""A kernel to test the harness with: softmax, argmax and logsumexp of rows.

It has what a kernel of this project has: a pass that keeps a running maximum and sum
per thread, reductions over simdgroups, a second level of them through threadgroup
memory, and outputs of several dtypes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

SOURCE = """
    constexpr uint NO_INDEX = 0xFFFFFFFFu;
    threadgroup float group_max[32];
    threadgroup float group_sum[32];
    threadgroup uint group_index[32];

    uint row = threadgroup_position_in_grid.y;
    uint thread_id = thread_position_in_threadgroup.x;
    uint num_threads = threads_per_threadgroup.x;
    uint lane = thread_index_in_simdgroup;
    uint simdgroup = simdgroup_index_in_threadgroup;
    uint num_simdgroups = simdgroups_per_threadgroup;
    const uint V = logits_shape[1];
    const device T* row_logits = logits + row * V;

    // One thread: the largest logit it meets, where, and the sum relative to it.
    float largest = -INFINITY;
    float sum = 0.0f;
    uint index = NO_INDEX;
    for (uint i = thread_id; i < V; i += num_threads) {
        float logit = static_cast<float>(row_logits[i]) * scale;
        if (logit > largest) {
            sum *= metal::exp(largest - logit);
            largest = logit;
            index = i;
        }
        sum += metal::exp(logit - largest);
    }

    // One simdgroup; of equal logits the first counts.
    float simd_largest = simd_max(largest);
    uint simd_index = simd_min(largest == simd_largest ? index : NO_INDEX);
    float rescaled = sum ? sum * metal::exp(largest - simd_largest) : 0.0f;
    float simd_total = simd_sum(rescaled);
    if (lane == 0) {
        group_max[simdgroup] = simd_largest;
        group_sum[simdgroup] = simd_total;
        group_index[simdgroup] = simd_index;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    // The threadgroup: every simdgroup reduces what all of them left.
    float other_max = lane < num_simdgroups ? group_max[lane] : -INFINITY;
    float other_sum = lane < num_simdgroups ? group_sum[lane] : 0.0f;
    uint other_index = lane < num_simdgroups ? group_index[lane] : NO_INDEX;
    float row_max = simd_max(other_max);
    uint row_index = simd_min(other_max == row_max ? other_index : NO_INDEX);
    float row_sum = simd_sum(other_sum * metal::exp(other_max - row_max));

    // Second pass.
    for (uint i = thread_id; i < V; i += num_threads) {
        float logit = static_cast<float>(row_logits[i]) * scale;
        probs[row * V + i] = static_cast<T>(metal::exp(logit - row_max) / row_sum);
    }
    if (thread_id == 0) {
        argmax[row] = row_index;
        logsumexp[row] = row_max + metal::log(row_sum);
    }
"""


@dataclass(frozen=True)
class ToyKernel:
    """What the harness asks of a kernel."""

    name: str
    source: str
    header: str
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]

    def but(self, old: str, new: str) -> ToyKernel:
        """The same with one change in its source."""
        assert self.source.count(old) >= 1, f"not in the source: {old}"
        return replace(self, source=self.source.replace(old, new))


TOY = ToyKernel(
    name="toy_softmax",
    source=SOURCE,
    header="",
    input_names=("logits", "scale"),
    output_names=("probs", "argmax", "logsumexp"),
)
SCALE = 0.7


def arguments(
    logits: mx.array,  # [B, V]
    *,
    num_threads: int = 256,
) -> tuple[list[mx.array], dict[str, Any]]:
    """The inputs of the toy, and how it is launched."""
    B, V = logits.shape
    launch = {
        "template": [("T", logits.dtype)],
        "grid": (num_threads, B, 1),
        "threadgroup": (num_threads, 1, 1),
        "output_shapes": [(B, V), (B,), (B,)],
        "output_dtypes": [logits.dtype, mx.uint32, mx.float32],
    }
    return [logits, mx.array(SCALE)], launch


def example_logits(B: int = 3, V: int = 5000) -> np.ndarray:
    """Logits [B, V] whose largest value stands in several places of each row."""
    logits = np.random.default_rng(0).normal(size=(B, V)).astype(np.float32) * 4
    logits[:, [17, 19, 273, V - 990]] = 30
    return logits


def expected(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Softmax [B, V], argmax [B] and logsumexp [B] in float64."""
    scaled = logits.astype(np.float64) * np.float32(SCALE)
    shifted = scaled - scaled.max(axis=1, keepdims=True)
    total = np.exp(shifted).sum(axis=1, keepdims=True)
    logsumexp = scaled.max(axis=1) + np.log(total[:, 0])
    return np.exp(shifted) / total, scaled.argmax(axis=1), logsumexp
