"""Which weights are measured: a checkpoint, or random ones in a published shape."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_gemma_mtp.checkpoints.hub import fetch
from mlx_gemma_mtp.pair.load import embedded_pair_path, load, load_tokenizer
from mlx_gemma_mtp.pair.pair import Pair, pair_of
from mlx_gemma_mtp.selftest.random_pair import random_pair


@dataclass(frozen=True)
class ModelSpec:
    """The pair to measure; every field is what the command line says.

    Attributes:
        model: Folder or Hub id; None for the embedded pair.
        draft_model: Folder or Hub id; None to find it.
        shapes: A published family whose shapes get random weights, or None.
        num_layers: How many of its layers to keep; None for all.
        bits: Bits of its quantized weights; None for float ones.
        dtype: Type of float weights; None for the checkpoint's, and for bfloat16.
    """

    model: str | None = None
    draft_model: str | None = None
    shapes: str | None = None
    num_layers: int | None = None
    bits: int | None = None
    dtype: str | None = None

    @property
    def folder(self) -> Path:
        """The target's folder."""
        return fetch(self.model or embedded_pair_path())

    @property
    def title(self) -> str:
        """The pair in words."""
        name = self.model or "the embedded pair"
        if self.shapes is not None:
            layers = f", {self.num_layers} layers" if self.num_layers else ""
            bits = f", {self.bits} bits" if self.bits else ""
            name = f"random weights in the shapes of {self.shapes}{layers}{bits}"
        return f"{name}, {self.dtype}" if self.dtype else name

    def load(self) -> Pair:
        """Load or make the pair."""
        if self.shapes is not None:
            return random_pair(
                self.shapes,
                num_layers=self.num_layers,
                bits=self.bits,
                dtype=getattr(mx, self.dtype or "bfloat16"),
            )
        model, _ = load(
            self.model or embedded_pair_path(), draft_model=self.draft_model
        )
        pair = pair_of(model)
        if self.dtype is not None:
            for module in (pair.target, pair.drafter):
                if module is not None:
                    module.set_dtype(getattr(mx, self.dtype))
                    mx.eval(module.parameters())
        return pair

    def tokenizer(self) -> Any | None:
        """The target's tokenizer; None for random weights."""
        return None if self.shapes is not None else load_tokenizer(self.folder)
