"""Layers of MLX that give a few rows to the kernel, and all others to MLX.

They take the place of a model's layers where a round is traced, in the copy of the
modules that it computes with: the user's own model stays as it is, and layers that are
quantized or get adapters later are followed. An adapter's inner layer is one of them.

A layer of a class that is not MLX's own is left alone: it may compute something else.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models import gemma4_text

from ..kernels.layer_trial import LayerSizes, Mixture
from ..kernels.matmul import DENSE, Form, multiply
from ..kernels.matmul_fused import Matrix, gate_by, gate_up, qkv
from ..kernels.ways import GATE_UP, QKV
from ..models.attention import JoinedProjections
from ..models.layers import JoinedGate, is_known
from ..models.mixture import mixture_of
from .choices import Choice, Choices, Shape

_QUANTIZED = ("weight", "scales", "biases")
_TABLE = "embed_tokens"  # is the head too, but for models that have another
_OTHER_HEADS = {"lm_head", "masked_embedding"}


class _FewRows:
    """What the layers have in common: the choice for their matrix."""

    _choice: Choice
    _form: Form

    @property
    def matrix(self) -> Matrix:
        """The arrays of the matrix, as kernels take them."""
        layer: Any = self
        names = ("weight",) if self.form.bits == DENSE else _QUANTIZED
        return tuple(layer[name] for name in names)

    @property
    def form(self) -> Form:
        """How its numbers are stored."""
        return self._form

    def takes(self, x: mx.array) -> bool:
        """Whether the kernel multiplies these rows [..., K]."""
        num_rows = x.size // max(x.shape[-1], 1)
        return x.dtype == self._form.dtype and self._choice.takes(num_rows)

    def _product(self, x: mx.array) -> mx.array | None:
        """x [..., K] times the matrix, [..., N]; None where MLX is to multiply."""
        if not self.takes(x):
            return None
        columns = self._choice.columns[x.size // x.shape[-1] - 1]
        return multiply(x, *self.matrix, form=self._form, num_columns=columns)


class _FewRowsLayer(_FewRows):
    """What a layer and a quantized one have in common."""

    def __call__(self, x: mx.array) -> mx.array:
        """x [..., K] times the matrix, and the bias if there is one: [..., N]."""
        layer: Any = self
        mlx: Any = super()
        product = self._product(x)
        if product is None:
            return cast(mx.array, mlx.__call__(x))
        return product + layer["bias"] if "bias" in layer else product


class _FewRowsTable(_FewRows):
    """What a table of embeddings that is the head too and a quantized one share."""

    def as_linear(self, x: mx.array) -> mx.array:
        """The logits [..., N] of hidden states [..., K]."""
        mlx: Any = super()
        product = self._product(x)
        return cast(mx.array, mlx.as_linear(x)) if product is None else product


class FewRowsLinear(_FewRowsLayer, nn.Linear):
    """A dense layer."""


class FewRowsQuantizedLinear(_FewRowsLayer, nn.QuantizedLinear):
    """A quantized layer."""


class FewRowsEmbedding(_FewRowsTable, nn.Embedding):
    """A dense table of embeddings that is the head too."""


class FewRowsQuantizedEmbedding(_FewRowsTable, nn.QuantizedEmbedding):
    """A quantized table of embeddings that is the head too."""


class FewRowsMLP(gemma4_text.MLP):
    """The dense part of a layer, whose gate and values come from one launch."""

    def __call__(self, x: mx.array) -> mx.array:
        """What it gives for x [..., K], [..., K]."""
        gate, up = self.gate_proj, self.up_proj
        if not gate.takes(x):
            return super().__call__(x)
        return self.down_proj(gate_up(x, gate.matrix, up.matrix, form=gate.form))


class _FewRowsGate(_FewRowsLayer, JoinedGate):
    """A gate whose projection and activation come from one launch."""

    def gated(self, h: mx.array, values: mx.array) -> mx.array | None:
        """See ``JoinedGate``."""
        if not self.takes(h) or values.dtype != h.dtype:
            return None
        return gate_by(h, self.matrix, values, form=self.form)


class FewRowsLinearGate(_FewRowsGate, FewRowsLinear):
    """Of a dense layer."""


class FewRowsQuantizedGate(_FewRowsGate, FewRowsQuantizedLinear):
    """Of a quantized layer."""


class FewRowsAttention(JoinedProjections):
    """Attention whose queries, keys and values come from one launch."""

    def project(self, x: mx.array) -> list[mx.array] | None:
        """See ``JoinedProjections``."""
        layers = _projections(self)
        if not layers[0].takes(x):
            return None
        matrices = [layer.matrix for layer in layers]
        return qkv(x, matrices, form=layers[0].form)


def _projections(attention: gemma4_text.Attention) -> list[Any]:
    """The layers of queries, keys and values, as far as it has them."""
    names = ("q_proj", "k_proj", "v_proj")
    return [attention[name] for name in names if name in attention]


def _are_alike(layers: Sequence[nn.Module]) -> bool:
    """Whether one kernel can multiply by all of them: by all of the same rows."""
    own = [layer for layer in layers if isinstance(layer, _FewRowsLayer)]
    return (
        len(own) == len(layers) > 1
        and not any("bias" in layer for layer in layers)
        and len({(layer.form, layer._choice.first_row) for layer in own}) == 1
    )


_KINDS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: FewRowsLinear,
    nn.QuantizedLinear: FewRowsQuantizedLinear,
    nn.Embedding: FewRowsEmbedding,
    nn.QuantizedEmbedding: FewRowsQuantizedEmbedding,
}

_GATES: dict[type[nn.Module], type[nn.Module]] = {
    FewRowsLinear: FewRowsLinearGate,
    FewRowsQuantizedLinear: FewRowsQuantizedGate,
}


def few_rows(layer: nn.Module, choices: Choices) -> None:
    """Let a layer take the kernel where that was chosen for its matrix.

    Args:
        layer: Any module whose own modules have been given to this before; it is
            changed in place.
        choices: Which matrices the kernel multiplies.
    """
    if type(layer) is gemma4_text.MLP and GATE_UP in choices.ways:
        if _are_alike([layer.gate_proj, layer.up_proj]):
            layer.__class__ = FewRowsMLP
        return
    if type(layer) is gemma4_text.Attention and QKV in choices.ways:
        if layer.has_kv and _are_alike(_projections(layer)):
            layer.__class__ = FewRowsAttention
        return
    if type(layer) is gemma4_text.DecoderLayer and GATE_UP in choices.ways:
        gate: Any = layer.per_layer_input_gate
        if type(gate) in _GATES and "bias" not in gate:
            gate.__class__ = _GATES[type(gate)]
        return
    kind = _KINDS.get(type(layer))
    if kind is None:
        return
    shape = shape_of(layer)
    choice = choices.by_shape.get(shape)
    if choice is None:
        return
    layer.__class__ = kind
    vars(layer).update(_choice=choice, _form=shape.form)


def shape_of(layer: nn.Module) -> Shape:
    """The shape of a layer's matrix; one that is not known where no kernel fits it."""
    fields: Any = layer
    num_outputs, width = fields["weight"].shape
    if not isinstance(layer, nn.QuantizedLinear | nn.QuantizedEmbedding):
        return Shape(num_outputs, width, Form(DENSE, 0, fields["weight"].dtype))
    scales, biases = fields["scales"], fields.get("biases")
    is_affine = layer.mode == "affine" and biases is not None
    is_affine = is_affine and scales.dtype == biases.dtype
    form = Form(layer.bits if is_affine else 0, layer.group_size, scales.dtype)
    return Shape(num_outputs, width * 32 // layer.bits, form)


def shapes_of(models: Iterable[nn.Module | None]) -> Counter[Shape]:
    """How many matrices of each shape that the kernel multiplies some models have.

    A table of embeddings counts where it is the head.
    """
    found: Counter[Shape] = Counter()
    for model in models:
        layers = [] if model is None else model.named_modules()
        paths = {path: set(path.split(".")) for path, _ in layers}
        has_other_head = any(parts & _OTHER_HEADS for parts in paths.values())
        for path, layer in layers:
            is_head = _TABLE in paths[path] and not has_other_head
            if isinstance(layer, nn.Embedding | nn.QuantizedEmbedding) and not is_head:
                continue
            if type(layer) in _KINDS and (shape := shape_of(layer)).is_known:
                found[shape] += 1
    return found


def sizes_of(models: Iterable[nn.Module | None]) -> LayerSizes:
    """What the layers of some models have."""
    widths: dict[tuple[int, mx.Dtype], None] = {}
    head_dims: dict[tuple[int, mx.Dtype], None] = {}
    mixtures: dict[Mixture, None] = {}
    arrays: list[object] = []
    for model in models:
        flat: Any = [] if model is None else tree_flatten(model.parameters())
        arrays += [(name, array.shape, str(array.dtype)) for name, array in flat]
        for _, layer in [] if model is None else model.named_modules():
            if type(layer) is gemma4_text.DecoderLayer and is_known(layer):
                if (mixture := mixture_of(layer)) is not None:
                    mixtures[mixture] = None
                weight = layer.input_layernorm.weight
                widths[weight.shape[-1], weight.dtype] = None
                head_dims[layer.self_attn.head_dim, weight.dtype] = None
    structure = hashlib.sha256(repr(arrays).encode()).hexdigest()
    return LayerSizes(tuple(widths), tuple(head_dims), structure, tuple(mixtures))
