"""What can be said to the chat itself: /stats, /retry, /save and so on.

A command gives back what to show. Knows nothing of the terminal.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ..cli.command import write_file
from ..constants import AUTO, MAX_DRAFT_TOKENS
from ..errors import OutputError, RequestError
from .conversation import Conversation
from .figures import describe_session
from .session import Session
from .settings import NAMES

MARK = "/"
MAX_FILE_BYTES = 10_000_000  # some times the longest context of any model


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        usage: Its name and argument.
        help: What it does.
    """

    usage: str
    help: str

    @property
    def name(self) -> str:
        """What it is called by."""
        return self.usage.split()[0]


COMMANDS = (
    Command("/stats", "figures of the last answer and of all: speed, acceptance, K"),
    Command("/stats on|off", "show the figures after every answer, or not"),
    Command("/drafts on|off|N", "draft N tokens a round, as many as pay (on), or none"),
    Command("/temp N", "another temperature, as --temp; without N show it"),
    Command("/top-p N", "the same for --top-p"),
    Command("/top-k N", "the same for --top-k"),
    Command("/min-p N", "the same for --min-p"),
    Command("/seed N|off", "the same for --seed"),
    Command("/max-tokens N", "the same for --max-tokens"),
    Command("/thinking on|off", "whether the model thinks before it answers"),
    Command("/system TEXT", "change the system prompt; without TEXT show it"),
    Command("/retry", "answer the last message again"),
    Command("/undo", "drop the last exchange"),
    Command("/reset", "begin a new conversation; the system prompt stays"),
    Command("/save FILE", "write the conversation as JSON"),
    Command("/load FILE", "go on with a conversation from a file"),
    Command("/help", "show this"),
    Command("/quit", "leave, as Ctrl-D does"),
)
# What people type who come from other chats; the first three are mlx_lm.chat's.
OTHER_NAMES = {
    "q": "/quit",
    "r": "/reset",
    "h": "/help",
    "/exit": "/quit",
    "/bye": "/quit",
    "/clear": "/reset",
    "/regen": "/retry",
    "/?": "/help",
}
HELP = "\n".join(
    [
        *(f"{command.usage:18}{command.help}" for command in COMMANDS),
        "q, /exit and /bye leave too, r and /clear reset, /regen tries again, h helps.",
        "Ctrl-C stops an answer; what was said stays. Lines that are pasted together",
        "are one message. A line that ends in \\ goes on in the next one, and so does",
        'everything between """ and """. A message that begins with / is written with',
        "//.",
    ]
)


class Commands:
    """Carries commands out.

    Args:
        session: What they act on.
        drafts: Drafts per round that ``/drafts on`` means.
        shows_stats: Whether to show figures after every answer.

    Attributes:
        shows_stats: The same, as the user has set it since.
        has_ended: Whether the user has said /quit.
        asks_again: Whether the user has said /retry; whoever answers takes it back.
    """

    def __init__(
        self, session: Session, *, drafts: int | str, shows_stats: bool
    ) -> None:
        self._session = session
        self._drafts = drafts or AUTO
        self.shows_stats = shows_stats
        self.has_ended = False
        self.asks_again = False
        self._actions: dict[str, Callable[[str], str]] = {
            "/stats": self._stats,
            "/drafts": self._set_drafts,
            **{_command(name): partial(self._set, name) for name in NAMES},
            "/thinking": self._think,
            "/system": self._system,
            "/retry": self._retry,
            "/undo": self._undo,
            "/reset": self._reset,
            "/save": self._save,
            "/load": self._load,
            "/help": self._help,
            "/quit": self._quit,
        }

    @staticmethod
    def is_meant(message: str) -> bool:
        """Whether a message is said to the chat, not to the model."""
        is_marked = message.startswith(MARK) and message[1:2] != MARK
        return is_marked or message in OTHER_NAMES

    def run(self, line: str) -> str:
        """Carry a command out.

        Args:
            line: The command and its argument.

        Returns:
            What to show.

        Raises:
            RequestError: There is no such command, or its argument is none it takes.
            OutputError: A file cannot be written.
        """
        name, _, argument = line.strip().partition(" ")
        name = OTHER_NAMES.get(name, name)
        if name not in self._actions:
            raise RequestError(
                f"a command must be one of {', '.join(self._actions)}: got {name}. To "
                "say a text that begins with /, write //."
            )
        return self._actions[name](argument.strip())

    def _stats(self, argument: str) -> str:
        if not argument:
            return describe_session(self._session)
        if argument not in ("on", "off"):
            raise RequestError(f"/stats must be followed by on or off: got {argument}.")
        self.shows_stats = argument == "on"
        return f"Figures after every answer: {argument}."

    def _set_drafts(self, argument: str) -> str:
        if argument == "on":
            drafts = self._drafts
        elif argument == "off":
            drafts = 0
        elif argument.isdecimal() and int(argument) <= MAX_DRAFT_TOKENS:
            drafts = int(argument)
        else:
            raise RequestError(
                "/drafts must be followed by on, off or a number from 0 to "
                f"{MAX_DRAFT_TOKENS}: got {argument or 'nothing'}."
            )
        if drafts and not self._session.has_drafts:
            raise RequestError(
                f"/drafts must be off without a drafter: got {argument}. Start again "
                "with --draft-model, or with --draft-source lookup."
            )
        self._session.num_draft_tokens = drafts
        return f"Drafts per round: {drafts}."

    def _set(self, name: str, argument: str) -> str:
        session = self._session
        if argument:
            session.settings = session.settings.changed(name, argument)
        value = session.settings.value(name)
        return f"{_command(name)} {'off' if value is None else value}"

    def _think(self, argument: str) -> str:
        prompts = self._session.prompts
        if prompts.thinks is None:
            raise RequestError(
                "/thinking must have a chat template: got a model without one. Start "
                "again with another model."
            )
        if argument not in ("", "on", "off"):
            raise RequestError(
                f"/thinking must be followed by on or off: got {argument}."
            )
        if argument:
            prompts.thinks = argument == "on"
        return f"/thinking {'on' if prompts.thinks else 'off'}"

    def _retry(self, argument: str) -> str:
        _expect_nothing("/retry", argument)
        self.asks_again = True
        return ""

    def _system(self, argument: str) -> str:
        conversation = self._session.conversation
        if argument:
            conversation.system = argument
        if conversation.system is None:
            return "No system prompt."
        return f"System prompt: {conversation.system}"

    def _undo(self, argument: str) -> str:
        _expect_nothing("/undo", argument)
        dropped = self._session.conversation.undo()
        return f"Dropped: {_first_line(dropped.question)}"

    def _reset(self, argument: str) -> str:
        _expect_nothing("/reset", argument)
        self._session.reset()
        return "A new conversation."

    def _save(self, argument: str) -> str:
        path = _path("/save", argument)
        conversation = self._session.conversation
        if os.path.exists(path):  # a name too long is /save's to say
            _check_is_ours(path)
        write_file("/save", str(path), conversation.to_json() + "\n")
        return f"Saved {_exchanges(conversation)} to {path}."

    def _load(self, argument: str) -> str:
        path = _path("/load", argument)
        conversation = Conversation.from_json(_read(path), source=str(path))
        self._session.conversation = conversation
        return f"Loaded {_exchanges(conversation)} from {path}."

    def _help(self, argument: str) -> str:
        return HELP

    def _quit(self, argument: str) -> str:
        _expect_nothing("/quit", argument)
        self.has_ended = True
        return ""


def _command(name: str) -> str:
    """The command that changes a setting."""
    return MARK + name.replace("_", "-")


def _expect_nothing(name: str, argument: str) -> None:
    """Check that a command stands alone."""
    if argument:
        raise RequestError(
            f"{name} must stand alone: got {argument} after it. Leave that out."
        )


def _path(name: str, argument: str) -> Path:
    """The file that a command names."""
    if not argument:
        raise RequestError(f"{name} must be followed by a file's name: got none.")
    if "\0" in argument:
        raise RequestError(
            f"{name} must be followed by a file's name: got one with a null character."
        )
    return Path(os.path.expanduser(argument))


def _read(path: Path) -> str:
    """A file's text.

    Raises:
        RequestError: It cannot be read, is too large, or is no text.
    """
    try:
        if path.exists() and not path.is_file():  # what has no end, or makes us wait
            raise RequestError(f"{path} must be a file that can be read: got none.")
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
        if len(content) > MAX_FILE_BYTES:
            raise RequestError(
                f"{path} must have at most {MAX_FILE_BYTES / 1e6:.0f} MB: got "
                f"{path.stat().st_size / 1e6:.0f}. No model reads as much."
            )
        return content.decode()
    except OSError as error:
        raise RequestError(
            f"{path} must be a file that can be read: got {error.strerror}."
        ) from error
    except UnicodeError as error:
        raise RequestError(f"{path} must be UTF-8 text: got {error}.") from error


def _check_is_ours(path: Path) -> None:
    """Check that a file that is there already holds a conversation.

    Raises:
        OutputError: It holds something else, which must not be lost.
    """
    try:
        Conversation.from_json(_read(path), source=str(path))
    except RequestError as error:
        raise OutputError(
            f"/save must name a new file or a saved conversation: got {path}, which "
            "holds something else. Name another one."
        ) from error


def _exchanges(conversation: Conversation) -> str:
    count = len(conversation)
    return f"{count} exchange{'s' * (count != 1)}"


def _first_line(text: str) -> str:
    line = text.split("\n", 1)[0]
    return line if len(line) <= 60 else f"{line[:57]}..."
