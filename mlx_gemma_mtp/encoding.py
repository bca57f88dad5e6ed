"""Text to token ids, as models read it."""

from __future__ import annotations

from collections.abc import Sequence
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


def num_common(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many elements two sequences begin with in common."""
    length = min(len(one), len(other))
    return next((i for i in range(length) if one[i] != other[i]), length)
