"""The README and the pages of docs/, and what stands in their blocks of code."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}


def blocks(kind, page=None):
    """The blocks of a kind, each once: of one page, or of all."""
    texts = PAGES.values() if page is None else [PAGES[page]]
    found = (re.findall(rf"```{kind}\n(.*?)```", text, re.DOTALL) for text in texts)
    return list(dict.fromkeys(text for blocks in found for text in blocks))


def lines(kind, page=None):
    """Their lines, each once."""
    text = "".join(blocks(kind, page))
    return list(dict.fromkeys(text.splitlines()))
