"""The arrays of target and drafter as inputs of compiled rounds.

A compiled function keeps the arrays that it finds while it is traced: it would go on
with weights that have changed since, and hold them when nobody else does. So a round is
traced with copies of the modules in which its inputs stand for the arrays. The modules
themselves, which other threads may read meanwhile, are never written to.

It knows of modules only that they are trees, and nothing of what is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import gemma4_text

from ..matmuls.choices import STOCK, Choices
from ..matmuls.modules import few_rows
from ..models.drafter import Drafter
from ..models.target import text_model

_PLAIN = frozenset((bool, int, float, str, type(None)))
_SEQUENCES = frozenset((list, tuple))


class ArraysChangedError(Exception):
    """Modules hold other arrays than those that were read; read them again."""


class ModelArrays:
    """The arrays of a target and its drafter, those that are no parameters included.

    Args:
        target: mlx-lm's model object of a Gemma 4 target.
        drafter: The drafter; None where there is none.
        choices: Which of their matrices the kernel of few rows multiplies.

    Attributes:
        choices: The same.

    Raises:
        PairingError: ``target`` is not a Gemma 4 of mlx-lm.
    """

    def __init__(
        self, target: nn.Module, drafter: Drafter | None, choices: Choices = STOCK
    ) -> None:
        self._modules = (text_model(target), drafter)
        self.choices = choices

    def of_target(self) -> ModelArrays:
        """The arrays of the target alone."""
        return ModelArrays(self._modules[0], None, self.choices)

    def using(self, choices: Choices) -> ModelArrays:
        """The same arrays, multiplied as other choices say."""
        target, drafter = self._modules
        return ModelArrays(target, drafter, choices)

    def read(self) -> tuple[list[mx.array], object]:
        """All arrays, in a fixed order, and what a trace depends on beside them.

        That is the modules' classes and plain numbers, and the arrays' shapes and
        types: it differs once layers were quantized or have got adapters. The choices
        are no part of it.
        """
        arrays: list[mx.array] = []
        structure: list[object] = []
        _read(self._modules, arrays, structure)
        return arrays, tuple(structure)

    def bound(
        self, arrays: Sequence[mx.array], inputs: Sequence[mx.array]
    ) -> tuple[gemma4_text.Model, Drafter | None]:
        """Language model and drafter that compute with inputs in place of arrays.

        Args:
            arrays: What was read.
            inputs: What stands for each of them.

        Raises:
            ArraysChangedError: The modules hold other arrays by now.
        """
        rest = iter(zip(arrays, inputs, strict=True))
        lm, drafter = _copied(self._modules, rest, self.choices)
        if next(rest, None) is not None:
            raise ArraysChangedError
        if drafter is not None:
            drafter.ways = self.choices.ways
        return lm, drafter


@dataclass
class _Inputs:
    """What a function takes beside its arguments, while it is called.

    Attributes:
        arrays: The models' arrays; while it is traced, what stands for them.
        bind: Gives the models that compute with those.
    """

    arrays: list[mx.array] = field(default_factory=list)
    bind: Callable[[list[mx.array]], Any] | None = None


class CompiledFunction:
    """A compiled function of models and arrays, for the thread that made it.

    Between calls it holds neither models nor their arrays.

    Args:
        function: Takes the models, then arrays.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._inputs = _Inputs()
        self._function = mx.compile(
            partial(_call, self._inputs, function), inputs=self._inputs.arrays
        )

    def __call__(
        self,
        bind: Callable[[list[mx.array]], Any],
        model_arrays: Sequence[mx.array],
        *arrays: Any,
    ) -> Any:
        """Call it.

        Args:
            bind: Gives the models, of what stands for their arrays.
            model_arrays: The models' arrays.
            arrays: What it takes beside the models.

        Raises:
            ArraysChangedError: It had to be traced, and the models hold other arrays.
        """
        inputs = self._inputs
        inputs.arrays[:] = model_arrays
        inputs.bind = bind
        try:
            return self._function(*arrays)
        finally:
            inputs.arrays.clear()
            inputs.bind = None


def _call(inputs: _Inputs, function: Callable[..., Any], *arrays: Any) -> Any:
    """Call a function with the models that the inputs give."""
    assert inputs.bind is not None
    return function(inputs.bind(inputs.arrays), *arrays)


def _read(value: object, arrays: list[mx.array], structure: list[object]) -> None:
    """Add a tree's arrays and what else a trace depends on."""
    kind = type(value)
    if kind is mx.array:
        array = cast(mx.array, value)
        arrays.append(array)
        structure += (array.shape, array.dtype)
    elif isinstance(value, dict):
        if isinstance(value, nn.Module):
            for name, number in list(vars(value).items()):
                if type(number) in _PLAIN:
                    structure.append((name, number))
        structure += (kind, *value)
        for item in list(value.values()):
            _read(item, arrays, structure)
    elif kind in _SEQUENCES:
        items = cast(Sequence[object], value)
        structure.append((kind, len(items)))
        for item in items:
            _read(item, arrays, structure)
    elif kind in _PLAIN:
        structure.append(value)


def _copied(
    value: Any, rest: Iterator[tuple[mx.array, mx.array]], choices: Choices
) -> Any:
    """A tree with other arrays; what is neither array, module nor container stays."""
    if isinstance(value, mx.array):
        array, stand_in = next(rest, (None, None))
        if array is not value:
            raise ArraysChangedError
        return stand_in
    if isinstance(value, dict):
        copy = type(value).__new__(type(value))
        if isinstance(value, nn.Module):
            vars(copy).update(vars(value))
        for key, item in list(value.items()):
            dict.__setitem__(copy, key, _copied(item, rest, choices))
        if choices and isinstance(value, nn.Module):
            few_rows(cast(nn.Module, copy), choices)
        return copy
    if type(value) in _SEQUENCES:
        return type(value)(_copied(item, rest, choices) for item in value)
    return value
