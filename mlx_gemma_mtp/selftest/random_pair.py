"""Pairs of random weights in the shapes of the published families.

Speed and exactness depend on shapes, not on what weights say, so both can be looked at
where no checkpoint is at hand: nothing is read or downloaded. A pair may have fewer
layers and tokens than the published one and is otherwise that.

Numbers are made in the type they are kept in, packed ones as packed words, one tensor
at a time: beyond the pair no more memory is used than twice its largest tensor.
"""

from __future__ import annotations

import math
from typing import cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models import gemma4_text

from ..errors import RequestError
from ..models.drafter import Drafter
from ..models.published import drafter_config, text_config
from ..pair.pair import Pair

_WORD_BYTES = 4
_MIN_DRAFTER_BITS = 8  # of a drafter with a centroid head, as the converter writes it


def random_pair(
    family: str,
    *,
    num_layers: int | None = None,
    vocab_size: int | None = None,
    bits: int | None = None,
    group_size: int = 64,
    dtype: mx.Dtype = mx.bfloat16,
    seed: int = 0,
) -> Pair:
    """A target and a drafter of random weights in a published family's shapes.

    Args:
        family: One of ``FAMILIES``, upper or lower case.
        num_layers: Layers of the target to keep, as in ``text_config``; None for all.
        vocab_size: Tokens to keep; None for all.
        bits: Bits of a quantized weight; None for float weights. As in a converted
            pair, a router and a drafter's projections have 8, and so has a drafter
            with a centroid head, whose centroids are float.
        group_size: Quantized weights with one scale.
        dtype: Type of float weights and of activations.
        seed: The same one gives the same weights.

    Raises:
        RequestError: No such family, a number outside its range, or a mixture of
            experts in a type that the CPU cannot run.
    """
    target, drafter = skeletons(family, num_layers=num_layers, vocab_size=vocab_size)
    is_half_mixture = target.args.enable_moe_block and dtype != mx.float32
    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    if is_half_mixture and bits is None and on_cpu:
        raise RequestError(
            f"{family} must be float32 or quantized on the CPU: got {dtype}. Pass "
            "bits=4, or dtype=mx.float32."
        )
    if bits is not None:
        _quantize(target, drafter, bits=bits, group_size=group_size)
    for number, module in enumerate((target, drafter)):
        _fill(module, dtype, mx.random.key(2 * seed + number))
        module.eval()
    return Pair(
        target,
        drafter,
        target_source=f"random weights in the shapes of {family}",
        drafter_source=f"drafter of random weights in the shapes of {family}",
    )


def skeletons(
    family: str, *, num_layers: int | None = None, vocab_size: int | None = None
) -> tuple[gemma4_text.Model, Drafter]:
    """The float modules of a pair, whose parameters are lazy: no memory is used.

    Arguments and errors as for ``text_config``.
    """
    text = text_config(family, num_layers=num_layers, vocab_size=vocab_size)
    target = gemma4_text.Model(gemma4_text.ModelArgs.from_dict(text))
    return target, Drafter(drafter_config(family, vocab_size=vocab_size))


def _quantize(
    target: gemma4_text.Model, drafter: Drafter, *, bits: int, group_size: int
) -> None:
    """Turn modules into quantized ones; nothing is evaluated."""
    nn.quantize(
        target,
        group_size=group_size,
        bits=bits,
        class_predicate=lambda path, module: (
            hasattr(module, "to_quantized") and target.quant_predicate(path, module)
        ),
    )
    has_centroid_head = drafter.masked_embedding is not None
    own_bits = max(bits, _MIN_DRAFTER_BITS) if has_centroid_head else bits

    def of_drafter(path: str, module: nn.Module) -> bool | dict[str, int]:
        if not hasattr(module, "to_quantized") or "centroids" in path:
            return False
        is_projection = path.endswith(("pre_projection", "post_projection"))
        wanted = max(own_bits, _MIN_DRAFTER_BITS) if is_projection else own_bits
        return {"bits": wanted, "group_size": group_size}

    nn.quantize(drafter, class_predicate=of_drafter)


def _fill(module: nn.Module, dtype: mx.Dtype, key: mx.array) -> None:
    """Give a module random weights, a tensor at a time."""
    parameters = cast(list[tuple[str, mx.array]], tree_flatten(module.parameters()))
    packed = {
        path: (part.bits, part.group_size)
        for path, part in module.named_modules()
        if hasattr(part, "bits")
    }
    keys = mx.random.split(key, len(parameters))
    for (name, array), own_key in zip(parameters, keys, strict=True):
        path, _, leaf = name.rpartition(".")
        if path in packed:
            value = _packed(leaf, array, *packed[path], dtype, own_key)
        else:
            value = _tensor(leaf, array, dtype, own_key)
        mx.eval(value)
        module.load_weights([(name, value)], strict=False)


def _tensor(leaf: str, like: mx.array, dtype: mx.Dtype, key: mx.array) -> mx.array:
    """A random tensor of the shape of ``like``.

    Matrices turn rows of unit size into such rows, so that activations keep their size
    from layer to layer as trained ones do.
    """
    if leaf == "token_ordering":
        return mx.random.permutation(like.size, key=key).astype(mx.int32)
    if like.ndim < 2:  # norms and scalars
        return mx.ones(like.shape, dtype=dtype)
    step, middle = _levels(8, like.shape[-1])
    num_words = -(-like.size // _WORD_BYTES)
    levels = _words(num_words, key).view(mx.uint8)[: like.size].reshape(like.shape)
    return (levels.astype(dtype) - middle) * step


def _packed(
    leaf: str,
    like: mx.array,
    bits: int,
    group_size: int,
    dtype: mx.Dtype,
    key: mx.array,
) -> mx.array:
    """One of the three tensors of a quantized matrix, or a vector beside them."""
    if leaf == "weight":
        return _words(like.size, key).reshape(like.shape)
    if leaf not in ("scales", "biases"):
        return _tensor(leaf, like, dtype, key)
    step, middle = _levels(bits, like.shape[-1] * group_size)
    return mx.full(like.shape, step if leaf == "scales" else -step * middle, dtype)


def _words(count: int, key: mx.array) -> mx.array:
    """Random words, uint32 [count]; keys are such words, two each."""
    return mx.random.split(key, (count + 1) // 2).flatten()[:count]


def _levels(bits: int, width: int) -> tuple[float, float]:
    """Step and middle of evenly spread levels whose variance is 1 / width."""
    num_levels = 2**bits
    deviation = math.sqrt((num_levels**2 - 1) / 12)
    return 1 / (deviation * math.sqrt(width)), (num_levels - 1) / 2
