"""Lines from whoever talks: typed, pasted, called back from earlier; or piped.

What is pasted is one message. Where readline asks the terminal to bracket what is
pasted, it comes as one line with line ends in it. Where it cannot (libedit, simple
terminals, older versions), lines come one by one, and those that wait already when one
has come belong to it. Knows nothing of messages or commands but how these begin.
"""

from __future__ import annotations

import os
import select
import termios
from types import ModuleType
from typing import Any, TextIO

from ..cli.command import check_utf8, not_utf8
from .commands import MARK
from .history import History, history_path

_PROMPTS = {False: "> ", True: "... "}  # by whether a message has begun
# How long a terminal may take between two lines that were pasted; nobody types faster.
_GAP_S = 0.05


class Lines:
    """Asks for lines.

    Args:
        source: Standard input.
        output: Standard output.
        notes: Standard error.

    Attributes:
        is_terminal: Whether somebody types them.
    """

    def __init__(self, source: TextIO, output: TextIO, notes: TextIO) -> None:
        self.is_terminal = source.isatty()
        self._source = source
        self._notes = notes
        self._can_edit = self.is_terminal and output.isatty()
        self._readline = _readline() if self._can_edit else None
        self._history = History(history_path() if self._readline else None)
        self._has_ended = False
        if self._readline is not None:
            for message in self._history.read():
                self._readline.add_history(message)

    def next(self, has_begun: bool) -> str | None:
        """Ask for a line, or for several that come together.

        Args:
            has_begun: Whether they belong to a message that has begun.

        Returns:
            The line without its end; None at the end of the input.

        Raises:
            RequestError: It is not UTF-8.
        """
        lines: list[str] = []
        try:
            lines.append(self._ask(has_begun))
            while self._goes_on(lines[0]):
                lines.append(self._ask(True))
        except EOFError:
            self._has_ended = True
            if self.is_terminal:
                self._notes.write("\n")
                self._notes.flush()
        except UnicodeError as error:
            raise not_utf8("a message", error) from error
        if not lines:
            return None
        text = "\n".join(lines)
        check_utf8("a message", text)  # a terminal may keep other bytes as surrogates
        # What was pasted ends where its last line does.
        return text.rstrip("\n") if "\n" in text else text

    def keep(self, message: str) -> None:
        """Keep a message to be called back, now and in later sessions."""
        if self._readline is not None and message.strip():
            self._readline.add_history(message)
            self._history.add(message)

    def _ask(self, has_begun: bool) -> str:
        """Ask for one line.

        Raises:
            EOFError: There is none.
        """
        if self._has_ended:  # behind lines that were pasted
            raise EOFError
        prompt = _PROMPTS[has_begun]
        if self._can_edit:
            return input(prompt)
        if self.is_terminal:
            self._notes.write(prompt)
            self._notes.flush()
        line = self._source.readline()
        if not line:
            raise EOFError
        return line.removesuffix("\n")

    def _goes_on(self, first: str) -> bool:
        """Whether more waits that was pasted; a command stands alone."""
        if not self.is_terminal or (first.startswith(MARK) and first[1:2] != MARK):
            return False
        return _is_waiting(self._source, is_edited=self._readline is not None)


def _readline() -> ModuleType | None:
    """What lets lines be edited, set up; None where Python was built without it."""
    try:
        import readline
    except ImportError:
        return None
    # Its description alone tells the one from the other. Code is indented.
    if "libedit" in (readline.__doc__ or ""):
        readline.parse_and_bind("bind ^I ed-insert")
    else:
        readline.parse_and_bind("tab: self-insert")
        if os.environ.get("TERM", "dumb") != "dumb":  # Python has switched it off
            readline.parse_and_bind("set enable-bracketed-paste on")
    readline.set_auto_history(False)  # a message is called back as a whole
    return readline


def _is_waiting(source: TextIO, *, is_edited: bool) -> bool:
    """Whether a terminal has more to read, now or in a moment.

    Args:
        source: The terminal.
        is_edited: Whether the next line is read key by key, a part of one too.
    """
    try:
        descriptor = source.fileno()
        before = termios.tcgetattr(descriptor)
    except (OSError, termios.error):
        return False
    now: list[Any] = list(before)
    if is_edited:  # else a terminal tells of whole lines only; and they show twice
        now[3] &= ~(termios.ICANON | termios.ECHO)
    try:
        termios.tcsetattr(descriptor, termios.TCSANOW, now)
        return bool(select.select([descriptor], [], [], _GAP_S)[0])
    finally:
        termios.tcsetattr(descriptor, termios.TCSANOW, before)
