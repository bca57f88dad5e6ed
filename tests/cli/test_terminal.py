"""Chat and generation in a real pseudo-terminal: pastes, Control-C, progress, history.

Run: python -m pytest tests/cli/test_terminal.py
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import select
import stat
import struct
import subprocess
import sys
import termios
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from mlx_gemma_mtp import store
from mlx_gemma_mtp.chat.history import FILE_NAME
from tests.tiny import endless_folder

ROOT = Path(__file__).parents[2]
# The terminal is the child's own, so that a key becomes a signal.
START = """
import fcntl, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGINT, signal.default_int_handler)
from {module} import main
raise SystemExit(main())
"""
CONTROL_C = b"\x03"
BRACKETS = b"\x1b[?2004h"  # asks a terminal to say what is pasted
PATIENCE_S = 120
LONG = "the rain in the north and the heat in the south " * 60


class Terminal:
    """What stands on the screen of a program, and its keys."""

    def __init__(self, descriptor):
        self._descriptor = descriptor
        self._shown = b""  # what nobody has waited for yet

    def wait(self, text):
        """Wait until the screen shows a text; give what came up to its end."""
        until = time.monotonic() + PATIENCE_S
        while text not in self._shown:
            ready, _, _ = select.select([self._descriptor], [], [], 1)
            if ready:
                self._shown += os.read(self._descriptor, 4096)
            assert time.monotonic() < until, self._shown
        before, self._shown = self._shown.split(text, 1)
        return before + text

    def type(self, keys):
        os.write(self._descriptor, keys)

    def rest(self):
        """What comes until the program ends."""
        found, self._shown = self._shown, b""
        with suppress(OSError):  # nobody has the other end
            while more := os.read(self._descriptor, 4096):
                found += more
        return found


@contextmanager
def started(module, *args, cache, **more):
    """A command in a terminal, with more variables; yields that and the process."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    variables = {
        "TERM": "xterm",
        "MLX_DISABLE_COMPILE": "1",
        store.FOLDER_VARIABLE: str(cache),
        "INPUTRC": os.devnull,
    }
    process = subprocess.Popen(
        [sys.executable, "-c", START.format(module=module), *map(str, args)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        cwd=ROOT,
        env=os.environ | variables | more,
    )
    os.close(theirs)
    try:
        yield Terminal(ours), process
        process.wait(timeout=PATIENCE_S)
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def chat(*args, **more):
    command = "mlx_gemma_mtp.chat.__main__"
    return started(command, "--exactness", "fast", *args, **more)


@pytest.fixture(scope="module")
def endless(tmp_path_factory):
    return endless_folder(tmp_path_factory.mktemp("terminal") / "endless")


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def questions(path):
    messages = json.loads(path.read_text(encoding="utf-8"))["messages"]
    return [m["content"] for m in messages if m["role"] == "user"]


def editors():
    """What may edit lines, as environment variables: with and without brackets."""
    yield pytest.param({"TERM": "xterm-256color"}, id="readline")
    # macOS's; it knows no brackets, as readline does not in a simple terminal.
    for path in Path("/usr/lib").glob("*/libedit.so.2"):
        yield pytest.param({"TERM": "xterm", "LD_PRELOAD": str(path)}, id="libedit")
        return
    yield pytest.param({"TERM": "dumb"}, id="dumb")


@pytest.mark.parametrize("variables", list(editors()))
def test_a_paste_is_one_message_and_called_back_later(
    endless, cache, tmp_path, variables
):
    """Also where the terminal does not say what is pasted."""
    has_brackets = variables["TERM"] == "xterm-256color"
    saved = tmp_path / "said.json"
    paste = b"the rain\r\t/and the heat\r\rin the south"
    args = ("--model", endless, "-m", "4")
    with chat(*args, cache=cache, **variables) as (screen, child):
        shown = screen.wait(b"> ")
        assert (BRACKETS in shown) == has_brackets
        screen.type(b"\x1b[200~" + paste + b"\x1b[201~" if has_brackets else paste)
        screen.wait(b"in the south")
        screen.type(b"\r")
        screen.wait(b"cut off after 4 tokens")
        screen.wait(b"> ")
        screen.type(b"one line\r")
        screen.wait(b"cut off after 4 tokens")
        screen.wait(b"> ")
        screen.type(f"/save {saved}\r".encode())
        screen.wait(b"Saved 2 exchanges")
        screen.wait(b"> ")
        screen.type(b"\x10" * 3 + b"\r")  # what was typed three messages before
        screen.wait(b"cut off after 4 tokens")
        screen.wait(b"> ")
        screen.type(b"/retry\r")
        screen.wait(b"each try gives the same answer")
        screen.wait(b"cut off after 4 tokens")
        screen.wait(b"> ")
        screen.type(f"/save {saved}\r".encode())
        screen.wait(b"Saved 3 exchanges")
        screen.wait(b"> ")
        screen.type(b"q\r")
        screen.rest()
    assert child.returncode == 0
    text = paste.replace(b"\r", b"\n").decode()
    assert questions(saved) == [text, "one line", text]
    history = cache / FILE_NAME
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    entries = [json.loads(line) for line in history.read_text().splitlines()]
    assert entries[:2] == [text, "one line"]


def test_control_c_while_a_chat_reads_and_answers(endless, cache, tmp_path):
    """Each time it is back at the input line, and what was said stays."""
    conversation = tmp_path / "long.json"
    roles = ("user", "assistant")
    messages = [{"role": role, "content": LONG} for role in roles]
    conversation.write_text(json.dumps({"messages": messages}))
    (cache).mkdir()
    (cache / FILE_NAME).write_text('"from before"\nno JSON\n')
    args = ("--model", endless, "-m", "-1", "--prefill-step-size", "1")
    with chat(*args, cache=cache) as (screen, child):
        screen.wait(b"> ")
        screen.type(f"/load {conversation}\r".encode())
        screen.wait(b"Loaded 1 exchange")
        screen.wait(b"> ")
        screen.type(b"the rain\r")
        screen.wait(b"Reading the prompt")
        screen.type(CONTROL_C)
        screen.wait(b"> ")
        screen.type(b"/stats\r")
        screen.wait(b"No answer yet.")
        screen.wait(b"> ")
        screen.type(b"/reset\r")
        screen.wait(b"> ")
        screen.type(b"\x10" * 5)
        screen.wait(b"from before")
        screen.type(b"\r")
        screen.wait(b"\n")
        screen.wait(b"e")  # it is in the middle of an answer
        screen.type(CONTROL_C)
        screen.wait(b"(stopped)")
        screen.wait(b"> ")
        screen.type(b"/undo\r")
        screen.wait(b"Dropped: from before")
        screen.wait(b"> ")
        screen.type(b"\x04")
        screen.rest()
    assert child.returncode == 0


def test_control_c_while_a_prompt_is_read(endless, cache):
    args = ("--model", endless, "-p", LONG * 2, "--prefill-step-size", "1")
    quick = ("--exactness", "fast")
    with started("mlx_gemma_mtp.cli.generate", *args, *quick, cache=cache) as (
        screen,
        child,
    ):
        screen.wait(b"Reading the prompt")
        screen.type(CONTROL_C)
        shown = screen.rest()
    assert child.returncode == 130
    assert b"Traceback" not in shown
    # Nothing of it is left on its line.
    assert re.search(rb"\r +\r(\^C)?\s*\Z", shown), shown[-300:]
