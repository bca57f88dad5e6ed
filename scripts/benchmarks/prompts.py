"""What is measured on: held-out text, and prompts by kind.

Kinds come from ``scripts/data/prompts.json``; a prompt is cut, or its text repeated, to
the length that is asked for.
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_gemma_mtp.generation.chat_template import apply_chat_template
from mlx_gemma_mtp.generation.encoding import encode_text

DATA = Path(__file__).parents[1] / "data"
HELD_OUT = DATA / "heldout.jsonl.gz"
KINDS_FILE = DATA / "prompts.json"
KINDS = ("code", "prose", "json", "echo", "chat")

Tokens = list[int]


def read_documents(tokenizer: Any) -> list[Tokens]:
    """Held-out texts as token ids, each with its begin-of-sequence token."""
    with gzip.open(HELD_OUT, "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    return [encode_text(tokenizer, text) for text in texts]


def prompts_of(
    documents: list[Tokens], rng: random.Random, *, count: int, length: int
) -> list[Tokens]:
    """Random stretches of held-out text, each behind its document's first token."""
    usable = [d for d in documents if len(d) > length]
    prompts = []
    for _ in range(count):
        document = rng.choice(usable)
        start = rng.randrange(len(document) - length)
        prompts.append([document[0], *document[start + 1 : start + length]])
    return prompts


@dataclass(frozen=True)
class KindPrompt:
    """A prompt of one kind, whose middle part can have any length.

    Attributes:
        before: What stands in front of the text.
        text: The text that is cut or repeated.
        after: What follows it.
    """

    before: str
    text: str
    after: str


def read_kinds() -> dict[str, list[KindPrompt]]:
    """The prompts of every kind."""
    kinds = json.loads(KINDS_FILE.read_text(encoding="utf-8"))
    return {
        kind: [KindPrompt(**{"before": "", "after": "", **p}) for p in prompts]
        for kind, prompts in kinds.items()
    }


def kind_prompts(
    tokenizer: Any, kind: str, *, count: int, length: int
) -> list[Tokens] | str:
    """Prompts of a kind, about ``length`` tokens each, or why there are none."""
    is_chat = kind == "chat"
    if is_chat and getattr(tokenizer, "chat_template", None) is None:
        return "the tokenizer has no chat template"
    prompts = read_kinds()[kind][:count]
    make = _chat_tokens if is_chat else _plain_tokens
    return [make(tokenizer, prompt, length) for prompt in prompts]


def random_prompts(
    vocab_size: int, kind: str, *, count: int, length: int
) -> list[Tokens]:
    """Random token ids for models that no tokenizer belongs to."""
    rng = random.Random(f"{kind}, {length}")
    return [[rng.randrange(vocab_size) for _ in range(length)] for _ in range(count)]


def _plain_tokens(tokenizer: Any, prompt: KindPrompt, length: int) -> Tokens:
    before = encode_text(tokenizer, prompt.before)
    after = _bare(tokenizer, prompt.after)
    room = max(1, length - len(before) - len(after))
    return [*before, *_fitted(_bare(tokenizer, prompt.text), room), *after]


def _chat_tokens(tokenizer: Any, prompt: KindPrompt, length: int) -> Tokens:
    overhead = len(_turn(tokenizer, prompt.before + prompt.after))
    room = max(1, length - overhead)
    text = tokenizer.decode(_fitted(_bare(tokenizer, prompt.text), room))
    return _turn(tokenizer, f"{prompt.before}{text}{prompt.after}")


def _turn(tokenizer: Any, content: str) -> Tokens:
    messages = [{"role": "user", "content": content}]
    advice = "Take a model whose template does."
    return apply_chat_template(tokenizer, messages, {}, advice=advice).tokens


def _bare(tokenizer: Any, text: str) -> Tokens:
    return encode_text(tokenizer, text, continues=True) if text else []


def _fitted(tokens: Sequence[int], length: int) -> Tokens:
    """The first ``length`` tokens of a text that goes on for ever."""
    repeats = -(-length // len(tokens))
    return (list(tokens) * repeats)[:length]
