"""The training loop.

Weights and the optimizer's state are float32; the drafter computes with a copy in its
own type. Records are read from disk as they are needed, and the activations of a chunk
of places are the most that is in memory at once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from ...errors import RequestError
from ...models.drafter import Drafter
from ..recording.records import Records
from ..report.measured import Acceptance, Point
from ..settings import TrainingSettings
from .objective import Objective
from .optimizer import Optimizer, Tree
from .snapshot import Progress, canonical, read_snapshot, write_snapshot
from .unrolling import Cutter


@dataclass(frozen=True)
class Material:
    """What a drafter learns from and is judged by.

    Attributes:
        records: Where records are.
        train: The names of those to learn from.
        judged: The names of those to judge by.
    """

    records: Records
    train: Sequence[str]
    judged: Sequence[str]


class Trainer:
    """Trains a drafter on records.

    Args:
        drafter: Its trainable parameters are trained, in place.
        material: What it learns from.
        objective: The loss.
        cutter: Makes chunks of records.
        settings: How it is trained.
        checkpoint: The file that progress is kept in.
        on_point: Called with everything that is measured on the way.
    """

    def __init__(
        self,
        drafter: Drafter,
        material: Material,
        *,
        objective: Objective,
        cutter: Cutter,
        settings: TrainingSettings,
        checkpoint: Path,
        on_point: Callable[[Point], None] = lambda point: None,
    ) -> None:
        self._drafter = drafter
        self._material = material
        self._objective = objective
        self._cutter = cutter
        self._settings = settings
        self._checkpoint = checkpoint
        self._on_point = on_point
        self._loss_and_gradients = nn.value_and_grad(drafter, objective.loss)
        self._optimizer = Optimizer(
            settings.learning_rate, has_muon=settings.lora_rank is None
        )
        self.progress = self._first_progress()
        self._judge_if_due()  # the run was cut off before

    def train(self) -> None:
        """Train to the end, and leave the best weights in the drafter, float32.

        Raises:
            RequestError: The loss is no number any more.
        """
        try:
            while not self._is_over():
                self._step()
                if self.progress.step % self._settings.save_every == 0:
                    self._save()
                self._judge_if_due()
            self._judge()
        finally:
            self._save()
        self._drafter.update(self.progress.best)

    def judged(self, names: Sequence[str]) -> Acceptance:
        """The acceptance of the weights in use, at all places of records."""
        total, num_places = mx.zeros((self._settings.num_draft_tokens,)), 0
        for name in names:
            for chunk in self._cutter.chunks(self._material.records.read(name)):
                found = self._objective.accepted(self._drafter, chunk)
                total = total + found.sum(axis=0)
                num_places += chunk.num_places
                mx.eval(total)
        shares = cast(list[float], (total / num_places).tolist())
        reached = [min(share, 1.0) for share in shares]
        return Acceptance(tuple(reached), num_places)

    def _step(self) -> None:
        """One step of the optimizer.

        Progress changes in one assignment: an interruption finds it before or after.
        """
        began, progress, settings = time.monotonic(), self.progress, self._settings
        size, seed = settings.batch_size, settings.seed
        names = batch(self._material.train, size, seed, progress.step)
        loss, gradients = self._gradients(names)
        if not math.isfinite(loss):
            raise RequestError(
                f"the loss must be a number: got {loss} after {progress.step} steps. "
                "Lower --learning-rate, and pass --resume to keep the texts."
            )
        if not progress.history:
            first = Point(0, progress.seconds / 60, loss, progress.best_length)
            self.progress = progress = replace(progress, history=[first])
            self._on_point(first)
        optimizer = self._optimizer
        optimizer.state = _copied(progress.optimizer)  # it is changed in place
        weights = optimizer.step(gradients, progress.weights, self._share())
        weights, state = canonical(weights), canonical(optimizer.state)
        mx.eval(weights, state)
        self._use(weights)
        self.progress = replace(
            progress,
            weights=weights,
            optimizer=state,
            step=progress.step + 1,
            seconds=progress.seconds + time.monotonic() - began,
            losses=[*progress.losses, loss],
        )
        mx.clear_cache()  # texts of other lengths use none of these buffers

    def _gradients(self, names: Sequence[str]) -> tuple[float, Tree]:
        """The mean loss of a batch and its gradients, a chunk at a time."""
        loss, num_places = mx.zeros(()), 0
        gradients = tree_map(mx.zeros_like, self.progress.weights)
        for name in names:
            for chunk in self._cutter.chunks(self._material.records.read(name)):
                part, parts = self._loss_and_gradients(self._drafter, chunk)
                loss = loss + part
                gradients = tree_map(
                    lambda g, p: g + p.astype(mx.float32), gradients, parts
                )
                mx.eval(loss, gradients)
                num_places += chunk.num_places
        scale = 1 / max(num_places, 1)
        gradients = tree_map(lambda g: g * scale, gradients)
        return cast(float, loss.item()) * scale, gradients

    def _judge_if_due(self) -> None:
        if self.progress.step % self._settings.judge_every == 0:
            self._judge()

    def _judge(self) -> None:
        """Measure weights that were not measured; keep them where they are the best."""
        began, progress = time.monotonic(), self.progress
        if not progress.losses:
            return
        length = self.judged(self._material.judged).length
        best, best_length, best_step = (
            (progress.weights, length, progress.step)
            if length > progress.best_length
            else (progress.best, progress.best_length, progress.best_step)
        )
        seconds = progress.seconds + time.monotonic() - began
        loss = sum(progress.losses) / len(progress.losses)
        point = Point(progress.step, seconds / 60, loss, length)
        self.progress = replace(
            progress,
            best=best,
            best_length=best_length,
            best_step=best_step,
            losses=[],
            seconds=seconds,
            history=[*progress.history, point],
        )
        self._on_point(point)

    def _share(self) -> float:
        """How much of the run is behind."""
        settings, progress = self._settings, self.progress
        share = progress.step / settings.steps
        if settings.minutes is not None:
            share = max(share, progress.seconds / (60 * settings.minutes))
        return min(share, 1.0)

    def _is_over(self) -> bool:
        progress, settings = self.progress, self._settings
        since = progress.step - progress.best_step
        return self._share() >= 1 or since >= settings.patience * settings.judge_every

    def _first_progress(self) -> Progress:
        """Where the run was, or its beginning."""
        progress = read_snapshot(self._checkpoint)
        if progress is None:
            parameters = self._drafter.trainable_parameters()
            weights = canonical(tree_map(lambda w: w.astype(mx.float32), parameters))
            self._optimizer.init(weights)
            progress = Progress(weights, self._optimizer.state, best=weights)
            mx.eval(weights)
            self._drafter.set_dtype(self._cutter.dtype)
            self._use(weights)
            length = self.judged(self._material.judged).length
            return replace(progress, best_length=length)
        self._drafter.set_dtype(self._cutter.dtype)
        self._use(progress.weights)
        return progress

    def _use(self, weights: Tree) -> None:
        """Let the drafter compute with weights, rounded to its type."""
        self._drafter.update(tree_map(lambda w: w.astype(self._cutter.dtype), weights))

    def _save(self) -> None:
        write_snapshot(self._checkpoint, self.progress)


def _copied(tree: Tree) -> Tree:
    """Another tree of the same arrays."""
    found: Tree = tree_map(lambda array: array, tree)
    return found


def batch(names: Sequence[str], size: int, seed: int, step: int) -> list[str]:
    """The texts of a step: every epoch has all of them, in an order of its own."""
    places = range(step * size, (step + 1) * size)
    epochs = [divmod(place, len(names)) for place in places]
    return [names[_order(len(names), seed, epoch)[i]] for epoch, i in epochs]


@lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> list[int]:
    """A permutation of 0 .. count - 1."""
    return [int(i) for i in np.random.default_rng([seed, epoch]).permutation(count)]
