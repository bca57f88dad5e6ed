"""Optimizers and their schedule: Muon for the layers' matrices, Adam for the rest.

Muon learns matrices in fewer steps than Adam, and needs half of its state. Tables of
tokens, norms and scalars, and the narrow matrices of adapters, are Adam's.

Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks".
"""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim

Tree = dict[str, Any]

_WARM_UP = 0.04  # share of the run
_LEAST = 0.02  # share of the rate at the end
# Muon's updates have all singular values near 1 and Adam's entries near 1; this is
# Muon's rate over Adam's.
_MUON_RATE = 5.0


class Optimizer:
    """Both optimizers as one.

    Args:
        learning_rate: Adam's highest rate.
        has_muon: Whether matrices are Muon's; adapters' are not.
    """

    def __init__(self, learning_rate: float, *, has_muon: bool) -> None:
        adam = optim.Adam(learning_rate, betas=[0.9, 0.99], bias_correction=True)
        self._rates = [learning_rate]
        self._parts: list[optim.Optimizer] = [adam]
        if has_muon:
            self._rates.insert(0, _MUON_RATE * learning_rate)
            self._parts.insert(0, optim.Muon(self._rates[0], weight_decay=0.0))
        filters = [_is_layer_matrix] if has_muon else []
        self._all = optim.MultiOptimizer(self._parts, filters)

    def init(self, weights: Tree) -> None:
        """Make the state for float32 weights."""
        self._all.init(weights)

    def step(self, gradients: Tree, weights: Tree, progress: float) -> Tree:
        """The weights after one step.

        Args:
            gradients: Of the mean loss.
            weights: Float32.
            progress: Share of the run that is behind, 0 to 1.
        """
        for part, rate in zip(self._parts, self._rates, strict=True):
            part.learning_rate = rate * schedule(progress)
        gradients, _ = optim.clip_grad_norm(gradients, 1.0)
        return self._all.apply_gradients(gradients, weights)

    @property
    def state(self) -> Tree:
        """Everything that the next step depends on."""
        return self._all.state

    @state.setter
    def state(self, state: Tree) -> None:
        self._all.state = state


def schedule(progress: float) -> float:
    """Share of the highest learning rate: up at once, then down along a cosine."""
    if progress < _WARM_UP:
        return max(progress / _WARM_UP, _LEAST)
    rest = (progress - _WARM_UP) / (1 - _WARM_UP)
    return _LEAST + (1 - _LEAST) * 0.5 * (1 + math.cos(math.pi * min(rest, 1.0)))


def _is_layer_matrix(name: str, array: mx.array) -> bool:
    return array.ndim == 2 and not ("embed" in name or "lora" in name)
