"""The server's HTTP side, around a decoder that follows a script.

Run: python -m pytest tests/server/test_http.py
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import struct
import threading
import time
from contextlib import closing
from typing import Any

import pytest

from mlx_gemma_mtp.server import protocol, reply
from mlx_gemma_mtp.server.app import POSTED
from mlx_gemma_mtp.server.bridge import Drain
from mlx_gemma_mtp.server.json_body import UNREADABLE
from tests.server.serving import (
    EOS,
    Client,
    ScriptedDecoder,
    echo,
    scripted_means,
    scripted_server,
    tokenizer,
    tokens_of,
    wait_until,
)


@pytest.fixture(scope="module")
def server():
    decoder = ScriptedDecoder(echo)
    with scripted_server(scripted_means(decoder)) as (client, parts):
        yield client, parts, decoder


@pytest.fixture
def client(server):
    return server[0]


def answer_text(text, count):
    return tokenizer().decode(echo([2, *tokens_of(text)])[:count])


class TestCompletions:
    def test_whole(self, client):
        response = client.complete("a b c", max_tokens=7)
        body = response.json()
        assert response.status == 200
        assert body["object"] == "text_completion"
        assert body["model"] == "embedded"
        assert body["id"].startswith("cmpl-")
        assert abs(body["created"] - time.time()) < 60
        assert body["choices"] == [
            {
                "index": 0,
                "text": answer_text("a b c", 7),
                "logprobs": None,
                "finish_reason": "length",
            }
        ]
        assert body["usage"] == {
            "prompt_tokens": 1 + len(tokens_of("a b c")),
            "completion_tokens": 7,
            "total_tokens": 8 + len(tokens_of("a b c")),
            "prompt_tokens_details": {"cached_tokens": 0},
            "completion_tokens_details": {
                "reasoning_tokens": 0,
                "accepted_prediction_tokens": 0,
                "rejected_prediction_tokens": 0,
            },
        }
        assert body["speculative"] == {
            "rounds": 3,
            "drafted": 9,
            "accepted": 4,
            "acceptance_length": 1 + 4 / 3,
            "rule": "greedy",
        }

    def test_stream_is_the_whole_in_pieces(self, client):
        whole = client.complete("a b c", max_tokens=11, logprobs=2).json()
        *chunks, last = client.stream("a b c", max_tokens=11, logprobs=2)
        assert {chunk["id"] for chunk in chunks} == {last["id"]}
        assert all(chunk["object"] == "text_completion" for chunk in chunks)
        assert all(chunk["usage"] is None for chunk in chunks)
        choices = [chunk["choices"][0] for chunk in chunks]
        assert "".join(c["text"] for c in choices) == whole["choices"][0]["text"]
        assert [c["finish_reason"] for c in choices[:-1]] == [None] * len(choices[:-1])
        assert choices[-1]["finish_reason"] == "length"
        assert last["choices"] == []
        for name in ("usage", "speculative"):
            assert last[name] == whole[name]
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            parts = [value for c in choices for value in c["logprobs"][name]]
            assert parts == whole["choices"][0]["logprobs"][name]

    def test_stream_without_usage(self, client):
        events = client.complete(max_tokens=4, stream=True).events
        assert all("usage" not in event for event in events)
        assert all(event["choices"] for event in events)

    def test_prompts_of_every_kind(self, client):
        text = answer_text("a b", 4)
        ids = [2, *tokens_of("a b")]
        for prompt, count in (
            ("a b", 1),
            (ids, 1),
            (["a b", "a b"], 2),
            ([ids, ids, ids], 3),
        ):
            choices = client.complete(prompt, max_tokens=4).json()["choices"]
            assert [c["text"] for c in choices] == [text] * count
            assert [c["index"] for c in choices] == list(range(count))

    def test_choices_of_each_prompt(self, client):
        body = client.complete(["a", "b c"], n=3, max_tokens=2).json()
        texts = [answer_text("a", 2)] * 3 + [answer_text("b c", 2)] * 3
        assert [choice["text"] for choice in body["choices"]] == texts
        assert body["usage"]["completion_tokens"] == 12
        # Each prompt is counted once.
        num_tokens = len(tokens_of("a")) + len(tokens_of("b c"))
        assert body["usage"]["prompt_tokens"] == 2 + num_tokens

    def test_streamed_choices(self, client):
        *chunks, _ = client.stream(["a", "b c"], n=2, max_tokens=5)
        texts = ["", "", "", ""]
        for chunk in chunks:
            (choice,) = chunk["choices"]
            texts[choice["index"]] += choice["text"]
        assert texts == [answer_text("a", 5)] * 2 + [answer_text("b c", 5)] * 2

    def test_log_probabilities(self, client):
        (choice,) = client.complete("a b", max_tokens=2, logprobs=1).json()["choices"]
        tokens = [tokenizer().decode([t]) for t in echo([2, *tokens_of("a b")])[:2]]
        assert choice["logprobs"] == {
            "tokens": tokens,
            "token_logprobs": [-0.5, -0.5],
            "top_logprobs": [{token: -0.5} for token in tokens],
            "text_offset": [0, len(tokens[0])],
        }
        (choice,) = client.complete("a b", max_tokens=2, logprobs=0).json()["choices"]
        assert choice["logprobs"]["top_logprobs"] == [{}, {}]

    def test_a_stop_string(self, client):
        text = answer_text("a b c", 60)
        stop = text[7:9]
        (choice,) = client.complete("a b c", max_tokens=60, stop=stop).json()["choices"]
        assert choice["finish_reason"] == "stop"
        assert choice["text"] == text[: text.index(stop)]
        nothings: list[Any] = ["", [], None]
        for nothing in nothings:
            assert client.text("a", max_tokens=3, stop=nothing) == answer_text("a", 3)

    def test_settings_reach_the_decoder(self, server):
        client, _, decoder = server
        client.complete(max_tokens=3, speculative={"num_draft_tokens": 2}, logprobs=5)
        request, _ = decoder.added[-1]
        assert (request.max_tokens, request.max_draft_tokens) == (3, 2)
        assert request.num_logprobs == 5
        client.complete(max_tokens=3, speculative={"num_draft_tokens": "auto"})
        assert decoder.added[-1][0].max_draft_tokens == 8

    @pytest.mark.parametrize(
        ("sources", "expected"),
        [
            (None, "auto"),
            (["lookup"], "lookup"),
            (["drafter"], "drafter"),
            (["lookup", "drafter"], "auto"),
        ],
    )
    def test_sources_of_drafts(self, server, sources, expected):
        client, _, decoder = server
        client.complete(max_tokens=3, speculative={"sources": sources})
        assert decoder.added[-1][0].draft_source == expected

    @pytest.mark.parametrize("sources", [[], ["text"], "lookup"])
    def test_other_sources(self, client, sources):
        response = client.complete(max_tokens=3, speculative={"sources": sources})
        assert response.status == 400

    @pytest.mark.parametrize(
        "content",
        ["c d e", [{"type": "text", "text": t} for t in ("c d", " e")]],
    )
    def test_a_prediction_is_searched(self, server, content):
        client, _, decoder = server
        prediction = {"type": "content", "content": content}
        assert client.chat(max_tokens=3, prediction=prediction).status == 200
        assert decoder.added[-1][0].prediction == tuple(tokens_of("c d e"))
        assert client.chat(max_tokens=3, prediction=None).status == 200
        assert decoder.added[-1][0].prediction == ()

    @pytest.mark.parametrize(
        ("prediction", "param"),
        [
            ("c d e", "prediction"),
            ({"type": "content"}, "prediction.content"),
            ({"type": "text", "content": "c"}, "prediction.type"),
            ({"type": "content", "content": "c", "x": 1}, "prediction.x"),
            ({"type": "content", "content": [{"type": "image_url"}]}, "prediction"),
            ({"type": "content", "content": "c " * 40_000}, "prediction"),
        ],
    )
    def test_other_predictions(self, client, prediction, param):
        response = client.chat(max_tokens=3, prediction=prediction)
        assert response.status == 400
        assert "\n" not in response.message
        assert response.json()["error"]["param"].startswith(param)

    def test_length_by_default(self, server):
        client, _, decoder = server
        client.complete([2] * 600)
        assert decoder.added[-1][0].max_tokens == 1024 - 600
        client.complete([2])
        assert decoder.added[-1][0].max_tokens == 512


class TestChat:
    def test_whole(self, client):
        body = client.chat("a b", max_tokens=5, logprobs=True, top_logprobs=2).json()
        assert body["object"] == "chat.completion"
        assert body["id"].startswith("chatcmpl-")
        (choice,) = body["choices"]
        assert choice["message"] == {
            "role": "assistant",
            "content": answer_text("a b", 5),
            "refusal": None,
        }
        assert choice["finish_reason"] == "length"
        (first, *_) = choice["logprobs"]["content"]
        token = echo([2, *tokens_of("a b")])[0]
        text = tokenizer().decode([token])
        entry = {"token": text, "logprob": -0.5, "bytes": list(text.encode())}
        assert first == {**entry, "top_logprobs": [entry, entry]}
        assert len(choice["logprobs"]["content"]) == 5

    def test_stream(self, client):
        body = {"stream": True, "stream_options": {"include_usage": True}, "n": 2}
        *chunks, last = client.chat("a b", max_tokens=5, **body).events
        assert all(chunk["object"] == "chat.completion.chunk" for chunk in chunks)
        for index in (0, 1):
            own = [c for (c,) in (k["choices"] for k in chunks) if c["index"] == index]
            assert own[0]["delta"]["role"] == "assistant"
            assert all("role" not in choice["delta"] for choice in own[1:])
            text = "".join(choice["delta"].get("content", "") for choice in own)
            assert text == answer_text("a b", 5)
            assert own[-1]["finish_reason"] == "length"
        assert last["usage"]["completion_tokens"] == 10
        assert last["choices"] == []

    def test_contents_in_parts(self, client):
        parts = [{"type": "text", "text": "a"}, {"type": "text", "text": " b"}]
        content = client.chat(parts, max_tokens=5).json()["choices"][0]["message"]
        assert content["content"] == answer_text("a b", 5)

    def test_max_completion_tokens_counts_first(self, client):
        body = client.chat(max_tokens=3, max_completion_tokens=5).json()
        assert body["usage"]["completion_tokens"] == 5

    def test_instructions_are_a_place_to_keep(self, server):
        client, parts, _ = server
        long = "word " * 70
        messages = [
            {"role": "system", "content": long},
            {"role": "user", "content": "a b c d"},
        ]
        prompt = parts.desk.prompts.of_messages(messages)
        places = {place.kind: place.num_tokens for place in prompt.places}
        start = parts.desk.prompts.of_text(f"# {long}\n").tokens
        assert prompt.tokens[: places["system"]] == start[: places["system"]]
        assert len(start) - 2 <= places["system"] <= len(start)
        assert places["user"] == len(prompt.tokens) - 1
        body = {"messages": messages, "max_tokens": 2}
        assert client.ask("POST", "/v1/chat/completions", body).status == 200

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "has none"),
            ({"tool_choice": "required"}, "tool_choice must name one of the 0 tools"),
            ({"response_format": {"type": "json"}}, "response_format.type"),
            ({"top_logprobs": 3}, "must stand beside logprobs"),
            ({"logprobs": True, "top_logprobs": 21}, "at most 20: got 21"),
            ({"chat_template_kwargs": {"chat_template": "x"}}, "which is none"),
            ({"chat_template_kwargs": {"tokenize": True}}, "which is none"),
            ({"messages": []}, "messages"),
        ],
    )
    def test_what_cannot_be_done_is_said(self, client, fields, message):
        response = client.chat(**fields)
        assert response.status == 400
        assert message in response.message
        assert response.message.count("\n") == 0

    def test_tools_may_stand_beside_none(self, client):
        tools = [{"type": "function", "function": {"name": "f"}}]
        assert client.chat(tools=tools, tool_choice="none", max_tokens=2).status == 200


class TestMistakes:
    @pytest.mark.parametrize(
        ("fields", "param", "message"),
        [
            ({"temperature": "warm"}, "temperature", "valid number"),
            ({"temperature": -1}, "temperature", "greater than or equal to 0"),
            ({"temperature": True}, "temperature", "valid number"),
            ({"max_tokens": 0}, "max_tokens", "1 or more, or -1 for no limit: got 0"),
            ({"max_tokens": -2}, "max_tokens", "greater than or equal to -1"),
            ({"max_tokens": 2.5}, "max_tokens", "valid integer"),
            ({"n": 129}, "n", "less than or equal to 128"),
            ({"top_p": 2}, "top_p", "less than or equal to 1"),
            ({"stop": [""]}, "stop.0", "at least 1 character"),
            ({"stop": ["x"] * 17}, "stop", "at most 16"),
            ({"seed": 2**64}, "seed", "less than"),
            ({"stream": "yes"}, "stream", "valid boolean"),
            ({"prompt": []}, "prompt", "at least 1"),
            ({"prompt": [[]]}, "prompt.0", "at least 1"),
            ({"prompt": 7}, "prompt", "valid"),
            ({"prompt": [1024]}, "prompt", "below 1024: got 1024"),
            ({"prompt": [-1]}, "prompt.0", "greater than or equal to 0"),
            ({"logit_bias": {"a": 1}}, "logit_bias", "from 0 to 1023"),
            ({"logit_bias": {"1024": 1}}, "logit_bias", "from 0 to 1023"),
            ({"logit_bias": {"3": 1001}}, "logit_bias.3", "less than or equal"),
            ({"stop_token_ids": [1024]}, "stop_token_ids", "from 0 to 1023: got 1024"),
            ({"stop_token_ids": [-1]}, "stop_token_ids.0", "greater than or equal"),
            ({"stop_token_ids": [5] * 1025}, "stop_token_ids", "at most 1024"),
            ({"min_tokens": -1}, "min_tokens", "greater than or equal to 0"),
            (
                {"min_tokens": 4, "max_tokens": 3},
                "min_tokens",
                "at most max_tokens, 3 here: got 4",
            ),
            ({"cache_salt": ""}, "cache_salt", "at least 1 character"),
            ({"cache_salt": "x" * 1025}, "cache_salt", "at most 1024 characters"),
            ({"cache_salt": 5}, "cache_salt", "valid string"),
            ({"best_of": 3}, "best_of", "must be n: got 3"),
            ({"logprobs": 21}, "logprobs", "at most 20: got 21"),
            ({"prompt": [2] * 1024}, "prompt", "at most 1024 tokens"),
            (
                {"speculative": {"num_draft_tokens": 9}},
                "speculative.num_draft_tokens",
                "less than or equal to 8",
            ),
            ({"stream_options": 3}, "stream_options", "valid"),
        ],
    )
    def test_fields(self, client, fields, param, message):
        response = client.complete(**{"prompt": "a", **fields})
        assert response.status == 400
        assert message in response.message
        error = response.json()["error"]
        assert error["type"] == "invalid_request_error"
        assert error["param"] == param

    def test_a_mistake_in_a_stream_has_a_status(self, client):
        response = client.complete(max_tokens=0, stream=True)
        assert response.status == 400
        response = client.complete(max_tokens=999, stream=True, prompt=[3])
        assert response.status == 400
        assert "must fit: got 999" in response.message

    def test_a_length_is_named_as_openai_does(self, client):
        error = client.complete([2] * 1024).json()["error"]
        assert error["code"] == "context_length_exceeded"

    @pytest.mark.parametrize(
        "body",
        [
            b"[]",
            b"null",
            b'"text"',
            b'{"prompt": "x", "temperature": 1e999}',
        ],
    )
    def test_bodies(self, client, body):
        for path in ("/v1/completions", "/v1/chat/completions"):
            response = client.ask("POST", path, body)
            assert response.status == 400
            assert response.message not in ("", UNREADABLE)

    @pytest.mark.parametrize(
        "body",
        [
            b"",
            b"{",
            b"{}x",
            b"\xff\xfe",
            b"[" * 100_000,
            b'{"prompt": NaN}',
            b'{"prompt": "x", "temperature": -Infinity}',
            b'{"prompt": "x", "max_tokens": ' + b"9" * 5000 + b"}",
            b'{"prompt": "\\ud800"}',
            b'{"prompt": {"\\uD800": 1}}',
        ],
    )
    def test_bodies_that_cannot_be_read(self, client, body):
        for path in POSTED:
            response = client.ask("POST", path, body)
            assert (response.status, response.message) == (400, UNREADABLE)

    def test_a_mark_before_a_body_is_no_text(self, client):
        body = b'\xef\xbb\xbf{"prompt": "a", "max_tokens": 1}'
        assert client.ask("POST", "/v1/completions", body).status == 200

    def test_paths_and_methods(self, client):
        assert client.get("/v1/nothing").status == 404
        assert "Not Found" in client.get("/v1/nothing").message
        assert client.get("/v1/completions").status == 405
        assert client.ask("POST", "/v1/models", {}).status == 405
        assert client.get("/docs").status == 404

    def test_types_of_content(self, client):
        for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
            response = client.ask("POST", "/v1/completions", b"{}", content_type=kind)
            assert response.status == 415
            assert "application/json" in response.message
        kind = "Application/JSON; charset=utf-8"
        body = b'{"prompt": "a", "max_tokens": 1}'
        response = client.ask("POST", "/v1/completions", body, content_type=kind)
        assert response.status == 200

    def test_whole_numbers_may_have_a_point(self, client):
        """They are integers in JSON Schema, and some clients know no others."""
        body = b'{"prompt": [[4.0, 5], [4, 5.0]], "max_tokens": 2.0, "seed": -0.0}'
        found = client.ask("POST", "/v1/completions", body).json()
        texts = [choice["text"] for choice in found["choices"]]
        assert texts == [client.text([4, 5], max_tokens=2)] * 2
        body = b'{"prompt": [4.0, 5], "n": 1e0, "max_tokens": 2, "temperature": 0}'
        found = client.ask("POST", "/v1/completions", body).json()
        assert found["choices"][0]["text"] == texts[0]

    def test_models(self, client):
        (model,) = client.get("/v1/models").json()["data"]
        assert model["id"] == "embedded"
        assert client.get("/v1/models/embedded").json() == model
        assert client.get("/v1/models/other").status == 404
        for name in ("embedded", "default_model", None):
            assert client.complete(model=name, max_tokens=1).status == 200
        response = client.complete(model="gpt-9", max_tokens=1)
        assert response.status == 404
        assert response.json()["error"]["code"] == "model_not_found"
        assert "'gpt-9'" in response.message


class TestState:
    def test_health(self, client):
        response = client.get("/health")
        assert (response.status, response.json()) == (200, {"status": "ok"})

    def test_metrics(self, client):
        client.complete(max_tokens=6)
        response = client.get("/metrics")
        assert response.headers["content-type"].startswith("text/plain")
        text = response.body.decode()
        values = dict(
            re.findall(r"^mlx_gemma_mtp_(\S+) (\S+)$", text, flags=re.MULTILINE)
        )
        assert float(values["generated_tokens_total"]) >= 6
        assert float(values["draft_tokens_total"]) > 0
        assert float(values['rounds_total{num_draft_tokens="3"}']) > 0
        assert float(values['draft_tokens_by_position_total{position="1"}']) > 0
        assert float(values['draft_tokens_by_source_total{source="drafter"}']) > 0
        assert float(values["time_to_first_token_seconds_count"]) >= 1
        assert float(values["inter_token_seconds_count"]) >= 3
        assert float(values["live_requests"]) == 0
        assert float(values["waiting_requests"]) == 0
        assert float(values["max_kv_bytes"]) == 1e9
        assert float(values["connections"]) >= 1
        ok = 'requests_total{endpoint="/v1/completions",status="200"}'
        assert float(values[ok]) >= 1

    def test_stats(self, client, monkeypatch):
        window_s = 600.0  # nobody is so slow that the tokens are out of it
        monkeypatch.setattr("mlx_gemma_mtp.server.metrics._SPEED_WINDOW_S", window_s)
        client.complete(max_tokens=6)
        found = client.get("/stats").json()
        assert found["tokens_per_second"] >= 6 / window_s
        assert (found["live"], found["waiting"], found["kv_bytes"]) == (0, 0, 0)
        assert (found["model"], found["drafter"]) == ("embedded", "drafter")
        assert found["has_chat_template"] is True
        assert found["example"] == "def fibonacci(n):\n"
        assert found["num_draft_tokens"] == 3
        assert list(found["rounds_by_num_draft_tokens"]) == ["3"]
        assert 0 < found["acceptance_rate"] < 1
        assert 1 < found["acceptance_length"] < 4
        assert found["acceptance_by_position"][0] <= 1
        assert found["memory_bytes"] == 1

    def test_page(self, client):
        response = client.get("/")
        assert response.status == 200
        assert response.headers["content-type"].startswith("text/html")
        assert "default-src 'none'" in response.headers["content-security-policy"]

    def test_description(self, client):
        found = client.get("/openapi.json").json()
        assert {"/v1/completions", "/v1/chat/completions"} <= set(found["paths"])
        for path in found["paths"].values():
            for operation in path.values():
                assert "422" not in operation["responses"]


class TestAccess:
    def test_the_key_is_asked_for(self):
        means = scripted_means(ScriptedDecoder(echo))
        with scripted_server(means, "--api-key", "sesame") as (client, _):
            assert client.complete(max_tokens=1).status == 200
            strangers = [Client(client.port), Client(client.port, "sesam")]
            for stranger in [*strangers, Client(client.port, "sesame ö")]:
                assert stranger.get("/health").status == 200
                assert stranger.get("/").status == 200
                for path in ("/metrics", "/stats", "/v1/models", "/openapi.json"):
                    response = stranger.get(path)
                    assert response.status == 401
                    assert response.headers["www-authenticate"] == "Bearer"
                response = stranger.complete(max_tokens=1)
                assert response.status == 401
                assert response.json()["error"]["code"] == "invalid_api_key"
            # With a key any name will do.
            assert client.get("/v1/models", host="example.org").status == 200

    def test_foreign_names_are_refused(self, client):
        for host in (
            "localhost:8080",
            "127.0.0.1:1",
            "[::1]:80",
            "192.168.0.7",
            "a.localhost",
        ):
            assert client.get("/v1/models", host=host).status == 200
        response = client.get("/v1/models", host="evil.example:8080")
        assert response.status == 403
        assert "--allowed-hosts" in response.message

    def test_names_can_be_allowed(self):
        means = scripted_means(ScriptedDecoder(echo))
        arguments = ("--allowed-hosts", "Mac.local", "--allowed-origins", "https://a.b")
        with scripted_server(means, *arguments) as (client, _):
            assert client.get("/v1/models", host="mac.local:80").status == 200
            response = client.get("/v1/models", origin="https://a.b")
            assert response.headers["access-control-allow-origin"] == "https://a.b"
            response = client.get("/v1/models", origin="https://c.d")
            assert "access-control-allow-origin" not in response.headers
            preflight = client.ask(
                "OPTIONS",
                "/v1/completions",
                origin="https://a.b",
                access_control_request_method="POST",
                access_control_request_headers="authorization",
            )
            assert preflight.status == 200

    def test_no_origin_by_default(self, client):
        response = client.get("/v1/models", origin="https://a.b")
        assert "access-control-allow-origin" not in response.headers


class TestLimits:
    def test_bodies(self):
        means = scripted_means(ScriptedDecoder(echo))
        with scripted_server(means, "--max-request-bytes", "1000") as (client, _):
            assert client.complete("x" * 2000).status == 413
            connection = client.connect()
            with closing(connection):  # without saying how long it will be
                connection.putrequest("POST", "/v1/completions")
                connection.putheader("content-type", "application/json")
                connection.putheader("transfer-encoding", "chunked")
                connection.endheaders()
                for _ in range(3):
                    connection.send(b"190\r\n" + b"x" * 400 + b"\r\n")
                assert connection.getresponse().status == 413
            assert client.complete("x", max_tokens=1).status == 200

    def test_requests(self):
        decoder = ScriptedDecoder(echo, max_rows=1)
        decoder.allowed = threading.Semaphore(0)
        means = scripted_means(decoder, max_rows=1)
        arguments = ("--max-rows", "1", "--max-waiting", "2")
        with scripted_server(means, *arguments) as (client, parts):
            connections = [client.connect() for _ in range(3)]
            for connection in connections:
                body = {"prompt": "a", "max_tokens": 4}
                client.send(connection, "POST", "/v1/completions", body)
            wait_until(lambda: parts.bridge.num_open == 3)
            response = client.complete(max_tokens=1)
            assert response.status == 429
            assert response.headers["retry-after"] == "1"
            assert response.json()["error"]["type"] == "rate_limit_error"
            decoder.allowed.release(1000)
            for connection in connections:
                with closing(connection):
                    assert connection.getresponse().status == 200
            assert client.complete(max_tokens=1).status == 200
            response = client.complete(max_tokens=1, n=4)
            assert response.status == 400  # it would never be taken
            assert "at most 3 choices" in response.message
            assert client.complete(["a"] * 100_000).status == 400

    def test_connections(self):
        means = scripted_means(ScriptedDecoder(echo))
        with scripted_server(means, "--max-connections", "3") as (client, _):
            held = [client.connect() for _ in range(3)]
            for connection in held:
                connection.connect()
                client.send(connection, "GET", "/health")
                connection.getresponse().read()
            response = client.get("/health")
            assert response.status == 503
            assert "at most 3 connections" in response.message
            for connection in held:
                connection.close()
            wait_until(lambda: client.get("/health").status == 200)

    def test_heads_must_come(self, client, monkeypatch):
        monkeypatch.setattr(protocol, "HEAD_TIMEOUT_S", 0.1)
        for start in (b"", b"GET /health HTTP/1.1\r\nx: "):
            with socket.create_connection(("127.0.0.1", client.port), 30) as idle:
                idle.sendall(start)
                with contextlib.suppress(ConnectionResetError):
                    assert idle.recv(1) == b""

    def test_no_http_is_told_so(self, client):
        with socket.create_connection(("127.0.0.1", client.port), 30) as odd:
            odd.sendall(b"\x16\x03\x01\r\n\r\n")
            answer = odd.makefile("rb").read()
        head, body = answer.split(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 ")
        assert json.loads(body)["error"]["type"] == "invalid_request_error"


def stream_started(client, body):
    """A connection on which a stream has begun; the socket and what was read."""
    raw = json.dumps({**body, "stream": True}).encode()
    opened = socket.create_connection(("127.0.0.1", client.port), 30)
    opened.sendall(
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n"
        b"content-type: application/json\r\n"
        + f"content-length: {len(raw)}\r\n\r\n".encode()
        + raw
    )
    return opened, opened.recv(100)


class TestReaders:
    @pytest.mark.parametrize("is_stream", [True, False])
    def test_one_who_goes_away_frees_the_row(self, is_stream):
        decoder = ScriptedDecoder(echo)
        decoder.allowed = threading.Semaphore(0)
        with scripted_server(scripted_means(decoder)) as (client, parts):
            connection = client.connect()
            body = {"prompt": "a b", "max_tokens": 100, "stream": is_stream}
            client.send(connection, "POST", "/v1/completions", body)
            wait_until(lambda: parts.bridge.num_open == 1)
            decoder.allowed.release(2)
            wait_until(lambda: decoder.steps == 2)
            # Without a word, as a process that is killed.
            linger = struct.pack("ii", 1, 0)
            connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            connection.close()
            wait_until(lambda: parts.bridge.num_open == 0)
            steps = decoder.steps
            decoder.allowed.release(1)
            wait_until(lambda: decoder.removed)
            assert decoder.steps <= steps + 1
            wait_until(lambda: client.get("/stats").json()["live"] == 0)

    def test_one_who_reads_slowly_gets_larger_pieces(self):
        decoder = ScriptedDecoder(echo)
        with scripted_server(scripted_means(decoder)) as (client, _):
            opened, text = stream_started(client, {"prompt": "a b", "max_tokens": 900})
            with opened:
                time.sleep(0.3)
                while not text.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
                    text += opened.recv(1 << 16)
            found = re.findall(rb"^data: ({.*})$", text, flags=re.MULTILINE)
            texts = [json.loads(event)["choices"][0]["text"] for event in found]
            assert "".join(texts) == answer_text("a b", 900)

    def test_one_who_does_not_read_is_let_go_of(self, monkeypatch):
        monkeypatch.setattr(reply, "MAX_PENDING_TOKENS", 50)
        monkeypatch.setattr(protocol, "STALL_TIMEOUT_S", 0.2)
        answer = tokens_of("a") * 50_000
        decoder = ScriptedDecoder(lambda _: answer, block=50)
        means = scripted_means(decoder)
        with scripted_server(means, "--max-model-len", "100000") as (client, _):
            # More than what lies between two sockets: a kilobyte for each token.
            body = {"prompt": "a", "max_tokens": 50_000, "logprobs": 20}
            opened, _ = stream_started(client, body)
            with opened:
                wait_until(lambda: decoder.removed)
                wait_until(lambda: client.get("/stats").json()["live"] == 0)
                (row,) = decoder.removed
                assert row.num_emitted < 50_000


class TestEnd:
    def test_new_requests_are_refused_and_running_ones_finish(self):
        decoder = ScriptedDecoder(echo)
        decoder.allowed = threading.Semaphore(0)
        with scripted_server(scripted_means(decoder)) as (client, parts):
            connection = client.connect()
            body = {"prompt": "a b", "max_tokens": 20}
            client.send(connection, "POST", "/v1/completions", body)
            wait_until(lambda: parts.bridge.num_open == 1)
            parts.bridge.is_draining = True
            parts.mailbox.put(Drain(1000.0))
            response = client.get("/health")
            assert response.status == 503
            assert response.json() == {"status": "draining"}
            response = client.complete(max_tokens=1)
            assert response.status == 503
            assert "shutting down" in response.message
            decoder.allowed.release(1000)
            with closing(connection):
                found = json.loads(connection.getresponse().read())
            assert found["choices"][0]["text"] == answer_text("a b", 20)
            parts.thread.join(30)
            assert not parts.thread.is_alive()

    def test_a_failure_in_a_stream_is_an_event(self):
        decoder = ScriptedDecoder(echo)
        decoder.allowed = threading.Semaphore(0)
        with scripted_server(scripted_means(decoder)) as (client, parts):
            connection = client.connect()
            body = {"prompt": "a b", "max_tokens": 100, "stream": True}
            client.send(connection, "POST", "/v1/completions", body)
            wait_until(lambda: parts.bridge.num_open == 1)
            decoder.allowed.release(3)
            wait_until(lambda: decoder.steps == 3)
            decoder.error = RuntimeError("broken")
            decoder.allowed.release(10)
            with closing(connection):
                answer = connection.getresponse()
                assert answer.status == 200
                *pieces, last, end = answer.read().split(b"\n\n")
            assert pieces
            assert end == b""
            error = json.loads(last.removeprefix(b"data: "))["error"]
            assert error["type"] == "server_error"
            assert client.get("/health").json() == {"status": "failed"}
            assert client.complete(max_tokens=1).status == 503


def test_an_end_of_sequence_token_is_counted_and_not_shown():
    decoder = ScriptedDecoder(lambda prompt: [*prompt[1:3], EOS])
    with scripted_server(scripted_means(decoder)) as (client, _):
        body = client.complete("a b c", max_tokens=50, logprobs=0).json()
        (choice,) = body["choices"]
        assert choice["finish_reason"] == "stop"
        assert choice["text"] == tokenizer().decode([*tokens_of("a b c")[:2]])
        assert body["usage"]["completion_tokens"] == 3
        assert len(choice["logprobs"]["tokens"]) == 3
