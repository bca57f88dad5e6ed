"""Caches of prompts in a folder, so that another process can go on with them.

Each place of a prompt has a file (place_file.py), whose name is made of its number of
tokens and a digest of the model, the salt and all tokens up to it. So what has another
salt or model is not found, and names tell no salt. Several processes may share a
folder. What was used least recently goes first; a place goes before the ones that it
needs.

The decoding thread copies what is to be written; another one writes it. Readers see a
whole file or none. What cannot be read or written is as if it were not there, and is
said once.

All files of ours count for the budget, also those that are being written. A writer
holds a lock on its own: one without a lock was left by a kill, and goes.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import stat
import tempfile
import time
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import mlx.core as mx

from ..errors import RequestError
from ..store import Store
from .entries import Entry
from .file_writer import FileWriter, Job
from .mlx_lm_cache import prompt_cache_of
from .place_file import FORMAT, DamagedError, Place, bytes_at, read_place, write_place
from .slabs import SlabLayout

logger = logging.getLogger("mlx_gemma_mtp")

_NAME = re.compile(r"([1-9][0-9]{0,9})-([0-9a-f]{32})\.safetensors")
_PART = re.compile(r"[1-9][0-9]{0,9}-[0-9a-f]{32}\.[a-z0-9_]{8}\.part")
_PART_AGE_S = 3600  # writing takes seconds: where locks fail, an older part goes
# Reading fewer tokens takes hardly longer than a file with all sliding windows.
MIN_GAP = 512
_IS_FOLDER = "%s is a folder: the prompt is not kept. Remove it."
_TOKEN_BYTES = array("i").itemsize


class PromptFolder:
    """The places of prompts in a folder.

    Args:
        path: The folder; it is made where there is none.
        layout: Of the target.
        identity: What must be equal for caches to serve, JSON values.
        max_bytes: Most bytes of all files of ours.
        max_pending: Most bytes that wait to be written; more are not taken.
        min_gap: Fewer tokens than these are worth no file.

    Raises:
        RequestError: The folder cannot be used.
    """

    def __init__(
        self,
        path: Path,
        layout: SlabLayout,
        identity: Mapping[str, Any],
        *,
        max_bytes: int,
        max_pending: int,
        min_gap: int = MIN_GAP,
    ) -> None:
        _prepare(path)
        self._path = path
        self._layout = layout
        self._max_bytes = max_bytes
        self._min_gap = min_gap
        text = json.dumps({"format": FORMAT, **identity}, sort_keys=True)
        self._model = hashlib.blake2b(text.encode(), digest_size=16)
        self._lock = Store({}, path)
        self._bad: set[str] = set()  # names of files that do not serve
        self._said: set[str] = set()
        self._writer = FileWriter(self._write, max_bytes=max_pending)
        with self._lock.locked():
            self._make_room()

    def find(
        self, tokens: bytes, *, salt: str | None, beyond: int
    ) -> tuple[list[Any], int] | None:
        """The caches of the longest beginning that is here.

        Args:
            tokens: A prompt's, packed.
            salt: Only what was written with the same one is known.
            beyond: Tokens that need not be read in any case.

        Returns:
            mlx-lm's caches, and how many tokens they hold; None where nothing is here
            that saves much.
        """
        places = self._places(tokens, salt)
        for end in sorted(places, reverse=True):
            if end < beyond + self._min_gap:
                break
            if (caches := self._load(places, end)) is not None:
                return caches, end
        return None

    def offer(self, entries: Sequence[Entry]) -> None:
        """Let what is not here be written.

        Args:
            entries: Caches of one prompt, each of which begins with the tokens of the
                one before.
        """
        if not entries:
            return
        last = entries[-1]
        places = self._places(last.tokens, last.salt, self._writer.pending)
        digests = self._digests(last.tokens, last.salt, [e.num_tokens for e in entries])
        for entry in entries:
            end = entry.num_tokens
            begin = max((n for n in places if n <= end), default=0)
            if end - begin < self._min_gap:
                continue
            place = Place(digests[end], begin, end)
            data = bytes_at(self._layout, place, entry.caches)
            needs = [name for n, name in places.items() if n <= begin]
            if not self._writer.put(Job(_name(place.key, end), place, data, needs)):
                return
            places[end] = _name(place.key, end)

    def close(self, timeout_s: float) -> None:
        """Write what waits, but not for longer than this."""
        self._writer.close(timeout_s)

    def _places(
        self, tokens: bytes, salt: str | None, more: Iterable[str] = ()
    ) -> dict[int, str]:
        """The places of a prompt whose files are here: tokens up to each, and name."""
        names = (set(self._names()) - self._bad) | set(more)
        ends = {int(name.partition("-")[0]) for name in names}
        found = self._digests(tokens, salt, ends)
        places = {end: _name(key, end) for end, key in found.items()}
        return {end: name for end, name in places.items() if name in names}

    def _digests(
        self, tokens: bytes, salt: str | None, ends: Iterable[int]
    ) -> dict[int, str]:
        """What the files of places are called, those past the end left out."""
        running = self._model.copy()
        running.update(json.dumps(salt).encode() + b"\n")
        found, before = {}, 0
        for end in sorted(ends):
            if end * _TOKEN_BYTES > len(tokens):
                break
            running.update(tokens[before * _TOKEN_BYTES : end * _TOKEN_BYTES])
            found[end] = running.hexdigest()
            before = end
        return found

    def _load(self, places: Mapping[int, str], end: int) -> list[Any] | None:
        """The caches at a place; None where its files do not serve."""
        parts: list[dict[int, list[mx.array]]] = []
        at, used = end, []
        while at:
            name = places.get(at)
            begin = None if name is None else self._read(name, at, parts)
            if name is None or begin is None:
                self._bad.add(places[end])  # it needs the others
                return None
            used.append(name)
            at = begin
        self._touch(used)
        arrays = [
            [
                mx.concatenate([part[i][j] for part in reversed(parts) if i in part], 2)
                for j in range(2)
            ]
            for i in range(len(self._layout.layers))
        ]
        mx.eval(arrays)
        return prompt_cache_of(self._layout, arrays, end)

    def _read(
        self, name: str, end: int, parts: list[dict[int, list[mx.array]]]
    ) -> int | None:
        """Read a file; the sliding windows are those of the first one of parts.

        Returns:
            Where the tokens of its full layers begin; None where it does not serve.
        """
        found = _NAME.fullmatch(name)
        assert found is not None
        path = self._path / name
        try:
            begin, arrays = read_place(
                path, self._layout, found[2], end, has_windows=not parts
            )
        except FileNotFoundError:  # another process has made room
            return None
        except IsADirectoryError:
            self._bad.add(name)
            self._say(_IS_FOLDER, path)
            return None
        except (OSError, DamagedError) as error:
            self._bad.add(name)
            self._say("%s is not used: %s. It is written anew.", path, error)
            return None
        parts.append(arrays)
        return begin

    def _write(self, job: Job) -> None:
        """Write a file, and make room for it; called in the writer's thread."""
        path, part = self._path / job.name, None
        if path.is_dir():
            self._say(_IS_FOLDER, path)
            return
        try:
            file, part = self._open_part(job)
            with file:
                write_place(file, self._layout, job.place, job.data)
                file.flush()
                with self._lock.locked():
                    self._touch(job.needs)
                    if self._make_room(file.tell(), job, part):
                        os.replace(part, path)
                        part = None
            self._bad.discard(job.name)
        except OSError as error:
            self._say("no prompts can be kept in %s: %s.", self._path, error.strerror)
        finally:
            if part is not None:
                _drop(part)

    def _open_part(self, job: Job) -> tuple[IO[bytes], Path]:
        """A new file, locked while it is open, and where it is."""
        with self._lock.locked():  # who makes room never sees it without its own lock
            handle, part = tempfile.mkstemp(
                dir=self._path, prefix=f"{Path(job.name).stem}.", suffix=".part"
            )
            with contextlib.suppress(OSError):  # some disks have no locks
                fcntl.flock(handle, fcntl.LOCK_EX)
        return open(handle, "wb"), Path(part)

    def _make_room(
        self, size: int = 0, job: Job | None = None, part: Path | None = None
    ) -> bool:
        """Let files go until there is room for one more; the folder is locked.

        Args:
            size: Of that file, bytes.
            job: What it is; None for none.
            part: Where it is.

        Returns:
            Whether there is room; if there never can be, no file goes.
        """
        needs, name = ([], "") if job is None else (job.needs, job.name)
        taken, others = size + self._part_bytes(part), []
        for found, status in self._entries(_NAME):
            end = int(found.partition("-")[0])
            if found in needs:
                taken += status.st_size
            elif found != name:  # that one is replaced
                others.append((status.st_mtime_ns, -end, status.st_size, found))
        if job is not None and taken > self._max_bytes:
            return False
        total = taken + sum(num_bytes for _, _, num_bytes, _ in others)
        for _, _, num_bytes, found in sorted(others):
            if total <= self._max_bytes:
                break
            _drop(self._path / found)
            total -= num_bytes
        return total <= self._max_bytes

    def _part_bytes(self, own: Path | None) -> int:
        """Bytes of what others write; what killed writers have left is removed."""
        total = 0
        for name, status in self._entries(_PART):
            path = self._path / name
            if path == own:
                continue
            if _is_open(path) and time.time() - status.st_mtime <= _PART_AGE_S:
                total += status.st_size
            else:
                _drop(path)
        return total

    def _entries(
        self, pattern: re.Pattern[str]
    ) -> Iterator[tuple[str, os.stat_result]]:
        """The files of ours whose names are such ones, and what is known of them."""
        for name in self._names(pattern):
            with contextlib.suppress(OSError):  # another process may remove it
                status = (self._path / name).lstat()
                if stat.S_ISREG(status.st_mode):
                    yield name, status

    def _names(self, pattern: re.Pattern[str] = _NAME) -> list[str]:
        """What here has a name of ours."""
        try:
            return [name for name in os.listdir(self._path) if pattern.fullmatch(name)]
        except OSError as error:
            self._say("no prompts can be kept in %s: %s.", self._path, error.strerror)
            return []

    def _touch(self, names: Iterable[str]) -> None:
        """Let files be the last used ones, all at the same time."""
        now = time.time_ns()
        for name in names:
            with contextlib.suppress(OSError):
                os.utime(self._path / name, ns=(now, now))

    def _say(self, text: str, *values: object) -> None:
        """Say why something does not serve, each kind of it once."""
        if text not in self._said:
            self._said.add(text)
            logger.warning(text, *values)


def _name(key: str, end: int) -> str:
    """What the file of a place is called."""
    return f"{end}-{key}.safetensors"


def _is_open(path: Path) -> bool:
    """Whether a part's writer may still have it open."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def _drop(path: Path | str) -> None:
    """Remove a file; where that fails it is tried again another time."""
    with contextlib.suppress(OSError):
        os.unlink(path)


def _prepare(path: Path) -> None:
    """Make a folder that only its owner can look into.

    Raises:
        RequestError: It cannot be made or written, or others can write to it.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.stat()
    except OSError as error:
        raise RequestError(
            f"the folder for prompts must be one that can be made: got {path}: "
            f"{error.strerror}. Name another one."
        ) from error
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise RequestError(
            "the folder for prompts must be one that only you can write to: got "
            f"{path}. Name another one, or chmod 700 it."
        )
    if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        raise RequestError(
            f"the folder for prompts must be one that can be written: got {path}. Name "
            "another one."
        )
