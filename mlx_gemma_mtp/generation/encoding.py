"""Text to token ids, as models read it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any


def encode_text(tokenizer: Any, text: str, *, continues: bool = False) -> list[int]:
    """Token ids of a text, behind exactly one begin-of-sequence token.

    Gemma's instruction-tuned tokenizers add none by themselves, others do: what a
    tokenizer does counts for nothing here. A text may begin with the token; white space
    before it, which templates write by oversight, is dropped.

    Args:
        tokenizer: mlx-lm's, or one of transformers. One that has no such token adds
            none.
        text: The text.
        continues: Whether other tokens stand before it already; none is added then.
    """
    bos = tokenizer.bos_token_id
    start = text.lstrip()
    if bos is not None and start.startswith(tokenizer.bos_token):
        text = start
    # Not verbose: how long a text may be is the model's to say, not transformers'.
    ids = list(tokenizer.encode(text, add_special_tokens=False, verbose=False))
    if bos is None or continues:
        return ids
    begin = next((i for i, token in enumerate(ids) if token != bos), len(ids))
    return [bos, *ids[begin:]]


def longest_token(tokenizer: Any) -> int | None:
    """Characters that one token can stand for, at most.

    Args:
        tokenizer: mlx-lm's, or one of transformers.

    Returns:
        The number; None where the tokenizer may drop characters, or is of a kind that
        is not known here.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    model, vocabulary = backend.model, backend.get_vocab(with_added_tokens=True)
    keeps_all = (
        type(model).__name__ == "BPE"
        and model.byte_fallback
        and not (model.continuing_subword_prefix or model.end_of_word_suffix)
        and all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))
        and _keeps_length(_description(backend.normalizer))
        and _keeps_length(_description(backend.pre_tokenizer))
        and not any(
            token.lstrip or token.rstrip
            for token in backend.get_added_tokens_decoder().values()
        )
    )
    return max(map(len, vocabulary)) if keeps_all else None


def least_tokens(tokenizer: Any, text: str, longest: int) -> int:
    """Tokens that a text has at least, by its characters alone.

    Args:
        tokenizer: The one of ``encode_text``.
        text: The text.
        longest: What ``longest_token`` says of the tokenizer.
    """
    length = len(text)
    if tokenizer.bos_token_id is not None:
        # What encode_text makes one token of.
        begin = re.match(rf"\s*(?:{re.escape(tokenizer.bos_token)})+", text)
        length -= begin.end() if begin else 0
    return -(-length // longest)


def _description(part: Any) -> Mapping[str, Any]:
    """A part of a tokenizer as its file has it; empty where there is none."""
    found: Mapping[str, Any] = json.loads(part.__getstate__()) if part else {}
    return found


def _keeps_length(part: Mapping[str, Any]) -> bool:
    """Whether a normalizer or pre-tokenizer never makes a text shorter."""
    kind = part.get("type")
    if kind == "Sequence":
        parts = part.get("normalizers") or part.get("pretokenizers") or ()
        return all(map(_keeps_length, parts))
    if kind == "Replace":
        pattern = part["pattern"].get("String")
        return pattern is not None and len(part["content"]) >= len(pattern)
    if kind == "Split":
        return bool(part["behavior"] != "Removed")
    return kind in (None, "Prepend")
