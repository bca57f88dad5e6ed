"""What was typed before, over sessions: a file that only its owner can read.

One JSON string a line, so that messages of several lines come back whole. Chats that
run side by side each add to it. Knows nothing of the terminal.
"""

from __future__ import annotations

import json
import logging
import os
from contextlib import suppress
from pathlib import Path

from ..store import cache_folder, replace_file

logger = logging.getLogger("mlx_gemma_mtp")

FILE_NAME = "chat_history.jsonl"
MAX_ENTRIES = 1000
_MAX_CHARACTERS = 10_000  # of a message: a longer one is in a file of its own already
_MAX_BYTES = 2 * MAX_ENTRIES * 1000  # of the file that are looked at, the last ones


class History:
    """The messages of this session and of those before.

    Args:
        path: The file; None keeps nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def read(self) -> list[str]:
        """The newest messages, the oldest of them first; a file too long is cut."""
        if self._path is None:
            return []
        try:
            entries = _entries(self._path)
            is_long = self._path.stat().st_size > _MAX_BYTES
            if is_long or len(entries) > 2 * MAX_ENTRIES:
                text = "".join(map(_line, entries[-MAX_ENTRIES:]))
                replace_file(self._path, text)
        except FileNotFoundError:
            return []
        except OSError as error:
            self._give_up(error)
            return []
        return entries[-MAX_ENTRIES:]

    def add(self, message: str) -> None:
        """Keep a message for later sessions."""
        if self._path is None or len(message) > _MAX_CHARACTERS:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            mode = os.O_WRONLY | os.O_APPEND | os.O_CREAT
            handle = os.open(self._path, mode, 0o600)
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                os.fchmod(handle, 0o600)  # also one that a copy has opened to others
                file.write(_line(message))
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        """Say once why nothing is kept."""
        logger.error(
            "the chat's history must be a file that can be written: got %s: %s. It "
            "is not kept.",
            self._path,
            error.strerror,
        )
        self._path = None


def history_path() -> Path | None:
    """Where the history is kept; None where nothing is to be kept on disk."""
    folder = cache_folder()
    return None if folder is None else folder / FILE_NAME


def _line(message: str) -> str:
    return json.dumps(message) + "\n"


def _entries(path: Path) -> list[str]:
    """The messages in a file; what else is there is left out.

    Raises:
        OSError: It cannot be read.
    """
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _MAX_BYTES))
        text = file.read(_MAX_BYTES).decode(errors="replace")
    found: list[str] = []
    for line in text.splitlines():
        with suppress(ValueError, RecursionError):
            entry = json.loads(line)
            if isinstance(entry, str):
                found.append(entry)
    return found
