"""mlx-lm's prompt caches, in and out.

mlx-lm's contract: a cache that comes back holds the prompt and every token that was
yielded, the last one included. A cache of a sliding layer holds the window's keys. The
same objects serve plain decoding and drafting, this package and mlx-lm, in any order.

This is the only file that relies on what mlx-lm's cache objects look like.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache, RotatingKVCache

from ..constants import SLIDING
from ..errors import RequestError
from .prompt import PrefillCache, prefill_caches
from .slabs import SlabLayout

_MAKE_ONE = "mlx_lm.models.cache.make_prompt_cache(model) makes one."


def read_prompt_cache(
    layout: SlabLayout, prompt_cache: Sequence[Any]
) -> list[PrefillCache] | None:
    """What mlx-lm's cache objects hold; they are left as they are.

    Args:
        layout: Of the target that the cache belongs to.
        prompt_cache: One cache for each layer that owns K/V.

    Returns:
        Caches to read further tokens into; None where nothing was read yet.

    Raises:
        RequestError: They are not the target's caches, or not all as long.
    """
    if not check_prompt_cache(layout, prompt_cache):
        return None
    caches = prefill_caches(layout)
    for cache, source in zip(caches, prompt_cache, strict=True):
        keys, values = _in_order(source)
        cache.fill(keys, values, offset=int(source.offset))
        mx.async_eval(keys, values)  # another thread may read on
    return caches


def check_prompt_cache(layout: SlabLayout, prompt_cache: Sequence[Any]) -> int:
    """The number of tokens that a target's caches hold.

    Raises:
        RequestError: They are not the target's caches, or not all as long.
    """
    _check(layout, prompt_cache)
    offsets = {int(cache.offset) for cache in prompt_cache}
    if len(offsets) > 1:
        raise RequestError(
            f"the layers of a prompt cache must hold as many tokens: got {offsets}. "
            "Trim all of them together, with mlx_lm's trim_prompt_cache."
        )
    (num_tokens,) = offsets
    for cache, layer in zip(prompt_cache, layout.layers, strict=True):
        needed = num_tokens
        if layer.layer_type == SLIDING:
            needed = min(needed, layout.window)
        held = min(_length(cache.keys), _length(cache.values))
        if held < needed:
            raise RequestError(
                "a layer's cache must hold the keys and values of its tokens: got "
                f"{held} of {needed}. {_MAKE_ONE}"
            )
    return num_tokens


def holds_tokens(prompt_cache: Sequence[Any]) -> bool:
    """Whether something was read into mlx-lm's cache objects."""
    kinds = (KVCache, RotatingKVCache)
    return any(isinstance(c, kinds) and int(c.offset) > 0 for c in prompt_cache)


def make_prompt_cache(layout: SlabLayout) -> list[KVCache | RotatingKVCache]:
    """mlx-lm's cache objects that hold nothing yet."""
    return [
        RotatingKVCache(max_size=layout.window)
        if layer.layer_type == SLIDING
        else KVCache()
        for layer in layout.layers
    ]


def update_prompt_cache(
    layout: SlabLayout,
    prompt_cache: Sequence[Any],
    caches: Iterable[PrefillCache],
) -> None:
    """Let mlx-lm's cache objects hold what ``caches`` hold, in place.

    One layer after the other: of what is made on the way and of what the objects held
    before no more than one layer is held beside the rest.
    """
    _check(layout, prompt_cache)
    for target, layer, cache in zip(prompt_cache, layout.layers, caches, strict=True):
        if not cache.offset:
            continue
        keys, values = cache.keys_and_values()
        if layer.layer_type == SLIDING:
            # What the drafter sees beyond the window is not mlx-lm's.
            keys, values = (a[:, :, -layout.window :] for a in (keys, values))
            target._idx = keys.shape[2]
        target.keys, target.values = mx.contiguous(keys), mx.contiguous(values)
        target.offset = cache.offset
        mx.eval(target.keys, target.values)


def held_arrays(prompt_cache: Sequence[Any], *, begin: int) -> list[list[mx.array]]:
    """Keys and values of each layer, copied: the oldest first.

    Args:
        prompt_cache: Caches that hold something.
        begin: Of full layers the tokens from this one on; sliding layers have what is
            in the window.
    """
    found = []
    for cache in prompt_cache:
        arrays = _in_order(cache)
        if isinstance(cache, RotatingKVCache):
            arrays = [array[:, :, -cache.max_size :] for array in arrays]
        else:
            arrays = [array[:, :, begin:] for array in arrays]
        found.append([mx.contiguous(array) for array in arrays])
    mx.eval(found)
    return found


def prompt_cache_of(
    layout: SlabLayout, arrays: Sequence[Sequence[mx.array]], num_tokens: int
) -> list[Any]:
    """mlx-lm's cache objects that hold what ``held_arrays`` gave from the beginning.

    Args:
        layout: Of the target.
        arrays: Keys and values of each layer.
        num_tokens: How many tokens they are of.
    """
    made = make_prompt_cache(layout)
    for cache, (keys, values) in zip(made, arrays, strict=True):
        cache.keys, cache.values, cache.offset = keys, values, num_tokens
        if isinstance(cache, RotatingKVCache):
            cache._idx = keys.shape[2]
    return made


def _in_order(source: Any) -> list[mx.array]:
    """A cache's keys and values, the oldest first."""
    arrays = [source.keys, source.values]
    if not isinstance(source, RotatingKVCache):
        return [array[:, :, : source.offset] for array in arrays]
    index, length = source._idx, arrays[0].shape[2]
    if index == length:
        return arrays
    if index < source.offset:  # it has begun to rotate
        return [
            mx.concatenate([a[:, :, index:], a[:, :, :index]], axis=2) for a in arrays
        ]
    return [array[:, :, :index] for array in arrays]


def _check(layout: SlabLayout, prompt_cache: Sequence[Any]) -> None:
    """Raise unless these are the target's caches, each of one row."""
    if len(prompt_cache) != len(layout.layers):
        raise RequestError(
            "a prompt cache must have one entry for each layer with keys of its own: "
            f"got {len(prompt_cache)}, expected {len(layout.layers)}. {_MAKE_ONE}"
        )
    for cache, layer in zip(prompt_cache, layout.layers, strict=True):
        is_sliding = layer.layer_type == SLIDING
        expected = RotatingKVCache if is_sliding else KVCache
        if type(cache) is not expected:
            raise RequestError(
                f"a layer with {layer.layer_type} must have a {expected.__name__}: got "
                f"{type(cache).__name__}. {_MAKE_ONE}"
            )
        if isinstance(cache, RotatingKVCache) and (cache.max_size, cache.keep) != (
            layout.window,
            0,
        ):
            raise RequestError(
                f"a sliding layer's cache must keep the window's {layout.window} "
                f"newest keys: got max_size={cache.max_size}, keep={cache.keep}. "
                f"{_MAKE_ONE}"
            )
        shape = (1, layer.num_kv_heads, layer.head_dim)
        found = None if cache.keys is None else cache.keys.shape
        if found is not None and (found[0], found[1], found[3]) != shape:
            raise RequestError(
                "a prompt cache must be one row of this model's: got keys of shape "
                f"{list(found)}, expected [1, {shape[1]}, tokens, {shape[2]}]. "
                f"{_MAKE_ONE}"
            )


def _length(array: mx.array | None) -> int:
    return 0 if array is None else int(array.shape[2])
