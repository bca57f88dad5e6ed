"""Plain text to token ids, as models read it where no chat template is applied."""

from __future__ import annotations

from typing import Any


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text, with the begin-of-sequence token unless it is there.

    Args:
        tokenizer: mlx-lm's, or one of transformers.
        text: The text.
    """
    bos = tokenizer.bos_token
    add_special_tokens = bos is None or not text.startswith(bos)
    # Not verbose: how long a text may be is the model's to say, not transformers'.
    return list(
        tokenizer.encode(text, add_special_tokens=add_special_tokens, verbose=False)
    )
