"""Lines of data files: UTF-8 text, each with its place, read one at a time.

No more than one line is ever held, and no line is longer than ``MAX_LINE_BYTES``.
Knows nothing of what the lines mean.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import BinaryIO

from ...errors import DataError

MAX_LINE_BYTES = 4 * 2**20  # with its line end
_BYTE_ORDER_MARK = "\ufeff"


@dataclass(frozen=True)
class Place:
    """Where something stands in the data, for messages.

    Attributes:
        path: The file.
        line: The line's number, the first is 1; None for the file as a whole.
    """

    path: Path
    line: int | None = None

    def __str__(self) -> str:
        return f"{self.path}" if self.line is None else f"{self.path}, line {self.line}"

    def error(
        self, what: str, constraint: str, found: str, next_step: str
    ) -> DataError:
        """The mistake that something here is not what it must be.

        Args:
            what: What is wrong.
            constraint: What it must be.
            found: What it is.
            next_step: What to do, a sentence.
        """
        return DataError(
            f"{self}: {what} must be {constraint}: got {found}. {next_step}"
        )


def read_lines(path: Path) -> Iterator[tuple[Place, str]]:
    r"""Read a file line by line.

    Args:
        path: The file. A byte order mark at its beginning is left out.

    Yields:
        The line's place, and its text with its line end, ``"\n"`` or ``"\r\n"``, which
        the last one may lack.

    Raises:
        DataError: The file cannot be read, is not UTF-8, or has a line of more than
            ``MAX_LINE_BYTES``.
    """
    with _open(path) as file:
        offset = 0
        for number in count(1):
            place = Place(path, number)
            raw = _read_line(file, place)
            if not raw:
                return
            text = _decode(raw, place, offset)
            yield place, text.removeprefix(_BYTE_ORDER_MARK) if number == 1 else text
            offset += len(raw)


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except IsADirectoryError as error:
        next_step = f"Name the files in it, such as {path / '*.jsonl'}."
        raise Place(path).error("the data", "a file", "a folder", next_step) from error
    except (OSError, ValueError) as error:  # ValueError: no file has such a name
        raise _unreadable(path, error) from error


def _read_line(file: BinaryIO, place: Place) -> bytes:
    """The next line of a file, empty at its end."""
    try:
        raw = file.readline(MAX_LINE_BYTES + 1)
    except OSError as error:
        raise _unreadable(place.path, error) from error
    if len(raw) > MAX_LINE_BYTES:
        raise place.error(
            "the line",
            f"{MAX_LINE_BYTES:,} bytes or shorter",
            "a longer one",
            "Cut it into several lines, or leave the file out.",
        )
    return raw


def _decode(raw: bytes, place: Place, offset: int) -> str:
    """The text of a line that begins at byte ``offset`` of its file."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = offset + error.start
        raise place.error(
            "the text",
            "UTF-8",
            f"byte 0x{raw[error.start]:02x} at offset {byte:,} of the file",
            "Convert the file first, for example with iconv.",
        ) from error


def _unreadable(path: Path, error: Exception) -> DataError:
    reason = error.strerror if isinstance(error, OSError) else None
    return Place(path).error(
        "the data",
        "a file that can be read",
        reason or str(error),
        "Check the path and its permissions.",
    )
