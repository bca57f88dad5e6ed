"""How many kernels Metal would launch for a pass of a published model, counted here.

The graph of a pass is built for the real shapes of a family, in 4 bits, and never
evaluated: no weights are needed. What Metal has one kernel for, and the CPU has not, is
one node while this counts: norms, rotations, attention that is fused there, products
of quantized matrices, and the kernels of this package. Attention that is not fused on
Metal is what MLX makes of it. Nodes that move no data do not count; see graph.py.

It is a count, not a time. Copies that MLX makes for its own reasons are not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import gemma4_text

from mlx_gemma_mtp.cache import masks
from mlx_gemma_mtp.cache.masks import draft_masks
from mlx_gemma_mtp.engine.model_arrays import CompiledFunction, ModelArrays
from mlx_gemma_mtp.kernels import common
from mlx_gemma_mtp.kernels.ways import STOCK_WAYS, Ways
from mlx_gemma_mtp.matmuls.choices import Choice, Choices
from mlx_gemma_mtp.matmuls.modules import shapes_of
from mlx_gemma_mtp.models import attention
from mlx_gemma_mtp.models.attention import SharedKV
from mlx_gemma_mtp.models.drafter import Drafter
from mlx_gemma_mtp.models.drafter_config import DrafterConfig
from mlx_gemma_mtp.models.families import NUM_CENTROIDS, VOCAB_SIZE, Family
from mlx_gemma_mtp.models.target import Target

from .graph import Count

CAPACITY = 2048  # slots of the full layers
NUM_ROWS = 5  # of a pass: the last token and four drafts


@dataclass(frozen=True)
class Launches:
    """What one pass and one draft step take.

    Attributes:
        target: Of a pass of the target, with its head.
        step: Of one draft step.
    """

    target: int
    step: int


class Counted:
    """A published pair, of which passes are counted.

    Args:
        family: The family.
    """

    def __init__(self, family: Family) -> None:
        args = {**family.target_text, "vocab_size": VOCAB_SIZE}
        self._target = gemma4_text.Model(gemma4_text.ModelArgs.from_dict(args))
        self._drafter = Drafter(_drafter_config(family))
        for model in (self._target, self._drafter):
            model.set_dtype(mx.bfloat16)
        wanted = self._target.quant_predicate
        nn.quantize(
            self._target,
            group_size=64,
            bits=4,
            class_predicate=lambda path, layer: (
                hasattr(layer, "to_quantized") and wanted(path, layer)
            ),
        )
        self._arrays = ModelArrays(self._target, self._drafter)

    @property
    def ways(self) -> tuple[str, ...]:
        """The ways that make a difference to the target."""
        return Target(self._target).ways

    def launches(
        self, ways: Ways = STOCK_WAYS, *, num_rows: int = NUM_ROWS
    ) -> Launches:
        """Count them.

        Args:
            ways: How layers are run; any of the kernels of few rows' own means that it
                multiplies all matrices that it can.
            num_rows: Rows of the target's pass.
        """
        shapes = shapes_of([self._target, self._drafter]) if ways else ()
        arrays = self._arrays.using(
            Choices({shape: Choice(1) for shape in shapes}, ways)
        )
        weights, _ = arrays.read()

        def models(inputs: list[mx.array]) -> tuple[Target, Drafter]:
            lm, drafter = arrays.bound(weights, inputs)
            assert drafter is not None
            return Target(self._target).over(lm, ways), drafter

        layout = Target(self._target).layout
        slabs = layout.allocate(1, CAPACITY)
        offset = mx.zeros((1,), dtype=mx.int32)
        made = draft_masks(
            layout, offset=offset, first_position=offset, capacity=CAPACITY
        )
        width = self._target.args.hidden_size
        given = [mx.zeros((1, 1, width), dtype=layout.dtype) for _ in range(2)]
        tokens = mx.zeros((1, num_rows), dtype=mx.int32)
        return Launches(
            _count(_verify, models, weights, tokens, slabs, offset),
            _count(_draft, models, weights, *given, slabs, made, offset),
        )


def _drafter_config(family: Family) -> DrafterConfig:
    """The published drafter's settings."""
    return DrafterConfig.from_dict(
        {
            "model_type": f"{family.kind}_assistant",
            "backbone_hidden_size": family.target["hidden_size"],
            "use_ordered_embeddings": family.has_centroid_head,
            "num_centroids": NUM_CENTROIDS,
            "text_config": {**family.drafter_text, "vocab_size": VOCAB_SIZE},
        }
    )


_Models = tuple[Target, Drafter]


def _verify(
    models: _Models, tokens: mx.array, slabs: list[mx.array], offset: mx.array
) -> list[mx.array]:
    """A pass of the target over one sequence."""
    found = models[0].verify(tokens, slabs, offset=offset, first_position=offset)
    return [found.logits, found.hidden, *found.slabs]


def _draft(
    models: _Models,
    embedding: mx.array,
    hidden: mx.array,
    slabs: list[mx.array],
    seen: dict[str, mx.array],
    offset: mx.array,
) -> list[mx.array]:
    """One draft step of one sequence; masks are made once for all of a round."""
    target, drafter = models
    shared = {
        kind: SharedKV(slabs[2 * i], slabs[2 * i + 1], seen[kind])
        for kind in dict.fromkeys(drafter.layer_types)
        for i in [target.layout.source(kind)]
    }
    found = drafter(embedding, hidden, shared, position=offset)
    return [found.logits, found.hidden]


def _count(
    function: Callable[..., list[mx.array]],
    models: Callable[[list[mx.array]], _Models],
    weights: list[mx.array],
    *arrays: Any,
) -> int:
    """Launches of a compiled function as Metal would run it, without its inputs'."""
    with _as_metal():
        found = CompiledFunction(function)(models, weights, *arrays)
    whole, given = Count(), Count()
    whole.add(found, weights, *arrays)
    given.add(weights, *arrays)
    return whole.launches - given.launches


# --------------------------------------------------------------------- one node each


@contextmanager
def _as_metal() -> Iterator[None]:
    """While a graph is built: what is one kernel on Metal is one node."""
    fast: dict[str, Any] = {
        "rms_norm": lambda x, weight, *_: _node(x.shape, x.dtype, x, weight),
        "rope": lambda x, *_, offset, freqs=None, **__: _node(
            x.shape, x.dtype, x, offset, freqs
        ),
        "scaled_dot_product_attention": partial(
            _attention, mx.fast.scaled_dot_product_attention
        ),
    }
    with (
        patch.multiple(mx.fast, **fast),
        patch.multiple(mx, quantized_matmul=_product, gather_qmm=_gathered),
        patch.object(common, "backend", lambda: "metal"),
        patch.object(common, "launch", _launched),
        patch.object(masks, "gpu", lambda: "metal"),
        patch.object(attention, "gpu", lambda: "metal"),
    ):
        yield


def _node(shape: Sequence[int], dtype: mx.Dtype, *inputs: Any) -> mx.array:
    """One node that takes some arrays and gives one of a shape."""
    arrays = [array for array in inputs if isinstance(array, mx.array)]
    (empty,) = mx.depends([mx.broadcast_to(mx.array(0, dtype), shape)], arrays)
    # A scan is never made one with what stands beside it.
    return mx.cumsum(empty, axis=-1).astype(dtype)


def _attention(
    mlx: Callable[..., mx.array],
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    *,
    scale: float,
    mask: mx.array,
) -> mx.array:
    """Fused where Metal's is, see kernels of MLX 0.32 for few queries."""
    num_queries, head_dim = queries.shape[2:]
    shared_by = queries.shape[1] // keys.shape[1]
    is_fused = head_dim in masks.FUSED_HEAD_DIMS
    if is_fused and num_queries <= masks.fused_queries(shared_by):
        return _node(queries.shape, queries.dtype, queries, keys, values, mask)
    return mlx(queries, keys, values, scale=scale, mask=mask)


def _product(x: mx.array, weight: mx.array, *arrays: Any, **_: Any) -> mx.array:
    """A product of a quantized matrix."""
    return _node((*x.shape[:-1], weight.shape[0]), x.dtype, x, weight, *arrays)


def _gathered(
    x: mx.array, weight: mx.array, *arrays: Any, rhs_indices: mx.array, **_: Any
) -> mx.array:
    """Products of the quantized matrices of experts."""
    shape = (*rhs_indices.shape, x.shape[-2], weight.shape[-2])
    return _node(shape, x.dtype, x, weight, rhs_indices, *arrays)


def _launched(
    kernel: common.Kernel,
    inputs: list[mx.array],
    *,
    output_shapes: Sequence[tuple[int, ...]],
    output_dtypes: Sequence[mx.Dtype],
    **_: Any,
) -> list[mx.array]:
    """A kernel of this package: its first output is the launch, others are free."""
    first, *rest = zip(output_shapes, output_dtypes, strict=True)
    launch = _node(*first, *inputs)
    others = [mx.broadcast_to(mx.array(0, dtype), shape) for shape, dtype in rest]
    return [launch, *(mx.depends([other], [launch])[0] for other in others)]
