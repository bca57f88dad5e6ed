"""What all dialects have in common: how streams live, fail, and add up.

Run: python -m pytest tests/server/test_dialects.py
"""

from __future__ import annotations

import functools
import json
import threading
from contextlib import closing
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from mlx_gemma_mtp.server import responses
from mlx_gemma_mtp.server.answer_parser import Dialogue
from mlx_gemma_mtp.server.choice import Piece, Tally
from mlx_gemma_mtp.server.messages.answer import MessageWriter
from mlx_gemma_mtp.server.messages.schema import MessagesBody
from mlx_gemma_mtp.server.responses import Figures
from mlx_gemma_mtp.server.responses_api.answer import ResponseWriter
from mlx_gemma_mtp.server.responses_api.schema import ResponsesBody, ResponsesTool
from mlx_gemma_mtp.server.responses_api.tools import ToolNames
from mlx_gemma_mtp.server.schema import ChatBody, CompletionBody
from tests.server.events import blocks_of, response_of
from tests.server.serving import (
    MarkedTokenizer,
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
    "/v1/responses": {"input": "a b"},
}
LIMITS = {"/v1/responses": "max_output_tokens"}
ALIVE = {
    "/v1/completions": b": keepalive\n",
    "/v1/chat/completions": b": keepalive\n",
    "/v1/messages": b"event: ping\n",
    "/v1/responses": b"event: response.in_progress\n",
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
    body = {**BODIES[path], LIMITS.get(path, "max_tokens"): 20, "stream": True}
    with closing(connection):
        client.send(connection, "POST", path, body)
        answer = connection.getresponse()
        num_alive = 0
        while num_alive < 3:
            num_alive += answer.readline() == ALIVE[path]
        decoder.allowed.release(100)
        assert answer.read()


@pytest.mark.parametrize("path", BODIES)
def test_a_silent_stream_says_how_much_of_the_prompt_is_read(monkeypatch, path):
    """Where its dialect has a word for that: comments, as mlx-lm's server has them."""
    monkeypatch.setattr(responses, "PATIENCE_S", 0.02)
    decoder = ScriptedDecoder(echo, chunk=4)
    decoder.allowed = threading.Semaphore(0)
    prompt = "a b c d e f g h"
    said = [{"role": "user", "content": prompt}]
    field = dict(zip(BODIES, ("prompt", "messages", "messages", "input"), strict=True))
    given = said if field[path] == "messages" else prompt
    body = {field[path]: given, LIMITS.get(path, "max_tokens"): 20, "stream": True}
    says_more = path in ("/v1/completions", "/v1/chat/completions")
    with scripted_server(scripted_means(decoder)) as (client, _):
        connection = client.connect()
        with closing(connection):
            client.send(connection, "POST", path, body)
            answer = connection.getresponse()
            for num_read in (4, 8):
                decoder.allowed.release()
                line = f": keepalive {num_read}/9\n".encode()
                expected = line if says_more else ALIVE[path]
                while answer.readline() != expected:
                    pass
            decoder.allowed.release(100)
            rest = answer.read()
    assert rest
    assert b"9/9" not in rest  # it was read by then


@pytest.mark.parametrize("path", BODIES)
def test_a_failure_in_a_stream_is_its_last_event(halted, path):
    client, parts, decoder = halted
    connection = client.connect()
    body = {**BODIES[path], LIMITS.get(path, "max_tokens"): 100, "stream": True}
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
    found = json.loads(last.partition(b"data: ")[2])
    error = found.get("response", found)["error"]
    kind = error["code"] if "response" in found else error["type"]
    assert kind in ("server_error", "api_error")
    assert "the engine has failed" in error["message"]
    if path == "/v1/responses":
        assert (found["type"], found["response"]["status"]) == (
            "response.failed",
            "failed",
        )


@pytest.mark.parametrize("path", BODIES)
def test_who_comes_to_a_failed_engine_need_not_come_again(halted, path):
    """Anthropic's clients come again and again for status 529."""
    client, parts, decoder = halted
    decoder.error = RuntimeError("broken")
    decoder.allowed.release(10)
    body = {**BODIES[path], LIMITS.get(path, "max_tokens"): 3}
    assert client.ask("POST", path, body).status == 500
    wait_until(lambda: parts.bridge.status == "failed")
    answer = client.ask("POST", path, body)
    error = answer.json()["error"]
    if path == "/v1/messages":
        assert (answer.status, error["type"]) == (500, "api_error")
    else:
        assert (answer.status, error["type"]) == (503, "server_error")
        assert error["code"] == "engine_failed"
    assert "must be started again" in error["message"]
    assert "retry-after" not in answer.headers


BEGUN = [*SAID, {"role": "assistant", "content": "{"}]
FORM = {"type": "json_schema", "schema": {"type": "object"}}
WITH_FORM: dict[str, tuple[str, str, dict[str, Any]]] = {
    "/v1/chat/completions": (
        "messages",
        "response_format",
        {"type": "json_object"},
    ),
    "/v1/messages": ("messages", "output_config", {"format": FORM}),
    "/v1/responses": ("input", "text", {"format": {**FORM, "name": "answer"}}),
}


@pytest.mark.parametrize("path", WITH_FORM)
def test_a_form_is_all_of_an_answer(path):
    """What the prompt has of it already would stand before the form."""
    turns, field, form = WITH_FORM[path]
    body = {LIMITS.get(path, "max_tokens"): 3, field: form}
    with scripted_server(scripted_means(ScriptedDecoder(echo))) as (client, _):
        answer = client.ask("POST", path, {**body, turns: BEGUN})
        assert answer.status == 400
        name = field if field == "response_format" else f"{field}.format"
        message = answer.json()["error"]["message"]
        assert message == (
            f"{name} must stand without a beginning of the answer: got a last message "
            "of the assistant's with text. Leave out one of them."
        )
        empty = [*SAID, {"role": "assistant", "content": ""}]
        for given in (SAID, empty):
            assert client.ask("POST", path, {**body, turns: given}).status == 200
        if path == "/v1/chat/completions":
            body["continue_final_message"] = False
            assert client.ask("POST", path, {**body, turns: BEGUN}).status == 200


KINDS: dict[str, type[BaseModel]] = {
    "/v1/completions": CompletionBody,
    "/v1/chat/completions": ChatBody,
    "/v1/messages": MessagesBody,
    "/v1/responses": ResponsesBody,
}


@pytest.mark.parametrize("path", BODIES)
def test_nothing_is_as_good_as_no_field(path):
    limit = {LIMITS.get(path, "max_tokens"): 3}
    fields = dict.fromkeys(KINDS[path].model_fields)
    with scripted_server(scripted_means(ScriptedDecoder(echo))) as (client, _):
        for stream in (None, True):
            more = {**limit, "stream": stream}
            alone = client.ask("POST", path, {**BODIES[path], **more})
            among = client.ask("POST", path, {**fields, **BODIES[path], **more})
            assert (alone.status, among.status) == (200, 200), among.body
            if stream is None:
                assert without_ids(alone.json()) == without_ids(among.json())


TOOLS = ToolNames(
    [
        ResponsesTool(type="function", name="f"),
        ResponsesTool(type="custom", name="g"),
    ]
)
PARTS = (
    "<|channel>thought\nhm\n<channel|>",
    "<|channel>thought\nand",
    "<channel|>",
    "text 🌈",
    "\n",
    '<|tool_call>call:f{a:<|"|><x<|"|>,b:[1,null]}<tool_call|>',
    '<|tool_call>call:g{input:<|"|>*** \n"x"<|"|>}<tool_call|>',
    "<|tool_call>call:f{",
)
FIGURES = Figures(9, 5, [Tally(4, 0, 0, 0, 0, "", 2)], 1)


def message_writer():
    reader = Dialogue(MarkedTokenizer()).readers(TOOLS.functions, 1)[0]
    return MessageWriter(reader, model="m", num_prompt_tokens=9)


def response_writer(**fields):
    reader = Dialogue(MarkedTokenizer()).readers(TOOLS.functions, 1)[0]
    body = ResponsesBody(input="a", **fields)
    return ResponseWriter(body, reader, TOOLS, model="m")


def events_of(writer, pieces):
    """The events of a stream as a client reads them."""
    sent = [*writer.begin()]
    for piece in pieces:
        sent += writer.add(0, piece)
    sent += writer.end(FIGURES)
    return [json.loads(each.partition(b"data: ")[2]) for each in sent]


def without_ids(value):
    """A value without what is new in each answer."""
    if isinstance(value, list):
        return [without_ids(each) for each in value]
    if isinstance(value, dict):
        new = ("id", "call_id", "created", "created_at", "completed_at")
        return {k: without_ids(v) for k, v in value.items() if k not in new}
    return value


@functools.cache
def writers():
    thinking = {"reasoning": {"summary": "auto"}}
    hidden = {"include": ["reasoning.encrypted_content"]}
    return [message_writer, response_writer] + [
        functools.partial(response_writer, **fields) for fields in (thinking, hidden)
    ]


@given(
    st.lists(st.sampled_from(PARTS), max_size=6).map("".join),
    st.lists(st.integers(0, 200), max_size=6),
    st.sampled_from(["stop", "length"]),
    st.sampled_from(range(4)),
)
def test_a_stream_makes_what_the_whole_is(text, places, reason, number):
    """Wherever the pieces part."""
    writer = writers()[number]
    ends = sorted(min(place, len(text)) for place in places)
    cuts = [0, *ends, len(text)]
    pieces = [Piece(text[i:j]) for i, j in pairwise(cuts)]
    pieces[-1].finish_reason = reason
    whole = writer().whole([Piece(text, finish_reason=reason)], FIGURES)
    events = events_of(writer(), pieces)
    if number:
        assert without_ids(response_of(events)) == without_ids(whole)
        return
    *parts, end, _ = events
    found = {**whole, "content": blocks_of(parts), **end["delta"]}
    assert without_ids({**found, "usage": end["usage"]}) == without_ids(whole)


def test_what_an_answer_took():
    usage = message_writer().whole([Piece("a", finish_reason="stop")], FIGURES)["usage"]
    assert usage == {
        "input_tokens": 5,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 4,
        "output_tokens": 5,
        "output_tokens_details": {"thinking_tokens": 2},
    }
    found = response_writer().whole([Piece("a", finish_reason="stop")], FIGURES)
    assert found["usage"] == {
        "input_tokens": 9,
        "input_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 0},
        "output_tokens": 5,
        "output_tokens_details": {"reasoning_tokens": 2},
        "total_tokens": 14,
    }
