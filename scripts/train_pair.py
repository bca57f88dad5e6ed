"""Train the embedded pair: a tiny Gemma 4 target and its MTP drafter, on a CPU.

    python scripts/train_pair.py --seed 1 --output FOLDER

Six stages: corpus -> tokenizer -> target -> export -> drafter -> model card. What takes
long leaves its result in the work folder and is skipped when that result is there. The
corpus is the standard library of the Python that runs this script, so nothing is
downloaded. Needs the package with torch beside it, which the package never imports: the
target is trained here, and its drafter, as any other, by train_drafter.py.

The target is Gemma 4's own model (see transformers' gemma4), written once more because
a 96-wide model in 30 layers is dominated by element-wise work: one decoder layer is
compiled once and called 30 times, sliding attention works on blocks, and bf16 matrix
products run on the CPU's matrix units.
"""

import argparse
import dataclasses
import io
import json
import math
import os
import platform
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

# Threads that spin at a barrier starve each other when anything else is running.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import sentencepiece as spm
import torch
import torch.nn.functional as nnf
from safetensors.torch import save as serialise
from torch import nn

from mlx_gemma_mtp import embedded_pair_path
from scripts.corpus import make_corpus, write_measured
from scripts.pair_card import TargetRun, write_card
from scripts.progress import log

# One compiled layer serves every kind, batch and length, with and without gradients.
torch._dynamo.config.recompile_limit = 64

SLIDING, FULL = "sliding_attention", "full_attention"
PAD, EOS, BOS, UNK = 0, 1, 2, 3
GROUP = 6  # five sliding layers and a full one
RMS_EPS = 1e-6


# ---------------------------------------------------------------------------
# Shapes
# ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of the target; names are those of the checkpoint's config.json."""

    vocab_size: int = 1024
    hidden_size: int = 96
    intermediate_size: int = 256
    num_hidden_layers: int = 30
    num_attention_heads: int = 4
    head_dim: int = 32
    num_key_value_heads: int = 2
    global_head_dim: int = 64
    num_global_key_value_heads: int = 1
    sliding_window: int = 32
    max_position_embeddings: int = 1024
    final_logit_softcapping: float = 30.0

    @property
    def embed_scale(self) -> float:
        """Return sqrt(hidden_size) rounded to bf16, as the checkpoints have it."""
        return float(torch.tensor(self.hidden_size**0.5, dtype=torch.bfloat16))

    def heads(self, kind: str) -> tuple[int, int]:
        """Return (number of K/V heads, head width) of one kind of layer."""
        if kind == FULL:
            return self.num_global_key_value_heads, self.global_head_dim
        return self.num_key_value_heads, self.head_dim


SHAPE = Shape()


# ---------------------------------------------------------------------------
# Tokenizer
# ---------------------------------------------------------------------------


def train_tokenizer(corpus: dict[str, Any], work: Path) -> spm.SentencePieceProcessor:
    """Train the sentencepiece model on the training files."""
    target = work / "tokenizer.model"
    if not target.exists():
        lines = [
            line
            for _, text in corpus["train"]
            for line in text.split("\n")
            if 0 < len(line.strip()) and len(line) < 1000
        ]
        random.Random(0).shuffle(lines)
        model = io.BytesIO()
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(lines[:300_000]),
            model_writer=model,
            model_type="bpe",
            vocab_size=SHAPE.vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            user_defined_symbols=["\n", "\t"],
            required_chars="".join(map(chr, range(33, 127))),
            character_coverage=0.9995,
            pad_id=PAD,
            eos_id=EOS,
            bos_id=BOS,
            unk_id=UNK,
            pad_piece="<pad>",
            eos_piece="<eos>",
            bos_piece="<bos>",
            unk_piece="<unk>",
            num_threads=1,
            minloglevel=2,
        )
        target.write_bytes(model.getvalue())
    return spm.SentencePieceProcessor(model_file=str(target))


def encode_files(
    tokenizer: spm.SentencePieceProcessor, files: list[Any], cache: Path
) -> list[np.ndarray]:
    """Return each file as <bos> tokens <eos>, uint16."""
    if not cache.exists():
        docs = [
            np.array([BOS, *tokenizer.encode(text), EOS], np.uint16)
            for _, text in files
        ]
        np.savez(cache, *docs)
    with np.load(cache) as stored:
        return [stored[name] for name in stored.files]


class Batches:
    """Endless shuffled windows over a list of documents."""

    def __init__(self, docs: list[np.ndarray], seed: int):
        """Keep the documents; `seed` fixes the order."""
        self.docs, self.rng = docs, np.random.default_rng(seed)
        self.pool: list[np.ndarray] = []

    def take(self, batch: int, length: int) -> torch.Tensor:
        """Return int64 [batch, length]; every epoch cuts the text elsewhere."""
        rows: list[Any] = []
        while len(rows) < batch:
            if not self.pool or len(self.pool[-1]) != length:
                self._refill(length)
            rows.append(self.pool.pop())
        return torch.from_numpy(np.stack(rows).astype(np.int64))

    def _refill(self, length: int) -> None:
        order = self.rng.permutation(len(self.docs))
        stream = np.concatenate([self.docs[i] for i in order])
        stream = stream[self.rng.integers(0, length) :]
        rows = stream[: len(stream) // length * length].reshape(-1, length)
        self.pool = list(rows[self.rng.permutation(len(rows))])


# ---------------------------------------------------------------------------
# Gemma 4's layers
# ---------------------------------------------------------------------------


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    """Return RMSNorm of the last axis in float32, the weight used as it is."""
    x = x.float()
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + RMS_EPS)
    return x if weight is None else x * weight


def rope_tables(
    kind: str, start: int, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cos and sin [1, length, 1, head_dim / 2] of positions from `start`."""
    _, width = SHAPE.heads(kind)
    theta, share = (1e6, 0.25) if kind == FULL else (1e4, 1.0)
    num_rotated = int(share * width / 2)  # the others keep frequency 0
    frequencies = torch.zeros(width // 2)
    frequencies[:num_rotated] = theta ** (-2 * torch.arange(num_rotated) / width)
    angles = torch.arange(start, start + length)[:, None] * frequencies
    return angles.cos()[None, :, None], angles.sin()[None, :, None]


def rotate(
    x: torch.Tensor,  # [B, T, N, D]
    tables: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """Return x with rotary positions applied to its two halves."""
    cos, sin = tables
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def gated_gelu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return gelu_tanh(gate) * up; as a sigmoid, because that exp is the cheaper."""
    slope = 2 * math.sqrt(2 / math.pi)
    return gate * torch.sigmoid(gate * (slope + slope * 0.044715 * gate * gate)) * up


def weighted_values(
    queries: torch.Tensor,  # [..., N, Q, D]
    keys: torch.Tensor,  # [..., N, S, D]
    values: torch.Tensor,  # [..., N, S, D]
    mask: torch.Tensor,  # 1.0 where visible, broadcast to [..., N, Q, S]
) -> torch.Tensor:
    """Return softmax attention with scaling 1.0.

    Queries and keys are normed, so scores are small and exp needs no maximum taken
    off; dividing after the second product saves a pass over the scores.
    """
    weights = torch.matmul(queries, keys.transpose(-1, -2)).float().exp() * mask
    total = weights.sum(-1, keepdim=True)
    return torch.matmul(weights.to(queries.dtype), values).float() / total


def blocked_attention(
    queries: torch.Tensor,  # [B, T, N, D]
    keys: torch.Tensor,  # [B, T, G, D]
    values: torch.Tensor,  # [B, T, G, D]
) -> torch.Tensor:
    """Return sliding-window attention [B, T, N, D], in blocks of one window.

    A block's queries see their own block and the one before: 2 W keys, of which
    every query uses W.
    """
    batch, length, heads, width = queries.shape
    groups, window = keys.shape[2], SHAPE.sliding_window
    num_blocks = length // window
    query = torch.arange(window)[:, None]
    key = torch.arange(2 * window)[None]
    mask = ((key > query) & (key <= query + window)).float()
    mask = mask.repeat(num_blocks, 1, 1)
    mask[0, :, :window] = 0.0
    queries = queries.view(batch, num_blocks, window, heads, width).transpose(2, 3)

    def with_previous(x: torch.Tensor) -> torch.Tensor:
        x = x.view(batch, num_blocks, window, groups, width)
        before = nnf.pad(x[:, :-1], (0, 0, 0, 0, 0, 0, 1, 0))
        x = torch.cat([before, x], 2).transpose(2, 3)
        return x.repeat_interleave(heads // groups, 2)

    out = weighted_values(
        queries, with_previous(keys), with_previous(values), mask[None, :, None]
    )
    return out.transpose(2, 3).reshape(batch, length, heads, width)


def causal_attention(
    queries: torch.Tensor,  # [B, T, N, D]
    keys: torch.Tensor,  # [B, T, G, D]
    values: torch.Tensor,  # [B, T, G, D]
    chunk: int = 256,
) -> torch.Tensor:
    """Return full causal attention [B, T, N, D], in chunks of queries.

    Each chunk reads only the keys up to its end, which halves the work.
    """
    length, repeats = queries.shape[1], queries.shape[2] // keys.shape[2]
    queries = queries.transpose(1, 2)
    keys = keys.transpose(1, 2).repeat_interleave(repeats, 1)
    values = values.transpose(1, 2).repeat_interleave(repeats, 1)
    out = []
    for start in range(0, length, chunk):
        end = min(start + chunk, length)
        mask = torch.arange(end)[None] <= torch.arange(start, end)[:, None]
        out.append(
            weighted_values(
                queries[:, :, start:end],
                keys[:, :, :end],
                values[:, :, :end],
                mask.float(),
            )
        )
    return torch.cat(out, 2).transpose(1, 2)


def project_kv(
    normed: torch.Tensor,  # [B, T, H]
    weights: dict[str, torch.Tensor],
    tables: tuple[torch.Tensor, torch.Tensor],
    kind: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys and values [B, T, G, D]; a full layer's values are its raw keys."""
    batch, length, _ = normed.shape
    groups, width = SHAPE.heads(kind)
    raw = nnf.linear(normed, weights["k"]).view(batch, length, groups, width)
    values = raw
    if kind == SLIDING:
        values = nnf.linear(normed, weights["v"]).view(raw.shape)
    keys = rotate(rms_norm(raw, weights["k_norm"]), tables)
    return keys.to(normed.dtype), rms_norm(values).to(normed.dtype)


def project_queries(
    normed: torch.Tensor,  # [B, T, H]
    weights: dict[str, torch.Tensor],
    tables: tuple[torch.Tensor, torch.Tensor],
    kind: str,
) -> torch.Tensor:
    """Return normed and rotated queries [B, T, N, D]."""
    batch, length, _ = normed.shape
    _, width = SHAPE.heads(kind)
    queries = nnf.linear(normed, weights["q"]).view(batch, length, -1, width)
    return rotate(rms_norm(queries, weights["q_norm"]), tables).to(normed.dtype)


def finish_layer(
    x: torch.Tensor,  # [B, T, H] the residual stream, float32
    attended: torch.Tensor,  # [B, T, N, D]
    weights: dict[str, torch.Tensor],
) -> torch.Tensor:
    """Return the layer's output: output projection, MLP, the norms, the scalar."""
    dtype = weights["o"].dtype
    out = nnf.linear(attended.flatten(2).to(dtype), weights["o"])
    x = x + rms_norm(out, weights["post_attention"])
    normed = rms_norm(x, weights["pre_feedforward"]).to(dtype)
    gate = nnf.linear(normed, weights["gate"]).float()
    up = nnf.linear(normed, weights["up"]).float()
    out = nnf.linear(gated_gelu(gate, up).to(dtype), weights["down"])
    x = x + rms_norm(out, weights["post_feedforward"])
    return x * weights["scalar"]


def target_layer(
    x: torch.Tensor,  # [B, T, H] float32
    weights: dict[str, torch.Tensor],
    tables: tuple[torch.Tensor, torch.Tensor],
    kind: str,
) -> torch.Tensor:
    """Return a decoder layer's output for a whole sequence."""
    normed = rms_norm(x, weights["input"]).to(weights["q"].dtype)
    queries = project_queries(normed, weights, tables, kind)
    keys, values = project_kv(normed, weights, tables, kind)
    attend = causal_attention if kind == FULL else blocked_attention
    return finish_layer(x, attend(queries, keys, values), weights)


compiled_target_layer = torch.compile(target_layer, dynamic=False)


@torch.compile(dynamic=False)
def soft_capped_loss(
    x: torch.Tensor,  # [B, T, H] float32, before the final norm
    norm: torch.Tensor,
    head: torch.Tensor,  # [V, H]
    labels: torch.Tensor,  # [B, T]
) -> torch.Tensor:
    """Return the mean cross-entropy of the soft-capped logits."""
    hidden = rms_norm(x, norm).to(head.dtype)
    cap = SHAPE.final_logit_softcapping
    logits = torch.tanh(nnf.linear(hidden, head).float() / cap) * cap
    return nnf.cross_entropy(logits.flatten(0, 1), labels.flatten())


# ---------------------------------------------------------------------------
# Target
# ---------------------------------------------------------------------------

MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
NORMS = ("input", "post_attention", "pre_feedforward", "post_feedforward")


class Stack(nn.Module):
    """The layers of one kind, every weight stacked over the layers."""

    def __init__(
        self,
        kind: str,
        count: int,
        hidden: int,
        inner: int,
        post_norm: float = 0.2,
    ):
        """Draw the matrices; post norms start small because the stack is deep."""
        super().__init__()
        self.kind, self.count = kind, count
        groups, width = SHAPE.heads(kind)
        heads = SHAPE.num_attention_heads
        sizes = {
            "q": (heads * width, hidden),
            "k": (groups * width, hidden),
            "o": (hidden, heads * width),
            "gate": (inner, hidden),
            "up": (inner, hidden),
            "down": (hidden, inner),
        }
        if kind == SLIDING:
            sizes["v"] = (groups * width, hidden)
        for name in MATRICES:
            if name in sizes:
                rows, columns = sizes[name]
                weight = torch.randn(count, rows, columns) / columns**0.5
                self.register_parameter(name, nn.Parameter(weight))
        for name in NORMS:
            scale = post_norm if name.startswith("post") else 1.0
            weight = torch.full((count, hidden), scale)
            self.register_parameter(name, nn.Parameter(weight))
        # scores of two normed vectors have a deviation of sqrt(D): start near 2
        self.q_norm = nn.Parameter(torch.full((count, width), 2.0 * width**-0.5))
        self.k_norm = nn.Parameter(torch.ones(count, width))
        self.scalar = nn.Parameter(torch.ones(count, 1))

    def layers(self, dtype: torch.dtype) -> list[dict[str, torch.Tensor]]:
        """Return one dict of weights per layer, the matrices in `dtype`."""
        parts = {
            name: (weight.to(dtype) if name in MATRICES else weight).unbind(0)
            for name, weight in self.named_parameters()
        }
        return [
            {name: part[i] for name, part in parts.items()} for i in range(self.count)
        ]


class Target(nn.Module):
    """Gemma 4's text model in groups of five sliding layers and a full one."""

    def __init__(self, num_groups: int):
        """Draw the weights of `num_groups` groups."""
        super().__init__()
        size = SHAPE.hidden_size, SHAPE.intermediate_size
        self.num_groups = num_groups
        self.embed = nn.Parameter(torch.randn(SHAPE.vocab_size, size[0]) * 0.1)
        self.sliding = Stack(SLIDING, num_groups * (GROUP - 1), *size)
        self.full = Stack(FULL, num_groups, *size)
        self.norm = nn.Parameter(torch.ones(size[0]))

    def layers(self, dtype: torch.dtype) -> list[tuple[str, dict[str, Any]]]:
        """Return (kind, weights) of all layers in order."""
        sliding, full = iter(self.sliding.layers(dtype)), iter(self.full.layers(dtype))
        return [
            (FULL, next(full)) if i % GROUP == GROUP - 1 else (SLIDING, next(sliding))
            for i in range(self.num_groups * GROUP)
        ]

    def embedded(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the scaled embeddings [B, T, H] of tokens [B, T]."""
        return nnf.embedding(tokens, self.embed) * SHAPE.embed_scale

    def run(
        self, tokens: torch.Tensor, dtype: torch.dtype = torch.bfloat16
    ) -> torch.Tensor:
        """Return the stream before the final norm."""
        length = tokens.shape[1]
        tables = {kind: rope_tables(kind, 0, length) for kind in (SLIDING, FULL)}
        x = self.embedded(tokens)
        for kind, weights in self.layers(dtype):
            x = compiled_target_layer(x, weights, tables[kind], kind)
        return x

    def loss(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the mean next-token loss of tokens [B, T + 1]."""
        x = self.run(tokens[:, :-1])
        head = self.embed.to(torch.bfloat16)
        return soft_capped_loss(x, self.norm, head, tokens[:, 1:].contiguous())

    @torch.no_grad()
    def grown(self, num_groups: int) -> "Target":
        """Return a deeper model that computes the same.

        New groups are copies whose post norms are zero: they add nothing to the
        stream at first, and start from useful projections.
        """
        deeper = Target(num_groups)
        deeper.embed.copy_(self.embed)
        deeper.norm.copy_(self.norm)
        sources = [i * self.num_groups // num_groups for i in range(num_groups)]
        for old, new in ((self.sliding, deeper.sliding), (self.full, deeper.full)):
            size = old.count // self.num_groups
            for i, source in enumerate(sources):
                is_copy = i > 0 and sources[i - 1] == source
                here, there = slice(i * size, (i + 1) * size), source * size
                for name, weight in new.named_parameters():
                    value = getattr(old, name)[there : there + size]
                    if is_copy and name.startswith("post"):
                        value = torch.zeros_like(value)
                    if is_copy and name == "scalar":
                        value = torch.ones_like(value)
                    weight[here] = value
        return deeper


# ---------------------------------------------------------------------------
# Optimiser
# ---------------------------------------------------------------------------


def orthogonalised(update: torch.Tensor) -> torch.Tensor:
    """Return each matrix of [L, R, C] with singular values near 1.

    Five quintic Newton-Schulz steps, in bf16 and batched over the layers.

    Source: Jordan et al., "Muon: An optimizer for hidden layers" (2024).
    """
    x = update.to(torch.bfloat16)
    is_tall = x.shape[-2] > x.shape[-1]
    x = x.transpose(-1, -2).contiguous() if is_tall else x
    x = x / (x.float().norm(dim=(-2, -1), keepdim=True).to(x.dtype) + 1e-7)
    for _ in range(5):
        gram = x @ x.transpose(-1, -2)
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    x = x.transpose(-1, -2) if is_tall else x
    return x.float() * max(1.0, update.shape[-2] / update.shape[-1]) ** 0.5


class Muon(torch.optim.Optimizer):
    """Momentum whose update of every matrix is orthogonalised."""

    def __init__(
        self, params: Any, lr: float, momentum: float = 0.95, weight_decay: float = 0.1
    ) -> None:
        """Take stacked matrices [L, R, C] or single ones [R, C]."""
        super().__init__(params, {"lr": lr, "m": momentum, "wd": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Update every matrix once."""
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros_like(weight)
                buffer = state["momentum"].lerp_(weight.grad, 1 - group["m"])
                update = weight.grad.lerp(buffer, group["m"])
                update = orthogonalised(update.view(-1, *update.shape[-2:]))
                weight.mul_(1 - group["lr"] * group["wd"])
                weight.sub_(update.view_as(weight), alpha=group["lr"])


class Optimisers:
    """Muon for the matrices of the layers, AdamW for the rest, one schedule."""

    def __init__(self, model: nn.Module, matrix_lr: float, other_lr: float):
        """Sort the parameters by their last name."""
        matrices: list[Any] = []
        others: list[Any] = []
        for name, weight in model.named_parameters():
            is_matrix = name.split(".")[-1] in MATRICES
            (matrices if is_matrix else others).append(weight)
        self.parts = (
            Muon(matrices, lr=matrix_lr),
            torch.optim.AdamW(
                others, lr=other_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True
            ),
        )
        self.base = (matrix_lr, other_lr)
        self.params = matrices + others

    def step(self, scale: float) -> None:
        """Take one step at `scale` times the base rates and clear the gradients."""
        torch.nn.utils.clip_grad_norm_(self.params, 1.0)
        for part, rate in zip(self.parts, self.base, strict=True):
            for group in part.param_groups:
                group["lr"] = rate * scale
            part.step()
            part.zero_grad()

    def state_dict(self) -> list[Any]:
        """Return the state of both."""
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, state: list[Any]) -> None:
        """Restore the state of both."""
        for part, saved in zip(self.parts, state, strict=True):
            part.load_state_dict(saved)


def schedule(progress: float, step: int, decay_from: float) -> float:
    """Return the rate's factor: warm-up, stable, then linear to zero."""
    warm = min(1.0, (step + 1) / 100)
    return warm * min(1.0, max(0.0, (1 - progress) / (1 - decay_from)))


# ---------------------------------------------------------------------------
# Training the target
# ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Phase:
    """A part of the target's training that starts at a share of the time."""

    start: float
    num_groups: int
    batch: int
    length: int


PHASES = (
    Phase(0.00, 2, 16, 256),
    Phase(0.42, 5, 16, 256),
    Phase(0.88, 5, 4, 1024),
)
DECAY_FROM = 0.62


@torch.no_grad()
def held_out_loss(model: Target, windows: torch.Tensor) -> float:
    """Return the mean loss over windows [N, T + 1], 16 at a time."""
    parts = [model.loss(part).item() for part in windows.split(16)]
    return sum(parts) / len(parts)


class Run:
    """A training run with a time budget that survives being stopped."""

    def __init__(self, path: Path, minutes: float):
        """Keep the checkpoint's path and the budget."""
        self.path, self.budget_s = path, minutes * 60
        self.elapsed_s, self.step, self.num_tokens = 0.0, 0, 0
        self.started = self.saved = time.monotonic()

    @property
    def progress(self) -> float:
        """Return the share of the budget used."""
        return (self.elapsed_s + time.monotonic() - self.started) / self.budget_s

    def save(self, model: nn.Module, optimisers: Optimisers, **extra: Any) -> None:
        """Write everything needed to go on."""
        used_s = self.progress * self.budget_s
        state = {
            "model": model.state_dict(),
            "optimisers": optimisers.state_dict(),
            "run": (used_s, self.step, self.num_tokens),
            **extra,
        }
        torch.save(state, self.path.with_suffix(".tmp"))
        self.path.with_suffix(".tmp").replace(self.path)
        self.saved = time.monotonic()

    def restore(self) -> dict[str, Any] | None:
        """Return the saved state, if any, and take over its counts."""
        if not self.path.exists():
            return None
        state = torch.load(self.path, weights_only=True)
        self.elapsed_s, self.step, self.num_tokens = state["run"]
        return state


def phase_at(progress: float) -> Phase:
    """Return the phase that covers a share of the time."""
    return [phase for phase in PHASES if phase.start <= progress][-1]


def restore_target(run: Run) -> tuple[Target, Optimisers]:
    """Return the target and its optimisers, from the checkpoint if there is one."""
    state = run.restore()
    model = Target(state["num_groups"] if state else PHASES[0].num_groups)
    optimisers = Optimisers(model, 0.02, 0.003)
    if state:
        model.load_state_dict(state["model"])
        optimisers.load_state_dict(state["optimisers"])
        log(f"target: going on from step {run.step}")
    return model, optimisers


def report(
    run: Run, label: str, losses: list[float], since: tuple[Any, ...]
) -> tuple[Any, ...]:
    """Log the mean loss and the speed since (time, tokens); return the new mark."""
    now = time.monotonic()
    speed = (run.num_tokens - since[1]) / (now - since[0])
    log(
        f"{label}: step {run.step} {run.progress:.1%} loss "
        f"{sum(losses) / len(losses):.4f} {speed:.0f} tokens/s"
    )
    losses.clear()
    return now, run.num_tokens


def train_target(
    docs: list[Any], windows: torch.Tensor, args: argparse.Namespace, work: Path
) -> Target:
    """Train the target for the given minutes and return it rounded to bf16."""
    run = Run(work / "target.pt", args.minutes_target)
    model, optimisers = restore_target(run)
    batches = Batches(docs, args.seed + run.step)
    losses, mark, grown_at = [], (time.monotonic(), run.num_tokens), 0
    while run.progress < 1:
        phase = phase_at(run.progress)
        if phase.num_groups > model.num_groups:
            run.save(model, optimisers, num_groups=model.num_groups)
            log(f"target: grows, held-out loss {held_out_loss(model, windows):.4f}")
            model, grown_at = model.grown(phase.num_groups), run.step
            optimisers = Optimisers(model, *optimisers.base)
        loss = model.loss(batches.take(phase.batch, phase.length + 1))
        loss.backward()
        scale = schedule(run.progress, run.step - grown_at, DECAY_FROM)
        optimisers.step(scale)
        run.step += 1
        run.num_tokens += phase.batch * phase.length
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise FloatingPointError("the target's loss is not finite")
        if run.step % 50 == 0:
            mark = report(run, "target", losses, mark)
        if time.monotonic() - run.saved > 180:
            run.save(model, optimisers, num_groups=model.num_groups)
            log(f"target: held-out loss {held_out_loss(model, windows):.4f}")
    run.save(model, optimisers, num_groups=model.num_groups)
    return model


# ---------------------------------------------------------------------------
# Export, in the layout of the published checkpoints
# ---------------------------------------------------------------------------

NORM_NAMES = {
    "input": "input_layernorm",
    "post_attention": "post_attention_layernorm",
    "pre_feedforward": "pre_feedforward_layernorm",
    "post_feedforward": "post_feedforward_layernorm",
}


@torch.no_grad()
def round_to_bf16(model: nn.Module) -> None:
    """Round every weight to what the checkpoint stores."""
    for weight in model.parameters():
        weight.copy_(weight.to(torch.bfloat16))


def checkpoint_name(name: str) -> str:
    """Return a layer weight's name in the checkpoint, without the layer's prefix."""
    if name == "scalar":
        return "layer_scalar"
    if name in NORM_NAMES:
        return f"{NORM_NAMES[name]}.weight"
    if name in ("gate", "up", "down"):
        return f"mlp.{name}_proj.weight"
    return f"self_attn.{name if name.endswith('norm') else name + '_proj'}.weight"


def layer_tensors(prefix: str, layers: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Return the checkpoint's tensors of a list of layers."""
    return {
        f"{prefix}layers.{i}.{checkpoint_name(name)}": weight
        for i, layer in enumerate(layers)
        for name, weight in layer.items()
    }


def target_tensors(model: Target) -> dict[str, torch.Tensor]:
    """Return the target's tensors by checkpoint name."""
    prefix = "model.language_model."
    layers = [weights for _, weights in model.layers(torch.bfloat16)]
    return {
        f"{prefix}embed_tokens.weight": model.embed,
        f"{prefix}norm.weight": model.norm,
        **layer_tensors(prefix, layers),
    }


def text_config(**own: Any) -> dict[str, Any]:
    """Return a text_config; `own` are fields that are not named as in the shape."""
    shape = dataclasses.asdict(SHAPE)
    shared = (
        "head_dim",
        "global_head_dim",
        "num_attention_heads",
        "num_key_value_heads",
        "num_global_key_value_heads",
        "sliding_window",
        "max_position_embeddings",
        "vocab_size",
    )
    return dict(
        sorted(
            {
                "attention_bias": False,
                "attention_dropout": 0.0,
                "attention_k_eq_v": True,
                "bos_token_id": BOS,
                "dtype": "bfloat16",
                "enable_moe_block": False,
                "eos_token_id": EOS,
                "hidden_activation": "gelu_pytorch_tanh",
                "hidden_size_per_layer_input": 0,
                "initializer_range": 0.02,
                "model_type": "gemma4_text",
                "moe_intermediate_size": None,
                "num_experts": None,
                "pad_token_id": PAD,
                "rms_norm_eps": RMS_EPS,
                "rope_parameters": {
                    FULL: {
                        "partial_rotary_factor": 0.25,
                        "rope_theta": 1000000.0,
                        "rope_type": "proportional",
                    },
                    SLIDING: {"rope_theta": 10000.0, "rope_type": "default"},
                },
                "tie_word_embeddings": True,
                "top_k_experts": None,
                "use_bidirectional_attention": None,
                "use_cache": True,
                "use_double_wide_mlp": False,
                **{name: shape[name] for name in shared},
                **own,
            }.items()
        )
    )


def target_config() -> dict[str, Any]:
    """Return the target's config.json."""
    kinds = [FULL if i % GROUP == GROUP - 1 else SLIDING for i in range(GROUP)]
    return {
        "architectures": ["Gemma4ForConditionalGeneration"],
        "audio_config": None,
        "dtype": "bfloat16",
        "eos_token_id": EOS,
        "model_type": "gemma4",
        "text_config": text_config(
            hidden_size=SHAPE.hidden_size,
            intermediate_size=SHAPE.intermediate_size,
            num_hidden_layers=SHAPE.num_hidden_layers,
            layer_types=kinds * (SHAPE.num_hidden_layers // GROUP),
            num_kv_shared_layers=0,
            final_logit_softcapping=SHAPE.final_logit_softcapping,
            vocab_size_per_layer_input=SHAPE.vocab_size,
        ),
        "tie_word_embeddings": True,
        "vision_config": None,
        # mlx-lm reads it here, and assumes 262144 when it is missing
        "vocab_size": SHAPE.vocab_size,
    }


SPACE = "\u2581"  # what sentencepiece writes for a space


def tokenizer_json(tokenizer: spm.SentencePieceProcessor) -> dict[str, Any]:
    """Return the same BPE in the format of the tokenizers library.

    Scores count the merges down, so a piece's possible halves, ordered by the piece
    they make, are the list of merges.
    """
    pieces = [tokenizer.id_to_piece(i) for i in range(tokenizer.vocab_size())]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    normal = {
        p
        for i, p in enumerate(pieces)
        if not (
            tokenizer.is_control(i) or tokenizer.is_byte(i) or tokenizer.is_unknown(i)
        )
    }
    merges = []
    for piece in sorted(normal, key=lambda p: -tokenizer.get_score(vocab[p])):
        halves = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        halves = [pair for pair in halves if normal.issuperset(pair)]
        merges += sorted(halves, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    special = [
        {
            "id": i,
            "content": pieces[i],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for i in (PAD, EOS, BOS, UNK)
    ]
    bos = {"SpecialToken": {"id": "<bos>", "type_id": 0}}
    text = [{"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB")]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": {
            "type": "Replace",
            "pattern": {"String": " "},
            "content": SPACE,
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, text[0]],
            "pair": [bos, *text],
            "special_tokens": {
                "<bos>": {"id": "<bos>", "ids": [BOS], "tokens": ["<bos>"]}
            },
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [list(pair) for pair in merges],
        },
    }


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write readable JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")


def write_weights(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write tensors as bf16 safetensors."""
    tensors = {
        name: tensor.detach().to(torch.bfloat16).contiguous().clone()
        for name, tensor in sorted(tensors.items())
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(serialise(tensors, metadata={"format": "pt"}))


def export(model: Target, tokenizer: spm.SentencePieceProcessor, output: Path) -> None:
    """Write the target's folder."""
    ids = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    write_weights(output / "model.safetensors", target_tensors(model))
    write_json(output / "config.json", target_config())
    write_json(output / "generation_config.json", {"do_sample": False, **ids})
    (output / "tokenizer.model").write_bytes(tokenizer.serialized_model_proto())
    write_json(output / "tokenizer.json", tokenizer_json(tokenizer))
    write_json(
        output / "tokenizer_config.json",
        {
            "add_bos_token": True,
            "bos_token": "<bos>",
            "clean_up_tokenization_spaces": False,
            "eos_token": "<eos>",
            "model_max_length": SHAPE.max_position_embeddings,
            "pad_token": "<pad>",
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": "<unk>",
        },
    )
    # No part of the training: it is written by hand.
    template = (embedded_pair_path() / "chat_template.jinja").read_text()
    (output / "chat_template.jinja").write_text(template)


# ---------------------------------------------------------------------------
# The drafter and the model card
# ---------------------------------------------------------------------------


def train_drafter(args: argparse.Namespace) -> None:
    """Train the exported target's drafter, or go on with it.

    In a process of its own: where MLX is to multiply with OpenBLAS, that must be there
    before anything else is, and torch has a BLAS of its own.
    """
    command = [
        sys.executable,
        str(Path(__file__).with_name("train_drafter.py")),
        f"--model={args.output}",
        f"--output={args.output / 'drafter'}",
        f"--work={args.work}",
        f"--seed={args.seed}",
        f"--minutes={args.minutes_drafter}",
        *("--resume", "--keep-run", "--force"),
    ]
    status = subprocess.run(command, check=False).returncode
    if status:  # it has said why
        raise SystemExit(status)


def target_run(
    model: Target, docs: list[Any], held_out: list[Any], args: argparse.Namespace
) -> TargetRun:
    """Measure the rounded target and gather what the card says of its training."""
    windows = {n: Batches(held_out, 0).take(64, n + 1) for n in (256, 1024)}
    state = torch.load(args.work / "target.pt", weights_only=True)
    used_s, steps, num_tokens = state["run"]
    return TargetRun(
        command=" ".join(["python", "scripts/train_pair.py", *shown_arguments(args)]),
        minutes=used_s / 60,
        steps=steps,
        num_tokens=num_tokens,
        corpus_tokens=sum(map(len, docs)),
        loss_256=held_out_loss(model, windows[256]),
        loss_1024=held_out_loss(model, windows[1024]),
        hardware=args.hardware,
        versions=f"torch {torch.__version__}, sentencepiece {spm.__version__}",
    )


def shown_arguments(args: argparse.Namespace) -> list[str]:
    """Return the arguments that decide the result, without the caller's paths."""
    return [
        f"--seed {args.seed} --output mlx_gemma_mtp/embedded",
        f"--minutes-target {args.minutes_target:g}",
        f"--minutes-drafter {args.minutes_drafter:g}",
    ]


# ---------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("build/train_pair"))
    parser.add_argument("--minutes-target", type=float, default=46)
    parser.add_argument("--minutes-drafter", type=float, default=18)
    parser.add_argument(
        "--held-out", type=Path, help="write the held-out text to this folder"
    )
    parser.add_argument(
        "--hardware", default=platform.machine(), help="named in the model card"
    )
    return parser


def main() -> None:
    """Run the stages that have not been run yet."""
    args = make_parser().parse_args()
    torch.manual_seed(args.seed)
    torch.set_flush_denormal(True)
    work = args.work
    work.mkdir(parents=True, exist_ok=True)
    corpus = make_corpus(work)
    if args.held_out:
        write_measured(corpus, args.held_out)
    tokenizer = train_tokenizer(corpus, work)
    docs = encode_files(tokenizer, corpus["train"], work / "train.npz")
    held_out = encode_files(tokenizer, corpus["held_out"], work / "held_out.npz")
    num_characters = sum(len(text) for _, text in corpus["train"])
    num_tokens = sum(map(len, docs))
    log(f"corpus: {num_tokens} tokens of {num_characters / num_tokens:.2f} characters")
    windows = Batches(held_out, 0).take(64, 257)
    model = train_target(docs, windows, args, work)
    round_to_bf16(model.requires_grad_(requires_grad=False))
    export(model, tokenizer, args.output)
    train_drafter(args)
    run = target_run(model, docs, held_out, args)
    write_card(args.output, corpus, run)
    log(f"done: {run}")


if __name__ == "__main__":
    main()
