"""The drafter's centroid-routed LM head (E2B, E4B): scores for a few clusters only.

A dense head over 262,144 tokens would cost more than the rest of the drafter. Instead
the vocabulary is sorted into C clusters (2,048 of 128 tokens each); the hidden state
is compared with the C centroids, and only the tokens of the best clusters (32, so
4,096 candidates) are scored against the tied embedding.

The candidates stay a list end to end: nothing is scattered to the full vocabulary and
nothing is read by the host. This file knows nothing of configs, masks or sampling.

Source: transformers 5.22.2, Gemma4AssistantMaskedEmbedder in
models/gemma4_assistant/modeling_gemma4_assistant.py.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn


class MaskedEmbedding(nn.Module):
    """Chooses candidate tokens by their cluster's centroid.

    Args:
        hidden_size: Width h of the drafter.
        vocab_size: Number V of tokens.
        num_centroids: Number C of clusters; divides V.
        top_k: How many clusters are scored.
    """

    def __init__(
        self, hidden_size: int, *, vocab_size: int, num_centroids: int, top_k: int
    ) -> None:
        super().__init__()
        self.centroids = nn.Linear(hidden_size, num_centroids, bias=False)
        # Token ids in cluster order: cluster c owns entries c*V/C .. (c+1)*V/C - 1.
        self.token_ordering = mx.zeros((vocab_size,), dtype=mx.int32)
        self.num_centroids = num_centroids
        self.top_k = min(top_k, num_centroids)

    def __call__(
        self, hidden: mx.array, embed_tokens: nn.Module
    ) -> tuple[mx.array, mx.array, mx.array]:
        """Score the tokens of the clusters nearest to ``hidden``.

        Args:
            hidden: The drafter's normed output, [B, L, h].
            embed_tokens: The tied embedding, plain or quantized: gathered rows are
                dequantized by the module itself.

        Returns:
            Logits and token ids of the M = top_k * V / C candidates, both [B, L, M],
            and the scores of the clusters, [B, L, C].
        """
        num_rows, num_tokens, _ = hidden.shape
        scores = self.centroids(hidden)
        # A choice has no gradient; without saying so, training could not begin.
        order = mx.argpartition(-mx.stop_gradient(scores), kth=self.top_k - 1, axis=-1)
        nearest = order[..., : self.top_k]  # [B, L, top_k]
        clusters = self.token_ordering.reshape(self.num_centroids, -1)
        token_ids = clusters[nearest].reshape(num_rows, num_tokens, -1)  # [B, L, M]
        embeddings = embed_tokens(token_ids)  # [B, L, M, h]
        logits = (embeddings @ hidden[..., None]).squeeze(-1)  # [B, L, M]
        return logits, token_ids, scores

    def clusters_of_tokens(self) -> mx.array:
        """The cluster of every token id, int32 [V]."""
        places = mx.argsort(self.token_ordering)
        size = self.token_ordering.size // self.num_centroids
        return (places // size).astype(mx.int32)
