"""Pairs of random weights in the shapes of the published families.

Speed and exactness depend on shapes, not on what weights say, so both can be looked at
where no checkpoint is at hand: nothing is read or downloaded. A pair may have fewer
layers and tokens than the published one and is otherwise that.

Numbers are made in the type they are kept in, packed ones as packed words, one tensor
at a time: beyond the pair no more memory is used than twice its largest tensor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models import gemma4_text

from ..constants import FULL, SLIDING
from ..errors import RequestError
from ..models import config
from ..models.config import DrafterConfig
from ..models.drafter import Drafter
from ..pair.pair import Pair

_SOURCE = "the table of published shapes"
_WORD_BYTES = 4
_DRAFTER_LAYERS = (SLIDING, SLIDING, SLIDING, FULL)
_MIN_DRAFTER_BITS = 8  # of a drafter with a centroid head, as the converter writes it


@dataclass(frozen=True)
class Family:
    """A published pair: the keys in which it differs from the others.

    Attributes:
        period: Layers up to and with each full one.
        target: Keys of the target's ``text_config``.
        drafter: Keys of the drafter's.
        num_assistant_tokens: Drafts per round that the drafter names.
        is_unified: Whether it is of the unified kind.
        has_centroid_head: Whether the drafter has one.
    """

    period: int
    target: dict[str, Any]
    drafter: dict[str, Any]
    num_assistant_tokens: int
    is_unified: bool = False
    has_centroid_head: bool = False

    @property
    def kind(self) -> str:
        """The published ``model_type``."""
        return "gemma4_unified" if self.is_unified else "gemma4"


# Source: the config.json files of google/gemma-4-<family>-it and its -assistant.
FAMILIES: dict[str, Family] = {
    "e2b": Family(
        period=5,
        target={
            "hidden_size": 1536,
            "intermediate_size": 6144,
            "num_hidden_layers": 35,
            "num_attention_heads": 8,
            "num_key_value_heads": 1,
            "num_kv_shared_layers": 20,
            "hidden_size_per_layer_input": 256,
            "sliding_window": 512,
            "max_position_embeddings": 131072,
            "use_double_wide_mlp": True,
        },
        drafter={"hidden_size": 256, "intermediate_size": 2048, "heads": 4},
        num_assistant_tokens=2,
        has_centroid_head=True,
    ),
    "e4b": Family(
        period=6,
        target={
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "num_hidden_layers": 42,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "num_kv_shared_layers": 18,
            "hidden_size_per_layer_input": 256,
            "sliding_window": 512,
            "max_position_embeddings": 131072,
        },
        drafter={"hidden_size": 256, "intermediate_size": 2048, "heads": 4},
        num_assistant_tokens=4,
        has_centroid_head=True,
    ),
    "12b": Family(
        period=6,
        target={
            "hidden_size": 3840,
            "intermediate_size": 15360,
            "num_hidden_layers": 48,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
            "sliding_window": 1024,
            "max_position_embeddings": 262144,
        },
        drafter={"hidden_size": 1024, "intermediate_size": 8192, "heads": 16},
        num_assistant_tokens=4,
        is_unified=True,
    ),
    "26b-a4b": Family(
        period=6,
        target={
            "hidden_size": 2816,
            "intermediate_size": 2112,
            "num_hidden_layers": 30,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "num_global_key_value_heads": 2,
            "attention_k_eq_v": True,
            "sliding_window": 1024,
            "max_position_embeddings": 262144,
            "enable_moe_block": True,
            "num_experts": 128,
            "top_k_experts": 8,
            "moe_intermediate_size": 704,
        },
        drafter={"hidden_size": 1024, "intermediate_size": 8192, "heads": 16},
        num_assistant_tokens=4,
    ),
    "31b": Family(
        period=6,
        target={
            "hidden_size": 5376,
            "intermediate_size": 21504,
            "num_hidden_layers": 60,
            "num_attention_heads": 32,
            "num_key_value_heads": 16,
            "num_global_key_value_heads": 4,
            "attention_k_eq_v": True,
            "sliding_window": 1024,
            "max_position_embeddings": 262144,
        },
        drafter={"hidden_size": 1024, "intermediate_size": 8192, "heads": 32},
        num_assistant_tokens=4,
    ),
}
VOCAB_SIZE = 262144


def text_config(
    family: str, *, num_layers: int | None = None, vocab_size: int | None = None
) -> dict[str, Any]:
    """A target's settings, as ``config.text_config`` reads them of a checkpoint.

    Args:
        family: One of ``FAMILIES``, upper or lower case.
        num_layers: How many layers to keep, 2 or more; None for all. Layers with K/V
            of their own and layers that share them keep their shares, and each part
            ends as the published one does, with its last sliding and full layers.
        vocab_size: Tokens to keep; None for all.

    Raises:
        RequestError: No such family, or a number outside its range.
    """
    found = _family(family)
    published = {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0}
    published |= found.target
    raw = {
        **published,
        "final_logit_softcapping": 30.0,
        "layer_types": _pattern(found.period, published["num_hidden_layers"]),
        **_vocabulary(vocab_size, has_tables=not found.is_unified),
    }
    if num_layers is not None:
        raw |= _cut(raw, num_layers)
    whole = {"model_type": found.kind, "text_config": raw}
    return config.text_config(whole, source=_SOURCE)


def drafter_config(family: str, *, vocab_size: int | None = None) -> DrafterConfig:
    """A drafter's settings, as those of a checkpoint.

    Args:
        family: One of ``FAMILIES``, upper or lower case.
        vocab_size: Tokens to keep, a multiple of 2048 where the drafter has a centroid
            head; None for all.

    Raises:
        RequestError: No such family, or a number outside its range.
    """
    found = _family(family)
    if found.has_centroid_head and vocab_size is not None and vocab_size % 2048:
        raise RequestError(
            f"vocab_size must be a multiple of 2048 for {family}: got {vocab_size}. "
            "Its drafter has 2048 centroids."
        )
    own = dict(found.drafter)
    heads = own.pop("heads")
    shared = ("num_key_value_heads", "num_global_key_value_heads", "attention_k_eq_v")
    kept = (*shared, "sliding_window", "max_position_embeddings")
    raw = {
        **{key: found.target[key] for key in kept if key in found.target},
        **own,
        "num_attention_heads": heads,
        "num_hidden_layers": len(_DRAFTER_LAYERS),
        "num_kv_shared_layers": len(_DRAFTER_LAYERS),
        "layer_types": list(_DRAFTER_LAYERS),
        **_vocabulary(vocab_size, has_tables=False),
    }
    whole = {
        "model_type": f"{found.kind}_assistant",
        "backbone_hidden_size": found.target["hidden_size"],
        "use_ordered_embeddings": found.has_centroid_head,
        "text_config": raw,
    }
    read = DrafterConfig.from_dict(whole, source=_SOURCE)
    return replace(read, num_assistant_tokens=found.num_assistant_tokens)


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


def _family(name: str) -> Family:
    found = FAMILIES.get(name.lower())
    if found is None:
        raise RequestError(
            f"the family must be one of {', '.join(FAMILIES)}: got {name!r}. 12b is "
            "the plainest of them."
        )
    return found


def _pattern(period: int, num_layers: int) -> list[str]:
    return [FULL if i % period == period - 1 else SLIDING for i in range(num_layers)]


def _vocabulary(size: int | None, *, has_tables: bool) -> dict[str, int]:
    """The sizes of the tables of tokens; those of 12B and drafters are one."""
    size = VOCAB_SIZE if size is None else size
    if not 256 <= size <= VOCAB_SIZE:
        raise RequestError(
            f"vocab_size must be from 256 to {VOCAB_SIZE}: got {size}. 8192 is enough "
            "to look at layers."
        )
    tables = {"vocab_size_per_layer_input": size} if has_tables else {}
    return {"vocab_size": size, **tables}


def _cut(raw: dict[str, Any], num_layers: int) -> dict[str, Any]:
    """The layers that stay when a target is cut."""
    total, types = raw["num_hidden_layers"], raw["layer_types"]
    if not 2 <= num_layers <= total:
        raise RequestError(
            f"num_layers must be from 2 to {total}: got {num_layers}. A pair needs one "
            "layer of each type."
        )
    num_own = total - raw["num_kv_shared_layers"]
    # At least one layer of each type has K/V of its own: the drafter reads them.
    kept_own = max(2, round(num_layers * num_own / total))
    kept_shared = num_layers - kept_own
    own, shared = types[:num_own], types[num_own:]
    return {
        "num_hidden_layers": num_layers,
        "num_kv_shared_layers": kept_shared,
        "layer_types": own[num_own - kept_own :] + shared[len(shared) - kept_shared :],
    }


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
