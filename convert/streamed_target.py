"""A target that reads its weights while it works, a layer at a time.

mlx-lm's model runs as it is, but its layers hold weights only while they work, and of
the embedding tables only the rows that are asked for are read: the model need not fit
into memory. For one pass over a short text; every pass reads everything again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_gemma_mtp.checkpoints.weights import as_stored, target_skeleton
from mlx_gemma_mtp.models.target import head_logits, scaled_embedding, text_model

from .plan import Block, Parameter, PartPlan
from .reader import Reader, open_reader

_HEAD_BLOCK_BYTES = 16 << 20


@dataclass(frozen=True)
class Reading:
    """What a target made of the text.

    Attributes:
        logits: Its predictions, [N, V].
        hidden: Its post-norm hidden states, [N, H].
        shared_kv: Keys and values for the drafter by layer type, [1, G, N, D] each.
    """

    logits: mx.array
    hidden: mx.array
    shared_kv: dict[str, tuple[mx.array, mx.array]]


@contextmanager
def open_target(
    plan: PartPlan, advance: Callable[[int], Any]
) -> Iterator[StreamedTarget]:
    """Open a target for reading a text.

    Args:
        plan: The target, to be read as it is.
        advance: Called with the bytes that were read since the last call.
    """
    with open_reader(plan) as reader:
        yield StreamedTarget(plan, reader, advance)
    mx.clear_cache()


def layer_bytes(plan: PartPlan) -> dict[str, int]:
    """Return the bytes of each layer; of the tables only rows are read.

    Args:
        plan: The target's plan.
    """
    by_layer: dict[str, int] = {}
    for parameter in plan.parameters:
        layer = _layer_path(parameter.name)
        by_layer[layer] = by_layer.get(layer, 0) + parameter.num_source_bytes
    by_layer.pop("", None)
    return by_layer


def is_cpu() -> bool:
    """Tell whether MLX computes on the CPU, where float32 is faster and rounds less."""
    return mx.default_device() == mx.Device(mx.cpu)


class StreamedTarget:
    """mlx-lm's target over layers and tables that read as they go.

    Args:
        plan: The target, to be read as it is.
        reader: Its files.
        advance: Called with the bytes that were read since the last call.
    """

    def __init__(
        self, plan: PartPlan, reader: Reader, advance: Callable[[int], Any]
    ) -> None:
        self.model = target_skeleton(plan.checkpoint)
        nn.quantize(self.model, class_predicate=as_stored(plan.formats))
        self.text = text_model(self.model)
        inner = self.text.model
        prefix = "" if self.text is self.model else "language_model."
        by_layer: dict[str, list[Parameter]] = {}
        for parameter in plan.parameters:
            by_layer.setdefault(_layer_path(parameter.name), []).append(parameter)
        layers: Any = [
            _Layer(layer, by_layer[f"{prefix}model.layers.{i}."], reader, advance)
            for i, layer in enumerate(inner.layers)
        ]
        inner.layers = layers
        tables = ["embed_tokens"]
        if inner.hidden_size_per_layer_input:
            tables.append("embed_tokens_per_layer")
        paths = {f"{prefix}model.{table}" for table in tables}
        for table in tables:
            path = f"{prefix}model.{table}"
            setattr(inner, table, _Table(plan, path, reader))
        if not self.text.tie_word_embeddings:
            paths.add(f"{prefix}lm_head")
            head: Any = _Table(plan, f"{prefix}lm_head", reader).as_linear
            self.text.lm_head = head
        rest = [
            (parameter.name, _read(reader, parameter))
            for parameter in by_layer[""]
            if parameter.name.rpartition(".")[0] not in paths
        ]
        self.model.load_weights(rest, strict=False)

    def read(self, token_ids: Sequence[int]) -> Reading:
        """Read a text.

        Args:
            token_ids: The text, N tokens.
        """
        inner = self.text.model
        hidden = inner(mx.array([list(token_ids)]))
        logits = head_logits(self.text, hidden)
        num_own = len(inner.layers) - self.text.args.num_kv_shared_layers
        shared_kv = {layer.layer_type: layer.kv for layer in inner.layers[:num_own]}
        mx.eval(logits, hidden)
        return Reading(logits[0], hidden[0], shared_kv)

    def embed(self, token_ids: mx.array) -> mx.array:
        """Return the scaled embeddings of tokens [B, 1], [B, 1, H]."""
        return scaled_embedding(self.text, token_ids)


class _Layer:
    """A layer that holds its weights only while it works.

    It stands in mlx-lm's list of layers and is called as they are.
    """

    def __init__(
        self,
        layer: nn.Module,
        parameters: Sequence[Parameter],
        reader: Reader,
        advance: Callable[[int], Any],
    ) -> None:
        self.layer = layer
        self.advance = advance
        self.layer_type: str = layer.layer_type
        self.parameters = parameters
        self.reader = reader
        self.unread = layer.parameters()
        self.kv: Any = None

    def __call__(self, *args: Any, **settings: Any) -> Any:
        path = _layer_path(self.parameters[0].name)
        weights = [
            (parameter.name.removeprefix(path), _read(self.reader, parameter))
            for parameter in self.parameters
        ]
        self.layer.load_weights(weights, strict=False)
        hidden, self.kv, offset = self.layer(*args, **settings)
        mx.eval(hidden, self.kv)
        self.layer.update(self.unread)
        mx.clear_cache()
        self.advance(sum(parameter.num_source_bytes for parameter in self.parameters))
        return hidden, self.kv, offset


class _Table:
    """An embedding table or head of which only the rows that are needed are read.

    It stands in the place of mlx-lm's module and is called as that is.
    """

    def __init__(self, plan: PartPlan, path: str, reader: Reader) -> None:
        self.parameters = [p for p in plan.parameters if p.name.startswith(f"{path}.")]
        self.format = plan.formats.get(path)
        self.reader = reader
        self.num_rows = self.parameters[0].rows.run_length

    def __call__(self, token_ids: mx.array) -> mx.array:
        ids: Any = token_ids.flatten().tolist()
        rows = mx.concatenate([self._rows(token, 1) for token in ids])
        return rows.reshape(*token_ids.shape, -1)

    def as_linear(self, hidden: mx.array) -> mx.array:
        """Score every token, a block of rows at a time."""
        row_bytes = self.parameters[0].rows.num_columns * 4
        step = max(1, _HEAD_BLOCK_BYTES // row_bytes)
        scores: list[mx.array] = []
        for start in range(0, self.num_rows, step):
            block = Block(start, start, min(step, self.num_rows - start))
            scores.append(self._score(hidden, block))
            mx.eval(scores[-1])
        return mx.concatenate(scores, axis=-1)

    def _score(self, hidden: mx.array, block: Block) -> mx.array:
        weight, *scales = self._read(block)
        if self.format is None:
            return (weight @ hidden.swapaxes(-1, -2)).swapaxes(-1, -2)
        settings: Any = self.format.as_config()
        return mx.quantized_matmul(hidden, weight, *_pair(scales), **settings)

    def _rows(self, start: int, num_rows: int) -> mx.array:
        weight, *scales = self._read(Block(start, start, num_rows))
        if self.format is None:
            return weight
        settings: Any = self.format.as_config()
        return _as_computed(mx.dequantize(weight, *_pair(scales), **settings))

    def _read(self, block: Block) -> list[mx.array]:
        return [_as_computed(self.reader.read_rows(p, block)) for p in self.parameters]


def _pair(scales: Sequence[mx.array]) -> tuple[mx.array, mx.array | None]:
    """Return scales and, where there are any, biases."""
    return scales[0], scales[1] if len(scales) > 1 else None


def _read(reader: Reader, parameter: Parameter) -> mx.array:
    array = _as_computed(reader.read(parameter))
    mx.eval(array)  # now: or a whole layer would stand there in both types
    return array


def _as_computed(array: mx.array) -> mx.array:
    """Return what is computed with: float32 on the CPU, which rounds less there."""
    if is_cpu() and mx.issubdtype(array.dtype, mx.floating):
        return array.astype(mx.float32)
    return array


def _layer_path(name: str) -> str:
    """Return the path of the layer a parameter is in, with a dot, or nothing."""
    match = re.match(r".*?\blayers\.\d+\.", name)
    return match[0] if match else ""
