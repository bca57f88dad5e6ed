"""OpenAI's Responses: what bodies say, and how answers are written.

Run: python -m pytest tests/server/test_responses.py
"""

from __future__ import annotations

import json

import pytest

from mlx_gemma_mtp.server.responses_api.schema import ResponsesBody
from mlx_gemma_mtp.server.responses_api.tools import ToolNames
from mlx_gemma_mtp.server.responses_api.translation import chat_body, wrapped
from tests.gemma_pair import let_say
from tests.server.agents import CODEX, CODEX_CHAT
from tests.server.events import response_of
from tests.server.serving import (
    EOS,
    ScriptedDecoder,
    echo,
    pair_server,
    scripted_means,
    scripted_server,
    tokenizer,
    tokens_of,
)

PATH = "/v1/responses"
SAID = [{"role": "user", "content": "a b c"}]


def chat(given="a b c", **fields):
    """What a body becomes, without what it does not say."""
    body = ResponsesBody.model_validate({"input": given, **fields})
    tools = ToolNames(body.tools or ())
    return chat_body(body, tools).model_dump(exclude_none=True, by_alias=True)


class TestBodies:
    def test_the_least(self):
        assert chat() == chat(SAID) == {"messages": SAID}
        parts = [{"type": "input_text", "text": "a b c"}]
        assert chat([{"role": "user", "content": parts}])["messages"] == SAID

    def test_instructions_are_one_message(self):
        developer = {"type": "message", "role": "developer", "content": "Do."}
        late = {**developer, "content": "Stop."}
        found = chat([developer, *SAID, late], instructions="Be.")["messages"]
        first = {"role": "system", "content": "Be.\n\nDo."}
        assert found == [first, *SAID, {"role": "developer", "content": "Stop."}]

    def test_instructions_that_say_nothing(self):
        nothing = {"role": "developer", "content": ""}
        assert chat([nothing])["messages"] == [{"role": "system", "content": ""}]

    @pytest.mark.parametrize(
        ("item", "thought"),
        [
            ({"summary": []}, None),
            ({"summary": [{"type": "summary_text", "text": "Short"}]}, "Short"),
            ({"content": [{"type": "reasoning_text", "text": "Long"}]}, "Long"),
            ({"encrypted_content": wrapped("Lång 🌈")}, "Lång 🌈"),
            ({"encrypted_content": "gAAAA=="}, None),
            ({"encrypted_content": "plain:?"}, None),
            ({"encrypted_content": "plain:/w=="}, None),
            (
                {
                    "summary": [{"type": "summary_text", "text": "Short"}],
                    "encrypted_content": wrapped("Long"),
                },
                "Long",
            ),
        ],
    )
    def test_thoughts_come_back(self, item, thought):
        said = {"role": "assistant", "content": "So."}
        (_, message) = chat([*SAID, {"type": "reasoning", **item}, said])["messages"]
        assert message.pop("reasoning", None) == thought
        assert message == said

    @pytest.mark.parametrize(
        ("form", "expected"),
        [
            ({"type": "text"}, {"type": "text"}),
            ({"type": "json_object"}, {"type": "json_object"}),
            (
                {
                    "type": "json_schema",
                    "name": "n",
                    "strict": True,
                    "schema": {"a": 1},
                },
                {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "strict": True, "schema": {"a": 1}},
                },
            ),
        ],
    )
    def test_forms(self, form, expected):
        assert chat(text={"format": form})["response_format"] == expected

    def test_settings(self):
        fields = {"model": "m", "temperature": 0.5, "top_p": 0.9, "seed": 3}
        reasoning = {"effort": "low", "summary": "auto"}
        found = chat(**fields, max_output_tokens=7, reasoning=reasoning, user="u")
        expected = {**fields, "max_tokens": 7, "reasoning_effort": "low"}
        assert found == {"messages": SAID, **expected}

    @pytest.mark.parametrize(
        ("given", "expected"),
        [
            ("auto", "auto"),
            ("required", "required"),
            (
                {"type": "function", "name": "f"},
                {"type": "function", "function": {"name": "f"}},
            ),
            (
                {"type": "function", "name": "f", "namespace": "n"},
                {"type": "function", "function": {"name": "n__f"}},
            ),
        ],
    )
    def test_tool_choice(self, given, expected):
        assert chat(tool_choice=given)["tool_choice"] == expected

    def test_what_codex_sends(self):
        body = ResponsesBody.model_validate(CODEX)
        tools = ToolNames(body.tools or ())
        assert chat_body(body, tools).model_dump(exclude_none=True) == CODEX_CHAT
        assert tools.left_out == ["web_search"]


@pytest.fixture(scope="module")
def client():
    with scripted_server(scripted_means(ScriptedDecoder(echo))) as (client, _):
        yield client


def ask(client, given="a b c", **fields):
    return client.ask("POST", PATH, {"input": given, **fields})


def answer_text(text, count):
    return tokenizer().decode(echo([2, *tokens_of(text)])[:count])


class TestAnswers:
    def test_whole(self, client):
        response = ask(client, max_output_tokens=7, instructions="Be.", user="u")
        body = response.json()
        assert response.status == 200
        assert body["id"].startswith("resp_")
        assert (body["object"], body["model"]) == ("response", "embedded")
        assert (body["instructions"], body["user"]) == ("Be.", "u")
        (item,) = body["output"]
        assert item["role"] == "assistant"
        text = tokenizer().decode(echo([2, *tokens_of("# Be.\na b c")])[:7])
        part = {"type": "output_text", "text": text}
        assert item["content"] == [{**part, "annotations": [], "logprobs": []}]
        assert (body["status"], item["status"]) == ("incomplete", "incomplete")
        assert body["incomplete_details"] == {"reason": "max_output_tokens"}
        num_prompt = 1 + len(tokens_of("# Be.\na b c"))
        assert body["usage"] == {
            "input_tokens": num_prompt,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": 7,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": num_prompt + 7,
        }

    def test_a_stream_leads_to_the_whole(self, client):
        whole = ask(client, max_output_tokens=7).json()
        events = ask(client, max_output_tokens=7, stream=True).named_events
        assert events[-1]["type"] == "response.incomplete"
        found = response_of(events)
        (own,) = found["output"]
        assert own["content"] == whole["output"][0]["content"]
        assert found["usage"] == whole["usage"]

    @pytest.mark.parametrize("stream", [False, True])
    def test_an_answer_with_an_end(self, stream):
        decoder = ScriptedDecoder(lambda prompt: [*prompt[1:3], EOS])
        with scripted_server(scripted_means(decoder)) as (client, _):
            response = ask(client, stream=stream)
        body = response_of(response.named_events) if stream else response.json()
        assert (body["status"], body["incomplete_details"]) == ("completed", None)
        assert body["output"][0]["status"] == "completed"

    def test_nothing_is_stored(self, client):
        response = client.get(f"{PATH}/resp_1")
        assert response.status == 404
        assert "Nothing is stored" in response.message
        assert response.json()["error"]["type"] == "invalid_request_error"


class TestMistakes:
    @pytest.mark.parametrize(
        ("fields", "param", "message"),
        [
            ({"input": []}, "input", "at least 1"),
            ({"input": None}, "input", "valid"),
            ({"input": [{"role": "tool", "content": "a"}]}, "input.0.role", "'user'"),
            ({"input": [{"type": "item_reference"}]}, "input.0", "must be one of"),
            ({"input": [{"type": ["message"]}]}, "input.0", "must be one of"),
            ({"input": ["a"]}, "input.0", "must be one of"),
            (
                {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
                "input.0.content.0",
                "reads text only: got an image",
            ),
            (
                {"previous_response_id": "resp_1"},
                "previous_response_id",
                "Send the items of the conversation in input.",
            ),
            ({"conversation": "c"}, "conversation", "must be left out"),
            ({"background": True}, "background", "must be left out"),
            ({"prompt": {"id": "p"}}, "prompt", "must be left out"),
            ({"top_logprobs": 2}, "top_logprobs", "must be left out"),
            ({"max_output_tokens": 0}, "max_output_tokens", "greater than"),
            ({"text": {"verbosity": "low"}}, "text.verbosity", "text.verbosity must"),
            (
                {"text": {"format": {"type": "json_schema", "name": "n"}}},
                "text.format.schema",
                "text.format.schema must hold",
            ),
            (
                {
                    "text": {
                        "format": {
                            "type": "json_schema",
                            "name": "n",
                            "schema": {"type": "thing"},
                        }
                    }
                },
                "text.format.schema",
                "text.format.schema: ",
            ),
            ({"tools": [{"type": "function"}]}, "tools[0].name", "must name the tool"),
            (
                {"tools": [{"type": "namespace", "name": "n", "tools": [{}]}]},
                "tools[0].tools.type",
                "required",
            ),
            ({"tool_choice": "any"}, "tool_choice", "got 'any'"),
            ({"tool_choice": {"type": "web_search"}}, "tool_choice", "or a function"),
            ({"tool_choice": "required"}, "tool_choice", "one of the 0 tools"),
            ({"input": "a " * 2000}, "prompt", "at most 1024 tokens"),
        ],
    )
    def test_fields(self, client, fields, param, message):
        response = client.ask("POST", PATH, {"input": "a", **fields})
        assert response.status == 400
        assert message in response.message
        assert "\n" not in response.message
        assert response.json()["error"]["param"] == param


WEATHER = {
    "type": "function",
    "name": "get_weather",
    "description": "d",
    "strict": False,
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    },
}
PATCH = {"type": "custom", "name": "patch", "description": "d"}
SPACE = {"type": "namespace", "name": "n", "tools": [WEATHER]}
CALLS = (
    '<|tool_call>call:get_weather{city:<|"|>Paris<|"|>,days:3}<tool_call|>'
    '<|tool_call>call:n__get_weather{city:<|"|>Oslo<|"|>}<tool_call|>'
    '<|tool_call>call:patch{input:<|"|>*** \n "Begin"<|"|>}<tool_call|>'
)
SPOKEN = f"<|channel>thought\nI call.\n<channel|>{CALLS}<|tool_response>"


@pytest.fixture(scope="module")
def gemma(gemma_pair_folder):
    with pair_server(gemma_pair_folder("may-12b")) as (client, _):
        yield client


@pytest.mark.gemma
@pytest.mark.usefixtures("plain_graphs")
@pytest.mark.parametrize(
    ("stream", "settings"),
    [
        (False, {}),
        # As Codex does: what it hands back of a thought is this field alone.
        (True, {"include": ["reasoning.encrypted_content"]}),
    ],
)
def test_a_thought_and_calls_go_back(
    monkeypatch, gemma, gemma_tokenizer, stream, settings
):
    tokenizer = gemma_tokenizer("may-12b")
    prompts = let_say(monkeypatch, tokenizer, SPOKEN, "Sunny.<turn|>")
    instructions = json.dumps([stream, settings])
    fields = {
        "max_output_tokens": 120,
        "tools": [WEATHER, PATCH, SPACE],
        "instructions": instructions,
        **settings,
    }
    question = {"role": "user", "content": "Weather in Paris, I ask. " * 20}
    response = ask(gemma, [question], stream=stream, **fields)
    body = response_of(response.named_events) if stream else response.json()
    thought, paris, oslo, patch = body["output"]
    place = "summary" if "reasoning" in settings else "content"
    (part,) = thought[place]
    assert part["text"] == "I call."
    for call in (paris, oslo):
        assert call["type"] == "function_call"
        assert call["name"] == "get_weather"
    assert json.loads(paris["arguments"]) == {"city": "Paris", "days": 3}
    assert ("namespace" in paris, oslo["namespace"]) == (False, "n")
    assert (patch["type"], patch["name"]) == ("custom_tool_call", "patch")
    assert patch["input"] == '*** \n "Begin"'
    assert (body["status"], paris["status"]) == ("completed", "completed")
    if "include" in settings:
        del thought["content"]
    kinds = {"function_call": "function_call_output"}
    results = [
        {
            "type": kinds.get(call["type"], "custom_tool_call_output"),
            "call_id": call["call_id"],
            "output": "ok",
        }
        for call in (paris, oslo, patch)
    ]
    given = [question, *body["output"], *results]
    answer = ask(gemma, given, **fields).json()
    (item,) = answer["output"]
    assert item["content"][0]["text"] == "Sunny."
    # The whole first turn was read before; its tokens are the same again.
    num_spoken = len(tokenizer.encode(SPOKEN, add_special_tokens=False))
    details = answer["usage"]["input_tokens_details"]
    assert details["cached_tokens"] == len(prompts[0]) + num_spoken - 1
    assert answer["usage"]["input_tokens"] == len(prompts[1])
    num_thought = len(
        tokenizer.encode(SPOKEN.partition("<|tool_call>")[0], add_special_tokens=False)
    )
    details = body["usage"]["output_tokens_details"]
    assert details["reasoning_tokens"] == num_thought


@pytest.mark.gemma
@pytest.mark.usefixtures("plain_graphs")
def test_codex_is_answered(monkeypatch, gemma, gemma_tokenizer):
    prompts = let_say(monkeypatch, gemma_tokenizer("may-12b"), "One file.<turn|>")
    body = {**CODEX, "model": "default_model", "max_output_tokens": 20}
    response = response_of(gemma.ask("POST", PATH, body).named_events)
    (item,) = response["output"]
    assert item["content"][0]["text"] == "One file."
    text = gemma_tokenizer("may-12b").decode(prompts[0])
    for part in ("You are Codex.", "I list.", "agents__spawn", "start: A", "gone"):
        assert part in text
    assert "web_search" not in text
