"""A folder that appears as a whole or not at all.

Everything is written into a hidden folder beside the place where it will stand, and
renamed there at the end. Whoever writes holds a lock on the hidden folder, so two runs
cannot meet in it, and what a killed run left is told from one that is at work. Knows
nothing of models.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from ..constants import DRAFTER_MODEL_TYPES, TARGET_MODEL_TYPES
from ..errors import OutputError
from .checkpoint import CONFIG_NAME, WEIGHTS_PATTERN

_MARGIN_BYTES = 64 << 20  # configs, tokenizer, the file system's own
# In a folder that a run hides: without it nothing there is removed or moved.
MARKER = ".mlx_gemma_mtp.converting"
# What file systems answer that cannot wait for a folder, or cannot lock one.
_NOT_SUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


def check_free_space(place: Path, num_bytes: int) -> None:
    """Check that the disk has room.

    Args:
        place: Where the folder will stand.
        num_bytes: What will be written.

    Raises:
        OutputError: It has not.
    """
    parent = next(parent for parent in place.parents if parent.is_dir())
    # What a killed run left is removed before anything is written.
    free = shutil.disk_usage(parent).free + _size(_beside(place, "partial"))
    needed = num_bytes + _MARGIN_BYTES
    if free < needed:
        raise OutputError(
            f"the disk of {place} must have {needed / 1e9:.2f} GB free: got "
            f"{free / 1e9:.2f} GB. Make room, or name another folder."
        )


def check_place(place: Path, *, force: bool) -> None:
    """Check that a folder may be put at a place.

    Args:
        place: Where the folder will stand, absolute.
        force: Whether a checkpoint that stands there may be replaced.

    Raises:
        OutputError: Something stands there that may not be replaced.
    """
    if not place.name:
        raise OutputError(
            f"the output must be a folder that can be made: got {place}. Name another."
        )
    check_can_make(place)
    if os.path.lexists(_beside(place, "replaced")):
        _recover_unless_busy(place)
    _check_standing(place, force=force)


def check_can_make(folder: Path) -> None:
    """Check that a folder can be made, with all above it, before work begins.

    Args:
        folder: Where it will stand, absolute.

    Raises:
        OutputError: It cannot.
    """
    try:
        _beside(folder, "replaced").lstat()  # the longest name of those that are used
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise _not_writable(folder, str(error.strerror), "") from error
    above = next(parent for parent in folder.parents if os.path.lexists(parent))
    if above.is_dir() and os.access(above, os.W_OK | os.X_OK):
        return
    reason = errno.EACCES if above.is_dir() else errno.ENOTDIR
    raise _not_writable(folder, os.strerror(reason), f" at {above}")


def _check_standing(place: Path, *, force: bool) -> None:
    """Refuse what stands at a place, unless it may be replaced."""
    if not os.path.lexists(place) or _is_empty_folder(place):
        return
    if place.is_symlink():
        raise OutputError(
            f"{place} must not be there yet: got a link, which --force does not "
            "replace. Name another folder."
        )
    if not force:
        raise OutputError(
            f"{place} must not be there yet: got a {_kind(place)}. Name another "
            "folder, or --force to replace it."
        )
    if not _is_checkpoint(place):
        raise OutputError(
            f"{place} must be a folder with a Gemma 4 checkpoint to be replaced: got a "
            f"{_kind(place)} without one. Name another folder."
        )


@contextmanager
def staged(place: Path, *, force: bool) -> Iterator[Path]:
    """Write a folder that appears at the end of the block, or not at all.

    Args:
        place: Where it will stand, absolute.
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
        try:
            _empty(hidden, place)
            (hidden / MARKER).touch()
            try:
                _recover(place)
                _check_standing(place, force=force)
                yield hidden
                _check_standing(place, force=force)  # again: hours may have passed
                _publish(hidden, place)
            except BaseException:
                _remove(hidden)
                raise
        finally:
            os.close(lock)
    except OSError as error:
        reason = str(error.strerror or error)
        raise _not_writable(place, reason, _where(error, place)) from error


def _lock(hidden: Path, place: Path) -> int:
    """Make the hidden folder if needed and lock it."""
    while True:
        is_own = False
        with suppress(FileExistsError):
            hidden.mkdir()
            is_own = True
        try:
            descriptor = os.open(hidden, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:
            continue  # its owner has just finished
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENOTDIR):  # a link or a file
                _fail_foreign(place)
            raise
        try:
            if _is_locked(descriptor, hidden, place, is_own=is_own):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # renamed or removed between open and lock


def _is_locked(descriptor: int, hidden: Path, place: Path, *, is_own: bool) -> bool:
    """Lock an open folder; tell whether it is still the one at its path."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OutputError(
            f"{place} must be written by one run at a time: got another run at work "
            "there. Wait for it, or name another folder."
        ) from None
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise
        # A share without locks: as good as it gets there.
    try:
        found = os.lstat(hidden)
    except FileNotFoundError:
        return False
    # Some network shares give folders to another user than who made them.
    if not is_own and found.st_uid != os.geteuid():
        _fail_foreign(place)
    return os.path.samestat(os.fstat(descriptor), found)


def _empty(hidden: Path, place: Path) -> None:
    """Remove what a killed run left, and nothing else."""
    found = list(hidden.iterdir())
    if found and not (hidden / MARKER).is_file():
        _fail_foreign(place)
    for path in found:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != MARKER:
            path.unlink()


def _remove(hidden: Path) -> None:
    """Remove a hidden folder; its marker goes last, so that a next try finds it."""
    with suppress(OSError):
        for path in hidden.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != MARKER:
                path.unlink()
        (hidden / MARKER).unlink()
        hidden.rmdir()


def _publish(hidden: Path, place: Path) -> None:
    """Put the folder in its place; what stood there stays hidden beside it."""
    old = _beside(place, "replaced")
    _sync_tree(hidden)
    try:
        if os.path.lexists(place):
            (place / MARKER).touch()
            os.rename(place, old)
        os.rename(hidden, place)
    except BaseException:
        _recover(place)
        raise
    # Last: without it a run killed before would be taken for somebody else's folder.
    with suppress(OSError):  # it stands: nothing that fails now may undo it
        (place / MARKER).unlink()
        _sync(place.parent)


def forget_replaced(place: Path) -> None:
    """Remove what stood at a place before, once nothing can fail any more.

    Args:
        place: Where a folder was published.
    """
    old = _beside(place, "replaced")
    if _is_ours(old):
        _remove(old)


def _recover(place: Path) -> None:
    """Undo or finish a replacement that was cut off between its two renames."""
    old = _beside(place, "replaced")
    if not os.path.lexists(old):
        if _is_ours(place):  # cut off before the first of them, or between the two
            (place / MARKER).unlink()
        return
    if _is_ours(old) and _is_empty_folder(place):
        place.rmdir()
    if _is_ours(old) and not os.path.lexists(place):
        os.rename(old, place)
        (place / MARKER).unlink()
    elif _is_ours(old) and _is_checkpoint(place):
        _remove(old)
        (place / MARKER).unlink(missing_ok=True)
    else:
        raise OutputError(
            f"{old} must not be in the way of {place}: got something there that no "
            "stopped run left, or two checkpoints. Move one of them elsewhere."
        )


def _recover_unless_busy(place: Path) -> None:
    """Recover, unless a run is at work there, which may be between its renames."""
    hidden = _beside(place, "partial")
    try:
        lock = _lock(hidden, place)
    except OutputError:
        return
    try:
        _recover(place)
    finally:
        with suppress(OSError):  # not empty: what the killed run left
            hidden.rmdir()
        os.close(lock)


def _is_ours(folder: Path) -> bool:
    """Tell whether a run has marked a folder."""
    is_folder = folder.is_dir() and not folder.is_symlink()
    return is_folder and (folder / MARKER).is_file()


def _is_checkpoint(folder: Path) -> bool:
    """Tell whether a folder holds a target or a drafter."""
    try:
        config = json.loads((folder / CONFIG_NAME).read_bytes())
        kind = config.get("model_type") if isinstance(config, dict) else None
        return kind in TARGET_MODEL_TYPES + DRAFTER_MODEL_TYPES and any(
            folder.glob(WEIGHTS_PATTERN)
        )
    except (OSError, ValueError, RecursionError):
        return False


def _is_empty_folder(place: Path) -> bool:
    return place.is_dir() and not place.is_symlink() and not any(place.iterdir())


def _beside(place: Path, what: str) -> Path:
    return place.with_name(f".{place.name}.{what}")


def _kind(place: Path) -> str:
    if place.is_symlink():
        return "link"
    return "folder" if place.is_dir() else "file"


def _size(folder: Path) -> int:
    """Return what is gained by removing a folder."""
    try:
        if folder.is_symlink() or not folder.is_dir():
            return 0
        return sum(path.lstat().st_blocks * 512 for path in folder.rglob("*"))
    except OSError:  # what it is will be told when it is written to
        return 0


def _sync_tree(folder: Path) -> None:
    """Wait until names and small files are on the disk, too."""
    for path in sorted(folder.rglob("*"), reverse=True):
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise
    finally:
        os.close(descriptor)


def _where(error: OSError, place: Path) -> str:
    is_elsewhere = error.filename and str(error.filename) != str(place)
    return f" at {error.filename}" if is_elsewhere else ""


def _not_writable(place: Path, reason: str, where: str) -> OutputError:
    return OutputError(
        f"{place} must be a folder that can be written: got {reason}{where}. Check the "
        "place, or name another folder."
    )


def _fail_foreign(place: Path) -> NoReturn:
    hidden = _beside(place, "partial")
    raise OutputError(
        f"{place} must be written in {hidden} first: got something there that no "
        "stopped run left. Move it elsewhere, or name another folder."
    )
