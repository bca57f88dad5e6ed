"""Layers of MLX that give a few rows to the kernel, and all others to MLX.

They take the place of a model's layers where a round is traced, in the copy of the
modules that it computes with: the user's own model stays as it is, and layers that are
quantized or get adapters later are followed. An adapter's inner layer is one of them.

A layer of a class that is not MLX's own is left alone: it may compute something else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..kernels.matmul import DENSE, Form, multiply
from .choices import Choice, Choices, Shape

_TABLE = "embed_tokens"  # is the head too, but for models that have another
_OTHER_HEADS = {"lm_head", "masked_embedding"}


class _FewRows:
    """What the layers have in common: the choice for their matrix."""

    _choice: Choice
    _form: Form

    def _product(self, x: mx.array) -> mx.array | None:
        """x [..., K] times the matrix, [..., N]; None where MLX is to multiply."""
        layer: Any = self
        num_rows = x.size // max(x.shape[-1], 1)
        if x.dtype != self._form.dtype or not self._choice.takes(num_rows):
            return None
        return multiply(
            x,
            layer["weight"],
            layer.get("scales"),
            layer.get("biases"),
            form=self._form,
            num_columns=self._choice.columns[num_rows - 1],
        )


class FewRowsLinear(_FewRows, nn.Linear):
    """A dense layer."""

    def __call__(self, x: mx.array) -> mx.array:
        """x [..., K] times the matrix, and the bias if there is one: [..., N]."""
        product = self._product(x)
        if product is None:
            return super().__call__(x)
        return product + self["bias"] if "bias" in self else product


class FewRowsQuantizedLinear(_FewRows, nn.QuantizedLinear):
    """A quantized layer."""

    def __call__(self, x: mx.array) -> mx.array:
        """x [..., K] times the matrix, and the bias if there is one: [..., N]."""
        product = self._product(x)
        if product is None:
            return super().__call__(x)
        return product + self["bias"] if "bias" in self else product


class FewRowsEmbedding(_FewRows, nn.Embedding):
    """A dense table of embeddings that is the head too."""

    def as_linear(self, x: mx.array) -> mx.array:
        """The logits [..., N] of hidden states [..., K]."""
        product = self._product(x)
        return super().as_linear(x) if product is None else product


class FewRowsQuantizedEmbedding(_FewRows, nn.QuantizedEmbedding):
    """A quantized table of embeddings that is the head too."""

    def as_linear(self, x: mx.array) -> mx.array:
        """The logits [..., N] of hidden states [..., K]."""
        product = self._product(x)
        return super().as_linear(x) if product is None else product


_KINDS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: FewRowsLinear,
    nn.QuantizedLinear: FewRowsQuantizedLinear,
    nn.Embedding: FewRowsEmbedding,
    nn.QuantizedEmbedding: FewRowsQuantizedEmbedding,
}


def few_rows(layer: nn.Module, choices: Choices) -> None:
    """Let a layer take the kernel where that was chosen for its matrix.

    Args:
        layer: Any module; it is changed in place.
        choices: Which matrices the kernel multiplies.
    """
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
