"""What all dialects have in common: how streams live, fail, and add up.

Run: python -m pytest tests/server/test_dialects.py
"""

from __future__ import annotations

import json
import threading
from contextlib import closing
from typing import Any

import pytest

from mlx_gemma_mtp.server import responses
from tests.server.serving import (
    ScriptedDecoder,
    echo,
    scripted_means,
    scripted_server,
    wait_until,
)

SAID = [{"role": "user", "content": "a b"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "a b"},
    "/v1/chat/completions": {"messages": SAID},
    "/v1/messages": {"messages": SAID},
}
ALIVE = {
    "/v1/completions": b": keepalive\n",
    "/v1/chat/completions": b": keepalive\n",
    "/v1/messages": b"event: ping\n",
}


@pytest.fixture
def halted():
    """A server whose decoder runs the steps that a test allows."""
    decoder = ScriptedDecoder(echo)
    decoder.allowed = threading.Semaphore(0)
    with scripted_server(scripted_means(decoder)) as (client, parts):
        yield client, parts, decoder


@pytest.mark.parametrize("path", BODIES)
def test_a_silent_stream_says_that_it_is_alive(monkeypatch, halted, path):
    monkeypatch.setattr(responses, "PATIENCE_S", 0.02)
    client, _, decoder = halted
    connection = client.connect()
    body = {**BODIES[path], "max_tokens": 20, "stream": True}
    with closing(connection):
        client.send(connection, "POST", path, body)
        answer = connection.getresponse()
        num_alive = 0
        while num_alive < 3:
            num_alive += answer.readline() == ALIVE[path]
        decoder.allowed.release(100)
        assert answer.read()


@pytest.mark.parametrize("path", BODIES)
def test_a_failure_in_a_stream_is_its_last_event(halted, path):
    client, parts, decoder = halted
    connection = client.connect()
    body = {**BODIES[path], "max_tokens": 100, "stream": True}
    with closing(connection):
        client.send(connection, "POST", path, body)
        wait_until(lambda: parts.bridge.num_open == 1)
        decoder.allowed.release(3)
        wait_until(lambda: decoder.steps == 3)
        decoder.error = RuntimeError("broken")
        decoder.allowed.release(10)
        answer = connection.getresponse()
        assert answer.status == 200
        *pieces, last, end = answer.read().split(b"\n\n")
    assert pieces
    assert end == b""
    error = json.loads(last.partition(b"data: ")[2])
    kinds = ("server_error", "api_error")
    assert error["error"]["type"] in kinds
    assert "the engine has failed" in error["error"]["message"]
