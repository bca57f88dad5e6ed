"""What single tokens are called in reports of log-probabilities."""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_MAX_KNOWN = 2**18


class Places:
    """Where the tokens of one text stand in it."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._num_characters = 0

    def add(self, data: bytes) -> int:
        """The place of the next token, in characters of the text.

        Args:
            data: Its bytes. One that begins inside a character stands where that does.
        """
        place = self._num_characters
        begun, _ = self._decoder.getstate()
        if not _goes_on(begun, data):  # what is broken off is a character too
            place += len(begun.decode("utf-8", "replace"))
        self._num_characters += len(self._decoder.decode(data))
        return place


def _goes_on(begun: bytes, data: bytes) -> bool:
    """Whether bytes belong to a character that others have begun."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(begun + data[:1])
    except UnicodeDecodeError:
        return not begun
    return True


class Vocabulary:
    """Texts and bytes of tokens.

    Args:
        tokenizer: mlx-lm's.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, bytes] = {}

    def bytes_of(self, token: int) -> bytes:
        """A token's part of the text in UTF-8, perhaps of half a character."""
        known = self._known.get(token)
        if known is None:
            known = self._bytes_of(token)
            if len(self._known) < _MAX_KNOWN:
                self._known[token] = known
        return known

    def text_of(self, token: int) -> str:
        """A token's text; as OpenAI's ``bytes:\\xe2`` where it is none by itself."""
        found = self.bytes_of(token)
        try:
            return found.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in found)

    def pieces_of(self, tokens: Sequence[int]) -> list[str]:
        """Tokens as the vocabulary has them."""
        return list(map(str, self._tokenizer.convert_ids_to_tokens(list(tokens))))

    def text_of_all(self, tokens: Sequence[int]) -> str:
        """The text that tokens are together, control tokens included."""
        return str(self._tokenizer.decode(list(tokens)))

    def _bytes_of(self, token: int) -> bytes:
        piece = self._tokenizer.convert_ids_to_tokens(token)
        match = _BYTE.fullmatch(piece) if isinstance(piece, str) else None
        if match is not None:
            return bytes([int(match.group(1), 16)])
        text: str = self._tokenizer.decode([token])
        return text.encode("utf-8", "replace")
