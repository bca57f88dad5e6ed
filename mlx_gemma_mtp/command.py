"""What the package's commands share: mistakes as one line, exit statuses.

Knows nothing of what a command does.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NoReturn, TextIO

from .config import shorten
from .errors import MTPError, OutputError, RequestError

EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE


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
    output: TextIO,
    notes: TextIO,
    *,
    stopped: str | None = None,
) -> int:
    """Run a command, and say how it ends.

    Args:
        run: The command; returns its exit status.
        output: Standard output.
        notes: Standard error.
        stopped: What to say where a signal ends it, of a command that cleans up or
            keeps its work then: a polite kill and a closed terminal are answered like
            Control-C.

    Returns:
        Exit status: its own, 1 for a mistake of the user's, which is said in one line,
        128 and the signal's number if one ended it, 141 where the reader of the output
        went away.
    """
    try:
        with nullcontext() if stopped is None else _signals_as_interrupts():
            return run()
    except MTPError as error:
        notes.write(f"error: {error}\n")
        return 1
    except KeyboardInterrupt as interrupt:
        if stopped is not None:
            notes.write(f"{stopped}\n")
        return 128 + interrupt.args[0] if interrupt.args else EXIT_INTERRUPTED
    except BrokenPipeError:
        drop_output(output)
        return EXIT_BROKEN_PIPE


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


def set_up_output(output: TextIO, notes: TextIO, *, verbose: bool) -> None:
    """Let notes of the package go to a stream, and any text to the other one.

    Args:
        output: Standard output.
        notes: Standard error.
        verbose: Whether what is loaded is said too.
    """
    logging.basicConfig(stream=notes, format="%(message)s")
    package = logging.getLogger("mlx_gemma_mtp")
    package.setLevel(logging.INFO if verbose else logging.ERROR)
    if isinstance(output, io.TextIOWrapper):
        output.reconfigure(errors="replace")  # where the encoding is not UTF-8


def not_utf8(what: str, error: UnicodeError) -> RequestError:
    """The mistake that some input is not UTF-8.

    Args:
        what: The input.
        error: What Python says of it.
    """
    return RequestError(
        f"{what} must be UTF-8 text: got {error}. Convert it first, for example with "
        "iconv."
    )


def write_file(flag: str, path: str, text: str) -> None:
    """Write a file that a flag names.

    Args:
        flag: The flag, for the message.
        path: The file.
        text: What it will hold.

    Raises:
        OutputError: It cannot be written.
    """
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(
            f"{flag} must be a file that can be written: got {path}: "
            f"{error.strerror}. Name another one."
        ) from error


def drop_output(stream: TextIO) -> None:
    """Let a stream go nowhere once its reader has gone away.

    What is still buffered has no reader; the flush at exit must not say so.

    Args:
        stream: Standard output.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
