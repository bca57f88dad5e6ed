"""How many bytes each of several machines will hold, told by a ``config.json`` alone.

Queries, keys, values, gates and what they gate are split by outputs, what comes behind
them by inputs. All else is whole on every rank: tables, norms, routers, per-layer
inputs, the drafter, and the keys and values of the two layers that it reads.

Counted are parameters and slabs; activations, buffers and traces come on top. Knows
nothing of groups of machines, and reads no weight.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models import gemma4_text

from ..constants import FULL, SLIDING, TARGET_MODEL_TYPES
from ..models.drafter import Drafter
from ..models.drafter_config import DrafterConfig
from ..models.sharding import drafted_layers
from ..models.splits import Heads, check_groups, check_size, heads, split, unit_of
from ..models.text_config import check_model_type, check_target, text_config
from .quantization import WORD_BITS, Format

TOLERANCE = 0.03  # of what is measured, from what was planned

_DTYPE_KEYS = ("dtype", "torch_dtype")
_PREFIX = "language_model."  # of paths in a whole model's map
_KEYS = ("bits", "group_size", "mode")  # of a format, in that map
_MATRIX = re.compile(r"layers\.(\d+)\.(self_attn|mlp|experts\.switch_glu)\.(\w+)_proj$")


@dataclass(frozen=True)
class ShardPlan:
    """What one rank holds.

    Attributes:
        split_bytes: Weights of which it has its part.
        whole_bytes: Weights of the target that every rank has.
        drafter_bytes: The drafter's weights, which every rank has.
        kv_heads: Heads of keys that it keeps, of each layer that owns K/V.
        full_slot_bytes: Keys and values of one token in full layers.
        sliding_slot_bytes: The same in sliding layers, which keep a window of them.
    """

    split_bytes: int
    whole_bytes: int
    drafter_bytes: int
    kv_heads: tuple[int, ...]
    full_slot_bytes: int
    sliding_slot_bytes: int

    @property
    def weight_bytes(self) -> int:
        """All weights."""
        return self.split_bytes + self.whole_bytes + self.drafter_bytes

    def kv_bytes(self, full_slots: int, sliding_slots: int) -> int:
        """Keys and values of one sequence.

        Args:
            full_slots: Tokens that full layers have room for.
            sliding_slots: Tokens that sliding ones have.
        """
        full = full_slots * self.full_slot_bytes
        return full + sliding_slots * self.sliding_slot_bytes

    def is_met(self, measured_bytes: int) -> bool:
        """Whether weights that were loaded are what was planned, to within 3 %.

        Args:
            measured_bytes: Bytes of all of a rank's parameters.
        """
        return abs(measured_bytes - self.weight_bytes) <= TOLERANCE * self.weight_bytes


def shard_plans(
    config: Mapping[str, Any],
    size: int,
    *,
    drafter_config: Mapping[str, Any] | None = None,
    source: str = "config.json",
) -> tuple[ShardPlan, ...]:
    """Tell what each rank will hold.

    A matrix that the map of ``quantization`` does not name is taken to have the
    format of most.

    Args:
        config: A target's parsed ``config.json``.
        size: Number of machines, 1, 2 or 4.
        drafter_config: Its drafter's; None for no drafter.
        source: Where the config came from, for messages.

    Returns:
        The plan of rank 0, of rank 1 and so on.

    Raises:
        CheckpointError: No target's config, or no drafter's.
        RequestError: The target cannot be split over so many.
    """
    check_size(size)
    check_model_type(config, TARGET_MODEL_TYPES, source=source)
    text = text_config(config, source=source)
    check_target(text, source=source)
    model = gemma4_text.Model(gemma4_text.ModelArgs.from_dict(text))
    weights = _Weights(model, config)
    drafter_bytes = 0
    if drafter_config is not None:
        drafter_bytes = _drafter_bytes(drafter_config, source)
    parts = (_Parts(model, weights, rank, size) for rank in range(size))
    return tuple(_plan(part, weights, drafter_bytes) for part in parts)


def _plan(parts: _Parts, weights: _Weights, drafter_bytes: int) -> ShardPlan:
    """A rank's plan."""
    split_bytes = whole_bytes = 0
    for path, shape in weights.shapes:
        own = parts.shape(path, shape)
        if own is None:
            whole_bytes += weights.num_bytes(path, shape)
        else:
            split_bytes += weights.num_bytes(path, own)
    return ShardPlan(
        split_bytes,
        whole_bytes,
        drafter_bytes,
        parts.kept_heads,
        full_slot_bytes=parts.slot_bytes(FULL),
        sliding_slot_bytes=parts.slot_bytes(SLIDING),
    )


def _drafter_bytes(config: Mapping[str, Any], source: str) -> int:
    """Bytes of a drafter's weights, which are never split."""
    module = Drafter(DrafterConfig.from_dict(config, source=source))
    drafter = _Weights(module, config)
    floats = sum(drafter.num_bytes(path, shape) for path, shape in drafter.shapes)
    return floats + drafter.index_bytes


class _Weights:
    """A model's weights, unread: their shapes, and what matrices are packed in.

    Args:
        module: The float model, whose parameters are lazy.
        config: Its ``config.json``.

    Attributes:
        shapes: Of each parameter of floats, with the path of its module.
        index_bytes: Of parameters of whole numbers.
        item_bytes: Of a float number.
    """

    def __init__(self, module: nn.Module, config: Mapping[str, Any]) -> None:
        leaves: Any = tree_flatten(module.parameters())
        floats = [each for each in leaves if mx.issubdtype(each[1].dtype, mx.floating)]
        self.shapes = [
            (name.rpartition(".")[0], tuple(array.shape)) for name, array in floats
        ]
        self.index_bytes = sum(array.nbytes for _, array in leaves) - sum(
            array.nbytes for _, array in floats
        )
        inner = config.get("text_config") or {}
        named = [each.get(key) for each in (config, inner) for key in _DTYPE_KEYS]
        self.item_bytes = 4 if "float32" in named else 2
        self._map: Mapping[str, Any] = config.get("quantization") or {}
        self._packable = {
            path
            for path, part in module.named_modules()
            if hasattr(part, "to_quantized")
        }

    def format_of(self, path: str, num_columns: int) -> Format | None:
        """What a module's matrix is packed in; None for not at all.

        Args:
            path: The module's, in the text model alone.
            num_columns: Length of its rows.
        """
        if not self._map or path not in self._packable:
            return None
        named = self._map.get(path, self._map.get(_PREFIX + path, self._map))
        if not isinstance(named, Mapping):
            return None
        found = Format(**{key: named[key] for key in _KEYS if key in named})
        return found if found.fits(num_columns) else None

    def num_bytes(self, path: str, shape: Sequence[int]) -> int:
        """Bytes of a module's tensor of a shape, packed or not."""
        found = self.format_of(path, shape[-1])
        if found is None:
            return math.prod(shape) * self.item_bytes
        group_bytes = 2 * self.item_bytes if found.has_biases else 1
        packed = math.prod(found.packed_shape(shape)) * WORD_BITS // 8
        return packed + math.prod(found.scales_shape(shape)) * group_bytes


class _Parts:
    """Which part of each of a target's matrices a rank holds.

    Args:
        model: The target.
        weights: What its matrices are packed in.
        rank: Which rank.
        size: Number of ranks.
    """

    def __init__(
        self, model: gemma4_text.Model, weights: _Weights, rank: int, size: int
    ) -> None:
        self._weights = weights
        self._rank, self._size = rank, size
        self._attentions = [layer.self_attn for layer in model.layers]
        self._owners = [each for each in self._attentions if each.has_kv]
        self._drafted = drafted_layers(model)

    @property
    def kept_heads(self) -> tuple[int, ...]:
        """Heads of keys that the rank keeps, of each layer that owns K/V."""
        return tuple(map(self._num_kept, self._owners))

    def slot_bytes(self, layer_type: str) -> int:
        """Keys and values of one token in the layers of a type."""
        width = sum(
            self._num_kept(each) * each.head_dim
            for each in self._owners
            if each.layer_type == layer_type
        )
        return 2 * width * self._weights.item_bytes

    def shape(self, path: str, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """The shape of the rank's part of a matrix; None where it has the whole one."""
        found = _MATRIX.search(path)
        if found is None:
            return None
        number, block, name = found.groups()
        by_inputs = name in ("o", "down")
        if block != "self_attn":
            width = self._width(path, shape[-1] if by_inputs else shape[-2])
        else:
            attention = self._attentions[int(number)]
            if name in ("k", "v") and attention.layer_idx in self._drafted:
                return None
            width = self._attention_width(attention, name)
            if by_inputs:
                check_groups(width, self._group_size(path, shape[-1]))
        return (*shape[:-1], width) if by_inputs else (*shape[:-2], width, shape[-1])

    def _width(self, path: str, width: int) -> int:
        """The rank's part of a width of gates: whole groups of the matrix behind."""
        behind = f"{path.rpartition('.')[0]}.down_proj"
        unit = unit_of(width, self._size, self._group_size(behind, width))
        return len(split(width, self._size, unit)[self._rank])

    def _group_size(self, path: str, width: int) -> int | None:
        """Columns of a matrix with one scale; None where it is not packed."""
        packed = self._weights.format_of(path, width)
        return None if packed is None else packed.group_size

    def _attention_width(self, attention: gemma4_text.Attention, name: str) -> int:
        """The rank's part of the width of a projection of heads."""
        own = self._own(attention)
        held = own.kv if name in ("k", "v") else own.queries
        return len(held) * int(attention.head_dim)

    def _own(self, attention: gemma4_text.Attention) -> Heads:
        """The heads that the rank computes."""
        num_heads, num_kv_heads = attention.n_heads, attention.n_kv_heads
        return heads(num_heads, num_kv_heads, self._rank, self._size)

    def _num_kept(self, attention: gemma4_text.Attention) -> int:
        """Heads of keys that the rank keeps."""
        if attention.layer_idx in self._drafted:
            return int(attention.n_kv_heads)
        return len(self._own(attention).kv)
