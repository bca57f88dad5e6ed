"""A drafter that has learnt nothing yet, in a shape that goes with its target.

The drafter of a published target has the published shape; any other target gets one in
proportion. What a drafter shares with its target (vocabulary, keys and values, rotary
positions, window) is the target's own. Weights are random, but for two things that need
not be learnt again: which tokens resemble each other, and how large the target's keys
are. Knows nothing of files or of training.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models import gemma4_text

from ..constants import FULL, SLIDING
from ..models.compatibility import check_fit
from ..models.drafter import Drafter
from ..models.drafter_config import DrafterConfig
from ..models.families import family_of
from ..models.published import drafter_config
from ..models.target import Target, key_norm, text_model
from ..pair.pair import DEFAULT_NUM_DRAFT_TOKENS
from .clusters import cluster_order

_SOURCE = "the fresh drafter's settings"
_WIDTH_STEP = 64  # widths that quantize in groups of 64
_MAX_WIDTH = 1024  # of the published drafters with a dense head
# Names in the configs of Gemma's tokens; mlx-lm's model knows the first only.
_BOS, _EOS = 2, 1
# Settings that a drafter takes over from its target.
_SHARED = (
    "vocab_size",
    "num_key_value_heads",
    "num_global_key_value_heads",
    "attention_k_eq_v",
    "head_dim",
    "global_head_dim",
    "sliding_window",
    "rope_parameters",
    "max_position_embeddings",
    "rms_norm_eps",
    "pad_token_id",
)
# Layers start by adding half of what they compute, so that four of them do not bury
# what the target's hidden state says.
_POST_NORM = 0.5
# Attention scores of a query and a key start with this deviation.
_SCORE_DEVIATION = 2.0
_ROWS = 4096  # of a table, that are in memory as float32 at a time
_CLUSTER_WIDTH = 64  # tokens are told apart in so many random directions


@dataclass(frozen=True)
class _Shape:
    """In what a drafter is free, named as in its configuration."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_hidden_layers: int
    use_ordered_embeddings: bool
    num_assistant_tokens: int | None


def fresh_drafter(
    target: nn.Module, *, seed: int, config: Mapping[str, Any] | None = None
) -> tuple[Drafter, dict[str, Any]]:
    """Make a drafter for a target.

    Args:
        target: A target as from ``load_target()``, float or quantized.
        seed: The same one gives the same weights, 0..2**64 - 1.
        config: A drafter's ``config.json`` for another shape; None for
            ``fresh_config()``. A number of centroids must be a power of two.

    Returns:
        The drafter, in the type of the target's activations, and its ``config.json``.

    Raises:
        PairingError: ``target`` is not a Gemma 4 of mlx-lm, or ``config`` does not fit.
        CheckpointError: ``config`` is no drafter's.
    """
    config = fresh_config(target) if config is None else dict(config)
    read = DrafterConfig.from_dict(config, source=_SOURCE)
    num_drafts = _shape(text_model(target).args).num_assistant_tokens
    drafter = Drafter(replace(read, num_assistant_tokens=num_drafts))
    check_fit(target, drafter)
    _fill(drafter, target, mx.random.key(seed))
    drafter.eval()
    return drafter, config


def fresh_config(target: nn.Module) -> dict[str, Any]:
    """Return the ``config.json`` of a target's fresh drafter.

    A drafter of a published family with a centroid head has one where its centroids
    divide the target's vocabulary evenly, else a dense head.

    Args:
        target: A target as from ``load_target()``.

    Raises:
        PairingError: It is not a Gemma 4 of mlx-lm.
    """
    args = text_model(target).args
    shape = _shape(args)
    num_layers = shape.num_hidden_layers
    layout = Target(target).layout
    # A target without sliding layers has no such K/V to read.
    has_sliding = any(layer.layer_type == SLIDING for layer in layout.layers)
    first = SLIDING if has_sliding else FULL
    is_unified = shape.model_type == "gemma4_unified_assistant"
    dtype = str(layout.dtype).removeprefix("mlx.core.")
    config: dict[str, Any] = {
        "architectures": [
            f"Gemma4{'Unified' if is_unified else ''}AssistantForCausalLM"
        ],
        "backbone_hidden_size": args.hidden_size,
        "dtype": dtype,
        "model_type": shape.model_type,
        "text_config": {
            **{name: getattr(args, name) for name in _SHARED},
            "hidden_size": shape.hidden_size,
            "intermediate_size": shape.intermediate_size,
            "num_attention_heads": shape.num_attention_heads,
            "num_hidden_layers": num_layers,
            "num_kv_shared_layers": num_layers,
            "layer_types": [first] * (num_layers - 1) + [FULL],
        },
        "tie_word_embeddings": True,
        "use_ordered_embeddings": shape.use_ordered_embeddings,
    }
    # Written out in full, so that no reader's own defaults count.
    read = DrafterConfig.from_dict(config, source=_SOURCE)
    config["num_centroids"] = read.num_centroids
    config["centroid_intermediate_top_k"] = read.centroid_intermediate_top_k
    config["text_config"] = {
        **read.text_config,
        "model_type": "gemma4_unified_text" if is_unified else "gemma4_text",
        "attention_bias": False,
        "bos_token_id": _BOS,
        "dtype": dtype,
        "eos_token_id": _EOS,
        "hidden_activation": "gelu_pytorch_tanh",
    }
    return config


def _shape(args: gemma4_text.ModelArgs) -> _Shape:
    """The published shape of a published target's drafter, else one in proportion."""
    family = family_of(vars(args))
    if family is None:
        return _proportionate(args)
    published = drafter_config(family)
    text = published.text_config
    is_even = args.vocab_size % published.num_centroids == 0
    return _Shape(
        published.model_type,
        text["hidden_size"],
        text["intermediate_size"],
        text["num_attention_heads"],
        text["num_hidden_layers"],
        use_ordered_embeddings=published.use_ordered_embeddings and is_even,
        num_assistant_tokens=published.num_assistant_tokens,
    )


def _proportionate(args: gemma4_text.ModelArgs) -> _Shape:
    """As wide as the target up to the published width; shallow if that is narrow."""
    width = min(math.ceil(args.hidden_size / _WIDTH_STEP) * _WIDTH_STEP, _MAX_WIDTH)
    is_narrow = width < _MAX_WIDTH
    return _Shape(
        "gemma4_assistant",
        width,
        width * (2 if is_narrow else 8),
        args.num_attention_heads,
        2 if is_narrow else 4,
        use_ordered_embeddings=False,
        num_assistant_tokens=DEFAULT_NUM_DRAFT_TOKENS,
    )


def _fill(drafter: Drafter, target: nn.Module, key: mx.array) -> None:
    """Give a drafter its weights, a tensor at a time."""
    engine, key_sizes = Target(target), _key_sizes(drafter, target)
    dtype = engine.layout.dtype
    shapes = {name: tuple(array.shape) for name, array in _parameters(drafter)}
    keys = mx.random.split(key, len(shapes))
    for (name, shape), own_key in zip(shapes.items(), keys, strict=True):
        if name.startswith("masked_embedding."):
            continue  # once the head that it is made of is there
        if name == "model.embed_tokens.weight":
            value = _head(engine, shape[1], dtype, own_key)
        elif len(shape) < 2:
            value = _vector(name, shape, key_sizes).astype(dtype)
        else:
            value = _matrix(shape, own_key).astype(dtype)
        _set(drafter, name, value)
    if drafter.masked_embedding is not None:
        by_name = dict(zip(shapes, keys, strict=True))
        _sort_into_clusters(drafter, engine, by_name["masked_embedding.token_ordering"])


def _parameters(drafter: Drafter) -> list[tuple[str, mx.array]]:
    return cast(list[tuple[str, mx.array]], tree_flatten(drafter.parameters()))


def _set(drafter: Drafter, name: str, value: mx.array) -> None:
    mx.eval(value)
    drafter.load_weights([(name, value)], strict=False)


def _matrix(shape: tuple[int, ...], key: mx.array) -> mx.array:
    """Turns rows of unit size into rows of unit size, float32."""
    return mx.random.normal(shape, key=key) / math.sqrt(shape[-1])


def _key_sizes(drafter: Drafter, target: nn.Module) -> list[float]:
    """For each of the drafter's layers, the size of a number in the keys it reads."""
    by_type = {
        layer_type: _size(key_norm(target, layer_type).astype(mx.float32))
        for layer_type in set(drafter.layer_types)
    }
    return [by_type[layer_type] for layer_type in drafter.layer_types]


def _size(array: mx.array) -> float:
    """The root of the mean square of a float32 array's numbers."""
    return float(np.array(mx.sqrt(mx.mean(mx.square(array)))))


def _vector(name: str, shape: tuple[int, ...], key_sizes: list[float]) -> mx.array:
    """A norm's weight, or a layer's scalar."""
    path = name.split(".")
    value = 1.0
    if "q_norm" in path:
        # Scores are not scaled: of two normed vectors they have a deviation of sqrt(D).
        layer = int(path[path.index("layers") + 1])
        value = _SCORE_DEVIATION / (math.sqrt(shape[0]) * key_sizes[layer])
    elif any(part.startswith("post_") for part in path):
        value = _POST_NORM
    return mx.full(shape, value)


def _head(target: Target, width: int, dtype: mx.Dtype, key: mx.array) -> mx.array:
    """The tied head [V, h]: the target's embeddings in its first columns.

    Columns beyond the target's width are random. All have one size, by which logits
    start with a deviation of about 1.
    """
    # 1) the size of the target's numbers
    sizes = [(len(rows), _size(rows[:, :width])) for rows in _embeddings(target)]
    squares = sum(count * size**2 for count, size in sizes) / target.vocab_size
    scale = 1 / math.sqrt(squares * width)

    # 2) its columns, scaled, and what is missing
    parts = []
    keys = mx.random.split(key, _num_chunks(target.vocab_size))
    for rows, own_key in zip(_embeddings(target), keys, strict=True):
        known = rows[:, :width] * scale
        missing = (len(rows), width - known.shape[1])
        noise = mx.random.normal(missing, key=own_key) / math.sqrt(width)
        parts.append(mx.concatenate([known, noise], axis=1).astype(dtype))
        mx.eval(parts[-1])
    return mx.concatenate(parts)


def _sort_into_clusters(drafter: Drafter, target: Target, key: mx.array) -> None:
    """Fill a centroid head: similar tokens in one cluster, its middle as centroid."""
    masked, embed_tokens = drafter.masked_embedding, drafter.model.embed_tokens
    assert masked is not None
    first, second = mx.random.split(key)
    points = _project(target, first)
    order = cluster_order(points, num_clusters=masked.num_centroids, key=second)
    _set(drafter, "masked_embedding.token_ordering", order)
    head, size = embed_tokens.weight, len(order) // masked.num_centroids
    num_clusters = max(_ROWS // size, 1)  # at a time
    parts = []
    for start in range(0, masked.num_centroids, num_clusters):
        ids = order[start * size : (start + num_clusters) * size]
        rows = head[ids].astype(mx.float32).reshape(-1, size, head.shape[1])
        parts.append(mx.mean(rows, axis=1).astype(head.dtype))
        mx.eval(parts[-1])
    _set(drafter, "masked_embedding.centroids.weight", mx.concatenate(parts))


def _project(target: Target, key: mx.array) -> mx.array:
    """The target's embeddings in a few random directions, float32 [V, P]."""
    parts: list[mx.array] = []
    directions: mx.array | None = None
    for rows in _embeddings(target):
        if directions is None:
            shape = (rows.shape[1], _CLUSTER_WIDTH)
            directions = mx.random.normal(shape, key=key) / math.sqrt(shape[0])
        parts.append(rows @ directions)
        mx.eval(parts[-1])
    return mx.concatenate(parts)


def _embeddings(target: Target) -> Iterator[mx.array]:
    """The target's embeddings, a chunk of rows at a time, float32 [rows, H].

    Scaled as the target scales them, which tells tokens apart as well.
    """
    for start in range(0, target.vocab_size, _ROWS):
        ids = mx.arange(start, min(start + _ROWS, target.vocab_size))
        yield target.embed(ids).astype(mx.float32)


def _num_chunks(num_rows: int) -> int:
    return math.ceil(num_rows / _ROWS)
