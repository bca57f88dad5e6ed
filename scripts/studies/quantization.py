"""Measure which parts of a target and its drafter need how many bits.

    python scripts/studies/quantization.py

Every number is measured on weights that were quantized and dequantized again, so the
arithmetic is float32 throughout and the weights alone are what differs. Weights go
through bfloat16 first and so do scales, as in a converted checkpoint.

Groups of 64 become groups of 32 where 64 does not divide a row, and run on across rows
where 32 does not either (the tiny pairs' per-layer tables of 80 columns).

Acceptance length is tokens per round, 1 + accepted / rounds, greedy with K = 4, over
rounds that start at each of the first 16 tokens after held-out prompts: soon enough
that the target has not run into a loop. Greedy text does not depend on the drafter, so
it is written once, and every drafter is judged on the same texts; the standard error
after ± is that of the difference, paired by text.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import KVCache
from mlx_lm.tokenizer_utils import load as load_tokenizer

from mlx_gemma_mtp.checkpoints.quantization import Format
from mlx_gemma_mtp.constants import FULL, SLIDING
from mlx_gemma_mtp.generation.encoding import encode_text
from mlx_gemma_mtp.models.attention import SharedKV
from mlx_gemma_mtp.models.drafter import Drafter
from mlx_gemma_mtp.models.target import Target, text_model
from mlx_gemma_mtp.pair.load import embedded_pair_path, load_pair

HELD_OUT = Path(__file__).parents[1] / "data" / "heldout.jsonl.gz"
REFERENCE = Path(__file__).parents[2] / "tests" / "data" / "reference"
SECTIONS = ("weights", "drafter", "target", "rest")
NUM_DRAFT_TOKENS = 4
NUM_PLACES = 16  # of each text, that a round is judged at
PROMPT_TOKENS = 64
TEXT_TOKENS = 128  # of the texts that the target is judged on
STRETCH_CHARACTERS = 1200
BATCH = 4  # texts in one forward of the target


def label(form: Format) -> str:
    """What the tables call a format."""
    mode = f"affine {form.bits}" if form.mode == "affine" else form.mode
    return f"{mode} g{form.group_size}"


def bits_per_weight(form: Format) -> float:
    """Bits with the scales, which affine mode has two of, in bfloat16."""
    return form.bits + (32 if form.has_biases else 8) / form.group_size


AFFINE_4 = Format(4, 64)
AFFINE_5 = Format(5, 64)
AFFINE_6 = Format(6, 64)
AFFINE_8 = Format(8, 64)
AFFINE = (AFFINE_4, AFFINE_5, AFFINE_6, AFFINE_8)
FORMATS = (
    *AFFINE,
    Format(4, 32, "mxfp4"),
    Format(4, 16, "nvfp4"),
    Format(8, 32, "mxfp8"),
)
SMALL_GROUPS = (Format(4, 32), Format(5, 32))

# A piece of a weight's name, and the part it belongs to; the first that fits counts.
TARGET_PARTS = {
    "embed_tokens_per_layer.": "per-layer table",
    "per_layer_": "per-layer projections",
    "embed_tokens.": "embedding + head",
    "router.": "router",
    "experts.": "experts",
    "self_attn.": "attention",
    "mlp.": "MLP",
}
DRAFTER_PARTS = {
    "model.layers.": "layers",
    "pre_projection.": "pre_projection",
    "post_projection.": "post_projection",
    "embed_tokens.": "head",
    "centroids.": "centroids",
}
Plan = Mapping[str, Format]


def configure_parser() -> argparse.ArgumentParser:
    """The script's arguments."""
    parser = argparse.ArgumentParser(description="Measure quantization by parts.")
    parser.add_argument("sections", nargs="*", choices=[[], *SECTIONS], default=[])
    parser.add_argument("--prompts", type=int, default=120, help="for acceptance")
    parser.add_argument("--texts", type=int, default=12, help="for the target's KL")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="also write the figures here")
    return parser


def main() -> None:
    """Run the sections that were asked for, all by default."""
    args = configure_parser().parse_args()
    figures: dict[str, object] = {}
    functions: dict[str, Callable[..., dict[str, object]]] = {
        "weights": weights_section,
        "drafter": drafter_section,
        "target": target_section,
        "rest": rest_section,
    }
    for section in args.sections or SECTIONS:
        mx.random.seed(args.seed)
        start = time.perf_counter()
        figures[section] = functions[section](args)
        print(f"\n({section}: {time.perf_counter() - start:.0f} s)", flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=2), encoding="utf-8")


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a Markdown table."""
    print(f"\n**{title}**\n\n| {' | '.join(header)} |")
    print("|" + "---|" * len(header))
    for row in rows:
        print(f"| {' | '.join(row)} |")
    print(flush=True)


# --- rounding ---------------------------------------------------------------------


def round_trip(weight: mx.array, form: Format) -> mx.array:
    """Quantize a weight from bfloat16 and dequantize it to float32."""
    group_size = form.group_size
    if form.mode == "affine" and weight.shape[-1] % group_size:
        group_size = 32
    groups = weight.astype(mx.bfloat16).reshape(-1, group_size)
    settings = {"group_size": group_size, "bits": form.bits, "mode": form.mode}
    packed, *scales = mx.quantize(groups, **settings)  # type: ignore[arg-type]
    scales = [s if s.dtype == mx.uint8 else s.astype(mx.float32) for s in scales]
    rounded = mx.dequantize(packed, *scales, **settings)  # type: ignore[arg-type]
    return rounded.astype(mx.float32).reshape(weight.shape)


def relative_error(rounded: Sequence[mx.array], source: Sequence[mx.array]) -> float:
    """Root of the summed squared error over the root of the summed squares."""
    pairs = zip(rounded, source, strict=True)
    error = mx.stack([(a - b).square().sum() for a, b in pairs]).sum()
    power = mx.stack([b.square().sum() for b in source]).sum()
    return cast(float, mx.sqrt(error / power).item())


class Parts:
    """A model in float32 whose parts can be rounded, each to its own format.

    Args:
        model: A target or a drafter; its weights are changed in place.
        names: A piece of a weight's name to the part it belongs to.
    """

    def __init__(self, model: nn.Module, names: Mapping[str, str]) -> None:
        self.model = model
        model.set_dtype(mx.bfloat16)
        model.set_dtype(mx.float32)
        leaves = cast(list[tuple[str, mx.array]], tree_flatten(model.parameters()))
        self._weights: dict[str, dict[str, mx.array]] = {}
        for name, weight in leaves:
            part = next((p for piece, p in names.items() if piece in name), None)
            if part is not None and weight.ndim > 1:
                self._weights.setdefault(part, {})[name] = weight

    @property
    def names(self) -> list[str]:
        """The parts that the model has."""
        return list(self._weights)

    def weights(self, part: str) -> list[mx.array]:
        """The unrounded weights of a part."""
        return list(self._weights[part].values())

    def round(self, plan: Plan) -> None:
        """Round the parts that the plan names, and no others."""
        for part, weights in self._weights.items():
            form = plan.get(part)
            new = weights
            if form is not None:
                new = {name: round_trip(w, form) for name, w in weights.items()}
            self.model.load_weights(list(new.items()), strict=False)
        mx.eval(self.model.parameters())

    def everything(self, form: Format, *, but: Plan | None = None) -> dict[str, Format]:
        """The plan that rounds every part to one format, with exceptions."""
        return {**dict.fromkeys(self.names, form), **(but or {})}


def embedded_parts() -> tuple[Parts, Parts, Drafter]:
    """The embedded pair: target, drafter, and the drafter itself."""
    pair = load_pair()
    assert pair.drafter is not None
    target = Parts(pair.target, TARGET_PARTS)
    return target, Parts(pair.drafter, DRAFTER_PARTS), pair.drafter


# --- weights ----------------------------------------------------------------------


def weights_section(args: argparse.Namespace) -> dict[str, object]:
    """Relative error of the weights themselves."""
    shape = (2048, 2048)
    tails = mx.random.normal((4, *shape)).square().mean(axis=0).sqrt()
    columns: dict[str, list[mx.array]] = {
        "Gaussian": [mx.random.normal(shape)],
        "Student t(4)": [mx.random.normal(shape) / tails],
    }
    target, drafter, _ = embedded_parts()
    columns |= {f"target {part}": target.weights(part) for part in target.names}
    columns |= {f"drafter {part}": drafter.weights(part) for part in drafter.names}
    figures: dict[str, object] = {}
    rows = []
    for form in (SMALL_GROUPS[0], AFFINE_4, SMALL_GROUPS[1], *FORMATS[1:]):
        errors = {
            name: relative_error([round_trip(w, form) for w in weights], weights)
            for name, weights in columns.items()
        }
        figures[label(form)] = errors
        cells = [f"{100 * error:.2f}" for error in errors.values()]
        rows.append([label(form), f"{bits_per_weight(form):.2f}", *cells])
    table(
        "Relative RMS error of the weights, %",
        ["format", "bits/weight", *columns],
        rows,
    )
    return figures


# --- acceptance -------------------------------------------------------------------


def held_out_stretches(count: int, length: int, seed: int) -> mx.array:
    """Random stretches of held-out text, int32 [count, length]."""
    with gzip.open(HELD_OUT, "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    texts = [text for text in texts if len(text) > STRETCH_CHARACTERS]
    tokenizer = load_tokenizer(embedded_pair_path())
    rng = random.Random(seed)
    stretches: list[list[int]] = []
    while len(stretches) < count:
        text = rng.choice(texts)
        start = rng.randrange(len(text) - STRETCH_CHARACTERS)
        piece = text[start : start + STRETCH_CHARACTERS]
        begin, *tokens = encode_text(tokenizer, piece)
        # The first token may be the end of a word that the cut went through.
        tokens = [begin, *tokens[1:length]]
        if len(tokens) == length:
            stretches.append(tokens)
    return mx.array(stretches, dtype=mx.int32)


@dataclass(frozen=True)
class Texts:
    """Greedy texts of a target, with what a drafter reads of it.

    Attributes:
        tokens: Prompts and continuations, int32 [N, L].
        hidden: The target's post-norm rows, [N, L - 1, H].
        keys_values: Keys and values [N, G, L - 1, D] per layer type.
        embeddings: The target's scaled embedding of every token, [V, H].
        window: Positions that a sliding layer of the target sees.
    """

    tokens: mx.array
    hidden: mx.array
    keys_values: dict[str, tuple[mx.array, mx.array]]
    embeddings: mx.array
    window: int


def write_texts(model: nn.Module, prompts: mx.array) -> Texts:
    """Continue prompts [N, P] greedily, far enough to judge drafts at all places."""
    inner, target = text_model(model).model, Target(model)
    caches = [KVCache() for _ in inner.layers]
    tokens, hidden = [prompts], []
    for _ in range(NUM_PLACES + NUM_DRAFT_TOKENS):
        hidden.append(inner(tokens[-1], cache=caches))
        logits = inner.embed_tokens.as_linear(hidden[-1][:, -1])
        tokens.append(mx.argmax(logits, axis=-1, keepdims=True).astype(mx.int32))
        mx.eval(tokens[-1], hidden[-1])
    rows = mx.concatenate(hidden, axis=1)
    length = rows.shape[1]
    keys_values = {}
    for kind in (FULL, SLIDING):
        cache = caches[target.layout.source(kind)]
        assert cache.keys is not None
        assert cache.values is not None
        keys_values[kind] = (cache.keys[:, :, :length], cache.values[:, :, :length])
    return Texts(
        tokens=mx.concatenate(tokens, axis=1),
        hidden=rows,
        keys_values=keys_values,
        embeddings=target.embed(mx.arange(target.vocab_size)),
        window=target.layout.window,
    )


def count_accepted(drafter: Drafter, texts: Texts, offset: int) -> mx.array:
    """How many drafts agree with each text in a round at a place, int32 [N].

    Args:
        drafter: The drafter, with a dense head.
        texts: The texts.
        offset: The last token's position.
    """
    token, hidden = texts.tokens[:, offset], texts.hidden[:, offset - 1, None]
    position = mx.full((token.size,), offset, dtype=mx.int32)
    shared_kv = _shared_kv(texts, offset)
    matches = []
    for step in range(NUM_DRAFT_TOKENS):
        embedding = texts.embeddings[token][:, None]
        output = drafter(embedding, hidden, shared_kv, position=position)
        assert output.token_ids is None
        token, hidden = mx.argmax(output.logits[:, 0], axis=-1), output.hidden
        matches.append(token == texts.tokens[:, offset + step + 1])
    return mx.cumprod(mx.stack(matches, axis=-1).astype(mx.int32), axis=-1).sum(axis=-1)


def _shared_kv(texts: Texts, offset: int) -> dict[str, SharedKV]:
    """Keys and values before the last token: what cache.draft_masks shows."""
    first = {FULL: 0, SLIDING: max(0, offset - texts.window - 1)}
    shared = {}
    for kind, (keys, values) in texts.keys_values.items():
        seen = slice(first[kind], offset)
        mask = mx.ones((1, 1, 1, offset - first[kind]), dtype=mx.bool_)
        shared[kind] = SharedKV(keys[:, :, seen], values[:, :, seen], mask)
    return shared


@dataclass(frozen=True)
class Acceptance:
    """Mean accepted drafts of a round, for each text."""

    accepted: list[float]

    @property
    def length(self) -> float:
        """Tokens per round."""
        return 1 + statistics.mean(self.accepted)

    def standard_error(self, other: Acceptance | None = None) -> float:
        """Of the length, or of the difference to another on the same texts."""
        base = [0.0] * len(self.accepted) if other is None else other.accepted
        differences = [a - b for a, b in zip(self.accepted, base, strict=True)]
        return statistics.stdev(differences) / math.sqrt(len(differences))


def acceptance(drafter: Drafter, texts: Texts) -> Acceptance:
    """Judge a round at every place of every text."""
    first = texts.tokens.shape[1] - NUM_PLACES - NUM_DRAFT_TOKENS
    counts = [count_accepted(drafter, texts, first + i) for i in range(NUM_PLACES)]
    mean = mx.stack(counts).astype(mx.float32).mean(axis=0)
    return Acceptance(cast(list[float], mean.tolist()))


def read_prompts(args: argparse.Namespace) -> mx.array:
    """Random stretches of held-out text to start from."""
    return held_out_stretches(args.prompts, PROMPT_TOKENS, args.seed)


def record(found: Acceptance, base: Acceptance) -> dict[str, float]:
    """The figures of a measurement against the unrounded pair's."""
    return {
        "acceptance_length": found.length,
        "difference": found.length - base.length,
        "standard_error": found.standard_error(base),
    }


def cell(figures: dict[str, float]) -> str:
    """A difference with its standard error."""
    return f"{figures['difference']:+.3f} ± {figures['standard_error']:.3f}"


# --- drafter ----------------------------------------------------------------------


def drafter_section(args: argparse.Namespace) -> dict[str, object]:
    """What rounding parts of the drafter costs in acceptance."""
    target, parts, drafter = embedded_parts()
    texts = write_texts(target.model, read_prompts(args))
    base = acceptance(drafter, texts)

    def judge(plan: Plan) -> dict[str, float]:
        parts.round(plan)
        return record(acceptance(drafter, texts), base)

    both = ("pre_projection", "post_projection")
    columns: dict[str, tuple[str, ...]] = {
        "layers": ("layers",),
        "pre_projection": both[:1],
        "post_projection": both[1:],
        "both projections": both,
        "head": ("head",),
        "everything": tuple(parts.names),
    }
    found = {
        label(form): {
            name: judge(dict.fromkeys(names, form)) for name, names in columns.items()
        }
        for form in FORMATS
    }
    table(
        "Acceptance length, parts of the drafter rounded: difference to the unrounded "
        f"{base.length:.3f} ± {base.standard_error():.3f}",
        ["format", *columns],
        [[name, *map(cell, by_part.values())] for name, by_part in found.items()],
    )
    num_texts = len(base.accepted)
    print(f"{num_texts} texts, {num_texts * NUM_PLACES} rounds.")
    mixes = mix_table(parts, judge)
    return {"base": record(base, base), "parts": found, "mixes": mixes}


def mix_table(
    parts: Parts, judge: Callable[[Plan], dict[str, float]]
) -> dict[str, object]:
    """Acceptance when all parts of the drafter are rounded, each in its own way."""
    eight = {"pre_projection": AFFINE_8, "post_projection": AFFINE_8}
    six = {"pre_projection": AFFINE_6, "post_projection": AFFINE_6}
    layers = {"layers": AFFINE_4}
    plans = {
        "everything 4": parts.everything(AFFINE_4),
        "layers + head 4, projections 6": parts.everything(AFFINE_4, but=six),
        "layers + head 4, projections 8": parts.everything(AFFINE_4, but=eight),
        "layers 4, projections + head 6": parts.everything(AFFINE_6, but=layers),
        "layers 4, projections + head 8": parts.everything(AFFINE_8, but=layers),
        "everything 5": parts.everything(AFFINE_5),
        "everything 6": parts.everything(AFFINE_6),
        "everything 8": parts.everything(AFFINE_8),
    }
    found = {name: judge(plan) for name, plan in plans.items()}
    rows = [[name, cell(figures)] for name, figures in found.items()]
    title = "Acceptance length, the whole drafter rounded (affine g64)"
    table(title, ["drafter", "difference"], rows)
    return dict(found)


# --- target -----------------------------------------------------------------------


@dataclass(frozen=True)
class Judged:
    """A rounded target against its source, teacher-forced.

    Attributes:
        kl: KL(source || rounded) of each text, nats per token.
        agreement: Share of positions with the same most likely token.
    """

    kl: list[float]
    agreement: float

    @property
    def mean(self) -> float:
        """Nats per token."""
        return statistics.mean(self.kl)

    @property
    def standard_error(self) -> float:
        """Of the mean, over texts."""
        return statistics.stdev(self.kl) / math.sqrt(len(self.kl))

    def cell(self) -> str:
        """KL with its standard error, in thousandths, and the agreement in percent."""
        kl, error = 1000 * self.mean, 1000 * self.standard_error
        return f"{kl:.2f} ± {error:.2f}, {100 * self.agreement:.1f} %"


class Judge:
    """Compares a rounded target with its unrounded self on fixed texts.

    Args:
        parts: The target.
        tokens: Texts, int32 [N, L].
    """

    def __init__(self, parts: Parts, tokens: mx.array) -> None:
        self._parts = parts
        self._batches = [tokens[i : i + BATCH] for i in range(0, len(tokens), BATCH)]
        parts.round({})
        self._source = [self._log_probs(batch) for batch in self._batches]

    def __call__(self, plan: Plan) -> Judged:
        """Round the target by a plan and compare."""
        self._parts.round(plan)
        kl: list[float] = []
        same = []
        for batch, source in zip(self._batches, self._source, strict=True):
            rounded = self._log_probs(batch)
            per_token = (mx.exp(source) * (source - rounded)).sum(axis=-1)
            kl += cast(list[float], per_token.mean(axis=-1).tolist())
            same.append(mx.argmax(source, axis=-1) == mx.argmax(rounded, axis=-1))
        agreement = mx.concatenate(same).astype(mx.float32).mean().item()
        return Judged(kl, cast(float, agreement))

    def _log_probs(self, tokens: mx.array) -> mx.array:
        logits = self._parts.model(tokens)  # [B, L, V]
        log_probs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        mx.eval(log_probs)
        return log_probs


def target_section(args: argparse.Namespace) -> dict[str, object]:
    """What rounding parts of the target costs."""
    target, parts, drafter = embedded_parts()
    tokens = held_out_stretches(args.texts, TEXT_TOKENS, args.seed + 2)
    judge = Judge(target, tokens)
    columns: dict[str, tuple[str, ...]] = {name: (name,) for name in target.names}
    columns["everything"] = tuple(target.names)
    found = {
        label(form): {
            name: judge(dict.fromkeys(names, form)) for name, names in columns.items()
        }
        for form in FORMATS
    }
    rows = [
        [form, *(j.cell() for j in by_part.values())] for form, by_part in found.items()
    ]
    title = (
        "KL(source || rounded) in thousandths of a nat per token and top-1 agreement, "
        f"parts of the target rounded, {args.texts} texts of {TEXT_TOKENS} tokens"
    )
    table(title, ["format", *columns], rows)
    figures = {
        form: {name: vars(j) | {"mean": j.mean} for name, j in by_part.items()}
        for form, by_part in found.items()
    }
    return {"kl": figures, "pairs": pair_table(target, parts, drafter, args)}


def pair_table(
    target: Parts, parts: Parts, drafter: Drafter, args: argparse.Namespace
) -> dict[str, object]:
    """Acceptance when the whole target is rounded, and the drafter or not."""
    prompts = read_prompts(args)
    found: dict[str, dict[str, float]] = {}
    base: Acceptance | None = None
    for target_form in (None, AFFINE_8, AFFINE_4):
        target.round(target.everything(target_form) if target_form else {})
        texts = write_texts(target.model, prompts)
        for drafter_form in (None, AFFINE_8, AFFINE_4):
            parts.round(parts.everything(drafter_form) if drafter_form else {})
            measured = acceptance(drafter, texts)
            base = base or measured
            names = [label(f) if f else "float" for f in (target_form, drafter_form)]
            found[" / ".join(names)] = record(measured, base)
    rows = [
        [name, f"{figures['acceptance_length']:.3f}", cell(figures)]
        for name, figures in found.items()
    ]
    title = "Acceptance length of rounded pairs, each on its own target's text"
    table(title, ["target / drafter", "length", "difference"], rows)
    return dict(found)


# --- what the embedded pair has not -----------------------------------------------


def rest_section(args: argparse.Namespace) -> dict[str, object]:
    """Centroids, routers and per-layer tables: random weights only."""
    return {
        "centroids": centroid_table(),
        "router": router_table(),
        "reference": {
            name: reference_table(name) for name in ("e2b", "e4b", "26b-a4b")
        },
        "per-layer input": per_layer_table(),
    }


def top_sets(scores: mx.array, count: int) -> mx.array:
    """Membership of each row's highest scores, bool [rows, columns]."""
    threshold = mx.sort(scores, axis=-1)[:, -count, None]
    return scores >= threshold


def kept(source: mx.array, rounded: mx.array, count: int) -> dict[str, float]:
    """How much of the top scores survives; rows with their own scores [N, C]."""
    before, after = top_sets(source, count), top_sets(rounded, count)
    both = (before & after).sum(axis=-1)
    best = mx.take_along_axis(after, mx.argmax(source, axis=-1)[:, None], axis=-1)
    return {
        "kept": (both / count).mean().item(),  # type: ignore[dict-item]
        "equal sets": (both == count).mean().item(),  # type: ignore[dict-item]
        "best kept": best.mean().item(),  # type: ignore[dict-item]
    }


def top_table(
    title: str, count: int, cases: dict[str, tuple[mx.array, mx.array]]
) -> dict[str, object]:
    """Top scores kept, by format.

    Args:
        title: Of the table.
        count: How many of the highest scores are taken.
        cases: Name to inputs [N, H] and weight [C, H].
    """
    figures: dict[str, object] = {}
    rows = []
    for form in FORMATS:
        found = {
            name: kept(inputs @ weight.T, inputs @ round_trip(weight, form).T, count)
            for name, (inputs, weight) in cases.items()
        }
        figures[label(form)] = found
        cells = [
            f"{100 * f['kept']:.1f} / {100 * f['equal sets']:.1f} / "
            f"{100 * f['best kept']:.2f}"
            for f in found.values()
        ]
        rows.append([label(form), *cells])
    table(title, ["format", *cases], rows)
    return figures


def centroid_table() -> dict[str, object]:
    """The clusters that a centroid head scores, of 2,048."""
    centroids = mx.random.normal((2048, 256))
    noise = mx.random.normal((1000, 256))
    near = centroids[mx.random.randint(0, 2048, (1000,))]
    # Half of the variance is the cluster's own direction: a head that knows its answer.
    cases = {
        "random hidden": (noise, centroids),
        "near a centroid": (near + noise, centroids),
    }
    cases = {
        name: (x / mx.linalg.norm(x, axis=-1, keepdims=True), w)
        for name, (x, w) in cases.items()
    }
    title = (
        "Centroids 2048 x 256, top 32 of 2,048 clusters: kept / equal sets / best "
        "cluster kept, %"
    )
    return top_table(title, 32, cases)


def router_table() -> dict[str, object]:
    """The experts that a router chooses, of 128."""
    router = mx.random.normal((128, 2816))
    cases = {"random inputs": (mx.random.normal((2000, 2816)), router)}
    title = (
        "Router 128 x 2816, top 8 of 128 experts: kept / equal sets / best expert "
        "kept, %"
    )
    return top_table(title, 8, cases)


def reference_target(family: str) -> Parts:
    """A tiny random target of a family.

    A per-layer table is scaled up until its rows are as large as the projection that
    they are added to: as it is, it is a tenth of that, and hides its own error.
    """
    model = load_pair(REFERENCE / family / "target", False).target
    inner = text_model(model).model
    if inner.hidden_size_per_layer_input:
        table_rows = inner.embed_tokens_per_layer.weight
        scale = inner.embed_tokens_per_layer_scale
        rms = table_rows.square().mean().sqrt() * scale
        norm = inner.per_layer_projection_norm.weight
        wanted = norm.square().mean().sqrt()
        inner.embed_tokens_per_layer.weight = table_rows * (wanted / rms)
    return Parts(model, TARGET_PARTS)


def reference_table(family: str) -> dict[str, object]:
    """KL of a tiny random target when parts of it are rounded."""
    parts = reference_target(family)
    tokens = mx.random.randint(3, 512, (8, 64))
    judge = Judge(parts, tokens)
    special = [p for p in ("per-layer table", "router") if p in parts.names]
    ordinary = [p for p in parts.names if p not in special]
    columns: dict[str, tuple[str, ...]] = {name: (name,) for name in parts.names}
    columns["all but " + special[0]] = tuple(ordinary)
    columns["everything"] = tuple(parts.names)
    figures: dict[str, object] = {}
    rows = []
    for form in FORMATS:
        found = {
            name: judge(dict.fromkeys(names, form)) for name, names in columns.items()
        }
        figures[label(form)] = {name: j.mean for name, j in found.items()}
        rows.append([label(form), *(j.cell() for j in found.values())])
    figures |= _mixed(parts, judge, special[0])
    title = f"Tiny random {family}: KL in thousandths of a nat, top-1 agreement"
    table(title, ["format", *columns], rows)
    return figures


def _mixed(parts: Parts, judge: Judge, special: str) -> dict[str, object]:
    """The special part at each width while all else is at 4 bits, as a table."""
    figures: dict[str, object] = {}
    rows = []
    for form in AFFINE:
        found = judge(parts.everything(AFFINE_4, but={special: form}))
        name = f"{special} {label(form)}, all else {label(AFFINE_4)}"
        figures[name] = found.mean
        rows.append([name, found.cell()])
    table("Together: KL in thousandths of a nat", ["plan", "KL, agreement"], rows)
    return figures


def per_layer_table() -> dict[str, object]:
    """Error of the combined per-layer input when only the table is rounded."""
    figures: dict[str, object] = {}
    columns: dict[str, list[float]] = {}
    for family in ("e2b", "e4b"):
        parts = reference_target(family)
        (weight,) = parts.weights("per-layer table")
        source = _per_layer_inputs(parts)
        for form in FORMATS:
            parts.round({"per-layer table": form})
            error = relative_error([_per_layer_inputs(parts)], [source])
            own = relative_error([round_trip(weight, form)], [weight])
            columns.setdefault(label(form), []).extend((own, error))
    rows = [
        [form, *(f"{100 * error:.2f}" for error in errors)]
        for form, errors in columns.items()
    ]
    header = ["format", "e2b table", "e2b input", "e4b table", "e4b input"]
    table("Relative error of the table and of the per-layer input, %", header, rows)
    figures.update(columns)
    return figures


def _per_layer_inputs(parts: Parts) -> mx.array:
    """What the layers get for every token, [1, V, layers, width]."""
    inner = text_model(parts.model).model
    tokens = mx.arange(512)[None]
    embeddings = inner.embed_tokens(tokens)
    own = inner._get_per_layer_inputs(tokens, embeddings)
    inputs = inner._project_per_layer_inputs(embeddings * inner.embed_scale, own)
    mx.eval(inputs)
    return inputs


if __name__ == "__main__":
    main()
