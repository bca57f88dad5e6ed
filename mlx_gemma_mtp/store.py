"""JSON files in the user's cache folder: what was learnt of pairs on a machine.

What cannot be read or written is as if it were not there: nothing depends on it but
how fast things get going, and it is said once. Old files go by themselves. Knows
nothing of what is kept.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger("mlx_gemma_mtp")

# Names another folder; empty for keeping nothing on disk.
FOLDER_VARIABLE = "MLX_GEMMA_MTP_CACHE"
_MAX_BYTES = 1_000_000  # a file of ours has some thousand; a larger one is none
_MAX_FILES = 64
_MAX_AGE_S = 180 * 24 * 3600  # since it was last read or written
# Files of an earlier form are never read again, and may hold what they should not.
_FORM = 2
_NAME = re.compile(r"[0-9a-f]{24}\.json")
_PART_NAME = re.compile(r"[0-9a-f]{24}\.[a-z0-9_]{8}\.part")
_PART_AGE_S = 3600  # writing takes milliseconds: an older part was left by a kill

_once = threading.Lock()  # held from when it was said that nothing can be kept


def cache_folder() -> Path | None:
    """The folder for what is kept; None where nothing is to be kept on disk."""
    named = os.environ.get(FOLDER_VARIABLE)
    try:
        if named is not None:
            return Path(named).expanduser() if named else None
        home = Path.home()
    except RuntimeError as error:  # no such home folder is known
        _say_unusable(named or "none", error)
        return None
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "mlx_gemma_mtp"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else home / ".cache") / "mlx_gemma_mtp"


def forget(folder: Path) -> int:
    """Remove the files of all stores in a folder, and nothing else there.

    Returns:
        How many there were.

    Raises:
        OSError: One cannot be removed.
    """
    found = [path for path, _ in _files(folder)]
    found += [path for path in _entries(folder) if _PART_NAME.fullmatch(path.name)]
    for path in found:
        path.unlink(missing_ok=True)
    return len(found)


class Store:
    """What belongs to one key.

    Args:
        key: What the values hold for (machine, versions, pair), JSON values.
        folder: Where files are kept; None for nowhere.
    """

    def __init__(self, key: Mapping[str, Any], folder: Path | None) -> None:
        self._key = dict(key)
        self._folder = folder
        self._name = _digest(self._key)
        self._is_tidy = False

    def read(self) -> dict[str, Any]:
        """The values, empty where there are none."""
        if self._folder is None:
            return {}
        path = self._folder / f"{self._name}.json"
        try:
            found = _load(path)
        except FileNotFoundError:
            return {}
        except OSError as error:
            _say_unusable(self._folder, error)
            return {}
        if found.get("form") != _FORM or found.get("key") != self._key:
            return {}
        with contextlib.suppress(OSError):
            os.utime(path)  # it is in use
        values = found.get("values")
        return values if isinstance(values, dict) else {}

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Around reading, changing and writing: other processes wait meanwhile.

        Where a folder cannot be locked they do not, and the last one's values stay.
        """
        descriptor = None
        if self._folder is not None:
            with contextlib.suppress(OSError):
                self._folder.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(self._folder, os.O_RDONLY)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        try:
            yield
        finally:
            if descriptor is not None:
                os.close(descriptor)  # which unlocks it

    def write(self, values: Mapping[str, Any]) -> None:
        """Replace the values; readers see the old file or the new one, never a part."""
        if self._folder is None:
            return
        content = {"form": _FORM, "key": self._key, "values": dict(values)}
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            path = self._folder / f"{self._name}.json"
            replace_file(path, json.dumps(content, indent=1))
            if not self._is_tidy:
                self._is_tidy = True
                _tidy(self._folder, used=self._name)
        except OSError as error:
            _say_unusable(self._folder, error)


def replace_file(path: Path, text: str) -> None:
    """Write a file that only its owner can read; readers see the old one or this one.

    Raises:
        OSError: It cannot be written.
    """
    handle, part = tempfile.mkstemp(
        dir=path.parent, prefix=f"{path.stem}.", suffix=".part"
    )
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(part)
        raise


def _digest(key: Mapping[str, Any]) -> str:
    """What the file of a key is called."""
    text = json.dumps(key, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _load(path: Path) -> dict[str, Any]:
    """What a file holds, empty where that is none of ours.

    Raises:
        OSError: It cannot be read.
    """
    if path.stat().st_size > _MAX_BYTES:
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _tidy(folder: Path, *, used: str) -> None:
    """Remove what nobody needs: long unused files, and parts of writers long dead.

    Args:
        folder: Where they are.
        used: The name of one that stays.
    """
    now = time.time()
    others = [(p, form) for p, form in _files(folder) if p.stem != used]
    others.sort(key=lambda found: _last_use(found[0]), reverse=True)
    for place, (path, form) in enumerate(others, 1):
        is_old = now - _last_use(path) > _MAX_AGE_S
        if place >= _MAX_FILES or is_old or form < _FORM:
            _drop(path)
    for path in _entries(folder):
        if _PART_NAME.fullmatch(path.name) and now - _last_use(path) > _PART_AGE_S:
            _drop(path)


def _files(folder: Path) -> Iterator[tuple[Path, int]]:
    """The files of stores in a folder, each with its form.

    A folder that a user named may hold anything: only what has the name of its own key
    is a store's.
    """
    for path in _entries(folder):
        if not _NAME.fullmatch(path.name):
            continue
        try:
            found = _load(path)
        except OSError:
            continue
        key, form = found.get("key"), found.get("form", 1)
        if (
            isinstance(key, dict)
            and isinstance(form, int)
            and _digest(key) == path.stem
        ):
            yield path, form


def _entries(folder: Path) -> list[Path]:
    """What is in a folder; nothing where there is none.

    Raises:
        OSError: It cannot be read.
    """
    try:
        return list(folder.iterdir())
    except FileNotFoundError:
        return []


def _last_use(path: Path) -> float:
    """When a file was last used, seconds; now where another process removed it."""
    try:
        return path.stat().st_mtime
    except OSError:
        return time.time()


def _drop(path: Path) -> None:
    """Remove a file; where that fails it is tried again another time."""
    with contextlib.suppress(OSError):
        path.unlink()


def _say_unusable(folder: Path | str, error: Exception) -> None:
    """Say why nothing is kept, once in a process."""
    if _once.acquire(blocking=False):
        reason = error.strerror if isinstance(error, OSError) else None
        logger.error(
            "the cache folder must be one that can be written: got %s: %s. Name "
            "another one in %s, or leave that empty to keep nothing.",
            folder,
            reason or str(error).rstrip("."),
            FOLDER_VARIABLE,
        )
