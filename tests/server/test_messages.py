"""Anthropic's Messages: what bodies say, and how answers are written.

Run: python -m pytest tests/server/test_messages.py
"""

from __future__ import annotations

import pytest

from mlx_gemma_mtp.server.errors import AnswerError, engine_failed
from mlx_gemma_mtp.server.messages.answer import SIGNATURE
from mlx_gemma_mtp.server.messages.errors import body_of, status_of
from mlx_gemma_mtp.server.messages.schema import CountBody, MessagesBody
from mlx_gemma_mtp.server.messages.translation import chat_body
from tests.gemma_pair import let_say
from tests.server.agents import CLAUDE_CODE, CLAUDE_CODE_CHAT
from tests.server.events import blocks_of
from tests.server.serving import (
    ScriptedDecoder,
    echo,
    pair_server,
    scripted_means,
    scripted_server,
    tokenizer,
    tokens_of,
)

PATH = "/v1/messages"
SAID = [{"role": "user", "content": "a b c"}]


def chat(messages=SAID, **fields):
    """What a body becomes, without what it does not say."""
    body = MessagesBody.model_validate(
        {"max_tokens": 5, "messages": messages, **fields}
    )
    found = chat_body(body).model_dump(exclude_none=True, by_alias=True)
    assert found.pop("max_tokens") == 5
    return found


def messages_of(*messages, **fields):
    return chat(list(messages), **fields)["messages"]


class TestBodies:
    def test_the_least(self):
        assert chat() == {"messages": SAID, "reasoning_effort": "none"}

    def test_instructions(self):
        blocks = [
            {"type": "text", "text": "Be."},
            {"type": "text", "text": "Do.", "cache_control": {"type": "ephemeral"}},
        ]
        for system, text in (("Be.", "Be."), (blocks, "Be.\n\nDo.")):
            first, *rest = messages_of(*SAID, system=system)
            assert (first, rest) == ({"role": "system", "content": text}, SAID)
        assert messages_of(*SAID, system="") == SAID
        assert messages_of(*SAID, system=[]) == SAID

    def test_a_line_that_is_new_in_every_request_is_left_out(self):
        line = "x-anthropic-billing-header: cc_version=2.1; cch=1a2b3;"
        for system in (
            f"{line}\nBe.",
            [{"type": "text", "text": line}, {"type": "text", "text": "Be."}],
        ):
            first, *_ = messages_of(*SAID, system=system)
            assert first["content"].strip() == "Be."

    def test_a_turn_with_everything(self):
        said = {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Hm.", "signature": "x"},
                {"type": "redacted_thinking", "data": "AA=="},
                {"type": "text", "text": "I look"},
                {"type": "text", "text": " it up."},
                {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {"a": 1}},
                {"type": "tool_use", "id": "toolu_2", "name": "g", "input": {}},
            ],
        }
        results = {
            "role": "user",
            "content": [
                {"type": "text", "text": "And"},
                {"type": "tool_result", "tool_use_id": "toolu_1", "content": "4"},
                {
                    "type": "tool_result",
                    "tool_use_id": "toolu_2",
                    "is_error": True,
                    "content": [
                        {"type": "text", "text": "No g."},
                        {"type": "text", "text": "Sorry."},
                    ],
                },
                {"type": "text", "text": "then?", "cache_control": None},
            ],
        }
        assert messages_of(*SAID, said, results) == [
            *SAID,
            {
                "role": "assistant",
                "content": "I look it up.",
                "reasoning": "Hm.",
                "tool_calls": [
                    {
                        "id": "toolu_1",
                        "type": "function",
                        "function": {"name": "f", "arguments": {"a": 1}},
                    },
                    {
                        "id": "toolu_2",
                        "type": "function",
                        "function": {"name": "g", "arguments": {}},
                    },
                ],
            },
            {"role": "tool", "tool_call_id": "toolu_1", "content": "4"},
            {
                "role": "tool",
                "tool_call_id": "toolu_2",
                "content": "Error: No g.\n\nSorry.",
            },
            {"role": "user", "content": "And\n\nthen?"},
        ]

    def test_results_alone(self):
        for content, text in (
            (None, ""),
            ("", ""),
            ([], ""),
            ("error: x", "error: x"),
        ):
            block = {"type": "tool_result", "tool_use_id": "1", "is_error": bool(text)}
            message = {"role": "user", "content": [{**block, "content": content}]}
            expected = {"role": "tool", "tool_call_id": "1", "content": text}
            assert messages_of(message) == [expected]

    @pytest.mark.parametrize(
        ("thinking", "effort", "expected"),
        [
            (None, None, "none"),
            (None, "high", "none"),
            ({"type": "disabled"}, "max", "none"),
            ({"type": "enabled", "budget_tokens": 2000}, None, "high"),
            ({"type": "adaptive"}, None, "high"),
            ({"type": "adaptive", "display": "omitted"}, "low", "low"),
        ],
    )
    def test_thinking(self, thinking, effort, expected):
        found = chat(thinking=thinking, output_config={"effort": effort})
        assert found["reasoning_effort"] == expected
        limit = (thinking or {}).get("budget_tokens")
        assert found.get("max_thinking_tokens") == limit

    @pytest.mark.parametrize(
        ("given", "expected"),
        [
            ({"type": "auto"}, {"tool_choice": "auto"}),
            ({"type": "any"}, {"tool_choice": "required"}),
            ({"type": "none"}, {"tool_choice": "none"}),
            (
                {"type": "tool", "name": "f", "disable_parallel_tool_use": True},
                {
                    "tool_choice": {"type": "function", "function": {"name": "f"}},
                    "parallel_tool_calls": False,
                },
            ),
        ],
    )
    def test_tools(self, given, expected):
        schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
        tools = [
            {"name": "f", "description": "d", "input_schema": schema, "strict": True},
            {"type": "custom", "name": "g", "input_schema": {}, "defer_loading": False},
        ]
        found = chat(tools=tools, tool_choice=given)
        function = {"name": "f", "description": "d", "parameters": schema}
        assert found["tools"] == [
            {"type": "function", "function": {**function, "strict": True}},
            {"type": "function", "function": {"name": "g", "parameters": {}}},
        ]
        assert expected.items() <= found.items()

    def test_a_form(self):
        schema = {"type": "object"}
        asked = {"type": "json_schema", "schema": schema}
        for fields in ({"output_config": {"format": asked}}, {"output_format": asked}):
            assert chat(**fields)["response_format"] == {
                "type": "json_schema",
                "json_schema": {"name": "answer", "strict": True, "schema": schema},
            }

    def test_the_servers_own_limit_of_thoughts_goes_first(self):
        thinking = {"type": "enabled", "budget_tokens": 2000}
        for own, limit in ((None, 2000), (5, 5), (-1, -1)):
            found = chat(thinking=thinking, max_thinking_tokens=own)
            assert found["max_thinking_tokens"] == limit

    def test_settings(self):
        fields = {
            "model": "m",
            "stream": True,
            "temperature": 0.5,
            "top_p": 0.9,
            "top_k": 7,
            "seed": 3,
            "speculative": {"num_draft_tokens": 2},
        }
        found = chat(**fields, stop_sequences=["x"], metadata={"user_id": "u"})
        assert fields.items() <= found.items()
        assert found["stop"] == ["x"]
        assert "metadata" not in found

    def test_what_claude_code_sends(self):
        body = MessagesBody.model_validate(CLAUDE_CODE)
        found = chat_body(body).model_dump(exclude_none=True)
        assert found == CLAUDE_CODE_CHAT

    def test_a_count_needs_no_limit(self):
        found = chat_body(CountBody.model_validate({"messages": SAID}))
        assert found.model_dump(exclude_none=True)["messages"] == SAID


@pytest.fixture(scope="module")
def client():
    with scripted_server(scripted_means(ScriptedDecoder(echo))) as (client, _):
        yield client


def ask(client, messages=SAID, path=PATH, **fields):
    body = {"max_tokens": 7, "messages": messages, **fields}
    return client.ask("POST", path, body)


def answer_text(text, count):
    return tokenizer().decode(echo([2, *tokens_of(text)])[:count])


class TestAnswers:
    def test_whole(self, client):
        response = ask(client)
        body = response.json()
        assert response.status == 200
        assert response.headers["request-id"] == response.headers["x-request-id"]
        assert body.pop("id").startswith("msg_")
        assert body == {
            "type": "message",
            "role": "assistant",
            "model": "embedded",
            "content": [{"type": "text", "text": answer_text("a b c", 7)}],
            "stop_reason": "max_tokens",
            "stop_sequence": None,
            "usage": {
                "input_tokens": 1 + len(tokens_of("a b c")),
                "cache_creation_input_tokens": 0,
                "cache_read_input_tokens": 0,
                "output_tokens": 7,
                "output_tokens_details": {"thinking_tokens": 0},
            },
        }

    def test_a_stream_is_the_whole_in_pieces(self, client):
        whole = ask(client).json()
        events = ask(client, stream=True).named_events
        first, ping, *parts, delta, last = events
        assert first["type"] == "message_start"
        assert first["message"]["content"] == []
        assert first["message"]["stop_reason"] is None
        assert first["message"]["usage"]["input_tokens"] == 4
        assert (ping, last) == ({"type": "ping"}, {"type": "message_stop"})
        assert blocks_of(parts) == whole["content"]
        assert delta["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}
        assert delta["usage"] == whole["usage"]

    @pytest.mark.parametrize("stream", [False, True])
    def test_a_stop_string(self, client, stream):
        text = answer_text("a b c", 60)
        stop = text[7:9]
        settings = {"max_tokens": 60, "stop_sequences": ["zzz", stop]}
        response = ask(client, stream=stream, **settings)
        if stream:
            *parts, end, _ = response.named_events
            ((block,), found) = blocks_of(parts), end["delta"]
        else:
            found = response.json()
            (block,) = found["content"]
        assert block["text"] == text[: text.index(stop)]
        assert (found["stop_reason"], found["stop_sequence"]) == ("stop_sequence", stop)

    def test_a_query_and_headers_of_its_clients(self, client):
        body = {"model": "embedded", "max_tokens": 3, "messages": SAID}
        headers = {"anthropic_version": "2023-06-01", "anthropic_beta": "a,b"}
        response = client.ask("POST", f"{PATH}?beta=true", body, **headers)
        assert response.status == 200

    def test_counts(self, client):
        path = f"{PATH}/count_tokens"
        for fields in ({}, {"system": "Be brief."}):
            body = {"messages": SAID, **fields}
            count = client.ask("POST", path, body).json()
            used = ask(client, **fields).json()["usage"]["input_tokens"]
            assert count == {"input_tokens": used}


class TestMistakes:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"max_tokens": None}, "max_tokens"),
            ({"max_tokens": 0}, "max_tokens"),
            ({"messages": []}, "messages"),
            ({"messages": [{"role": "tool", "content": "a"}]}, "messages.0.role"),
            ({"messages": [{"role": "user"}]}, "messages.0.content"),
            (
                {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
                "reads text only: got an image",
            ),
            ({"system": [{"type": "image"}]}, "reads text only: got an image"),
            (
                {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
                "tools[0].type must be custom: got 'web_search_20250305'",
            ),
            ({"tools": [{"name": "f", "input_schema": {}}]}, "tools need a chat"),
            ({"tool_choice": {"type": "tool"}}, "tool_choice.name must name a tool"),
            ({"tool_choice": {"type": "any"}}, "tool_choice must name one of the 0"),
            ({"mcp_servers": [{"url": "x"}]}, "mcp_servers must be left out"),
            ({"container": "x"}, "container must be left out"),
            ({"stop_sequences": [""]}, "stop_sequences.0"),
            ({"thinking": {"type": "much"}}, "thinking.type"),
            (
                {
                    "output_format": {
                        "type": "json_schema",
                        "schema": {"type": "thing"},
                    }
                },
                "output_format.schema: ",
            ),
            (
                {
                    "output_config": {
                        "format": {"type": "json_schema", "schema": {"type": "thing"}}
                    }
                },
                "output_config.format.schema: ",
            ),
        ],
    )
    def test_fields(self, client, fields, message):
        response = ask(client, **fields)
        assert response.status == 400
        error = response.json()
        assert error["type"] == "error"
        assert error["error"]["type"] == "invalid_request_error"
        assert error["request_id"] == response.headers["request-id"]
        assert message in error["error"]["message"]
        assert "\n" not in error["error"]["message"]

    def test_a_prompt_that_is_too_long_is_told_in_the_clients_words(self, client):
        message = {"role": "user", "content": "a " * 2000}
        error = ask(client, [message]).json()["error"]
        assert error["message"].startswith("prompt is too long: ")

    def test_models(self, client):
        response = ask(client, model="claude-x")
        assert response.status == 404
        assert response.json()["error"]["type"] == "not_found_error"
        assert client.get(PATH).status == 405

    @pytest.mark.parametrize(
        ("status", "told", "kind"),
        [
            (400, 400, "invalid_request_error"),
            (401, 401, "authentication_error"),
            (403, 403, "permission_error"),
            (404, 404, "not_found_error"),
            (408, 408, "timeout_error"),
            (413, 413, "request_too_large"),
            (415, 415, "invalid_request_error"),
            (429, 429, "rate_limit_error"),
            (500, 500, "api_error"),
            (503, 529, "overloaded_error"),
        ],
    )
    def test_kinds(self, status, told, kind):
        failure = AnswerError(status, "so.")
        assert status_of(failure) == told
        assert body_of(failure)["error"] == {"type": kind, "message": "so."}

    def test_an_engine_that_has_failed_is_no_load(self):
        failure = engine_failed()
        assert (failure.status, status_of(failure)) == (503, 500)
        assert body_of(failure)["error"]["type"] == "api_error"

    def test_keys(self):
        means = scripted_means(ScriptedDecoder(echo))
        with scripted_server(means, "--api-key", "sesame") as (client, _):
            client.key = None
            body = {"max_tokens": 1, "messages": SAID}
            for headers in (
                {},
                {"x_api_key": "other"},
                {"x_api_key": ""},
                {"authorization": "Bearer other", "x_api_key": "another"},
            ):
                response = client.ask("POST", PATH, body, **headers)
                assert response.status == 401
                assert response.json()["error"]["type"] == "authentication_error"
            for headers in (
                {"x_api_key": "sesame"},
                {"authorization": "Bearer sesame"},
                {"authorization": "Bearer other", "x_api_key": "sesame"},
            ):
                assert client.ask("POST", PATH, body, **headers).status == 200
            assert client.get("/v1/models", x_api_key="sesame").status == 200


WEATHER = {
    "name": "get_weather",
    "description": "d",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    },
}
PARIS = '<|tool_call>call:get_weather{city:<|"|>Paris<|"|>,days:3}<tool_call|>'
SPOKEN = f"<|channel>thought\nI call.\n<channel|>{PARIS}{PARIS}<|tool_response>"


@pytest.fixture(scope="module")
def gemma(gemma_pair_folder):
    with pair_server(gemma_pair_folder("may-12b")) as (client, _):
        yield client


@pytest.mark.gemma
@pytest.mark.usefixtures("plain_graphs")
class TestGemma:
    @pytest.mark.parametrize("stream", [False, True])
    def test_a_thought_and_calls_go_back(
        self, monkeypatch, gemma, gemma_tokenizer, stream
    ):
        tokenizer = gemma_tokenizer("may-12b")
        prompts = let_say(monkeypatch, tokenizer, SPOKEN, "Sunny.<turn|>")
        settings = {
            "max_tokens": 80,
            "tools": [WEATHER],
            "thinking": {"type": "enabled", "budget_tokens": 1024},
            "system": f"{stream}",
        }
        question = {"role": "user", "content": "Weather in Paris, I ask. " * 20}
        response = ask(gemma, [question], stream=stream, **settings)
        if stream:
            *parts, end, _ = response.named_events
            content, found = blocks_of(parts), {**end["delta"], "usage": end["usage"]}
        else:
            found = response.json()
            content = found["content"]
        thought, *calls = content
        assert thought == {
            "type": "thinking",
            "thinking": "I call.",
            "signature": SIGNATURE,
        }
        ids = [call.pop("id") for call in calls]
        arguments = {"city": "Paris", "days": 3}
        call = {"type": "tool_use", "name": "get_weather", "input": arguments}
        assert calls == [call, call]
        assert len(set(ids)) == 2
        assert found["stop_reason"] == "tool_use"
        for each, name in zip(calls, ids, strict=True):
            each["id"] = name
        results = [
            {"type": "tool_result", "tool_use_id": name, "content": "20 degrees"}
            for name in ids
        ]
        conversation = [
            question,
            {"role": "assistant", "content": content},
            {"role": "user", "content": results},
        ]
        answer = ask(gemma, conversation, **settings).json()
        assert answer["content"] == [{"type": "text", "text": "Sunny."}]
        assert answer["stop_reason"] == "end_turn"
        # The whole first turn was read before; its tokens are the same again.
        num_spoken = len(tokenizer.encode(SPOKEN, add_special_tokens=False))
        usage = answer["usage"]
        assert usage["cache_read_input_tokens"] == len(prompts[0]) + num_spoken - 1
        num_input = usage["input_tokens"] + usage["cache_read_input_tokens"]
        assert num_input == len(prompts[1])

    def test_the_beginning_of_an_answer(self, monkeypatch, gemma, gemma_tokenizer):
        tokenizer = gemma_tokenizer("may-12b")
        prompts = let_say(monkeypatch, tokenizer, "of it.<turn|>")
        begun = {"role": "assistant", "content": [{"type": "text", "text": "Because "}]}
        answer = ask(gemma, [*SAID, begun]).json()
        assert answer["content"] == [{"type": "text", "text": "of it."}]
        assert tokenizer.decode(prompts[0]).endswith("Because ")
        assert "<|think|>" not in tokenizer.decode(prompts[0])

    def test_claude_code_is_answered(self, monkeypatch, gemma, gemma_tokenizer):
        tokenizer = gemma_tokenizer("may-12b")
        prompts = let_say(monkeypatch, tokenizer, "One file.<turn|>")
        body = {**CLAUDE_CODE, "model": "default_model"}
        events = gemma.ask("POST", f"{PATH}?beta=true", body).named_events
        *parts, end, _ = events
        assert blocks_of(parts) == [{"type": "text", "text": "One file."}]
        assert end["delta"]["stop_reason"] == "end_turn"
        text = tokenizer.decode(prompts[0])
        for part in ("You are an agent.", "I list.", "Runs a command.", "a.py"):
            assert part in text
        assert "x-anthropic" not in text
