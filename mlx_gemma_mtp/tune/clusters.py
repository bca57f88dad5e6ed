"""Sorts a vocabulary into clusters of similar tokens, for a drafter's centroid head.

Every cluster has the same number of tokens. The vocabulary is cut in halves at the
median along the direction in which its points spread most, and the halves again, until
there are enough of them. Knows nothing of models.
"""

from __future__ import annotations

import mlx.core as mx

# Of the power iteration. The halves need not be cut along the very best direction.
_NUM_ITERATIONS = 12
_TINY = 1e-20  # keeps equal points, which spread in no direction, from a division by 0


def cluster_order(
    points: mx.array,  # [V, P]
    *,
    num_clusters: int,
    key: mx.array,
) -> mx.array:
    """Return the token ids in cluster order.

    Args:
        points: What tells tokens apart, float32, a row for each token.
        num_clusters: C, a power of two that divides V.
        key: Decides where the search for directions starts.

    Returns:
        Every id once, int32 [V]: entries c*V/C .. (c+1)*V/C - 1 are cluster c.
    """
    num_points, width = points.shape
    assert num_clusters & (num_clusters - 1) == 0, "halves give powers of two"
    assert num_points % num_clusters == 0, "clusters are of equal size"
    order = mx.arange(num_points, dtype=mx.int32)[None]
    parts = points[None]  # [parts, points of each, P]
    start = mx.random.normal((width, 1), key=key)
    while len(order) < num_clusters:
        nearest = mx.argsort(_along(parts, start), axis=1)
        half = order.shape[1] // 2
        order = mx.take_along_axis(order, nearest, axis=1).reshape(-1, half)
        parts = mx.take_along_axis(parts, nearest[..., None], axis=1)
        parts = parts.reshape(-1, half, width)
        mx.eval(order, parts)  # else every level's points stay in memory
    return order.flatten()


def _along(parts: mx.array, start: mx.array) -> mx.array:
    """Where each point lies along its part's widest direction, [parts, points]."""
    centred = parts - mx.mean(parts, axis=1, keepdims=True)
    spread = centred.swapaxes(1, 2) @ centred  # [parts, P, P]
    direction = mx.broadcast_to(start, (len(parts), *start.shape))
    for _ in range(_NUM_ITERATIONS):
        direction = spread @ direction
        length = mx.sqrt(mx.sum(direction * direction, axis=1, keepdims=True))
        direction = direction / mx.maximum(length, _TINY)
    return (centred @ direction).squeeze(-1)
