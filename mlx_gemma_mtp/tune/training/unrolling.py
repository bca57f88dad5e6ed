"""K draft steps from many places of a text at once, as a round runs them from one.

All steps of a place read the same keys at the same position; a step takes the token
before it and the drafter's own hidden state. Where the drafter's own token is another
than the text's, the target stops the block there, so the steps behind it matter only
where both are the same: the text's tokens are the drafter's own wherever it counts.

Knows the drafter and records; nothing of losses or of training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import mlx.core as mx

from ...cache.slabs import SlabLayout
from ...models.attention import SharedKV
from ...models.drafter import Drafter, DraftOutput
from ..recording.records import Record, first_seen

# Of what the activations of a chunk of places may take.
_ACTIVATION_BYTES = 1 << 30
_MOST_PLACES = 256


@dataclass(frozen=True)
class Chunk:
    """Neighbouring places of a text, C of them, and what judges K steps from each.

    Row j of the judging arrays is the first step's of place j; rows past the end of the
    text repeat its last one, and no step counts there.

    Attributes:
        embeddings: Of the last tokens, and of the K - 1 behind the last place's,
            scaled, [1, C + K - 1, H].
        hidden: The hidden state each place starts from, [1, C, H].
        shared_kv: Keys, values and masks by layer type.
        position: That of the first place's last token, int32 [1].
        token_ids: The target's most likely tokens, int32 [C + K - 1, M].
        probs: Their probabilities, float32 [C + K - 1, M].
        next_tokens: The text's own tokens, int32 [C + K - 1].
        next_probs: Their probabilities, float32 [C + K - 1].
        is_inside: Whether the text goes on so far, bool [C + K - 1].
    """

    embeddings: mx.array
    hidden: mx.array
    shared_kv: dict[str, SharedKV]
    position: mx.array
    token_ids: mx.array
    probs: mx.array
    next_tokens: mx.array
    next_probs: mx.array
    is_inside: mx.array

    @property
    def num_places(self) -> int:
        """C."""
        return self.hidden.shape[1]


@dataclass(frozen=True)
class Cutter:
    """Cuts records into chunks.

    Attributes:
        layout: The target's.
        embed: Gives the target's scaled embeddings [B, L, H] of tokens [B, L].
        num_draft_tokens: K.
        num_places: Most places C of a chunk: the activations of so many are in memory
            together.
        dtype: The type that the drafter computes in.
    """

    layout: SlabLayout
    embed: Callable[[mx.array], mx.array]
    num_draft_tokens: int
    num_places: int
    dtype: mx.Dtype

    def chunks(self, record: Record) -> Iterator[Chunk]:
        """All places of a record in order."""
        for first in range(0, record.num_places, self.num_places):
            count = min(self.num_places, record.num_places - first)
            yield self._chunk(record, first, count)

    def _chunk(self, record: Record, first: int, count: int) -> Chunk:
        """Places ``first`` to ``first + count - 1``."""
        offset, total = record.start + first, record.num_places
        rows = mx.arange(first, first + count + self.num_draft_tokens - 1)
        is_inside = rows < total
        rows = mx.minimum(rows, total - 1)
        return Chunk(
            embeddings=self.embed(record.tokens[record.start + rows][None]).astype(
                self.dtype
            ),
            hidden=record.hidden[None, first : first + count].astype(self.dtype),
            shared_kv={
                kind: self._shared_kv(record, kind, offset, count) for kind in record.kv
            },
            position=mx.array([offset], dtype=mx.int32),
            token_ids=record.token_ids[rows],
            probs=record.probs[rows],
            next_tokens=record.tokens[record.start + 1 + rows],
            next_probs=record.next_probs[rows],
            is_inside=is_inside,
        )

    def _shared_kv(
        self, record: Record, layer_type: str, offset: int, count: int
    ) -> SharedKV:
        """The keys that places see whose last tokens follow ``offset`` tokens or more.

        Masks as in ``masks.draft_masks``, for a query per place.
        """
        kv = record.kv[layer_type]
        low = first_seen(self.layout, layer_type, offset)
        high = offset + count - 1  # the last place sees the keys before it
        part = slice(low - kv.first, high - kv.first)
        ends = mx.arange(offset, offset + count)[:, None]
        keys = mx.arange(low, high)
        oldest = [
            first_seen(self.layout, layer_type, end)
            for end in range(offset, offset + count)
        ]
        mask = (keys < ends) & (keys >= mx.array(oldest)[:, None])
        return SharedKV(
            kv.keys[:, :, part].astype(self.dtype),
            kv.values[:, :, part].astype(self.dtype),
            mask[None, None],
        )


def unroll(drafter: Drafter, chunk: Chunk, num_draft_tokens: int) -> list[DraftOutput]:
    """Run K draft steps from every place, [1, C, ...] each."""
    hidden, outputs = chunk.hidden, []
    for step in range(num_draft_tokens):
        embedding = chunk.embeddings[:, step : step + chunk.num_places]
        output = drafter(embedding, hidden, chunk.shared_kv, position=chunk.position)
        hidden = output.hidden
        outputs.append(output)
    return outputs


def places_in_memory(drafter: Drafter, num_draft_tokens: int) -> int:
    """How many places of a text may have their activations in memory together.

    Logits are the most of them: each step's, with their softmax and their gradient; of
    a centroid head the embeddings of the candidates, which every place gathers.
    """
    text = drafter.config.text_config
    head = drafter.masked_embedding
    if head is None:
        numbers = 3 * text["vocab_size"]
    else:
        candidates = head.top_k * text["vocab_size"] // head.num_centroids
        numbers = 2 * candidates * text["hidden_size"]
    most = _ACTIVATION_BYTES // (4 * numbers * num_draft_tokens)
    return max(1, min(most, _MOST_PLACES))
