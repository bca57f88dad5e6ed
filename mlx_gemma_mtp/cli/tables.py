"""Tables as text: for the terminal and for Markdown.

Names of models and of kinds of text are somebody else's: whatever they hold, a row
stays one line and a table keeps its columns.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

# Entities, not backslashes: parsers disagree about a backslash before an escaped bar.
_ENTITIES = str.maketrans({sign: f"&#{ord(sign)};" for sign in "&<>|`*[]\\~$#"})
# Between letters or digits an underscore is no emphasis.
_EMPHASIS = re.compile(r"(?<![^\W_])_|_(?![^\W_])")


def size(num_bytes: int) -> str:
    """Return a number of bytes in its unit, powers of 1000.

    Args:
        num_bytes: How many.
    """
    for unit, unit_bytes in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if num_bytes >= unit_bytes:
            return f"{num_bytes / unit_bytes:.2f} {unit}"
    return f"{num_bytes} B"


def duration(seconds: float) -> str:
    """Return a time in its unit, never as none.

    Args:
        seconds: How long, 0 or more.
    """
    milliseconds = seconds * 1e3
    if seconds >= 10:
        return f"{seconds:.0f} s"
    if milliseconds >= 999.5:
        return f"{seconds:.1f} s"
    if milliseconds >= 0.001:
        return f"{milliseconds:.3g} ms"
    return "under 0.001 ms"


def one_line(text: str) -> str:
    """Return text on one line, without what would move a terminal's cursor.

    Args:
        text: Any text.
    """
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def aligned(rows: Sequence[Sequence[str]], *, left: Sequence[int]) -> list[str]:
    """Align columns, to the left where named, else to the right.

    Args:
        rows: One or more, of as many cells each.
        left: The columns to align to the left.

    Returns:
        A line for each row.
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  " + "  ".join(cells).rstrip())
    return lines


def markdown_text(text: str) -> str:
    """Return text that Markdown shows as it is, on one line, also inside a table.

    Args:
        text: Any text.
    """
    return _EMPHASIS.sub("&#95;", one_line(text).translate(_ENTITIES))


def markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a table; cells are shown as they are, not read as Markdown.

    Args:
        rows: The head, then any number of rows, of as many cells each.

    Returns:
        Its lines.
    """
    lines = [f"| {' | '.join(markdown_text(cell) for cell in row)} |" for row in rows]
    return [lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]
