"""Thoughts on a screen, and left out where a program reads."""

import io
import time
from types import SimpleNamespace

import pytest

from mlx_gemma_mtp.cli import display
from mlx_gemma_mtp.cli.display import CompileProgress, Display, PromptProgress
from mlx_gemma_mtp.markup.answer import CONTENT, REASONING, Part


class Screen(io.StringIO):
    """A terminal, or a file."""

    def __init__(self, is_terminal):
        super().__init__()
        self._is_terminal = is_terminal

    def isatty(self):
        return self._is_terminal


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


def shown(*parts, is_terminal=True, **settings):
    screen = Screen(is_terminal)
    display = Display(screen, **settings)
    for kind, text in parts:
        display.show([Part(kind, text)])
    display.end()
    return screen.getvalue()


THOUGHT, MORE, ANSWER = (REASONING, "Hm"), (REASONING, " so"), (CONTENT, "Yes")


def test_a_terminal():
    dim, plain = "\033[2m", "\033[0m"
    assert shown(ANSWER) == "Yes\n"
    assert shown(THOUGHT, MORE, ANSWER) == f"{dim}Hm so{plain}\n\nYes\n"
    assert shown(ANSWER, THOUGHT) == f"Yes\n\n{dim}Hm{plain}\n"
    assert shown(THOUGHT) == f"{dim}Hm{plain}\n"


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_a_terminal_without_colors(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert shown(THOUGHT, ANSWER) == "Hm\n\nYes\n"


def test_a_file():
    assert shown(THOUGHT, ANSWER, MORE, is_terminal=False) == "Yes\n"
    found = shown(THOUGHT, ANSWER, is_terminal=False, shows_thoughts=True)
    assert found == "Hm\n\nYes\n"


def test_what_is_said_of_an_answer_without_an_end():
    display = Display(Screen(is_terminal=False))
    display.show([Part(*THOUGHT)])
    assert display.cut_off(9) == (
        "(cut off while thinking, after 9 tokens; see --max-tokens, or --thinking off)"
    )
    display.show([Part(*ANSWER)])
    assert display.cut_off(9) == "(cut off after 9 tokens; see --max-tokens)"
    assert display.cut_off(9, "full") == "(cut off after 9 tokens; full)"


@pytest.fixture
def impatient(monkeypatch):
    """Nothing takes as little time as not to be shown, if a test waits for it."""
    monkeypatch.setattr(display, "_PATIENCE_S", 0.0)
    monkeypatch.setattr(display, "_QUIET_S", 0.0)
    monkeypatch.setattr(display, "_BETWEEN_S", 0.001)
    monkeypatch.setenv("COLUMNS", "80")


@pytest.mark.parametrize("is_interrupted", [False, True])
def test_a_prompt_that_takes_long_is_shown_and_is_gone_then(impatient, is_interrupted):
    screen = Screen(True)
    progress = PromptProgress(screen)
    for num_read in (0, 50):
        progress.tell(num_read, 100)
        while f" {num_read}/100 " not in screen.getvalue():
            pass
    if is_interrupted:
        progress.end()
    else:
        progress.tell(100, 100)
    assert screen.getvalue().startswith("\rReading the prompt:   0%")
    assert screen.getvalue().endswith("\r")
    assert not screen.getvalue().split("\r")[-2].strip()


@pytest.mark.parametrize(
    ("is_terminal", "term", "patience_s"),
    [(False, "xterm", 0.0), (True, "dumb", 0.0), (True, "xterm", 3600.0)],
)
def test_a_prompt_is_not_shown(impatient, monkeypatch, is_terminal, term, patience_s):
    """To a file, where it could not be taken back, or where it is read at once."""
    monkeypatch.setattr(display, "_PATIENCE_S", patience_s)
    monkeypatch.setenv("TERM", term)
    screen = Screen(is_terminal)
    progress = PromptProgress(screen)
    for num_read in (0, 50, 100, 0, 1):
        progress.tell(num_read, 100)
    progress.end()
    assert screen.getvalue() == ""


@pytest.fixture
def kernels(impatient, monkeypatch):
    """How many kernels there were, and how many were compiled since: to be set."""
    numbers = SimpleNamespace(before=0, now=0)
    monkeypatch.setattr(display, "num_kept", lambda: numbers.before)
    monkeypatch.setattr(display, "num_compiled", lambda: numbers.now)
    return numbers


def wait_for(screen, text):
    while text not in screen.getvalue():
        time.sleep(0.001)


class TestCompiling:
    def test_is_shown_behind_the_text_and_is_gone_then(self, kernels, monkeypatch):
        monkeypatch.setattr(display, "_QUIET_S", 3600.0)
        screen = Screen(True)
        with CompileProgress(screen) as compiling:
            shown = Display(screen, compiling=compiling)
            shown.show([Part(CONTENT, "So")])
            assert screen.getvalue() == "So"
            kernels.now = 3
            wait_for(screen, "3 of about 100]")
            before = len(screen.getvalue())
            shown.show([Part(CONTENT, " it is")])
            # Nothing of it is left where text is written.
            assert screen.getvalue()[before:] == "\033[K it is"
            kernels.now = 120
            wait_for(screen, ": 120]")
        assert screen.getvalue().endswith("\033[K")

    def test_goes_when_nothing_more_comes(self, kernels):
        screen = Screen(True)
        with CompileProgress(screen):
            kernels.now = 1
            wait_for(screen, "\033[?7h\033[K")

    def test_says_nothing_of_all_where_some_were_there(self, kernels):
        kernels.before = 70
        screen = Screen(True)
        with CompileProgress(screen):
            kernels.now = 2
            wait_for(screen, ": 2]")

    def test_without_colors(self, kernels, monkeypatch):
        monkeypatch.setenv("NO_COLOR", "1")
        screen = Screen(True)
        with CompileProgress(screen):
            kernels.now = 1
            wait_for(screen, "?7l[compiling kernels for this CPU, once: 1")

    @pytest.mark.parametrize(
        ("is_terminal", "term"), [(False, "xterm"), (True, "dumb")]
    )
    def test_is_not_shown(self, kernels, monkeypatch, is_terminal, term):
        monkeypatch.setenv("TERM", term)
        screen = Screen(is_terminal)
        with CompileProgress(screen):
            kernels.now = 9
            time.sleep(0.02)
        assert screen.getvalue() == ""

    def test_is_not_shown_where_there_is_nothing(self, kernels):
        screen = Screen(True)
        kernels.now = 5  # before
        with CompileProgress(screen):
            time.sleep(0.02)
        assert screen.getvalue() == ""
