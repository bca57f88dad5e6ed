"""A folder that appears as a whole or not at all.

Everything is written into a hidden folder beside the place where it will stand, and
renamed there at the end. Whoever writes holds a lock on the hidden folder, so two runs
cannot meet in it, and what a killed run left is told from one that is at work. Knows
nothing of models.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from mlx_gemma_mtp.errors import OutputError

_MARGIN_BYTES = 64 << 20  # configs, tokenizer, the file system's own


def check_free_space(place: Path, num_bytes: int) -> None:
    """Check that the disk has room.

    Args:
        place: Where the folder will stand.
        num_bytes: What will be written.

    Raises:
        OutputError: It has not.
    """
    parent = _existing_parent(place)
    free = shutil.disk_usage(parent).free
    needed = num_bytes + _MARGIN_BYTES
    if free < needed:
        raise OutputError(
            f"the disk of {place} must have {needed / 1e9:.2f} GB free: got "
            f"{free / 1e9:.2f} GB. Make room, or take another --mlx-path."
        )


def check_place(place: Path, *, force: bool) -> None:
    """Check that a folder may be put at a place.

    Args:
        place: Where the folder will stand.
        force: Whether a checkpoint that stands there may be replaced.

    Raises:
        OutputError: Something stands there that may not be replaced.
    """
    _recover(place)
    if not os.path.lexists(place):
        return
    if place.is_dir() and not place.is_symlink() and not any(place.iterdir()):
        return  # an empty folder is no loss
    if not force:
        raise OutputError(
            f"{place} must not be there yet: got a {_kind(place)}. Take another "
            "--mlx-path, or --force to replace it."
        )
    if place.is_symlink() or not (place / "config.json").is_file():
        raise OutputError(
            f"{place} must be a folder with a checkpoint to be replaced: got a "
            f"{_kind(place)} without config.json. Take another --mlx-path."
        )


@contextmanager
def staged(place: Path, *, force: bool) -> Iterator[Path]:
    """Write a folder that appears at the end of the block, or not at all.

    Args:
        place: Where it will stand.
        force: Whether a checkpoint that stands there may be replaced.

    Yields:
        The folder to write into.

    Raises:
        OutputError: Another run writes there, or the place cannot be written.
    """
    hidden = _beside(place, "partial")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        lock = _lock(hidden, place)
    except OSError as error:
        _fail(place, error)
    try:
        _empty(hidden)
        yield hidden
        check_place(place, force=force)  # again: hours may have passed
        _publish(hidden, place)
    except BaseException:
        shutil.rmtree(hidden, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def _lock(hidden: Path, place: Path) -> int:
    """Make the hidden folder if needed and lock it."""
    while True:
        with suppress(FileExistsError):
            hidden.mkdir()
        try:
            descriptor = os.open(hidden, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            continue  # its owner has just finished
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), hidden.stat()):
                return descriptor
        except FileNotFoundError:
            pass  # renamed or removed between open and lock
        except BlockingIOError:
            os.close(descriptor)
            raise OutputError(
                f"{place} must be written by one run at a time: got another run at "
                "work there. Wait for it, or take another --mlx-path."
            ) from None
        os.close(descriptor)


def _empty(folder: Path) -> None:
    """Remove what a killed run left."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _publish(hidden: Path, place: Path) -> None:
    """Put the folder in its place; what stood there goes last."""
    old = _beside(place, "replaced")
    try:
        _sync_tree(hidden)
        if os.path.lexists(place):
            os.rename(place, old)
        os.rename(hidden, place)
        _sync(place.parent)
    except OSError as error:
        _recover(place)
        _fail(place, error)
    shutil.rmtree(old, ignore_errors=True)


def _recover(place: Path) -> None:
    """Finish or undo a replacement that was cut off between its two renames."""
    old = _beside(place, "replaced")
    if not os.path.lexists(old):
        return
    if os.path.lexists(place):
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.rename(old, place)


def _beside(place: Path, what: str) -> Path:
    return place.with_name(f".{place.name}.{what}")


def _existing_parent(place: Path) -> Path:
    for parent in place.parents:
        if parent.is_dir():
            return parent
    return Path.cwd()


def _kind(place: Path) -> str:
    if place.is_symlink():
        return "link"
    return "folder" if place.is_dir() else "file"


def _sync_tree(folder: Path) -> None:
    """Wait until names and small files are on the disk, too."""
    for path in sorted(folder.rglob("*"), reverse=True):
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fail(place: Path, error: OSError) -> NoReturn:
    raise OutputError(
        f"{place} must be writable: got {error.strerror or error}. Take another "
        "--mlx-path."
    ) from error
