"""What in a grammar of Lark's form is a text, and what is a control token's name.

Knows the form of these words alone, as llguidance reads them, and nothing of rules.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

# Rust's white space has not the four characters that Python's has beside it.
_NAME = r"<(?:[^<>\s]|[\x1c-\x1f])+>"
# Each may hold what looks like the others: who comes first decides.
_WORD = re.compile(
    rf'({_NAME})|"(?:\\.|[^"\\])*"|//[^\n]*|\#[^\n]*|/(?:\\.|[^/\\])+/', re.DOTALL
)


def literals(lark: str) -> list[str]:
    """The texts and expressions of a grammar, as they are written."""
    found = (match.group() for match in _WORD.finditer(lark))
    return [each for each in found if each[0] in '"/' and not each.startswith("//")]


def rules_alone(lark: str) -> str:
    """A grammar without what names no rule, though it may look so."""
    return _WORD.sub(" ", lark)


def numbered(lark: str, tokens: Mapping[str, int]) -> str:
    """A grammar that has tokens' numbers in place of their names.

    Args:
        lark: The grammar.
        tokens: The tokens by their names; other names stay as they are.
    """

    def number(match: re.Match[str]) -> str:
        token = tokens.get(match[1])
        return match.group() if token is None else f"<[{token}]>"

    return _WORD.sub(number, lark)
