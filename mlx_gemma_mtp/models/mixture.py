"""The mixture of experts of a layer, over the weights of mlx-lm's modules.

A router chooses some experts for each row, and says what each one's result counts; the
sum of these is a branch beside the layer's dense part. With MLX's own operations it
gives mlx-lm's bytes. Parts that are not what mlx-lm 0.32 builds are called as they are.

This file knows nothing of what stands around it in a layer.

Source: mlx-lm 0.32, models/gemma4_text.py and models/switch_layers.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import gemma4_text, switch_layers

from ..kernels import add_norm, route
from ..kernels.layer_trial import Mixture
from ..kernels.matmul import CHUNK, DENSE, MAX_ROWS, Form
from ..kernels.matmul_fused import Matrix, gather_gate_up
from ..kernels.ways import ADD_NORM, EXPERTS, ROUTE, Ways
from .sharding import Summed


@dataclass(frozen=True)
class Normed:
    """A residual stream after the norms of a mixture, [B, L, H] each.

    Attributes:
        dense: For the dense part.
        experts: For the experts.
        routed: For the router's matrix; None for a router that norms by itself.
    """

    dense: mx.array
    experts: mx.array
    routed: mx.array | None


def added(
    layer: gemma4_text.DecoderLayer, h: mx.array, y: mx.array, ways: Ways
) -> tuple[mx.array, Normed]:
    """Add the norm of y to a residual stream, and norm the sum.

    Args:
        layer: mlx-lm's, with a mixture; its norms have one eps.
        h: The residual stream, [B, L, H].
        y: What attention has found, [B, L, H].
        ways: What was chosen on this machine.
    """
    norm, router = layer.post_attention_layernorm, layer.router
    first, second = layer.pre_feedforward_layernorm, layer.pre_feedforward_layernorm_2
    is_kernel = ADD_NORM in ways
    if type(router) is gemma4_text.Router and router.eps == norm.eps:
        add = add_norm.add_norms if is_kernel else add_norm.plain_norms
        h, *normed = add(
            h,
            y,
            norm.weight,
            eps=norm.eps,
            next_weights=(first.weight, second.weight, router.scale),
            root=router._root_size,
        )
        return h, Normed(*normed)
    add_one = add_norm.add_norm if is_kernel else add_norm.plain
    h, dense = add_one(h, y, norm.weight, eps=norm.eps, next_weight=first.weight)
    assert dense is not None  # there is a next norm
    return h, Normed(dense, second(h), None)


def experts_branch(
    layer: gemma4_text.DecoderLayer, h: mx.array, normed: Normed, ways: Ways
) -> add_norm.Branches:
    """What the experts of the router's choice add to the dense part.

    Args:
        layer: mlx-lm's, with a mixture.
        h: The residual stream, [B, L, H].
        normed: The same after its norms.
        ways: What was chosen on this machine.
    """
    shares: mx.array | None
    experts, shares = _routed(layer.router, h, normed.routed, ways)
    if isinstance(layer.experts, Summed):  # whoever asks adds the parts up
        found, shares = layer.experts.module(normed.experts, experts, shares), None
    elif _is_known(layer.experts):
        glu = layer.experts.switch_glu
        found = _by_expert(glu, normed.experts, experts, ways)
    else:
        found, shares = layer.experts(normed.experts, experts, shares), None
    return add_norm.Branches(
        layer.post_feedforward_layernorm_1.weight,
        found,
        layer.post_feedforward_layernorm_2.weight,
        shares,
    )


def mixture_of(layer: gemma4_text.DecoderLayer) -> Mixture | None:
    """What the mixture of a layer has; None where there is none."""
    if not layer.enable_moe:
        return None
    config: Any = layer.config
    experts = layer.experts
    form = _form_of(experts.switch_glu) if _is_known(experts) else None
    return Mixture(config.num_experts, config.top_k_experts, form)


def _routed(
    router: Any, h: mx.array, x: mx.array | None, ways: Ways
) -> tuple[mx.array, mx.array]:
    """The experts of each row, uint32 [B, L, C], and their shares."""
    if x is None:
        experts, shares = router(h)
        return experts, shares
    choose = route.route if ROUTE in ways else route.plain
    count = router.config.top_k_experts
    return choose(router.proj(x), router.per_expert_scale, num_chosen=count)


def _is_known(experts: nn.Module) -> bool:
    """Whether experts are mlx-lm's own."""
    return (
        type(experts) is gemma4_text.Experts
        and type(experts.switch_glu) is switch_layers.SwitchGLU
        and type(experts.switch_glu.activation) is gemma4_text.GeGLU
    )


def _by_expert(
    glu: switch_layers.SwitchGLU, x: mx.array, experts: mx.array, ways: Ways
) -> mx.array:
    """What each chosen expert gives, [B, L, C, H]."""
    form = _form_of(glu) if EXPERTS in ways else None
    if form is None or x.dtype != form.dtype or x.size // x.shape[-1] > MAX_ROWS:
        found: mx.array = glu(x, experts)
        return found
    gate, up = _matrices(glu.gate_proj), _matrices(glu.up_proj)
    between = gather_gate_up(x, gate, up, experts, form=form)
    found = glu.down_proj(mx.expand_dims(between, -2), experts)
    return found.squeeze(-2)


def _form_of(glu: switch_layers.SwitchGLU) -> Form | None:
    """How gates and values are stored; None where the kernel does not multiply them."""
    form, other = (_form_of_one(layer) for layer in (glu.gate_proj, glu.up_proj))
    return form if form == other else None


def _form_of_one(layer: nn.Module) -> Form | None:
    fields: Any = layer
    form = None
    if type(layer) is switch_layers.SwitchLinear:
        form = Form(DENSE, 0, fields.weight.dtype)
    elif type(layer) is switch_layers.QuantizedSwitchLinear:
        is_affine = layer.mode == "affine" and layer.get("biases") is not None
        bits = layer.bits if is_affine else 0
        form = Form(bits, layer.group_size, fields.scales.dtype)
    if form is None or not form.is_known or "bias" in layer:
        return None
    return form if fields.input_dims % CHUNK == 0 else None


def _matrices(layer: nn.Module) -> Matrix:
    """The arrays of all experts' matrices, as the kernel takes them."""
    names = ("weight", "scales", "biases")
    return tuple(layer[name] for name in names if name in layer)
