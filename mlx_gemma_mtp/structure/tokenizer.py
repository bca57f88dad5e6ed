"""llguidance's view of a tokenizer: built once for each tokenizer of a process.

Control tokens have other names there, which no text has: so a text that spells one is
of ordinary tokens. A grammar has them by their numbers.
"""

from __future__ import annotations

import json
from copy import copy
from dataclasses import dataclass, field
from secrets import token_hex
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

from ..errors import RequestError
from .library import llguidance


@dataclass
class _Entry:
    """A tokenizer's, and who may build it."""

    lock: Lock = field(default_factory=Lock)
    made: Any = None


_lock = Lock()
_entries: WeakKeyDictionary[Any, _Entry] = WeakKeyDictionary()


def grammar_tokenizer(tokenizer: Any) -> Any:
    """llguidance's ``LLTokenizer`` of a tokenizer.

    The first call for Gemma's 262144 tokens takes some seconds, in which Python's other
    threads stand still most of the time; later ones are free. Any thread may call it.

    Args:
        tokenizer: mlx-lm's, around a fast one of transformers.

    Raises:
        RequestError: llguidance is not installed, or cannot read the tokenizer.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise RequestError(
            "text with a given form must have a tokenizer of the library tokenizers: "
            f"got {type(tokenizer).__name__}. Use a checkpoint with tokenizer.json."
        )
    with _lock:
        entry = _entries.setdefault(backend, _Entry())
    with entry.lock:
        if entry.made is None:
            entry.made = _build(backend, sorted(tokenizer.eos_token_ids))
        return entry.made


def control_tokens(tokenizer: Any) -> dict[str, int]:
    """The control tokens of a tokenizer, by their names.

    Args:
        tokenizer: mlx-lm's, around a fast one of transformers.
    """
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    return {each.content: token for token, each in added.items() if each.special}


def _build(backend: Any, eos: list[int]) -> Any:
    """Build it, with the tokens that end a text.

    Raises:
        RequestError: llguidance cannot read the tokenizer, or no token ends a text.
    """
    if not eos:
        raise RequestError(
            "text with a given form must have a token that ends it: got a tokenizer "
            "without one. Name it in generation_config.json."
        )
    whole = copy(backend)  # the caller's stays as it is
    whole.no_padding()
    whole.no_truncation()
    library = llguidance()
    try:
        return library.LLTokenizer(_renamed(whole.to_str()), eos_token=eos)
    except ValueError as error:
        raise RequestError(
            f"the tokenizer must be one that llguidance can read: got {error}. Decode "
            "without a given form."
        ) from error


def _renamed(text: str) -> str:
    """A tokenizer's JSON in which no text spells a control token.

    llguidance finds the tokens of a text that must come next with the tokenizer, which
    would take its control tokens for it.
    """
    whole = json.loads(text)
    secret = token_hex(16)  # nobody who writes a text can know it
    names = {
        each["content"]: f"<{secret}-{each['id']}>"
        for each in whole["added_tokens"]
        if each["special"]
    }
    for each in whole["added_tokens"]:
        each["content"] = names.get(each["content"], each["content"])
    model = whole["model"]
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(piece, piece): i for piece, i in vocabulary.items()}
    else:  # a unigram model's pieces, with their weights
        model["vocab"] = [[names.get(piece, piece), w] for piece, w in vocabulary]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    whole["post_processor"] = None  # it names them too, and nothing here needs it
    return json.dumps(whole, ensure_ascii=False)
