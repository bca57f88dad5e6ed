"""How far the converted pair's predictions are from the source's, in little memory.

Both targets read one short text, a layer at a time; what they predict at each of its
tokens is compared. The drafters then draft from the source's hidden states and K/V, and
their tokens are compared.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_gemma_mtp.checkpoints.checkpoint import open_checkpoint
from mlx_gemma_mtp.checkpoints.tokenizer import load_tokenizer
from mlx_gemma_mtp.checkpoints.weights import load_drafter
from mlx_gemma_mtp.constants import FULL
from mlx_gemma_mtp.generation.encoding import encode_text
from mlx_gemma_mtp.models.attention import SharedKV

from .plan import PartPlan
from .planner import plan_drafter, plan_target
from .progress import Progress
from .streamed_target import Reading, StreamedTarget, is_cpu, layer_bytes, open_target

TEXT = """def mean(values):
    \"\"\"Return the arithmetic mean of a list of numbers.\"\"\"
    if not values:
        raise ValueError("no values")
    return sum(values) / len(values)
"""
NUM_DRAFTS = 4
_MAX_TOKENS, _MIN_TOKENS = 48, 4
_CPU_OPERATIONS = 2e10  # 15 to 30 seconds on MLX's CPU backend


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

    A comparison that fails, for lack of memory or because of the machine, says so and
    is no reason to throw away what was written and verified.

    Args:
        source: The folders of target and, if there is one, drafter.
        result: The same of the converted pair. A target that is the same folder is
            read once.
        progress: Told what is done.

    Returns:
        What was found, or why nothing was.
    """
    try:
        return _compare(source, result, progress)
    except Exception as error:  # noqa: BLE001  # whatever MLX, mlx-lm or the files do
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return f"not compared: {reason}"


def _compare(
    source: Sequence[Path], result: Sequence[Path], progress: Progress
) -> Divergence | str:
    before, after = _plans(source), _plans(result)
    needed = max(needed_bytes(before), needed_bytes(after))
    allowance = memory_allowance()
    if needed > allowance:
        return (
            f"not compared: that needs about {needed / 1e9:.1f} GB, more than half of "
            "this machine's memory"
        )
    targets = [before[0]] if source[0] == result[0] else [before[0], after[0]]
    num_bytes = sum(sum(layer_bytes(plan).values()) for plan in targets)
    tokenizer = load_tokenizer(result[0])
    token_ids = encode_text(tokenizer, TEXT)[: _num_tokens(before[0])]
    with progress("comparing with the source", num_bytes) as advance:
        with open_target(before[0], advance) as target:
            expected = target.read(token_ids)
            drafts = [
                _draft(folder, target, expected, token_ids)
                for folder in (*source[1:], *result[1:])
            ]
        found = expected
        if len(targets) > 1:
            with open_target(after[0], advance) as target:
                found = target.read(token_ids)
    return _divergence(expected.logits, found.logits, drafts)


def needed_bytes(plans: Sequence[PartPlan]) -> int:
    """Return how much memory a comparison needs: its largest layer, or the drafter.

    Args:
        plans: A pair's, read as it is.
    """
    copies = 4 if is_cpu() else 2  # as read, and as float32 on the CPU
    drafter = sum(plan.num_source_bytes for plan in plans[1:])
    return copies * max(drafter, *layer_bytes(plans[0]).values())


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
) -> Divergence | str:
    """Compare predictions [N, V] and drafts."""
    expected, found = _log_probs(expected), _log_probs(found)
    kl = (mx.exp(expected) * (expected - found)).sum(axis=-1).mean()
    same = (mx.argmax(expected, axis=-1) == mx.argmax(found, axis=-1)).mean()
    agreement = None
    if len(drafts) == 2:
        equal = [one == other for one, other in zip(*drafts, strict=True)]
        agreement = sum(equal) / max(1, len(equal))
    values: Any = mx.stack([mx.maximum(kl, 0), same.astype(mx.float32)]).tolist()
    if not math.isfinite(values[0]):
        return "not finite: take another --dtype"
    return Divergence(len(expected), values[0], values[1], agreement)


def _draft(
    folder: Path,
    target: StreamedTarget,
    reading: Reading,
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


def _window(target: StreamedTarget, layer_type: str) -> int | None:
    return None if layer_type == FULL else int(target.text.args.sliding_window)


def _num_tokens(plan: PartPlan) -> int:
    """Return how many tokens are worth their time."""
    if not is_cpu():
        return _MAX_TOKENS
    computed = sum(p.num_weights for p in plan.parameters if "per_layer." not in p.name)
    return max(_MIN_TOKENS, min(_MAX_TOKENS, int(_CPU_OPERATIONS / (2 * computed))))


def _log_probs(logits: mx.array) -> mx.array:
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)
