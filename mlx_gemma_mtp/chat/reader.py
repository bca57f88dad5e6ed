"""Lines to messages: one line, or several.

A line that ends in a backslash goes on in the next one; between three quotes
everything counts, line ends included. A line may hold line ends of its own, where it
was pasted. Knows nothing of the terminal.
"""

from __future__ import annotations

from collections.abc import Callable

QUOTES = '"""'
# Asks for a line, given whether a message has begun; None at the end of the input.
NextLine = Callable[[bool], str | None]


def read_message(next_line: NextLine) -> str | None:
    """Read lines up to the end of a message.

    Args:
        next_line: Gives lines, without their ends.

    Returns:
        The message, perhaps empty; None where the input has ended. A message that the
        end of the input cuts off counts.
    """
    line = next_line(False)
    if line is None:
        return None
    if line.lstrip().startswith(QUOTES):
        return _read_quoted(line.lstrip()[len(QUOTES) :], next_line)
    return _read_continued(line, next_line)


def _read_quoted(line: str, next_line: NextLine) -> str:
    """What stands between three quotes; what follows the closing ones on their line."""
    lines: list[str] = []
    following: str | None = line
    end = -1  # the line that the closing quotes are on
    while following is not None:
        inside, quotes, after = following.partition(QUOTES)
        lines += inside.split("\n")
        if quotes:
            end = len(lines) - 1
            rest, *further = after.split("\n")
            lines[end] += rest
            lines += further
            break
        following = next_line(True)
    # Quotes on lines of their own do not make empty lines.
    first = 1 if len(lines) > 1 and not lines[0].strip() else 0
    if len(lines) > first + 1 and not lines[end].strip():
        del lines[end]
    return "\n".join(lines[first:])


def _read_continued(line: str, next_line: NextLine) -> str:
    """A line and those that its backslashes continue."""
    lines = []
    following: str | None = line
    while following is not None and following.endswith("\\"):
        lines.append(following[:-1])
        following = next_line(True)
    if following is not None:
        lines.append(following)
    return "\n".join(lines)
