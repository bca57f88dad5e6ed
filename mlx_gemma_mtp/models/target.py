"""The target: mlx-lm's own Gemma 4 model, driven over slabs.

mlx-lm's layers are used as they are; only the loop over them is ours, because a round
needs the hidden state after the final norm, the logits of every row, and the slabs.
This is the only file that relies on mlx-lm's Gemma 4 internals. It knows nothing of
the drafter, of acceptance or of sampling.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import gemma4, gemma4_text

from ..cache.masks import (
    FUSED_HEAD_DIMS,
    MAX_FUSED_QUERIES,
    fused_queries,
    over_heads,
    verify_masks,
    verify_slots,
)
from ..cache.prompt import PrefillCache
from ..cache.slabs import LayerKV, SlabLayout
from ..errors import PairingError
from ..kernels.ways import (
    ADD_NORM,
    EXPERTS,
    GATE_UP,
    NORM_ROPE,
    PACKED,
    QKV,
    ROUTE,
    SPLIT,
    STOCK_WAYS,
    WAYS,
    Ways,
)
from .attention import SharedKV
from .layers import is_known, run_layers
from .mixture import mixture_of
from .sharding import KVHeads, Shard, rows_of, shard_of

# A chunk's tokens times the layers that are evaluated together. Modelled, half a second
# of the slowest: of 12B on a chip of 2 TFLOPS, and of 31B on one of 4.
_TOKENS_OF_LAYERS = 2048


@dataclass(frozen=True)
class TargetOutput:
    """What one verify forward gives.

    Attributes:
        logits: After the soft-cap, [B, L, V].
        hidden: After the final norm, [B, L, H].
        slabs: The updated slabs, keys and values of each layer in turn.
    """

    logits: mx.array
    hidden: mx.array
    slabs: list[mx.array]


@dataclass(frozen=True)
class Prefilled:
    """What reading a chunk of each of some prompts gives.

    Attributes:
        logits: Of each chunk's last token, [B, 1, V].
        hidden: Of each chunk's last token, after the final norm, [B, 1, H].
        caches: The cache of each layer that owns its K/V.
    """

    logits: mx.array
    hidden: mx.array
    caches: list[PrefillCache]


class Target:
    """A Gemma 4 text model that verifies blocks of tokens.

    Args:
        model: What ``mlx_lm.load`` returns for a Gemma 4 checkpoint.

    Attributes:
        layout: Of its slabs.
        shard: Which part of it is here; None for all of it.
        vocab_size: Number of token ids.
        hidden_size: H.

    Raises:
        PairingError: The model is not a Gemma 4 of mlx-lm.
    """

    def __init__(self, model: nn.Module) -> None:
        self._lm = text_model(model)
        self._ways = STOCK_WAYS
        self.shard = shard_of(self._lm)
        args = self._lm.args
        self._first_shared = args.num_hidden_layers - args.num_kv_shared_layers
        self.vocab_size: int = args.vocab_size
        self.hidden_size: int = args.hidden_size
        self.layout = SlabLayout(
            layers=tuple(
                LayerKV(
                    layer.layer_type,
                    layer.self_attn.n_kv_heads,
                    layer.self_attn.head_dim,
                )
                for layer in self._lm.layers[: self._first_shared]
            ),
            window=args.sliding_window,
            # The type the activations have: that of the norms, which no
            # quantization touches.
            dtype=self._lm.model.norm.weight.dtype,
        )

    def over(self, lm: gemma4_text.Model, ways: Ways = STOCK_WAYS) -> Target:
        """The same target with another language model, of the same structure.

        Args:
            lm: The model.
            ways: How its layers are run.
        """
        target = copy(self)
        target._lm, target._ways = lm, ways
        return target

    @property
    def ways(self) -> tuple[str, ...]:
        """The ways to run layers that make a difference to this model."""
        found = [ADD_NORM, NORM_ROPE, GATE_UP, QKV]
        mixtures = [mixture_of(layer) for layer in self._lm.layers if is_known(layer)]
        found += [ROUTE] if any(mixtures) else []
        found += [EXPERTS] if any(m is not None and m.form for m in mixtures) else []
        for i, layer in enumerate(self.layout.layers):
            num_seen = self._num_seen(i)
            shared_by = self._num_heads // num_seen
            if layer.head_dim not in FUSED_HEAD_DIMS:
                # Those of a single head MLX packs by itself.
                found += [PACKED] if shared_by > 1 and num_seen > 1 else []
            elif fused_queries(shared_by) < MAX_FUSED_QUERIES:
                found += [SPLIT]
        return tuple(way for way in WAYS if way in found)

    def embed(self, tokens: mx.array) -> mx.array:
        """Scaled embeddings of tokens [B, L], as the drafter takes them, [B, L, H]."""
        return scaled_embedding(self._lm, tokens)

    def prefill(
        self, tokens: mx.array, caches: list[PrefillCache], sizes: Sequence[int]
    ) -> Prefilled:
        """Read a chunk of each of some prompts, as ``read`` does.

        Args:
            tokens: A chunk a row, int32 [B, L]. Shorter ones are padded on the right,
                which no token before sees.
            caches: One for each layer that owns K/V; they are filled further, with
                padding too.
            sizes: Tokens of each chunk, 1 to L.

        Returns:
            The last tokens' logits and hidden states, and the caches.
        """
        hidden = self.read(tokens, caches)
        last = mx.array([size - 1 for size in sizes])
        # Copies: slices would keep the whole chunk.
        hidden = hidden[mx.arange(len(sizes)), last][:, None]
        return Prefilled(self.logits(hidden), hidden, caches)

    def read(self, tokens: mx.array, caches: Sequence[Any]) -> mx.array:
        """Read a chunk of each of some texts, which stand at the same place.

        A few layers at a time are evaluated, the last ones by the caller: Python hears
        of a signal only between two evaluations. How many they are changes no result.

        Args:
            tokens: At least one token id a row, int32 [B, L].
            caches: One for each layer that owns K/V; they are filled further. Where an
                exception ends this, only some of them are.

        Returns:
            The hidden states after the final norm, [B, L, H].
        """
        model = self._lm.model
        masks = model._make_masks(tokens, caches)  # of its argument the length counts
        types = (layer.layer_type for layer in self.layout.layers)
        return self._layers(
            tokens,
            caches,
            dict(zip(types, masks, strict=True)),
            after_layer=_InGroups(tokens.size, self.shard),
        )

    def logits(self, hidden: mx.array) -> mx.array:
        """The logits of post-norm hidden states [B, L, H], after the soft-cap."""
        return head_logits(self._lm, hidden)

    def verify(
        self,
        tokens: mx.array,
        slabs: list[mx.array],
        *,
        offset: mx.array,
        first_position: mx.array,
    ) -> TargetOutput:
        """Run a block of tokens that follows what the slabs hold.

        Args:
            tokens: The last token and the drafts, int32 [B, L].
            slabs: Keys and values of each layer in turn.
            offset: Position of each row's first token, int32 [B].
            first_position: The oldest position that each row's rings hold keys for,
                int32 [B].

        Returns:
            Logits and hidden states of every row of the block, and the slabs with the
            block's keys and values written.
        """
        layout = self.layout
        num_tokens, capacity = tokens.shape[1], layout.capacity(slabs)
        masks = verify_masks(
            layout,
            offset=offset,
            first_position=first_position,
            num_tokens=num_tokens,
            capacity=capacity,
        )
        masks = {
            kind: over_heads(
                mask,
                self._kv(slabs, layout.source(kind), mask).seen.keys,
                num_heads=self._num_heads,
                is_split=SPLIT in self._ways,
            )
            for kind, mask in masks.items()
        }
        slots = verify_slots(
            layout, offset=offset, num_tokens=num_tokens, capacity=capacity
        )
        model, lm = self._lm.model, self._lm
        embeddings = model.embed_tokens(tokens)
        h = embeddings * model.embed_scale
        hidden, kvs = run_layers(
            model.layers,
            model.norm,
            h,
            [
                self._kv(slabs, i, masks[layer.layer_type])
                for i, layer in enumerate(layout.layers)
            ],
            sources=model.previous_kvs,
            offset=offset,
            slots=slots,
            per_layer=self._per_layer_inputs(tokens, embeddings, h),
            ways=self._ways,
        )
        written = [array for kv in kvs for array in (kv.keys, kv.values)]
        return TargetOutput(head_logits(lm, hidden), hidden, written)

    @property
    def _num_heads(self) -> int:
        """Heads of queries, in every layer."""
        whole: int = self._lm.args.num_attention_heads
        return whole if self.shard is None else whole // self.shard.ranks.size

    def _kv_heads(self, i: int) -> range | None:
        """The heads of a layer's K/V that queries see; None for all of them."""
        return None if self.shard is None else self.shard.kv_heads[i]

    def _num_seen(self, i: int) -> int:
        """How many these are."""
        seen = self._kv_heads(i)
        return self.layout.layers[i].num_kv_heads if seen is None else len(seen)

    def _kv(self, slabs: Sequence[mx.array], i: int, mask: mx.array) -> SharedKV:
        """What there is of a layer's K/V."""
        return SharedKV(slabs[2 * i], slabs[2 * i + 1], mask, self._kv_heads(i))

    def _cache(self, caches: Sequence[Any], i: int) -> Any:
        """The cache of a layer that owns its K/V, as its queries see it."""
        seen = self._kv_heads(i)
        return caches[i] if seen is None else KVHeads(caches[i], seen)

    def _layers(
        self,
        tokens: mx.array,
        caches: Sequence[Any],
        masks: Mapping[str, Any],
        *,
        after_layer: Callable[[mx.array], None] | None = None,
    ) -> mx.array:
        """The layer loop of mlx-lm's Gemma4TextModel, [B, L, H]."""
        model = self._lm.model
        embeddings = model.embed_tokens(tokens)
        h = embeddings * model.embed_scale
        per_layer = self._per_layer_inputs(tokens, embeddings, h)
        shared: list[tuple[Any, Any]] = []
        for i, layer in enumerate(model.layers):
            owns_kv = i < self._first_shared
            kv, offset = (None, None) if owns_kv else shared[model.previous_kvs[i]]
            h, kv, offset = layer(
                h,
                masks[layer.layer_type],
                self._cache(caches, i) if owns_kv else None,
                per_layer_input=per_layer[i],
                shared_kv=kv,
                offset=offset,
            )
            shared.append((kv, offset))
            if after_layer is not None:
                after_layer(h)
        return model.norm(h)

    def _per_layer_inputs(
        self, tokens: mx.array, embeddings: mx.array, h: mx.array
    ) -> list[mx.array | None]:
        """Each layer's input from the per-layer embeddings (E2B, E4B), or Nones."""
        model = self._lm.model
        if not model.hidden_size_per_layer_input:
            return [None] * len(model.layers)
        inputs = model._project_per_layer_inputs(
            h, model._get_per_layer_inputs(tokens, embeddings)
        )
        if GATE_UP not in self._ways:
            return [inputs[:, :, i] for i in range(len(model.layers))]
        # A kernel takes each in one piece: all are laid out at once.
        each = mx.contiguous(inputs.transpose(2, 0, 1, 3))
        return [each[i : i + 1].squeeze(0) for i in range(len(model.layers))]


class _InGroups:
    """Evaluates the layers of a chunk in groups, each while the next one is built.

    Args:
        num_tokens: Tokens of the chunk: the more there are, the smaller a group.
        shard: Which part of the target it is; None for all of it.
    """

    def __init__(self, num_tokens: int, shard: Shard | None) -> None:
        self._shard = shard
        self._size = max(1, _TOKENS_OF_LAYERS // num_tokens)
        self._num_layers = 0
        self._running: mx.array | None = None

    def __call__(self, hidden: mx.array) -> None:
        self._num_layers += 1
        if self._num_layers % self._size:
            return
        mx.async_eval(hidden)
        if self._running is not None:
            mx.eval(self._running)
            if self._shard is not None:  # its sums are those of all
                self._shard.ranks.watchdog.beat()
        self._running = hidden


def scaled_embedding(lm: gemma4_text.Model, tokens: mx.array) -> mx.array:
    """Embeddings of tokens [B, L], as the drafter takes them, [B, L, H]."""
    return lm.model.embed_tokens(tokens) * lm.model.embed_scale


def head_logits(lm: gemma4_text.Model, hidden: mx.array) -> mx.array:
    """The head and the soft-cap over post-norm hidden states, [B, L, V]."""
    part = shard_of(lm)
    if part is not None and part.vocabulary is not None:
        rows = rows_of(lm.model.embed_tokens, part.vocabulary)
        return part.joined(_capped(lm, rows.as_linear(hidden)))
    if lm.tie_word_embeddings:
        return _capped(lm, lm.model.embed_tokens.as_linear(hidden))
    return _capped(lm, lm.lm_head(hidden))


def _capped(lm: gemma4_text.Model, logits: mx.array) -> mx.array:
    """Logits after the soft-cap."""
    cap = lm.final_logit_softcapping
    return logits if cap is None else gemma4_text.logit_softcap(cap, logits)


def key_norm(model: nn.Module, layer_type: str) -> mx.array:
    """The weight of the norm over the keys that a drafter reads, [D].

    Args:
        model: A target.
        layer_type: Which of the drafter's layers read them.
    """
    layer = Target(model).layout.source(layer_type)
    return text_model(model).layers[layer].self_attn.k_norm.weight


def text_model(model: nn.Module) -> gemma4_text.Model:
    """The language model inside what mlx-lm loads.

    Raises:
        PairingError: The model is not a Gemma 4 of mlx-lm.
    """
    if isinstance(model, gemma4.Model):
        return model.language_model
    if isinstance(model, gemma4_text.Model):
        return model
    raise PairingError(
        "target must be a Gemma 4 model of mlx-lm: got "
        f"{type(model).__module__}.{type(model).__name__}, expected "
        "mlx_lm.models.gemma4.Model. Load a Gemma 4 checkpoint, for example "
        "google/gemma-4-E2B-it."
    )
