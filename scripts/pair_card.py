"""The embedded pair's model card: shapes, acceptance, how it was trained.

What the pair's folder says is read from there, acceptance is measured in the engine;
only what was counted while the target was trained is given. Knows nothing of torch.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_gemma_mtp.checkpoints.checkpoint import (
    CONFIG_NAME,
    TRAINING_NAME,
    open_checkpoint,
)
from mlx_gemma_mtp.pair.load import load_pair, load_tokenizer

from .benchmarks.acceptance import decode_all
from .benchmarks.prompts import prompts_of, read_documents

NUM_DRAFT_TOKENS = 4  # that decode_all drafts


@dataclass(frozen=True)
class TargetRun:
    """What is known of the target's training alone.

    Attributes:
        command: The command line, without the caller's paths.
        minutes: Of training.
        steps: Of the optimizer.
        num_tokens: That it has learnt from, repeated ones counted again.
        corpus_tokens: Of the files to train on.
        loss_256: On held-out windows of 256 tokens, nats per token.
        loss_1024: On windows of 1024 tokens.
        hardware: What it ran on.
        versions: Of what trained it.
    """

    command: str
    minutes: float
    steps: int
    num_tokens: int
    corpus_tokens: int
    loss_256: float
    loss_1024: float
    hardware: str
    versions: str


@dataclass(frozen=True)
class Prompts:
    """Held-out text that acceptance is measured on.

    Attributes:
        num_prompts: Prompts to continue.
        num_places: Places of the text to run one round at.
        prompt_tokens: Tokens in front of either.
        max_tokens: Tokens that continue a prompt.
    """

    num_prompts: int = 100
    num_places: int = 500
    prompt_tokens: int = 64
    max_tokens: int = 128


CARD = """---
license: apache-2.0
library_name: mlx
tags: [gemma4, speculative-decoding, mtp]
---
# The embedded pair

A tiny Gemma 4 target with its MTP drafter, trained from scratch, so that speculative
decoding can be tried, tested and timed without a download. It is real in every
mechanism (sliding and full layers, keys that serve as values, proportional rope,
soft-capped logits, a drafter that reads the target's K/V) and writes text that looks
like Python. It is not useful as a language model: greedy decoding often ends in a
loop, which also lifts its acceptance. It was trained on no chats: its chat template
makes one Python text of a conversation, with instructions as comments, and the answer
goes on where the question ends.

| | target | drafter |
|---|---|---|
| class | `{target_class}`, text only | `{drafter_class}` |
| parameters | {target_parameters:,} | {drafter_parameters:,} |
| layers | {t[num_hidden_layers]}: five sliding, one full, repeated | \
{d[num_hidden_layers]}: {drafter_layers} |
| hidden / MLP width | {t[hidden_size]} / {t[intermediate_size]} | \
{d[hidden_size]} / {d[intermediate_size]} |
| query heads | {t[num_attention_heads]} | {d[num_attention_heads]} |
| sliding layers | {t[num_key_value_heads]} K/V heads of {t[head_dim]}, \
window {t[sliding_window]} | the target's K/V |
| full layers | {t[num_global_key_value_heads]} K/V head of {t[global_head_dim]}, \
values are the raw keys | the target's K/V |
| vocabulary | {t[vocab_size]}, byte-level fallback | the same, {head} head |
| longest sequence trained | {t[max_position_embeddings]} | {longest} |

Weights are bf16. `tokenizer.json` (tokenizers) and `tokenizer.model` (sentencepiece)
are the same BPE. A text begins with `<bos>` and ends with `<eos>`.

## Results

On held-out text, with the rounded weights; acceptance length = tokens per round with \
{num_draft_tokens} drafts, greedy, in MLX: the first two rows as \
`scripts/bench.py acceptance` has them.

| measure | value |
|---|---|
| acceptance length, {p.max_tokens} tokens written after each of {p.num_prompts} \
prompts | {generating:.2f} |
| acceptance length, one round at each of {p.num_places} places of the text | \
{in_text:.2f} |
| share of those places that accept {counts} drafts or more | {by_step} |
| target's loss, windows of 256 tokens | {r.loss_256:.3f} nats per token |
| target's loss, windows of 1024 tokens | {r.loss_1024:.3f} nats per token |

## Training

    {r.command}

* Corpus: the standard library of Python {python} (PSF-2.0 licence): {num_files} \
files, {num_characters:,} characters, {r.corpus_tokens:,} tokens. Generated tables are \
left out. SHA-256 of all files, held-out ones included: `{sha256}`.
* Held out by whole modules (a test goes with its module): {num_held_out} files that \
neither the tokenizer nor the models have seen; files that repeat them were dropped.
* Target: {r.num_tokens:,} tokens in {r.steps:,} steps, {r.minutes:.0f} minutes, in \
torch. Two groups of layers first, then five.
* Drafter: by `mlx_gemma_mtp.tune`, in MLX, from random weights (see \
`scripts/train_drafter.py`): {drafter_steps:,} steps in {drafter_minutes:.0f} minutes, \
on up to {num_texts:,} prompts of the corpus that the target continued \
itself, by up to {max_tokens} tokens, which took {text_minutes:.0f} minutes more. Its \
best weights were chosen on held-out files that the results above are not measured on. \
`drafter/{training_name}` has everything.
* Hardware: {r.hardware}; the drafter on {machine}. The schedules follow the clock, so \
another machine, or this one with other load, gives other weights from the same seed. \
Versions: {r.versions}.

Weights: Apache-2.0, as the package.
"""


def write_card(
    folder: Path,
    corpus: Mapping[str, Any],
    run: TargetRun,
    prompts: Prompts = Prompts(),
) -> None:
    """Measure a pair and write its card.

    Args:
        folder: The pair's, with the drafter in ``drafter/`` as
            ``mlx_gemma_mtp.tune`` left it.
        corpus: As from ``make_corpus``.
        run: The target's training.
        prompts: What acceptance is measured on.
    """
    facts = {
        **_shapes(folder),
        **_acceptance(folder, prompts),
        **_corpus(corpus),
        **_drafter_run(folder / "drafter"),
    }
    text = CARD.format(r=run, p=prompts, **facts)
    (folder / "README.md").write_text(text, "utf-8")


def _shapes(folder: Path) -> dict[str, Any]:
    """What the two configurations and the weights say."""
    target, drafter = (_json(folder / part / CONFIG_NAME) for part in ("", "drafter"))
    own = drafter["text_config"]
    return {
        "t": target["text_config"],
        "d": own,
        "target_class": target["architectures"][0],
        "drafter_class": drafter["architectures"][0],
        "drafter_layers": ", ".join(
            kind.removesuffix("_attention") for kind in own["layer_types"]
        ),
        "head": "centroid" if drafter["use_ordered_embeddings"] else "dense tied",
        "target_parameters": count_parameters(folder),
        "drafter_parameters": count_parameters(folder / "drafter"),
    }


def count_parameters(folder: Path) -> int:
    """Return how many numbers a checkpoint holds."""
    tensors = open_checkpoint(folder).tensors.values()
    return sum(math.prod(tensor.shape) for tensor in tensors)


def _acceptance(folder: Path, prompts: Prompts) -> dict[str, Any]:
    """Acceptance in real rounds."""
    pair = load_pair(folder, folder / "drafter")
    documents = read_documents(load_tokenizer(folder))
    rng, length = random.Random(0), prompts.prompt_tokens
    starts = prompts_of(documents, rng, count=prompts.num_prompts, length=length)
    places = prompts_of(documents, rng, count=prompts.num_places, length=length)
    generating = decode_all(pair, starts, prompts.max_tokens)
    # A budget of two tokens is the prefill's and exactly one round.
    in_text = decode_all(pair, places, 2)
    shares = (f"{share:.2f}" for share in in_text.acceptance_by_position)
    return {
        "num_draft_tokens": NUM_DRAFT_TOKENS,
        "generating": generating.acceptance_length,
        "in_text": in_text.acceptance_length,
        "counts": ", ".join(str(i + 1) for i in range(NUM_DRAFT_TOKENS)),
        "by_step": ", ".join(shares),
    }


def _corpus(corpus: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "python": corpus["python"],
        "sha256": corpus["sha256"],
        "num_files": len(corpus["train"]),
        "num_held_out": len(corpus["held_out"]),
        "num_characters": sum(len(text) for _, text in corpus["train"]),
    }


def _drafter_run(folder: Path) -> dict[str, Any]:
    """What the drafter's training has left on record."""
    training = _json(folder / TRAINING_NAME)
    settings, minutes = training["settings"], training["minutes"]
    return {
        "longest": settings["prompt_tokens"] + settings["max_tokens"],
        "drafter_steps": training["history"][-1]["step"],
        "drafter_minutes": minutes["training"],
        "text_minutes": minutes["text"],
        "num_texts": settings["num_texts"],
        "max_tokens": settings["max_tokens"],
        "machine": training["machine"],
        "training_name": TRAINING_NAME,
    }


def _json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return found
