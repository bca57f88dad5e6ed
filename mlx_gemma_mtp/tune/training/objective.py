"""The loss of a chunk of places, and what the drafter would have accepted there.

Puts unrolled steps and their divergences together; knows nothing of optimizers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx

from ...models.drafter import Drafter, DraftOutput
from .divergence import (
    Foretold,
    acceptance,
    cluster_divergence,
    divergence,
    foretold,
    reached,
)
from .unrolling import Chunk, unroll

# What routing counts for beside the tokens themselves.
_CLUSTER_WEIGHT = 0.25
# What a step counts at least, however seldom it is reached: while a drafter is new,
# hardly any of its later steps is.
_LEAST_REACH = 0.1


@dataclass(frozen=True)
class Objective:
    """What a drafter is trained for.

    Attributes:
        num_draft_tokens: K.
        temp: The temperature that drafts are drawn at; 0 for greedy ones.
        clusters: The cluster of every token, int32 [V], of a centroid head.
    """

    num_draft_tokens: int
    temp: float
    clusters: mx.array | None = None

    def loss(self, drafter: Drafter, chunk: Chunk) -> mx.array:
        """The sum over places and steps, float32."""
        reach = mx.ones((chunk.num_places,))
        total = mx.zeros(())
        for output, said, judge in self._steps(drafter, chunk):
            weight = mx.maximum(reach, _LEAST_REACH) * judge.is_inside
            found = self._divergence(output, said, judge)
            total = total + (mx.stop_gradient(weight) * found).sum()
            reach = reach * reached(said, judge.next_probs)
        return total

    def accepted(self, drafter: Drafter, chunk: Chunk) -> mx.array:
        """The probability that i drafts or more are accepted, [C, K], i = 1 to K.

        Greedy drafts stand where they are the target's own choice; of drawn ones see
        divergence.py. The steps behind a draft count where the text goes on with it.
        Filters of the drafter's own distribution are left out, so drawn drafts do a
        little better than this.
        """
        reach = mx.ones((chunk.num_places,))
        found = []
        for output, said, judge in self._steps(drafter, chunk):
            if self.temp:
                chance = acceptance(said, judge.probs)
                found.append(reach * chance * judge.is_inside)
                reach = reach * reached(said, judge.next_probs)
            else:
                best = best_tokens(output)
                is_chosen = best == judge.token_ids[:, 0]
                found.append(reach * is_chosen * judge.is_inside)
                reach = reach * is_chosen * (best == judge.next_tokens)
        return mx.stack(found, axis=-1)

    def _divergence(
        self, output: DraftOutput, said: Foretold, judge: _Judge
    ) -> mx.array:
        """One step's, [C]."""
        found = divergence(said, judge.probs)
        if output.cluster_scores is None or self.clusters is None:
            return found
        clusters = self.clusters[judge.token_ids]
        routing = cluster_divergence(output.cluster_scores[0], clusters, judge.probs)
        return found + _CLUSTER_WEIGHT * routing

    def _steps(
        self, drafter: Drafter, chunk: Chunk
    ) -> Iterator[tuple[DraftOutput, Foretold, _Judge]]:
        """Each draft step with what judges it."""
        for step, output in enumerate(unroll(drafter, chunk, self.num_draft_tokens)):
            judge = _Judge.of(chunk, step)
            said = foretold(output, judge.token_ids, judge.next_tokens, self.temp)
            yield output, said, judge


@dataclass(frozen=True)
class _Judge:
    """The rows of a chunk that judge one step; see ``Chunk``."""

    token_ids: mx.array
    probs: mx.array
    next_tokens: mx.array
    next_probs: mx.array
    is_inside: mx.array

    @classmethod
    def of(cls, chunk: Chunk, step: int) -> _Judge:
        """Those of a step, counted from 0."""
        rows = slice(step, step + chunk.num_places)
        return cls(
            chunk.token_ids[rows],
            chunk.probs[rows],
            chunk.next_tokens[rows],
            chunk.next_probs[rows],
            chunk.is_inside[rows],
        )


def best_tokens(output: DraftOutput) -> mx.array:
    """The most likely token of each place, [C]."""
    best = mx.argmax(output.logits[0], axis=-1)
    if output.token_ids is None:
        return best
    return mx.take_along_axis(output.token_ids[0], best[:, None], axis=-1)[:, 0]
