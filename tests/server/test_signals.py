"""Signals end a server at once, also while MLX computes in the main thread.

Run: python -m pytest tests/server/test_signals.py
"""

from __future__ import annotations

import http.client
import json
import re
import signal
import subprocess
import sys
from contextlib import closing, contextmanager

import pytest

from tests.server.serving import ROOT, WAIT_S, Client, wait_until


@contextmanager
def busy_server(kind, *arguments):
    """A server whose main thread does not come back from MLX."""
    command = [sys.executable, "-m", "tests.server.busy_server", kind, *arguments]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def port_of(process):
    """Where it listens, once it does."""
    lines = []
    for line in process.stderr:
        lines.append(line)
        if found := re.search(r"is served at http://\S+:(\d+)", line):
            return int(found[1])
    raise AssertionError(f"status {process.wait(WAIT_S)}: {''.join(lines)}")


@contextmanager
def asking(process):
    """A request that is being answered while MLX computes; and another client."""
    client = Client(port_of(process))
    with closing(client.connect()) as connection:
        body = {"prompt": "a b", "max_tokens": 50, "stream": True}
        client.send(connection, "POST", "/v1/completions", body)
        answer = connection.getresponse()
        assert process.stdout.readline() == "computing\n"
        yield answer, client


def test_while_a_model_loads():
    with busy_server("load") as process:
        assert process.stdout.readline() == "computing\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(WAIT_S) == 128 + signal.SIGINT


def test_the_first_one_is_obeyed_and_the_second_ends_the_process():
    with busy_server("step", "--shutdown-timeout", "1000") as process:
        with asking(process) as (answer, client):
            assert client.get("/health").status == 200
            process.send_signal(signal.SIGTERM)
            wait_until(lambda: client.get("/health").status == 503)
            assert client.get("/health").json() == {"status": "draining"}
            assert client.complete().status == 503
            process.send_signal(signal.SIGTERM)
            with pytest.raises((ConnectionError, http.client.HTTPException)):
                answer.read()
        assert process.wait(WAIT_S) == 128 + signal.SIGTERM


def test_the_process_ends_when_time_is_over():
    with busy_server("step", "--shutdown-timeout", "0") as process:
        with asking(process) as (answer, _):
            process.send_signal(signal.SIGTERM)
            *_, last, end = answer.read().split(b"\n\n")
        assert end == b""
        error = json.loads(last.removeprefix(b"data: "))["error"]
        assert "shutting down" in error["message"]
        assert process.wait(WAIT_S) == 0


def test_a_prompt_that_is_being_encoded_is_not_waited_for():
    with busy_server("encode", "--shutdown-timeout", "1000") as process:
        client = Client(port_of(process))
        with closing(client.connect()) as connection:
            client.send(connection, "POST", "/v1/completions", {"prompt": "a"})
            assert process.stdout.readline() == "computing\n"
            process.send_signal(signal.SIGTERM)
            answer = connection.getresponse()
            assert answer.status == 503
            assert "shutting down" in json.loads(answer.read())["error"]["message"]
        assert process.wait(WAIT_S) == 0


GIVING_UP = """
import threading
from mlx_gemma_mtp.server.shutdown import Shutdown

def give_up():
    print("giving up", flush=True)
    {ends}

shutdown = Shutdown(0.0)
with shutdown.obeying():
    shutdown.start(begin=lambda: None, give_up=give_up)
    print("listening", flush=True)
    threading.Event().wait()
"""


@pytest.mark.parametrize(
    ("ends", "status"),
    [("threading.Event().wait()", 128 + signal.SIGTERM), ("raise KeyError", 0)],
)
def test_nothing_delays_the_end_once_time_is_over(ends, status):
    """Neither readers who take their time nor what goes wrong with them."""
    command = [sys.executable, "-c", GIVING_UP.format(ends=ends)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "listening\n"
            process.send_signal(signal.SIGTERM)
            assert process.stdout.readline() == "giving up\n"
            if status:
                process.send_signal(signal.SIGTERM)
            assert process.wait(WAIT_S) == status
        finally:
            process.kill()
