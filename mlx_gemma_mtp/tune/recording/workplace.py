"""The folder of a run at work: one run at a time, and all that it needs to go on.

Knows nothing of what is kept there.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ...errors import OutputError
from .arrays import not_writable

_NOTES_NAME = "run.json"
Key = dict[str, Any]


class Workplace:
    """A run's folder.

    Attributes:
        folder: Where it is.
        records: The folder for records.
        checkpoint: The file for the training's progress; other settings have another.
        changed: Names of settings of the training that were others before.
        notes: What stages have found, as JSON has it; ``save`` keeps it.
    """

    def __init__(self, folder: Path, notes: dict[str, Any], training: Key) -> None:
        self.folder = folder
        self.notes = notes
        self.records = folder / "records"
        digest = hashlib.sha256(json.dumps(training, sort_keys=True).encode())
        self.checkpoint = folder / f"checkpoint-{digest.hexdigest()[:8]}.safetensors"
        self.changed = _differences(notes.setdefault("training", training), training)

    def save(self) -> None:
        """Keep the notes, whole or not at all.

        Raises:
            OutputError: They cannot be written.
        """
        path = self.folder / _NOTES_NAME
        scratch = path.with_name(f".{_NOTES_NAME}")
        try:
            scratch.write_text(json.dumps(self.notes), encoding="utf-8")
            os.replace(scratch, path)
        except OSError as error:
            raise not_writable(path, error) from error

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the minutes of a stage, over all runs of it that were not killed."""
        began = time.monotonic()
        try:
            yield
        except BaseException:
            with suppress(OutputError):  # what has gone wrong first is what counts
                self._add_minutes(name, began)
            raise
        self._add_minutes(name, began)

    def _add_minutes(self, name: str, began: float) -> None:
        minutes = self.notes.setdefault("minutes", {})
        spent = (time.monotonic() - began) / 60
        minutes[name] = minutes.get(name, 0.0) + spent
        self.save()

    def remove(self) -> None:
        """Remove the folder: at once as far as anyone can see, then what was in it.

        The drafter stands by then; what cannot be removed is only room.
        """
        hidden = _removed(self.folder)
        shutil.rmtree(hidden, ignore_errors=True)
        with suppress(OSError):
            os.rename(self.folder, hidden)
        for folder in (hidden, self.folder):
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def workplace(
    folder: Path, *, texts: Key, training: Key, is_resumed: bool
) -> Iterator[Workplace]:
    """Hold a run's folder.

    Args:
        folder: Made where it is not there.
        texts: What decides the records.
        training: What decides the training beside them. Where that is all that has
            changed, the records stay and training begins anew.
        is_resumed: Whether a run that was cut off goes on; where there is none, one
            begins.

    Raises:
        OutputError: The folder is another's or another run's, or cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise not_writable(folder, error) from error
    try:
        _lock(descriptor, folder)
        # As they come back from a file.
        texts, training = json.loads(json.dumps([texts, training]))
        place = Workplace(folder, _notes(folder, is_resumed=is_resumed), training)
        _check_same(place, texts)
        if place.changed:
            minutes = place.notes.get("minutes", {}).get("text", 0.0)
            place.notes = {
                "texts": texts,
                "training": training,
                "minutes": {"text": minutes},
                "peak_memory_bytes": place.notes.get("peak_memory_bytes", 0),
            }
        place.notes.setdefault("run", secrets.token_hex(8))
        shutil.rmtree(_removed(folder), ignore_errors=True)
        place.save()
        yield place
    finally:
        os.close(descriptor)


def has_written(folder: Path, training: Mapping[str, Any]) -> bool:
    """Whether a drafter's ``training.json`` is of the run in a folder, if there is one.

    Args:
        folder: The run's.
        training: What ``training.json`` says.
    """
    path = folder / _NOTES_NAME
    return path.exists() and training.get("run") == _read(path).get("run", "")


def _removed(folder: Path) -> Path:
    """What a folder is called while it is removed."""
    return folder.with_name(f".{folder.name}.done")


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


def _notes(folder: Path, *, is_resumed: bool) -> dict[str, Any]:
    """The notes of the run that goes on; none of a new one."""
    path = folder / _NOTES_NAME
    if path.exists():
        if is_resumed:
            return _read(path)
        raise OutputError(
            f"{folder} must not be there yet: got what another run has left. Pass "
            "--resume to go on with it, or remove the folder."
        )
    if any(found.name != f".{_NOTES_NAME}" for found in folder.iterdir()):
        raise OutputError(
            f"{folder} must be empty or of a run that was cut off: got other files. "
            "Take another --work."
        )
    return {}


def _differences(one: Key, other: Key) -> list[str]:
    return sorted(n for n in {*one, *other} if one.get(n) != other.get(n))


def _check_same(place: Workplace, texts: Key) -> None:
    """Check that records are of the same texts, or that there are none."""
    names = _differences(place.notes.setdefault("texts", texts), texts)
    if names:
        raise OutputError(
            f"{place.folder} must be of a run with the same texts: got another "
            f"{', '.join(names)}. Resume with what it was begun with, or take another "
            "--work."
        )


def _read(path: Path) -> dict[str, Any]:
    try:
        notes = json.loads(path.read_bytes())
        if isinstance(notes["texts"], dict) and isinstance(notes["training"], dict):
            return notes
        reason = "no settings in it"
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = str(error)
    raise OutputError(
        f"{path} must be what a run wrote: got {reason}. Remove the folder to start "
        "again."
    )
