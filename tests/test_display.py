"""Thoughts on a screen, and left out where a program reads."""

import io

import pytest

from mlx_gemma_mtp.answer import CONTENT, REASONING, Part
from mlx_gemma_mtp.display import Display


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
