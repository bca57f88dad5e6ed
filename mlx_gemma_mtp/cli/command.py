"""What the package's commands share: mistakes as one line, exit statuses.

Knows nothing of what a command does.
"""

from __future__ import annotations

import argparse
import codecs
import errno
import io
import logging
import os
import shutil
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import (
    contextmanager,
    nullcontext,
    redirect_stderr,
    redirect_stdout,
    suppress,
)
from pathlib import Path
from typing import Any, NoReturn, TextIO

from ..distributed.environment import is_first, num_launched
from ..errors import MTPError, OutputError, RanksError, RequestError, shorten

_PACKAGE = __name__.partition(".")[0]
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE
_SET_UTF8 = "Set LC_ALL=C.UTF-8, and leave PYTHONIOENCODING out."
# What a disk answers that is full, or that nothing can be written to.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
# Libraries that say what no user of ours can act on, and who else may ask them to.
_TALKATIVE = {
    "transformers": "TRANSFORMERS_VERBOSITY",
    "huggingface_hub": "HF_HUB_VERBOSITY",
}


class Parser(argparse.ArgumentParser):
    """A parser whose mistakes are the user's like all others: one line, status 1.

    Args:
        reason_against: Says why a flag of other programs means nothing here; None for
            one that is not known.
        settings: argparse's own.
    """

    def __init__(
        self,
        *,
        reason_against: Callable[[str], str | None] = lambda flag: None,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self._reason_against = reason_against

    def parse_args(
        self, args: Iterable[str] | None = None, namespace: Any = None
    ) -> Any:
        """Read the arguments.

        Args:
            args: Arguments; None for the process's.
            namespace: As argparse has it.

        Raises:
            RequestError: One is unknown, or not what it must be.
        """
        known, unknown = self.parse_known_args(
            None if args is None else list(args), namespace
        )
        if unknown:
            self._refuse(unknown[0].split("=")[0])
        return known

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print.

        Args:
            message: What is wrong with the arguments.

        Raises:
            RequestError: Always.
        """
        raise RequestError(f"{message}. See {self.prog} --help.")

    def _print_message(self, message: str, file: Any = None) -> None:
        """Write help; argparse would say nothing of a disk that is full."""
        file.write(message)  # argparse names it wherever it writes

    def _refuse(self, flag: str) -> NoReturn:
        """Say why a flag is not taken."""
        reason = self._reason_against(flag)
        if reason is None:
            self.error(f"unrecognized argument: {shorten(flag)}")
        raise RequestError(f"{flag} has no meaning here: {reason}. Leave it out.")


@contextmanager
def progress_bar(what: str, total: int, notes: TextIO, **style: Any) -> Iterator[Any]:
    """Show how far work is, and the time left.

    Args:
        what: What is being done.
        total: How much that is.
        notes: Standard error.
        style: More settings of tqdm's bar.

    Yields:
        The bar.
    """
    from tqdm import tqdm  # type: ignore[import-untyped]

    interval = 0.2 if notes.isatty() else 10.0  # a log file is no screen
    with tqdm(
        desc=what,
        total=total,
        file=notes,
        mininterval=interval,
        maxinterval=interval,
        **style,
    ) as bar:
        yield bar


def exit_status(
    run: Callable[[], int],
    output: TextIO | None,
    notes: TextIO,
    *,
    stopped: str | None = None,
) -> int:
    """Run a command, and say how it ends.

    Args:
        run: The command; returns its exit status.
        output: Standard output; None where it is closed.
        notes: Standard error.
        stopped: What to say where a signal ends it, of a command that cleans up or
            keeps its work then: a polite kill and a closed terminal are answered like
            Control-C.

    Returns:
        Exit status: its own, 1 for a mistake of the user's, which is said in one line,
        128 and the signal's number if one ended it, 141 where the reader of the output
        went away.
    """
    if output is None:
        _say(notes, "error: standard output must be open: got a closed one.")
        return 1
    _quieten_libraries()
    _set_up_streams(output, notes)
    try:
        try:
            return _ending(run, notes, stopped)
        finally:
            output.flush()  # here, where it can still be said what went wrong
    except BrokenPipeError:
        drop_output(output)
        return EXIT_BROKEN_PIPE
    except OSError as error:
        lost = _lost(output, error)
        if lost is None:
            raise
        _say(notes, f"error: {lost}")
        return 1


def _ending(run: Callable[[], int], notes: TextIO, stopped: str | None) -> int:
    """Run a command; exit status where the user or a signal ends it."""
    try:
        with nullcontext() if stopped is None else _signals_as_interrupts():
            with _printing():
                return run()
    except MTPError as error:
        ranks = _ranks()
        if ranks is not None:
            ranks.give_up(error)
        # Before ranks have met, all of them refuse what is asked for alike.
        if ranks is not None or not (is_mute() and isinstance(error, RequestError)):
            _say(notes, f"error: {error}")
        return 1
    except KeyboardInterrupt as interrupt:
        if stopped is not None:
            _say(notes, stopped)
        return 128 + interrupt.args[0] if interrupt.args else EXIT_INTERRUPTED


def is_mute() -> bool:
    """Whether the first of several ranks speaks, and writes files, for this one."""
    if is_first(os.environ):
        return False
    try:
        return num_launched(os.environ) > 1
    except RanksError:  # whoever asks how many there are says so
        return False


def _ranks() -> Any:
    """The ranks that this process has met; None where it has met none."""
    module = sys.modules.get(f"{_PACKAGE}.distributed.ranks")  # it imports MLX
    if module is None or not module.launched.cache_info().currsize:
        return None
    return module.launched()


@contextmanager
def _printing() -> Iterator[None]:
    """Let all that is printed inside go nowhere on a rank that is not the first."""
    if not is_mute():
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        with redirect_stdout(nowhere), redirect_stderr(nowhere):
            yield


def _say(notes: TextIO, line: str) -> None:
    """Write a last line; where that fails too, the exit status has to do."""
    with suppress(OSError):
        notes.write(f"{line}\n")
        notes.flush()


def _lost(output: TextIO, error: OSError) -> str | None:
    """What could not be written, in words; None where that is not what went wrong."""
    try:
        output.flush()
    except OSError:  # what failed before is still there, and fails again
        drop_output(output)
    else:
        if error.errno not in NO_ROOM:
            return None
    # Of a copy the second one is where it goes.
    where = error.filename2 or error.filename
    place = "" if where is None else f" at {where}"
    return (
        f"what is written must find room{place}: got {error.strerror}. Make some, or "
        "write elsewhere."
    )


def _quieten_libraries() -> None:
    """Let libraries keep to themselves what is no error, unless the user asks."""
    for name, variable in _TALKATIVE.items():
        if variable not in os.environ:
            os.environ[variable] = "error"  # read where it is imported later
            logging.getLogger(name).setLevel(logging.ERROR)
            warnings.filterwarnings("ignore", module=rf"{name}\b")


def _set_up_streams(output: TextIO, notes: TextIO) -> None:
    """Let any text go to standard output, and say where some of it will be lost."""
    if sys.stdin is None:  # closed: the same as one that has ended
        sys.stdin = open(os.devnull, encoding="utf-8")
    if not isinstance(output, io.TextIOWrapper):
        return
    output.reconfigure(errors="replace")
    if not _is_utf8(output.encoding):
        _say(
            notes,
            f"The terminal's encoding is {output.encoding}, not UTF-8: characters that "
            f"it lacks are read wrong and written as ?. {_SET_UTF8}",
        )


def _is_utf8(encoding: str) -> bool:
    return codecs.lookup(encoding).name == "utf-8"


@contextmanager
def _signals_as_interrupts() -> Iterator[None]:
    """Let a polite kill or a closed terminal raise what Control-C raises.

    A signal that is ignored, as nohup lets it be, stays so.
    """

    def interrupt(signum: int, frame: Any) -> NoReturn:
        raise KeyboardInterrupt(signum)

    if threading.current_thread() is not threading.main_thread():
        yield  # signals go elsewhere
        return
    signals = (signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in signals}
    changed = [number for number in signals if before[number] != signal.SIG_IGN]
    for number in changed:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number in changed:
            signal.signal(number, before[number])


def set_up_log(notes: TextIO, *, verbose: bool) -> None:
    """Let what the package says go to a stream.

    Args:
        notes: Standard error.
        verbose: Whether what is loaded is said too.
    """
    logging.basicConfig(stream=notes, format="%(message)s")
    package = logging.getLogger("mlx_gemma_mtp")
    package.setLevel(logging.INFO if verbose else logging.ERROR)


def check_utf8(what: str, text: str) -> None:
    """Check that an input is text.

    Args:
        what: The input.
        text: What it was read as: Python keeps other bytes as surrogates.

    Raises:
        RequestError: It is not.
    """
    try:
        text.encode()
    except UnicodeError as error:
        raise not_utf8(what, error) from error


def not_utf8(what: str, error: UnicodeError) -> RequestError:
    """The mistake that some input is not UTF-8, or not read as that.

    Args:
        what: The input.
        error: What Python says of it.
    """
    encoding = sys.getfilesystemencoding()
    if isinstance(error, UnicodeDecodeError):
        encoding = error.encoding
    if not _is_utf8(encoding):
        return RequestError(
            f"the terminal's encoding must be UTF-8 for {what}: got {encoding}. "
            f"{_SET_UTF8}"
        )
    return RequestError(
        f"{what} must be UTF-8 text: got {error}. Convert it first, for example with "
        "iconv."
    )


def check_output_file(flag: str, path: str) -> None:
    """Check that a file can be written, before work begins.

    Args:
        flag: The flag that names it, for the message.
        path: The file.

    Raises:
        OutputError: It cannot.
    """
    reason = _obstacle(Path(path))
    if reason is not None:
        raise _not_writable(flag, path, reason)


def _obstacle(place: Path) -> str | None:
    """Why a file cannot be written, as far as that shows; None where it does not."""
    try:
        place.lstat()
    except FileNotFoundError as error:
        if not place.parent.is_dir():
            return error.strerror
    except OSError as error:  # a name too long, a file in a folder's place
        return error.strerror
    if os.path.isdir(place):
        return os.strerror(errno.EISDIR)
    if not os.access(place if os.path.exists(place) else place.parent, os.W_OK):
        return os.strerror(errno.EACCES)
    return None


def write_file(flag: str, path: str, text: str) -> None:
    """Write a file that a flag names; a plain one as a whole or not at all.

    Args:
        flag: The flag, for the message.
        path: The file.
        text: What it will hold.

    Raises:
        OutputError: It cannot be written.
    """
    place = Path(path)
    try:
        is_plain = place.is_file() and not place.is_symlink()  # no device, no pipe
        if os.path.lexists(place) and not (
            is_plain and os.access(place.parent, os.W_OK)
        ):
            place.write_text(text, encoding="utf-8")
        else:
            _replace(place, text)
    except OSError as error:
        raise _not_writable(flag, path, str(error.strerror)) from error


def _replace(path: Path, text: str) -> None:
    """Let a file hold a text; what it held is lost only once that is on the disk.

    Raises:
        OSError: It cannot be written.
    """
    part = path.with_name(f".{path.name[:50]}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        if path.exists():
            shutil.copymode(path, part)
        os.replace(part, path)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise


def _not_writable(flag: str, path: str, reason: str) -> OutputError:
    return OutputError(
        f"{flag} must be a file that can be written: got {path}: {reason}. Name "
        "another one."
    )


def drop_output(stream: TextIO) -> None:
    """Let a stream go nowhere once its reader has gone away.

    What is still buffered has no reader; the flush at exit must not say so.

    Args:
        stream: Standard output.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
