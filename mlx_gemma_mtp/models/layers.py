"""Our own forward through Gemma 4 layers, over the weights of mlx-lm's modules.

A round runs its few places through it, of the target and of the drafter; prompts are
read by mlx-lm's layers. With MLX's own operations it gives mlx-lm's bytes. It differs
in where things are cut: every residual is added beside the norm in front of what reads
it next, be that in the next layer, and keys are written to slabs. So what stands beside
each other can be one kernel.

A layer is run here only where it is what mlx-lm 0.32 builds, down to its norms; what
somebody has put in its place is called as it is. Projections may be anything.

Source: mlx-lm 0.32, models/gemma4_text.py.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import gemma4_text

from ..cache.slabs import SlabView
from ..kernels.add_norm import Branches, add_norm, plain
from ..kernels.common import MIN_ELEMENTS
from ..kernels.ways import ADD_NORM, STOCK_WAYS, Ways
from . import mixture
from .attention import JoinedProjections, SharedKV, attend
from .sharding import Summed

logger = logging.getLogger("mlx_gemma_mtp")


class JoinedGate(nn.Module):
    """A projection of gates that somebody can compute with what they let through."""

    def gated(self, h: mx.array, values: mx.array) -> mx.array | None:
        """gelu(projection of h [B, L, H]) times values [B, L, P]; None: one by one."""
        raise NotImplementedError


def run_layers(
    layers: Sequence[Any],
    final_norm: nn.Module,
    h: mx.array,
    kvs: Sequence[SharedKV],
    *,
    sources: Sequence[int],
    offset: mx.array,
    slots: Mapping[str, mx.array] | None = None,
    per_layer: Sequence[mx.array | None] | None = None,
    ways: Ways = STOCK_WAYS,
) -> tuple[mx.array, list[SharedKV]]:
    """Run all layers of a model over a few places.

    Args:
        layers: mlx-lm's decoder layers.
        final_norm: What comes behind them.
        h: What goes in, [B, L, H].
        kvs: What there is to attend to.
        sources: Which of ``kvs`` each layer attends to.
        offset: Position of each row's first place, int32 [B].
        slots: Where a layer writes its keys and values that has the number of what it
            attends to, int32 [B, L] by layer type; None where no layer writes any.
        per_layer: Each layer's input from the per-layer embeddings, [B, L, P].
        ways: What was chosen on this machine.

    Returns:
        What comes out, after the final norm, [B, L, H], and ``kvs`` with what was
        written.
    """
    kvs = list(kvs)
    ends = _ends(layers, ways)
    x = None
    for i, layer in enumerate(layers):
        is_owner = slots is not None and sources[i] == i
        place = _Place(
            kvs[sources[i]],
            offset,
            slots[layer.layer_type] if slots is not None and is_owner else None,
            None if per_layer is None else per_layer[i],
            ends[i],
            ways,
        )
        if is_known(layer):
            x = layer.input_layernorm(h) if x is None else x
            next_norm = _next_norm(layers[i + 1 :], final_norm)
            h, x, kvs[sources[i]] = _run(layer, h, x, place, next_norm)
        else:
            h, kvs[sources[i]] = _run_other(layer, h, place)
            x = None
    return final_norm(h) if x is None else x, kvs


def _next_norm(rest: Sequence[Any], final_norm: nn.Module) -> nn.Module | None:
    """The norm that the next layer begins with; None where that is its own business."""
    if not rest:
        return final_norm
    norm: nn.Module | None = rest[0].input_layernorm if is_known(rest[0]) else None
    return norm


@dataclass(frozen=True)
class _Place:
    """What a layer runs over.

    Attributes:
        kv: What it attends to.
        offset: Position of each row's first place, int32 [B].
        slots: Where it writes, int32 [B, L]; None for a layer that owns no K/V.
        per_layer_input: Its input from the per-layer embeddings, [B, L, P].
        end: What its result is multiplied by; None for nothing.
        ways: What was chosen on this machine.
    """

    kv: SharedKV
    offset: mx.array
    slots: mx.array | None
    per_layer_input: mx.array | None
    end: mx.array | None
    ways: Ways


def _run(
    layer: gemma4_text.DecoderLayer,
    h: mx.array,
    x: mx.array,
    place: _Place,
    next_norm: nn.Module | None,
) -> tuple[mx.array, mx.array | None, SharedKV]:
    """Run a layer.

    Args:
        layer: mlx-lm's.
        h: The residual stream, [B, L, H].
        x: The same after the layer's first norm, [B, L, H].
        place: What it runs over.
        next_norm: In front of what comes next; None for none.

    Returns:
        The residual stream behind it, the same after the next norm if there is one, and
        what was attended to.
    """
    found, kv = attend(
        layer.self_attn,
        x,
        place.kv,
        offset=place.offset,
        slots=place.slots,
        ways=place.ways,
    )
    ways = place.ways
    h, x, branches = _attended(layer, h, found, ways)
    found, branches = _fed(layer, x, branches)
    norm, end = layer.post_feedforward_layernorm, place.end
    if place.per_layer_input is None or layer.per_layer_input_gate is None:
        h, normed = _added(
            h, found, norm, next_norm, ways, scale=end, branches=branches
        )
        return h, normed, kv
    h, _ = _added(h, found, norm, None, ways, branches=branches)
    gate = _gated(layer.per_layer_input_gate, h, place.per_layer_input)
    found = layer.per_layer_projection(gate)
    norm = layer.post_per_layer_input_norm
    h, normed = _added(h, found, norm, next_norm, ways, scale=end)
    return h, normed, kv


def _attended(
    layer: gemma4_text.DecoderLayer, h: mx.array, found: mx.array, ways: Ways
) -> tuple[mx.array, mx.array, Branches | None]:
    """The residual stream behind attention, the same normed, and what experts add."""
    if layer.enable_moe:
        h, normed = mixture.added(layer, h, found, ways)
        return h, normed.dense, mixture.experts_branch(layer, h, normed, ways)
    norm, next_norm = layer.post_attention_layernorm, layer.pre_feedforward_layernorm
    h, x = _added(h, found, norm, next_norm, ways)
    assert x is not None  # there is a next norm
    return h, x, None


def _gated(gate: nn.Module, h: mx.array, values: mx.array) -> mx.array:
    """The values [B, L, P] that a gate lets through."""
    found = gate.gated(h, values) if isinstance(gate, JoinedGate) else None
    return nn.gelu_approx(gate(h)) * values if found is None else found


def _fed(
    layer: gemma4_text.DecoderLayer, x: mx.array, branches: Branches | None
) -> tuple[mx.array, Branches | None]:
    """What the dense part gives for x [B, L, H], and what experts add to it.

    Of a part of a layer both are parts of a sum: one sum for both.
    """
    if branches is None or not isinstance(layer.mlp, Summed):
        return layer.mlp(x), branches
    dense, found = layer.mlp.with_part((x,), branches.other)
    return dense, branches._replace(other=found)


def _added(
    h: mx.array,
    y: mx.array,
    norm: nn.RMSNorm,
    next_norm: nn.Module | None,
    ways: Ways,
    *,
    scale: mx.array | None = None,
    branches: Branches | None = None,
) -> tuple[mx.array, mx.array | None]:
    """The residual stream with the norm of y added, and the same after the next norm.

    None stands for that where there is no next norm.
    """
    next_weight = None
    if type(next_norm) is nn.RMSNorm and next_norm.eps == norm.eps:
        next_weight = next_norm.weight
    add = add_norm if ADD_NORM in ways else plain
    h, normed = add(
        h,
        y,
        norm.weight,
        eps=norm.eps,
        scale=scale,
        next_weight=next_weight,
        branches=branches,
    )
    if normed is None and next_norm is not None:
        normed = next_norm(h)
    return h, normed


def _run_other(layer: Any, h: mx.array, place: _Place) -> tuple[mx.array, SharedKV]:
    """Call a layer that is not mlx-lm's own: its result, and what was attended to."""
    kv, cache = place.kv, None
    if place.slots is not None:
        cache = SlabView(kv.keys, kv.values, offset=place.offset, slots=place.slots)
    h, (keys, values), _ = layer(
        h,
        kv.mask,
        cache,
        per_layer_input=place.per_layer_input,
        shared_kv=None if cache is not None else (kv.keys, kv.values),
        offset=place.offset,
    )
    return h, replace(kv, keys=keys, values=values)


def _ends(layers: Sequence[Any], ways: Ways) -> list[mx.array | None]:
    """What each layer's result is multiplied by; None for nothing."""
    found = [layer.get("layer_scalar") for layer in layers]
    if ADD_NORM not in ways or len({s.dtype for s in found if s is not None}) > 1:
        return found
    if any(scalar is None for scalar in found):
        return found
    # As kernels take them, made once: each launch would pad its own.
    rows = mx.repeat(mx.concatenate(found), MIN_ELEMENTS)
    return [rows[i : i + MIN_ELEMENTS] for i in range(0, rows.size, MIN_ELEMENTS)]


def is_known(layer: Any) -> bool:
    """Whether a layer is mlx-lm's own, down to its attention and its norms."""
    attention = layer.get("self_attn")
    others = [] if type(layer) is gemma4_text.DecoderLayer else [layer]
    is_ours = isinstance(attention, JoinedProjections)
    if not (is_ours or type(attention) is gemma4_text.Attention):
        others.append(attention)
    norms = [
        norm for name, norm in layer.items() if "norm" in name and norm is not None
    ]
    others += [norm for norm in norms if type(norm) is not nn.RMSNorm]
    for module in others[:1]:
        _tell(type(module).__qualname__)
    return not others and len({norm.eps for norm in norms}) == 1


@cache
def _tell(name: str) -> None:
    """Say once what is not known."""
    logger.info("layers with %s run as they are, without kernels of this package", name)
