"""The MTP drafter: one draft step over the target's hidden state and K/V.

The drafter is a few decoder layers with queries only: it attends to the K/V that the
target's last layers of each type have written. A step takes the last token's embedding
(the target's, scaled) and a hidden state of the target's width, and gives logits and
the hidden state for the next step. The position is the same for all steps of a block.

It knows nothing of the target, of offsets or of sampling: keys, values and masks come
in as arguments.

Source: transformers 5.22.2, models/gemma4_assistant/modeling_gemma4_assistant.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import gemma4_text

from ..cache.masks import over_heads
from ..kernels.ways import STOCK_WAYS, Ways
from .attention import SharedKV
from .centroid_head import MaskedEmbedding
from .drafter_config import DrafterConfig
from .layers import run_layers
from .tensor_names import TOKEN_ORDERING, drafter_names


@dataclass(frozen=True)
class DraftOutput:
    """What one draft step gives.

    Attributes:
        logits: Scores of the candidates, without soft-cap, [B, 1, M].
        token_ids: The candidates' ids [B, 1, M], or None where M is the vocabulary.
        hidden: The projected hidden state for the next step, [B, 1, H].
        cluster_scores: How near each cluster of a centroid head is, [B, 1, C]; None
            without such a head. Decoding has no use for them, training has.
    """

    logits: mx.array
    token_ids: mx.array | None
    hidden: mx.array
    cluster_scores: mx.array | None = None


class _Layers(nn.Module):
    """The drafter's decoder layers, under the names the checkpoint uses."""

    def __init__(self, args: gemma4_text.ModelArgs) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(args.vocab_size, args.hidden_size)
        self.layers = [
            gemma4_text.DecoderLayer(args, i) for i in range(args.num_hidden_layers)
        ]
        self.norm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)


class Drafter(nn.Module):
    """A Gemma 4 MTP drafter ("assistant" in checkpoints).

    Args:
        config: The drafter's checked settings.

    Attributes:
        ways: How its layers are run.
    """

    ways: Ways = STOCK_WAYS

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.config = config
        args = gemma4_text.ModelArgs.from_dict(dict(config.text_config))
        self.model = _Layers(args)
        self._num_heads = args.num_attention_heads
        width = config.backbone_hidden_size
        self.pre_projection = nn.Linear(2 * width, args.hidden_size, bias=False)
        self.post_projection = nn.Linear(args.hidden_size, width, bias=False)
        self.masked_embedding = (
            MaskedEmbedding(
                args.hidden_size,
                vocab_size=args.vocab_size,
                num_centroids=config.num_centroids,
                top_k=config.centroid_intermediate_top_k,
            )
            if config.use_ordered_embeddings
            else None
        )

    def __call__(
        self,
        embedding: mx.array,
        hidden: mx.array,
        shared_kv: Mapping[str, SharedKV],
        *,
        position: mx.array,
    ) -> DraftOutput:
        """Run one draft step.

        Args:
            embedding: The target's scaled embedding of the newest token, [B, 1, H].
                Training passes neighbouring places of a text as L in place of 1, with
                a mask for each, [B, 1, L, S].
            hidden: The target's post-norm row that predicted that token, or the
                ``hidden`` of the step before, [B, 1, H].
            shared_kv: Keys, values and mask per layer type.
            position: RoPE position of each row's last token, [B]; the same for all
                steps of a block. Of several places that of the first.

        Returns:
            Logits over the candidates and the hidden state for the next step.
        """
        x = self.pre_projection(mx.concatenate([embedding, hidden], axis=-1))
        masks = {
            kind: over_heads(kv.mask, kv.keys, num_heads=self._num_heads)
            for kind, kv in shared_kv.items()
        }
        kinds = list(shared_kv)
        x, _ = run_layers(  # [B, 1, h]
            self.model.layers,
            self.model.norm,
            x,
            [replace(kv, mask=masks[kind]) for kind, kv in shared_kv.items()],
            sources=[kinds.index(kind) for kind in self.layer_types],
            offset=position,
            ways=self.ways,
        )
        if self.masked_embedding is None:
            logits, token_ids = self.model.embed_tokens.as_linear(x), None
            scores = None
        else:
            logits, token_ids, scores = self.masked_embedding(
                x, self.model.embed_tokens
            )
        return DraftOutput(logits, token_ids, self.post_projection(x), scores)

    @property
    def layer_types(self) -> tuple[str, ...]:
        """The types of the drafter's layers, in order."""
        return tuple(layer.layer_type for layer in self.model.layers)

    def sanitize(self, weights: dict[str, Any]) -> dict[str, Any]:
        """Turn checkpoint tensors into this module's parameters.

        The head is tied, so a stored ``lm_head`` is a copy; ``token_ordering`` is
        int64 in checkpoints and indexes with int32 here.

        Args:
            weights: Checkpoint name to array.

        Returns:
            Parameter name to array.
        """
        shares = drafter_names(weights).parameters
        kept = {name: weights[share.tensor] for name, share in shares.items()}
        if TOKEN_ORDERING in kept:
            kept[TOKEN_ORDERING] = kept[TOKEN_ORDERING].astype(mx.int32)
        return kept
