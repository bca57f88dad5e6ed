"""What rounds ask of a target and of a drafter; any models that give it will do.

It knows nothing of how rounds use them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import mlx.core as mx

from ..cache.prompt import PrefillCache
from ..cache.slabs import SlabLayout
from ..models.attention import SharedKV
from ..models.drafter import DraftOutput
from ..models.target import Prefilled, TargetOutput


class TargetLike(Protocol):
    """What a round asks of a target; see target.py for the shapes."""

    layout: SlabLayout
    vocab_size: int

    def embed(self, tokens: mx.array) -> mx.array:
        """Scaled embeddings of tokens."""

    def prefill(
        self, tokens: mx.array, caches: list[PrefillCache], sizes: Sequence[int]
    ) -> Prefilled:
        """Read a chunk of each of some prompts into caches."""

    def verify(
        self,
        tokens: mx.array,
        slabs: list[mx.array],
        *,
        offset: mx.array,
        first_position: mx.array,
    ) -> TargetOutput:
        """Run a block of tokens over the slabs."""


class DrafterLike(Protocol):
    """What a round asks of a drafter; see drafter.py for the shapes."""

    @property
    def layer_types(self) -> tuple[str, ...]:
        """The types of the drafter's layers."""

    def __call__(
        self,
        embedding: mx.array,
        hidden: mx.array,
        shared_kv: Mapping[str, SharedKV],
        *,
        position: mx.array,
    ) -> DraftOutput:
        """Run one draft step."""
