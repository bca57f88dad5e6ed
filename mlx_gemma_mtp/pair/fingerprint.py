"""What it is that something was learnt of: the machine, versions, settings, weights.

Two pairs of one key decode alike and as fast as each other. Knows nothing of what is
learnt, nor where it is kept.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..machine import describe_machine, mlx_settings, system_version

_NUM_PLACES = 64  # elements of each array that are looked at


def learnt_key(
    arrays: Sequence[tuple[str, mx.array]], *, matmuls: str = ""
) -> dict[str, Any]:
    """What must be equal for something learnt to hold, JSON values.

    Args:
        arrays: The arrays of target and drafter with their names.
        matmuls: What tells apart the choices of what multiplies them; empty for MLX.
    """
    info = mx.device_info()
    device = [str(info[key]) for key in ("device_name", "architecture") if key in info]
    return {
        "machine": describe_machine(str(mx.default_device()), *device),
        "system": system_version(),
        "settings": mlx_settings(),
        "pair": fingerprint(arrays),
        **({"matmuls": matmuls} if matmuls else {}),
    }


def fingerprint(arrays: Sequence[tuple[str, mx.array]]) -> str:
    """A text that differs for arrays of other names, shapes, types or values.

    Of the values a sample is looked at: 64 elements of each array, spread over all its
    axes, whatever its size. Other training, quantization or fused adapters change far
    more than would slip through; a few changed elements need not be seen. An array that
    is still lazy is evaluated, as the first forward would, and stays so.

    Args:
        arrays: The arrays with their names, in an order that is always the same.
    """
    found = hashlib.sha256()
    places = random.Random(0)
    alike: dict[tuple[mx.Dtype, tuple[int, ...]], list[mx.array]] = {}
    for name, array in arrays:
        found.update(f"{name} {array.shape} {array.dtype}\n".encode())
        if array.size:
            part = _sample(array, places)
            alike.setdefault((part.dtype, part.shape[1:]), []).append(part)
    # Few large results: to read each sample by itself would take a GPU far longer.
    joined = [mx.concatenate(parts).view(mx.uint8) for parts in alike.values()]
    mx.eval(joined)
    for part in joined:
        found.update(np.array(part).tobytes())
    return found.hexdigest()


def module_values(model: nn.Module) -> dict[str, float | str]:
    """The numbers and texts that modules compute with, by their path.

    Such as the base of rope, the epsilon of a norm, the bits of a quantized matrix, the
    scale of an adapter.

    Args:
        model: Whose modules they are.
    """
    return {
        f"{path}.{name}": value
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, int | float | str) and not name.startswith("_")
    }


def _sample(array: mx.array, places: random.Random) -> mx.array:
    """A view of elements that stand in a grid, whose corner is chosen at random.

    Slices are views also of arrays that are not contiguous; flattening would copy.
    """
    if not array.ndim:
        return array.reshape(1)
    most = max(round(_NUM_PLACES ** (1 / array.ndim)), 1)
    where = []
    for size in array.shape:
        count = min(size, most)
        step = size // count
        first = places.randrange(size - (count - 1) * step)
        where.append(slice(first, first + (count - 1) * step + 1, step))
    return array[tuple(where)]
