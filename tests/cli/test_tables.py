"""Tables as text.

Run: python -m pytest tests/cli/test_tables.py
"""

from __future__ import annotations

import html

from mlx_gemma_mtp.cli.tables import (
    aligned,
    markdown_table,
    markdown_text,
    one_line,
    size,
)

# Names that would break a line, a table or a page.
NASTY = (
    *("a|b", "a\\|b", "back\\", "line\nline", "\r\n| x |", "`tick|`", "__init__"),
    *("<!-- -->", "[x](y)", "\x1b[2Jtext", "| --- |", "---", "&#124;", "*", "$x$"),
    "\udc80",  # of a byte that is no text, as Python hands it on
)


def test_markdown_shows_text_as_it_is():
    for name in NASTY:
        shown = markdown_text(name)
        assert html.unescape(shown) == one_line(name)
        assert not set(shown) & set("|<>`*[]\\\n\x1b")
    assert markdown_text("num_draft_tokens") == "num_draft_tokens"
    assert markdown_text("_x_") == "&#95;x&#95;"


def test_a_table_in_markdown():
    assert markdown_table([("a", "b"), ("1|", "2")]) == [
        "| a | b |",
        "|---|---|",
        "| 1&#124; | 2 |",
    ]


def test_columns_are_aligned():
    lines = aligned([("name", "n"), ("x", "1,234")], left=(0,))
    assert lines == ["  name      n", "  x     1,234"]


def test_sizes():
    found = [size(n) for n in (0, 999, 1000, 2_500_000, 10**9)]
    assert found == ["0 B", "999 B", "1.00 kB", "2.50 MB", "1.00 GB"]
