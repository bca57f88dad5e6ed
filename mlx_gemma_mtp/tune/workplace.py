"""The folder of a run at work: one run at a time, and all that it needs to go on.

Knows nothing of what is kept there.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..errors import OutputError

_NOTES_NAME = "run.json"


class Workplace:
    """A run's folder.

    Attributes:
        folder: Where it is.
        notes: What stages have found, as JSON has it; ``save`` keeps it.
    """

    def __init__(self, folder: Path, notes: dict[str, Any]) -> None:
        self.folder = folder
        self.notes = notes

    def save(self) -> None:
        """Keep the notes, whole or not at all."""
        path = self.folder / _NOTES_NAME
        scratch = path.with_name(f".{_NOTES_NAME}")
        scratch.write_text(json.dumps(self.notes), encoding="utf-8")
        os.replace(scratch, path)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the minutes of a stage, over all runs of it."""
        began = time.monotonic()
        try:
            yield
        finally:
            minutes = self.notes.setdefault("minutes", {})
            spent = (time.monotonic() - began) / 60
            minutes[name] = minutes.get(name, 0.0) + spent
            self.save()


@contextmanager
def workplace(
    folder: Path, key: dict[str, Any], *, is_resumed: bool
) -> Iterator[Workplace]:
    """Hold a run's folder.

    Args:
        folder: Made where it is not there.
        key: What decides the run's result.
        is_resumed: Whether a run that was cut off goes on; where there is none, one
            begins.

    Raises:
        OutputError: The folder is another's or another run's, or cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise OutputError(
            f"{folder} must be a folder that can be written: got "
            f"{error.strerror or error}. Check the place, or take another --work."
        ) from error
    try:
        _lock(descriptor, folder)
        yield Workplace(folder, _notes(folder, key, is_resumed=is_resumed))
    finally:
        os.close(descriptor)


def remove(place: Workplace) -> None:
    """Remove what a run has kept; its notes go last, so that it can be told."""
    notes = place.folder / _NOTES_NAME
    for path in place.folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path != notes:
            path.unlink()
    notes.unlink()
    with suppress(OSError):
        place.folder.rmdir()


def _lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OutputError(
            f"{folder} must be used by one run at a time: got another at work there. "
            "Wait for it, or take another --work."
        ) from None
    except OSError:
        return  # a share without locks: as good as it gets there


def _notes(folder: Path, key: dict[str, Any], *, is_resumed: bool) -> dict[str, Any]:
    """The notes of the run that goes on, or of a new one."""
    path = folder / _NOTES_NAME
    key = json.loads(json.dumps(key))
    if not path.exists():
        if any(not found.name.startswith(".run") for found in folder.iterdir()):
            raise OutputError(
                f"{folder} must be empty or of a run that was cut off: got other "
                "files. Take another --work."
            )
        place = Workplace(folder, {"key": key})
        place.save()
        return place.notes
    if not is_resumed:
        raise OutputError(
            f"{folder} must not be there yet: got a run that was cut off. Pass "
            "--resume to go on with it, or remove the folder."
        )
    notes = _read(path)
    found = notes["key"]
    differences = sorted(n for n in {*key, *found} if key.get(n) != found.get(n))
    if differences:
        raise OutputError(
            f"{folder} must be of a run with the same settings: got another "
            f"{', '.join(differences)}. Resume with those of before, or take another "
            "--work."
        )
    return notes


def _read(path: Path) -> dict[str, Any]:
    try:
        notes = json.loads(path.read_bytes())
        if isinstance(notes["key"], dict):
            return notes
        reason = "no settings in it"
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = str(error)
    raise OutputError(
        f"{path} must be what a run wrote: got {reason}. Remove the folder to start "
        "again."
    )
