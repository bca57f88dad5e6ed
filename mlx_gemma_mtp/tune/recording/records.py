"""What the target hands a drafter, computed once for every text and kept on disk.

A *place* of a text is where a round may begin: a last token, behind which the drafter
is to propose. For each place of the continuation a record has the hidden state that
predicted its last token and the target's distribution of the token behind it; for the
text it has the keys and values that the drafter's layers read. Distributions are kept
as short lists of the most likely tokens: whole ones wherever a top-k of that length is
on, as in Gemma's own settings.

Knows the target and the disk; nothing of drafters or of training.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from ...cache.prompt import PrefillCache, prefill_caches
from ...cache.slabs import SlabLayout
from ...constants import SLIDING
from ...models.target import Target
from ...sampling.candidates import MAX_CANDIDATES, most_likely
from ...sampling.distribution import distribution
from ...sampling.graph import sampling_arrays, sampling_graph
from ...sampling.params import SamplingParams
from .arrays import not_writable, read_arrays, write_arrays
from .texts import Text


@dataclass(frozen=True)
class KeysValues:
    """Keys and values of the target's layer that drafter layers of one type read.

    Attributes:
        keys: [1, G, S, D], the oldest first.
        values: Theirs.
        first: Position of the first of them.
    """

    keys: mx.array
    values: mx.array
    first: int


@dataclass(frozen=True)
class Record:
    """A text as a drafter meets it, with P places.

    The last token of place j has position ``start + j``, and the drafter sees the keys
    before it. Row j of the distributions judges the first draft of place j, the second
    one of place j - 1, and so on.

    Attributes:
        tokens: The text, int32 [T] with T = start + P + 1.
        start: Position of the first place's last token: the prompt's length.
        hidden: The post-norm row that predicted each place's last token, [P, H].
        token_ids: The target's most likely tokens behind each place, int32 [P, M].
        probs: Their probabilities after filters and temperature, float32 [P, M].
        next_probs: That of the token which the text has there, float32 [P].
        kv: By layer type.
    """

    tokens: mx.array
    start: int
    hidden: mx.array
    token_ids: mx.array
    probs: mx.array
    next_probs: mx.array
    kv: dict[str, KeysValues]

    @property
    def num_places(self) -> int:
        """P."""
        return self.hidden.shape[0]

    @property
    def arrays(self) -> dict[str, mx.array]:
        """The arrays by name, as they are kept in a file."""
        arrays = {name: getattr(self, name) for name in _NAMES}
        for kind, kv in self.kv.items():
            arrays[f"{kind}.keys"], arrays[f"{kind}.values"] = kv.keys, kv.values
        return arrays


_SORT_BYTES = 1 << 27
_NAMES = ("tokens", "hidden", "token_ids", "probs", "next_probs")


class Recorder:
    """Runs the target over texts.

    Args:
        target: The target as it runs.
        params: The sampling settings whose distributions the drafter shall foretell.
        step_size: Most tokens in one forward.
    """

    def __init__(
        self, target: Target, params: SamplingParams, *, step_size: int
    ) -> None:
        self._target = target
        self._graph = sampling_graph([params])
        self._sampling = sampling_arrays([params])
        self._step_size = step_size

    def record(self, text: Text) -> Record:
        """Read a text whose continuation has two tokens or more."""
        layout, start = self._target.layout, text.num_prompt_tokens
        tokens = mx.array(text.tokens, dtype=mx.int32)
        num_read = tokens.size - 1  # nothing stands behind the last one to be foretold
        caches = prefill_caches(layout)
        kept = {}
        for kind in layer_types(layout):
            source = layout.source(kind)
            kept[kind] = caches[source] = _WholeCache(
                caches[source], first_seen(layout, kind, start)
            )
        rows = []
        for first in range(0, num_read, self._step_size):
            chunk = tokens[first : min(first + self._step_size, num_read)]
            hidden = self._target.read(chunk[None], caches)
            mx.eval(hidden, [cache.state for cache in caches])
            rows.append(hidden[0, max(start - 1 - first, 0) :])
        hidden = mx.concatenate(rows)  # from position start - 1 on
        record = Record(
            tokens,
            start,
            hidden[:-1],
            *self._distributions(hidden[1:], tokens[start + 1 :]),
            {kind: cache.whole() for kind, cache in kept.items()},
        )
        mx.eval(record.arrays)
        mx.clear_cache()
        return record

    def _distributions(
        self, hidden: mx.array, next_tokens: mx.array
    ) -> tuple[mx.array, mx.array, mx.array]:
        """Most likely tokens, their probabilities, those of the text's own tokens."""
        parts = []
        # Of a large vocabulary few rows: sorting takes eight bytes for each entry.
        size = max(1, _SORT_BYTES // (8 * self._target.vocab_size))
        for first in range(0, next_tokens.size, size):
            end = first + size
            parts.append(self._lists(hidden[first:end], next_tokens[first:end], first))
            mx.eval(parts[-1])
        ids, probs, next_probs = (
            mx.concatenate(list(part)) for part in zip(*parts, strict=True)
        )
        return ids, probs, next_probs

    def _lists(
        self, hidden: mx.array, next_tokens: mx.array, first: int
    ) -> tuple[mx.array, mx.array, mx.array]:
        """The same of some rows, whose logits are in memory together."""
        logits = self._target.logits(hidden[None])
        if not self._graph.is_sampled:
            best = mx.argmax(logits[0], axis=-1, keepdims=True).astype(mx.int32)
            is_next = best[:, 0] == next_tokens
            return best, mx.ones(best.shape), is_next.astype(mx.float32)
        positions = mx.arange(first, first + next_tokens.size)[None]
        (group,) = self._graph.groups
        found = distribution(logits, self._sampling, group=group, positions=positions)
        is_next = found.token_ids[0] == next_tokens[:, None]
        next_probs = mx.where(is_next, found.probs[0], 0).sum(axis=-1)
        count = min(MAX_CANDIDATES, found.scores.shape[-1])
        best_ones = most_likely(found.scores, count, token_ids=found.token_ids)
        probs = mx.exp(best_ones.logits - best_ones.log_mass)
        return best_ones.token_ids[0], probs[0], next_probs


class _WholeCache(PrefillCache):
    """A layer's cache that also keeps what it lets go of, from a position on."""

    def __init__(self, cache: PrefillCache, first: int) -> None:
        super().__init__(cache.num_kept)
        self._first = first
        self._chunks: list[tuple[mx.array, mx.array]] = []

    def update_and_fetch(
        self, keys: mx.array, values: mx.array
    ) -> tuple[mx.array, mx.array]:
        """Append a chunk; give what its queries may see."""
        skipped = max(self._first - self.offset, 0)
        if skipped < keys.shape[2]:
            self._chunks.append((keys[:, :, skipped:], values[:, :, skipped:]))
        return super().update_and_fetch(keys, values)

    def whole(self) -> KeysValues:
        """All keys and values from the position on."""
        keys, values = (
            mx.concatenate(list(part), axis=2)
            for part in zip(*self._chunks, strict=True)
        )
        return KeysValues(keys, values, self._first)


def layer_types(layout: SlabLayout) -> list[str]:
    """The types of layers whose keys and values a drafter can read."""
    return sorted({layer.layer_type for layer in layout.layers})


def first_seen(layout: SlabLayout, layer_type: str, offset: int) -> int:
    """Position of the oldest key that a drafter sees behind ``offset`` tokens."""
    return max(offset - layout.window - 1, 0) if layer_type == SLIDING else 0


class Records:
    """Records in a folder, one file each.

    Args:
        folder: Made where it is not there.

    Raises:
        OutputError: It cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise not_writable(folder, error) from error

    def __contains__(self, name: str) -> bool:
        return self._path(name).exists()

    def is_done(self, name: str) -> bool:
        """Whether there is a record, or was found that there can be none."""
        return name in self or self._mark(name).exists()

    def skip(self, name: str) -> None:
        """Note that a text has nothing to foretell."""
        try:
            self._mark(name).touch()
        except OSError as error:
            raise not_writable(self._mark(name), error) from error

    def write(self, name: str, record: Record) -> int:
        """Keep a record, whole or not at all; gives its bytes."""
        firsts = {f"{kind}.first": str(kv.first) for kind, kv in record.kv.items()}
        metadata = {"start": str(record.start), **firsts}
        return write_arrays(self._path(name), record.arrays, metadata)

    def read(self, name: str) -> Record:
        """A record; its arrays are read from the file when they are used."""
        arrays, metadata = read_arrays(self._path(name))
        kinds = [key.removesuffix(".first") for key in metadata if "." in key]
        kv = {
            kind: KeysValues(
                arrays[f"{kind}.keys"],
                arrays[f"{kind}.values"],
                int(metadata[f"{kind}.first"]),
            )
            for kind in kinds
        }
        named = {field: arrays[field] for field in _NAMES}
        return Record(**named, start=int(metadata["start"]), kv=kv)

    def clear_scratch(self) -> None:
        """Remove what killed processes have left half written."""
        for path in self._folder.glob(".*"):
            path.unlink(missing_ok=True)

    def num_bytes(self, names: Iterable[str]) -> int:
        """What records take on disk."""
        return sum(self._path(name).stat().st_size for name in names)

    def _mark(self, name: str) -> Path:
        return self._folder / f"{name}.nothing"

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.safetensors"


def record_bytes(
    target: Target, params: SamplingParams, *, num_tokens: int, num_places: int
) -> int:
    """About what the record of a text takes on disk.

    Args:
        target: The target.
        params: The sampling settings.
        num_tokens: Tokens of the text.
        num_places: Places of its continuation.
    """
    layout = target.layout
    sources = [layout.layers[layout.source(kind)] for kind in layer_types(layout)]
    numbers = sum(
        2
        * layer.num_kv_heads
        * layer.head_dim
        * (num_tokens - first_seen(layout, layer.layer_type, num_tokens - num_places))
        for layer in sources
    )
    numbers += target.hidden_size * num_places
    list_size = min(MAX_CANDIDATES, target.vocab_size) if params.temp else 1
    return layout.dtype.size * numbers + 8 * list_size * num_places
