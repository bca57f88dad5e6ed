"""A target's layers cut into a part for each of several machines, in place.

Queries, keys, values, gates and what they gate are cut by outputs, what comes behind
them by inputs: its results are parts of a sum, and every rank adds them all up. So a
layer has two sums; where experts stand beside the dense part, both share one in a
round, and have one each while a prompt is read. What is left is whole on every rank:
norms, the router, per-layer inputs, the tables. The head, which is a table too,
multiplies a rank's rows of it, and all ranks' logits are joined.

The two layers whose keys and values the drafter reads keep all heads of them, so that
the drafter, which is whole, asks nobody. The target attends to the rank's part.

Knows nothing of files or of rounds.

Source: tensor parallelism as of Megatron-LM (Shoeybi et al. 2019, section 3).
"""

from __future__ import annotations

import hashlib
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models import gemma4_text
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from ..distributed.ranks import Ranks
from ..errors import PairingError
from .splits import check_groups, heads, split, unit_of

_QUANTIZED = (nn.QuantizedLinear, QuantizedSwitchLinear)
_LAYERS = (nn.Linear, SwitchLinear, *_QUANTIZED)
_NUM_SEEN = 8  # numbers along each axis of a matrix that are looked at


@dataclass(frozen=True)
class Shard:
    """Which part of a target a rank holds.

    Attributes:
        ranks: All machines; the part is that of this one's rank.
        kv_heads: Of each layer that owns K/V the heads that the rank attends to, of
            those that it has; None for all of them.
        vocabulary: The rows of the table that the rank's head multiplies; None for all
            of them.
        seen: A digest of what was cut, of some numbers of each whole matrix: the same
            on every rank.
    """

    ranks: Ranks
    kv_heads: tuple[range | None, ...]
    vocabulary: range | None
    seen: hashlib._Hash = field(default_factory=hashlib.sha256, compare=False)

    def added(self, x: mx.array) -> mx.array:
        """The sum of all ranks' x, of its shape."""
        return mx.distributed.all_sum(x, group=self.ranks.group)

    def joined(self, logits: mx.array) -> mx.array:
        """All ranks' logits [..., V / size] beside each other, [..., V]."""
        rows = mx.moveaxis(logits, -1, 0)  # ranks are joined on the first axis
        rows = mx.distributed.all_gather(mx.contiguous(rows), group=self.ranks.group)
        return mx.moveaxis(rows, 0, -1)


class Summed(nn.Module):
    """A module whose results are parts of a sum."""

    def __init__(self, module: nn.Module, shard: Shard) -> None:
        super().__init__()
        self.module = module
        self._shard = shard

    def __call__(self, *inputs: mx.array) -> mx.array:
        """The sum of all ranks' results."""
        return self._shard.added(self.module(*inputs))

    def with_part(
        self, inputs: tuple[mx.array, ...], other: mx.array
    ) -> tuple[mx.array, mx.array]:
        """The sums of this module's results and of others of their shape, in one."""
        own, found = self._shard.added(mx.stack([self.module(*inputs), other]))
        return own, found


class KVHeads:
    """A prompt's cache of a layer whose queries see some heads of it.

    Args:
        cache: The cache; it keeps all heads.
        heads: Those that are seen.
    """

    def __init__(self, cache: Any, heads: range) -> None:
        self._cache = cache
        self._heads = slice(heads.start, heads.stop)

    @property
    def offset(self) -> Any:
        """Tokens so far."""
        return self._cache.offset

    def update_and_fetch(
        self, keys: mx.array, values: mx.array
    ) -> tuple[mx.array, mx.array]:
        """Append a chunk; give what its queries may see."""
        keys, values = self._cache.update_and_fetch(keys, values)
        return keys[:, self._heads], values[:, self._heads]


def shard(lm: gemma4_text.Model, ranks: Ranks) -> Shard:
    """Leave a target the part of its layers that this rank holds.

    One matrix after another is read, cut and let go, so a lazily loaded target never
    needs more memory than the part and its largest matrix.

    Args:
        lm: The language model; its layers are changed in place.
        ranks: The machines.

    Raises:
        PairingError: A layer is not mlx-lm's, or has adapters.
        RequestError: The target cannot be split over so many.
    """
    rank, size, args = ranks.rank, ranks.size, lm.args
    drafted = drafted_layers(lm)
    num_owners = args.num_hidden_layers - args.num_kv_shared_layers
    vocabulary = None
    if lm.tie_word_embeddings and args.vocab_size % size == 0:
        vocabulary = split(args.vocab_size, size)[rank]
    kv_heads = [
        heads(args.num_attention_heads, layer.self_attn.n_kv_heads, rank, size).kv
        for layer in lm.layers[:num_owners]
    ]
    part = Shard(
        ranks,
        tuple(kv if i in drafted else None for i, kv in enumerate(kv_heads)),
        vocabulary,
    )
    _check(lm)
    for i, layer in enumerate(lm.layers):
        _cut_attention(layer.self_attn, part, keeps_kv=i in drafted)
        _cut_gated(layer.mlp, part)
        layer.mlp = Summed(layer.mlp, part)
        if layer.enable_moe:
            _cut_gated(layer.experts.switch_glu, part)
            layer.experts = Summed(layer.experts, part)
    lm._mtp_shard = part
    return part


def drafted_layers(lm: gemma4_text.Model) -> list[int]:
    """The layers whose keys and values a drafter reads: of each type the last owner."""
    args = lm.args
    owners = lm.layers[: args.num_hidden_layers - args.num_kv_shared_layers]
    last = {layer.layer_type: i for i, layer in enumerate(owners)}
    return sorted(last.values())


def shard_of(lm: nn.Module) -> Shard | None:
    """Which part of a target this is; None for a whole one."""
    found = vars(lm).get("_mtp_shard")
    return found if isinstance(found, Shard) else None


def rows_of(table: nn.Module, part: range) -> Any:
    """A table of embeddings with some of its rows."""
    rows = copy(table)
    for name, array in _arrays(table):
        rows[name] = array[part.start : part.stop]
    return rows


def _check(lm: gemma4_text.Model) -> None:
    """Refuse what is not known, before anything is cut.

    Raises:
        PairingError: A layer is not mlx-lm's, or has adapters.
    """
    for layer in lm.layers:
        own = [layer, layer.self_attn, layer.mlp]
        known = [gemma4_text.DecoderLayer, gemma4_text.Attention, gemma4_text.MLP]
        parts = [m for _, m in layer.named_modules() if isinstance(m, nn.Linear)]
        kinds = [type(m) for m in own if type(m) not in known]
        kinds += [type(m) for m in parts if type(m) not in _LAYERS]
        kinds += [type(m) for _, m in layer.named_modules() if "lora_a" in m]
        behind = (layer.self_attn.get("o_proj"), layer.mlp.get("down_proj"))
        kinds += [type(m) for m in behind if m is not None and "bias" in m]
        for kind in kinds:
            raise PairingError(
                "a target on several machines must have mlx-lm's own layers: got "
                f"{kind.__qualname__}. Fuse adapters into the weights (mlx_lm.fuse)."
            )


def _cut_attention(attention: Any, part: Shard, *, keeps_kv: bool) -> None:
    """Leave an attention the rank's heads."""
    rank, size = part.ranks.rank, part.ranks.size
    own = heads(attention.n_heads, attention.n_kv_heads, rank, size)
    width = attention.head_dim
    queries = range(own.queries.start * width, own.queries.stop * width)
    check_groups(len(queries), _group_size(attention.o_proj))
    _cut_outputs(attention.q_proj, queries, part.seen)
    _cut_inputs(attention.o_proj, queries, part.seen)
    attention.o_proj = Summed(attention.o_proj, part)
    attention.n_heads = len(own.queries)
    if not attention.has_kv or keeps_kv:
        return
    kv = range(own.kv.start * width, own.kv.stop * width)
    for name in ("k_proj", "v_proj"):
        if name in attention:
            _cut_outputs(attention[name], kv, part.seen)
    attention.n_kv_heads = len(own.kv)


def _cut_gated(mlp: Any, part: Shard) -> None:
    """Leave two gated projections, and what comes behind them, the rank's part."""
    down = mlp.down_proj
    size = part.ranks.size
    unit = unit_of(_width(down), size, _group_size(down))
    own = split(_width(down), size, unit)[part.ranks.rank]
    for layer in (mlp.gate_proj, mlp.up_proj):
        _cut_outputs(layer, own, part.seen)
    _cut_inputs(down, own, part.seen)


def _width(layer: Any) -> int:
    """Inputs of a layer."""
    width = layer["weight"].shape[-1]
    return width * 32 // layer.bits if isinstance(layer, _QUANTIZED) else width


def _group_size(layer: Any) -> int | None:
    """Weights of a quantized layer with one scale; None of one that is not."""
    return layer.group_size if isinstance(layer, _QUANTIZED) else None


def _cut_outputs(layer: Any, part: range, seen: hashlib._Hash) -> None:
    """Leave a layer some of its outputs."""
    for name, array in _arrays(layer):
        axis = array.ndim - (1 if name == "bias" else 2)
        layer[name] = _taken(array, part, axis, seen)


def _cut_inputs(layer: Any, part: range, seen: hashlib._Hash) -> None:
    """Leave a layer some of its inputs: whole groups."""
    width = _width(layer)
    for name, array in _arrays(layer):
        if name == "bias":
            continue  # of no layer that is cut so: see _check
        count = array.shape[-1]  # words, or groups: parts end with whole ones
        own = range(part.start * count // width, part.stop * count // width)
        layer[name] = _taken(array, own, array.ndim - 1, seen)


def _arrays(layer: Any) -> list[tuple[str, mx.array]]:
    """The arrays of a matrix that are cut with it."""
    names = ("weight", "scales", "biases", "bias")
    return [(name, layer[name]) for name in names if layer.get(name) is not None]


def _taken(array: mx.array, part: range, axis: int, seen: hashlib._Hash) -> mx.array:
    """Part of an array, with the rest let go."""
    index = [slice(None)] * array.ndim
    index[axis] = slice(part.start, part.stop)
    taken = mx.contiguous(array[tuple(index)])
    spread = tuple(slice(None, None, -(-size // _NUM_SEEN)) for size in array.shape)
    numbers = mx.contiguous(array[spread]).view(mx.uint8)
    mx.eval(taken, numbers)
    seen.update(np.array(numbers).tobytes())
    return taken
