"""What of a drafter trains: all of it, or low-rank adapters on its matrices.

An adapter adds scale * (x a) b to what a matrix gives. b starts as zero, so an adapted
drafter drafts what it drafted before, until it is trained. Knows nothing of losses or
of files.

Source: LoRA, arXiv 2106.09685, equation 3; the layer is mlx-lm's ``LoRALinear``.
"""

from __future__ import annotations

import math
from typing import cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.lora import LoRALinear

from ...errors import RequestError
from ...models.drafter import Drafter

_Packed = nn.QuantizedLinear | nn.QuantizedEmbedding
_ORDERING = "token_ordering"


def trainable(drafter: Drafter) -> None:
    """Let everything train but the centroid head's ``token_ordering``, which is ids.

    Args:
        drafter: A plain drafter, without adapters; it is changed.
    """
    _check_plain(drafter)
    drafter.unfreeze()
    if drafter.masked_embedding is not None:
        drafter.masked_embedding.freeze(recurse=False, keys=_ORDERING)


def add_adapters(drafter: Drafter, *, rank: int, scale: float, seed: int) -> None:
    """Let nothing train but an adapter on each matrix; the tied head has none.

    Args:
        drafter: A plain drafter; it is changed.
        rank: Width between a and b, >= 1.
        scale: What the adapter's result is multiplied by.
        seed: Decides a, 0..2**64 - 1. Adapters are float32.

    Raises:
        RequestError: The rank is below 1.
    """
    if rank < 1:
        raise RequestError(
            f"the adapters' rank must be 1 or more: got {rank}. 8 is usual."
        )
    _check_plain(drafter)
    drafter.freeze()
    matrices = sorted(
        (path, module)
        for path, module in drafter.named_modules()
        if isinstance(module, nn.Linear)
    )
    keys = mx.random.split(mx.random.key(seed), len(matrices))
    adapters = []
    for (path, linear), key in zip(matrices, keys, strict=True):
        adapter = LoRALinear.from_base(linear, r=rank, scale=scale)
        # mlx-lm's own start, from this seed instead of the process's.
        bound = 1 / math.sqrt(linear.weight.shape[1])
        shape = adapter.lora_a.shape
        adapter.lora_a = mx.random.uniform(-bound, bound, shape, key=key)
        adapters.append((path, adapter))
    drafter.update_modules(tree_unflatten(adapters))


def fuse_adapters(drafter: Drafter) -> None:
    """Put adapters into their matrices, which then are plain ones again.

    The sum is one of float32 and is rounded once, to the matrix's type; mlx-lm's own
    ``fuse()`` rounds what is added, too. Nothing trains any more.

    Args:
        drafter: A drafter; it is changed. One without adapters stays as it is.
    """
    fused = []
    for path, module in drafter.named_modules():
        if isinstance(module, LoRALinear):
            linear, weight = module.linear, module.linear.weight
            added = module.scale * (module.lora_a @ module.lora_b).T
            total = weight.astype(mx.float32) + added.astype(mx.float32)
            linear.weight = total.astype(weight.dtype)
            mx.eval(linear.weight)
            fused.append((path, linear))
    if fused:
        drafter.update_modules(tree_unflatten(fused))
        drafter.freeze()


def dequantized(drafter: Drafter) -> Drafter:
    """Return a drafter of plain modules with a drafter's weights, to train it.

    Args:
        drafter: Quantized or plain; it stays as it is.

    Returns:
        Another object. What was packed has the type of the norms.
    """
    dtype = drafter.model.norm.weight.dtype
    packed = {
        path: module
        for path, module in drafter.named_modules()
        if isinstance(module, _Packed)
    }
    weights = {
        name: array
        for name, array in _parameters(drafter).items()
        if name.rpartition(".")[0] not in packed
    }
    for path, module in packed.items():
        weights[f"{path}.weight"] = mx.dequantize(
            module.weight,
            module.scales,
            module.get("biases"),
            group_size=module.group_size,
            bits=module.bits,
            mode=module.mode,
        ).astype(dtype)
    plain = Drafter(drafter.config)
    plain.load_weights(list(weights.items()), strict=True)
    plain.eval()
    mx.eval(plain.parameters())
    return plain


def _check_plain(drafter: Drafter) -> None:
    kinds = (nn.QuantizedLinear, nn.QuantizedEmbedding, LoRALinear)
    for path, module in drafter.named_modules():
        assert not isinstance(module, kinds), f"{path} is no plain module"


def _parameters(drafter: Drafter) -> dict[str, mx.array]:
    return dict(cast(list[tuple[str, mx.array]], tree_flatten(drafter.parameters())))
