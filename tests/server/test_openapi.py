"""What the server says of itself is what it does.

`make test-schema` lets schemathesis make requests of the description.

Run: python -m pytest tests/server/test_openapi.py
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from functools import reduce
from operator import or_
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from mlx_gemma_mtp.server import answer_schema as answers
from mlx_gemma_mtp.server import openai_format as formats
from mlx_gemma_mtp.server.answer_parser import Delta
from mlx_gemma_mtp.server.messages.answer_schema import MessageError
from mlx_gemma_mtp.server.openapi import CHUNKS, WHOLE, _numbers_to
from tests.server.agreement import agrees
from tests.server.serving import (
    EOS,
    ROOT,
    ScriptedDecoder,
    echo,
    scripted_means,
    scripted_server,
)

BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "messages": [{"role": "user", "content": "a b"}],
        "top_logprobs": 2,
    },
    "/v1/completions": {"prompt": "a b"},
    "/tokenize": {"prompt": "a b", "return_token_strs": True},
    "/detokenize": {"tokens": [4, 5]},
    "/v1/responses": {"input": "a b", "max_output_tokens": 3},
    "/v1/messages": {"messages": [{"role": "user", "content": "a b"}]},
    "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "a b"}]},
}
FORM = {"type": "json_schema", "schema": {"type": "object"}}
BAD_FORM = {"type": "json_schema", "schema": {"type": "thing"}}
NAMED = {"name": "answer"}
BEGUN = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "{"}]
# Nothing is wrong with each field by itself.
DISAGREEING: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"response_format": {"type": "json_object"}}),
    ("/v1/messages", {"output_format": FORM}),
    ("/v1/messages", {"output_config": {"format": FORM}}),
    ("/v1/messages/count_tokens", {"output_format": FORM}),
    ("/v1/responses", {"text": {"format": {**FORM, **NAMED}}}),
    ("/v1/responses", {"text": {"format": {"type": "json_object"}}}),
]
UNKNOWN: list[tuple[str, dict[str, Any]]] = [
    ("/v1/messages", {"output_format": BAD_FORM}),
    ("/v1/messages/count_tokens", {"output_config": {"format": BAD_FORM}}),
    ("/v1/responses", {"text": {"format": {**BAD_FORM, **NAMED}}}),
]
CHOICES = ("/v1/chat/completions", "/v1/completions")


@pytest.fixture(scope="module")
def client():
    with scripted_server(scripted_means(ScriptedDecoder(echo))) as (client, _):
        yield client


@pytest.fixture(scope="module")
def described(client):
    return client.get("/openapi.json").json()


def check(kind, value):
    """What JSON says must be of the kind, with nothing left over."""
    TypeAdapter(kind).validate_json(json.dumps(value))


class TestAnswers:
    @pytest.mark.parametrize("path", sorted(WHOLE))
    def test_whole_ones(self, client, path):
        if path in BODIES:
            logprobs = {"logprobs": 2 if "prompt" in BODIES[path] else True}
            for more in ({}, logprobs) if path in CHOICES else ({},):
                fields = {**BODIES[path], "max_tokens": 3, **more}
                fields = fields if more else {**fields, "top_logprobs": 0}
                response = client.ask("POST", path, fields)
                check(WHOLE[path], response.json())
        else:
            response = client.get(path.replace("{name}", "embedded"))
            check(WHOLE[path], response.json())
        assert response.status == 200

    @pytest.mark.parametrize("path", CHOICES)
    @pytest.mark.parametrize("has_usage", [True, False])
    def test_chunks(self, client, path, has_usage):
        options = {"include_usage": has_usage}
        logprobs = 2 if path == "/v1/completions" else True
        more = {"stream": True, "stream_options": options, "logprobs": logprobs}
        body = {**BODIES[path], "max_tokens": 5, **more}
        events = client.ask("POST", path, body).events
        assert events
        for event in events:
            check(CHUNKS[path][0], event)

    @pytest.mark.parametrize("path", sorted(CHUNKS.keys() - set(CHOICES)))
    def test_events(self, client, path):
        body = {**BODIES[path], "max_tokens": 5, "stream": True}
        events = client.ask("POST", path, body).named_events
        assert len({event["type"] for event in events}) > 6
        for event in events:
            check(reduce(or_, CHUNKS[path]), event)

    def test_messages_with_everything(self):
        function = {"name": "f", "arguments": "{}"}
        call = {"id": "call_1", "type": "function", "function": function}
        for calls in ([], [call], [{"index": 0, **call}]):
            for content in ("", "text"):
                for reasoning in ("", "thought"):
                    delta = Delta(content, reasoning, calls)
                    check(answers.AnswerMessage, formats.chat_message(delta))
                    for is_first in (True, False):
                        found = formats.chat_delta(delta, is_first=is_first)
                        check(answers.ChatDelta, found)

    def test_errors(self, client):
        for response in (
            client.complete(3),
            client.get("/nothing"),
            client.get("/v1/models", host="evil.example"),
            client.complete(model="other"),
            client.ask("DELETE", "/health"),
        ):
            check(answers.Error, response.json())
        path = "/v1/messages"
        for response in (
            client.ask("POST", path, {}),
            client.ask("POST", path, b"{"),
            client.ask("POST", path, {}, host="evil.example"),
            client.ask("POST", f"{path}/count_tokens", {"messages": 5}),
            client.ask("POST", path, {**BODIES[path], "max_tokens": 1, "model": "x"}),
            client.get(path),
        ):
            check(MessageError, response.json())

    def test_every_path_has_its_answers(self, described):
        schemas = described["components"]["schemas"]
        for path, operations in described["paths"].items():
            for operation in operations.values():
                responses = operation["responses"]
                assert "422" not in responses
                content = responses["200"]["content"]
                if path == "/metrics":
                    assert list(content) == ["text/plain; version=1.0.0; charset=utf-8"]
                else:
                    name = content["application/json"]["schema"]["$ref"]
                    assert (
                        schemas[name.rsplit("/", 1)[-1]]["additionalProperties"]
                        is False
                    )
                assert ("text/event-stream" in content) == (path in CHUNKS)
                error = responses["4XX"]["content"]["application/json"]["schema"]
                kind = "MessageError" if path.startswith("/v1/messages") else "Error"
                assert error == {"$ref": f"#/components/schemas/{kind}"}
        assert set(WHOLE) | {"/metrics"} == set(described["paths"])

    def test_every_reference_leads_somewhere(self, described):
        text = json.dumps(described)
        for name in {part.split('"')[0] for part in text.split('"#/')[1:]}:
            place = described
            for part in name.split("/"):
                place = place[part]
            assert place


@settings(max_examples=100)
@given(st.integers(0, 300_000), st.integers(0, 400_000))
def test_ids_are_those_of_the_vocabulary(largest, number):
    for each in (number, largest, largest + 1):
        found = re.fullmatch(_numbers_to(largest), str(each)) is not None
        assert found == (each <= largest)


class TestKeys:
    def test_without_one(self, described):
        assert "securitySchemes" not in described["components"]
        for operations in described["paths"].values():
            for operation in operations.values():
                assert "security" not in operation
                assert "401" not in operation["responses"]

    def test_with_one(self):
        means = scripted_means(ScriptedDecoder(echo))
        with scripted_server(means, "--api-key", "sesame") as (client, _):
            described = client.get("/openapi.json").json()
        ((name, scheme),) = described["components"]["securitySchemes"].items()
        assert scheme == {"type": "http", "scheme": "bearer"}
        for path, operations in described["paths"].items():
            for operation in operations.values():
                is_open = path == "/health"
                assert operation["security"] == ([] if is_open else [{name: []}])
                assert ("401" in operation["responses"]) != is_open


class TestAgreement:
    """What schemathesis is not to try is what is refused, and no more than that."""

    @pytest.mark.parametrize("path", BODIES)
    def test_what_is_answered(self, client, path):
        body = {"max_tokens": 3, **BODIES[path], "top_logprobs": 0}
        assert agrees(body)
        assert client.ask("POST", path, body).status == 200

    @pytest.mark.parametrize(("path", "fields"), DISAGREEING + UNKNOWN)
    def test_what_is_refused(self, client, described, path, fields):
        body = {"max_tokens": 3, **BODIES[path], **fields, "top_logprobs": 0}
        if (path, fields) in DISAGREEING:
            assert client.ask("POST", path, body).status == 200
            body["input" if "input" in body else "messages"] = BEGUN
        content = described["paths"][path]["post"]["requestBody"]["content"]
        schema = {**described, **content["application/json"]["schema"]}
        assert jsonschema.Draft202012Validator(schema).is_valid(body)
        assert client.ask("POST", path, body).status == 400
        assert not agrees(body)


@pytest.mark.schema
@pytest.mark.parametrize("key", [None, "sesame"])
def test_requests_that_schemathesis_makes(tmp_path, key):
    """None of them fails, or is answered otherwise than described."""
    means = scripted_means(ScriptedDecoder(lambda prompt: [*echo(prompt)[:8], EOS]))
    # Whatever the number of choices and the length of prompts may be.
    arguments = ["--max-waiting", "100000", "--max-model-len", "100000"]
    arguments += [] if key is None else ["--api-key", key]
    headers = [] if key is None else ["--header", f"Authorization: Bearer {key}"]
    with scripted_server(means, *arguments) as (client, _):
        client.key = key
        described = tmp_path / "openapi.json"
        described.write_bytes(client.get("/openapi.json").body)
        address = f"http://127.0.0.1:{client.port}"
        command = [sys.executable, "-m", "schemathesis.cli", "run", str(described)]
        options = ["--url", address, "--max-examples", "100", *headers]
        result = subprocess.run(
            [*command, *options],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
            env={
                **os.environ,
                "SCHEMATHESIS_HOOKS": "tests.server.schema_hooks",
                "PYTHONPATH": str(ROOT),
            },
        )
    assert result.returncode == 0, result.stdout + result.stderr
