"""A server of the embedded pair in a process of its own, for tests of its clients.

Nothing here is downloaded: the server is this package's, its clients are the callers.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
START_S = 120.0  # on a busy machine that compiles kernels for the first time
STOP_S = 60.0
LOG = "server.log"
_READY = re.compile(r"is served at (http://\S+)")

# As little as makes a prompt of messages, for a pair that goes on with text. The
# comment has the marks by which a template is known to have tools.
CHAT_TEMPLATE = (
    "{# <|tool_call> <tool_call|> #}{{ bos_token }}"
    "{% for message in messages %}{{ message.content }}{% endfor %}"
)


@contextmanager
def served(folder: Path, *args: str) -> Iterator[str]:
    """Run ``mlx_gemma_mtp.server`` on a free port of this machine.

    Args:
        folder: Where to keep what it writes to standard error.
        args: More arguments.

    Yields:
        Its address, such as http://127.0.0.1:40123.
    """
    with server_process(folder, *args) as (address, process):
        yield address
    said = (folder / LOG).read_text()
    assert process.returncode == 0, said
    assert "Traceback" not in said, said


@contextmanager
def served_chat(folder: Path, key: str, *args: str) -> Iterator[str]:
    """The same of the embedded pair with the least chat template, and with a key."""
    template = folder / "template.jinja"
    template.write_text(CHAT_TEMPLATE)
    arguments = ("--api-key", key, "--chat-template", str(template), *args)
    with served(folder, *arguments) as address:
        yield address


@contextmanager
def server_process(
    folder: Path, *args: str, **environment: str
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The same, for who wants the process too, and may end it.

    Args:
        folder: Where to keep what it writes to standard error.
        args: More arguments.
        environment: More variables.

    Yields:
        Its address and the process.
    """
    log = folder / LOG
    command = [sys.executable, "-m", "mlx_gemma_mtp.server", "--port", "0", *args]
    env = {**os.environ, **environment}
    with log.open("w") as file:
        process = subprocess.Popen(command, stderr=file, cwd=ROOT, env=env)
    try:
        yield _address(process, log), process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_S)
        finally:
            process.kill()
            process.wait()


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    """Wait until the server says where it is."""
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        if found := _READY.search(log.read_text()):
            return found[1]
        if process.poll() is not None:
            break
        time.sleep(0.05)
    raise AssertionError(f"the server did not start: {log.read_text()}")
