"""How far the converted pair's predictions are from the source's, in little memory.

Both targets read one short text; what they predict at each of its tokens is compared.
mlx-lm's model runs as it is, but its layers hold weights only while they work, and of
the embedding tables only the rows that are asked for are read: the pair need not fit
into memory. The drafters then draft from the source's hidden states and K/V, and their
tokens are compared.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils

from mlx_gemma_mtp.checkpoint import open_checkpoint
from mlx_gemma_mtp.config import FULL
from mlx_gemma_mtp.drafter import SharedKV
from mlx_gemma_mtp.target import text_model
from mlx_gemma_mtp.weights import load_drafter, one_line, target_skeleton

from .plan import Block, Parameter, PartPlan
from .planner import plan_drafter, plan_target
from .progress import Progress
from .reader import Reader, open_reader

TEXT = """def mean(values):
    \"\"\"Return the arithmetic mean of a list of numbers.\"\"\"
    if not values:
        raise ValueError("no values")
    return sum(values) / len(values)
"""
NUM_DRAFTS = 4
_MAX_TOKENS, _MIN_TOKENS = 48, 4
_CPU_OPERATIONS = 2e10  # 15 to 30 seconds on MLX's CPU backend
_HEAD_BLOCK_BYTES = 16 << 20


@dataclass(frozen=True)
class Divergence:
    """What was found.

    Attributes:
        num_tokens: Predictions that were compared.
        kl: Mean Kullback-Leibler divergence of the result's distribution from the
            source's, in nats a token.
        top_agreement: Share of predictions with the same most likely token, 0..1.
        draft_agreement: Share of draft tokens that both drafters agree on, 0..1; None
            without a drafter.
    """

    num_tokens: int
    kl: float
    top_agreement: float
    draft_agreement: float | None


def compare(
    source: Sequence[Path], result: Sequence[Path], *, progress: Progress
) -> Divergence | str:
    """Compare a converted pair with what it was made of.

    Args:
        source: The folders of target and, if there is one, drafter.
        result: The same of the converted pair.
        progress: Told what is done.

    Returns:
        What was found, or why there was too little memory for it.

    Raises:
        CheckpointError: A file cannot be read.
    """
    before, after = _plans(source), _plans(result)
    needed, allowance = needed_bytes(before), memory_allowance()
    if needed > allowance:
        return (
            f"not compared: that needs about {needed / 1e9:.1f} GB, more than half of "
            "this machine's memory"
        )
    num_bytes = sum(sum(_layer_bytes(plans[0]).values()) for plans in (before, after))
    with progress("comparing with the source", num_bytes) as advance:
        token_ids = _encode(result[0])[: _num_tokens(before[0])]
        with _open(before[0], advance) as target:
            expected = target.read(token_ids)
            drafts = [
                _draft(folder, target, expected, token_ids)
                for folder in (*source[1:], *result[1:])
            ]
        with _open(after[0], advance) as target:
            found = target.read(token_ids)
    return _divergence(expected.logits, found.logits, drafts)


def needed_bytes(plans: Sequence[PartPlan]) -> int:
    """Return how much memory a comparison needs: its largest layer, or the drafter.

    Args:
        plans: The source's; what they become is smaller.
    """
    copies = 4 if _is_cpu() else 2  # as read, and as float32 on the CPU
    drafter = sum(plan.num_source_bytes for plan in plans[1:])
    return copies * max(drafter, *_layer_bytes(plans[0]).values())


def _layer_bytes(plan: PartPlan) -> dict[str, int]:
    """Return the bytes of each layer; of the tables only rows are read."""
    by_layer: dict[str, int] = {}
    for parameter in plan.parameters:
        layer = _layer_path(parameter.name)
        by_layer[layer] = by_layer.get(layer, 0) + parameter.num_source_bytes
    by_layer.pop("", None)
    return by_layer


def memory_allowance() -> int:
    """Return how much memory a comparison may take: half of the machine's."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _plans(folders: Sequence[Path]) -> list[PartPlan]:
    """Plan to read folders as they are."""
    target, *drafters = (open_checkpoint(folder) for folder in folders)
    plans = [plan_target(target, None, dtype=None)]
    return plans + [plan_drafter(drafter, None, dtype=None) for drafter in drafters]


def _divergence(
    expected: mx.array, found: mx.array, drafts: Sequence[list[int]]
) -> Divergence:
    """Compare predictions [N, V] and drafts."""
    expected, found = _log_probs(expected), _log_probs(found)
    kl = (mx.exp(expected) * (expected - found)).sum(axis=-1).mean()
    same = (mx.argmax(expected, axis=-1) == mx.argmax(found, axis=-1)).mean()
    agreement = None
    if len(drafts) == 2:
        equal = [one == other for one, other in zip(*drafts, strict=True)]
        agreement = sum(equal) / max(1, len(equal))
    values: Any = mx.stack([mx.maximum(kl, 0), same.astype(mx.float32)]).tolist()
    return Divergence(len(expected), values[0], values[1], agreement)


def _encode(folder: Path) -> list[int]:
    """Return the tokens of the text."""
    with one_line(f"the tokenizer in {folder}"):
        return list(mlx_lm.utils.load_tokenizer(folder).encode(TEXT))


@dataclass(frozen=True)
class _Reading:
    """What a target made of the text.

    Attributes:
        logits: Its predictions, [N, V].
        hidden: Its post-norm hidden states, [N, H].
        shared_kv: Keys and values for the drafter by layer type, [1, G, N, D] each.
    """

    logits: mx.array
    hidden: mx.array
    shared_kv: dict[str, tuple[mx.array, mx.array]]


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
    """An embedding table of which only the rows that are asked for are read.

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
            rows = self._rows(start, min(step, self.num_rows - start))
            scores.append(hidden @ rows.T)
            mx.eval(scores[-1])
        return mx.concatenate(scores, axis=-1)

    def _rows(self, start: int, num_rows: int) -> mx.array:
        block = Block(start, start, num_rows)
        arrays = [
            _as_computed(self.reader.read_rows(p, block)) for p in self.parameters
        ]
        if self.format is None:
            return arrays[0]
        settings: Any = self.format.as_config()
        weight, scales, *biases = arrays
        bias = biases[0] if biases else None
        return _as_computed(mx.dequantize(weight, scales, bias, **settings))


class _StreamedTarget:
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
        nn.quantize(self.model, class_predicate=_stored(plan))
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
        paths = {table: f"{prefix}model.{table}" for table in tables}
        for table, path in paths.items():
            setattr(inner, table, _Table(plan, path, reader))
        rest = [
            (parameter.name, _read(reader, parameter))
            for parameter in by_layer[""]
            if parameter.name.rpartition(".")[0] not in paths.values()
        ]
        self.model.load_weights(rest, strict=False)

    def read(self, token_ids: Sequence[int]) -> _Reading:
        """Read a text.

        Args:
            token_ids: The text, N tokens.
        """
        inner = self.text.model
        hidden = inner(mx.array([list(token_ids)]))
        if self.text.tie_word_embeddings:
            logits = inner.embed_tokens.as_linear(hidden)
        else:
            logits = self.text.lm_head(hidden)
        cap = self.text.final_logit_softcapping
        logits = logits if cap is None else mx.tanh(logits / cap) * cap
        num_own = len(inner.layers) - self.text.args.num_kv_shared_layers
        shared_kv = {layer.layer_type: layer.kv for layer in inner.layers[:num_own]}
        mx.eval(logits, hidden)
        return _Reading(logits[0], hidden[0], shared_kv)

    def embed(self, token_ids: mx.array) -> mx.array:
        """Return the scaled embeddings of tokens [B, 1], [B, 1, H]."""
        inner = self.text.model
        return inner.embed_tokens(token_ids) * inner.embed_scale


def _draft(
    folder: Path,
    target: _StreamedTarget,
    reading: _Reading,
    token_ids: Sequence[int],
) -> list[int]:
    """Draft a block behind every token of the text but the first.

    Returns:
        The tokens of all blocks, step by step.
    """
    drafter = load_drafter(folder)
    drafter.set_dtype(reading.hidden.dtype)
    positions = mx.arange(1, len(token_ids))
    shared_kv = {
        layer_type: _seen(keys, values, positions, _window(target, layer_type))
        for layer_type, (keys, values) in reading.shared_kv.items()
    }
    tokens = mx.array(list(token_ids[1:]))[:, None]
    hidden = reading.hidden[:-1, None]  # the row that predicted the token
    drafts: list[int] = []
    for _ in range(NUM_DRAFTS):
        output = drafter(target.embed(tokens), hidden, shared_kv, position=positions)
        tokens, hidden = mx.argmax(output.logits, axis=-1), output.hidden
        if output.token_ids is not None:
            tokens = mx.take_along_axis(output.token_ids[:, 0], tokens, axis=-1)
        mx.eval(tokens, hidden)
        step: Any = tokens.flatten().tolist()
        drafts += step
    return drafts


def _seen(
    keys: mx.array, values: mx.array, positions: mx.array, window: int | None
) -> SharedKV:
    """Give each place of the text, as a row of a batch, the keys before it."""
    num_rows, num_keys = positions.size, keys.shape[2]
    slots = mx.arange(num_keys)
    mask = slots < positions[:, None]
    if window is not None:  # the window and one more, as in the engine
        mask = mask & (slots >= positions[:, None] - window - 1)
    shape = (num_rows, *keys.shape[1:])
    return SharedKV(
        mx.broadcast_to(keys, shape),
        mx.broadcast_to(values, (num_rows, *values.shape[1:])),
        mask[:, None, None, :],
    )


def _window(target: _StreamedTarget, layer_type: str) -> int | None:
    return None if layer_type == FULL else int(target.text.args.sliding_window)


@contextmanager
def _open(plan: PartPlan, advance: Callable[[int], Any]) -> Iterator[_StreamedTarget]:
    with open_reader(plan) as reader:
        yield _StreamedTarget(plan, reader, advance)
    mx.clear_cache()


def _stored(plan: PartPlan) -> Any:
    def predicate(path: str, module: nn.Module) -> bool | dict[str, Any]:
        found = plan.formats.get(path)
        return False if found is None else found.as_config()

    return predicate


def _read(reader: Reader, parameter: Parameter) -> mx.array:
    return _as_computed(reader.read(parameter))


def _as_computed(array: mx.array) -> mx.array:
    """Return what is computed with: float32 on the CPU, which rounds less there."""
    if _is_cpu() and mx.issubdtype(array.dtype, mx.floating):
        return array.astype(mx.float32)
    return array


def _is_cpu() -> bool:
    return mx.default_device() == mx.Device(mx.cpu)


def _layer_path(name: str) -> str:
    """Return the path of the layer a parameter is in, with a dot, or nothing."""
    match = re.match(r".*?\blayers\.\d+\.", name)
    return match[0] if match else ""


def _num_tokens(plan: PartPlan) -> int:
    """Return how many tokens are worth their time."""
    if not _is_cpu():
        return _MAX_TOKENS
    computed = sum(p.num_weights for p in plan.parameters if "per_layer." not in p.name)
    return max(_MIN_TOKENS, min(_MAX_TOKENS, int(_CPU_OPERATIONS / (2 * computed))))


def _log_probs(logits: mx.array) -> mx.array:
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)
