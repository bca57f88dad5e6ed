"""Gemma's answers where they are held to a form or to calls, behind free thoughts.

Run: python -m pytest tests/server/test_gemma_forms.py
"""

import json
import re
from typing import Any, ClassVar

import jsonschema
import pytest

from tests.gemma_pair import let_say
from tests.server.client_shapes import CALL, CONTENT, FENCED, SHAPES, Box
from tests.server.serving import pair_server

pytestmark = [pytest.mark.gemma, pytest.mark.usefixtures("plain_graphs")]

FORM = "july-12b"
QUESTION = [{"role": "user", "content": "Weather in Paris, and a long question " * 8}]


@pytest.fixture(scope="module")
def client(gemma_pair_folder):
    """A client of the one server: to build its grammars takes seconds."""
    with pair_server(gemma_pair_folder(FORM)) as (found, _):
        yield found


THOUGHT = '<|channel>thought\nIs it {"a": 2}?\n<channel|>'
ANSWER = '{"a":1}'


class TestThoughts:
    @pytest.mark.parametrize("number", [0, 4])
    def test_are_free(self, client, monkeypatch, gemma_tokenizer, number):
        """The answer behind one is not: neither where it is another than was meant."""
        tokenizer = gemma_tokenizer(FORM)
        let_say(monkeypatch, tokenizer, f"{THOUGHT}{ANSWER}<turn|>")
        fields: dict[str, Any] = {"reasoning_effort": "high", "max_tokens": 80}
        fields["speculative"] = {"num_draft_tokens": number}
        asked: dict[str, Any] = {"structured_outputs": {"json": {"const": {"a": 1}}}}
        message = client.chat(**fields, **asked).json()["choices"][0]["message"]
        assert message["reasoning"] == 'Is it {"a": 2}?'
        assert message["content"] == ANSWER
        asked = {"structured_outputs": {"regex": "[0-9]{3}"}}
        message = client.chat(**fields, **asked).json()["choices"][0]["message"]
        assert message["reasoning"] == 'Is it {"a": 2}?'
        assert re.fullmatch("[0-9]{3}", message["content"])

    def test_are_free_behind_a_kept_prompt(self, client, monkeypatch, gemma_tokenizer):
        """The row is told the whole prompt, also what caches hold of it."""
        let_say(monkeypatch, gemma_tokenizer(FORM), f"{THOUGHT}{ANSWER}<turn|>")
        asked = {"structured_outputs": {"json": {"const": {"a": 1}}}, "max_tokens": 80}
        for is_kept in (False, True):
            answer = client.chat("a b " * 60, reasoning_effort="high", **asked).json()
            message = answer["choices"][0]["message"]
            assert message["reasoning"] == 'Is it {"a": 2}?'
            assert message["content"] == ANSWER
            cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
            assert (cached > 0) is is_kept

    def test_none_comes_where_none_is_asked_for(
        self, client, monkeypatch, gemma_tokenizer
    ):
        let_say(monkeypatch, gemma_tokenizer(FORM), f"{THOUGHT}{ANSWER}<turn|>")
        asked = {"structured_outputs": {"regex": "[0-9]{3}"}, "max_tokens": 9}
        answer = client.chat(reasoning_effort="none", **asked).json()
        message = answer["choices"][0]["message"]
        assert "reasoning" not in message
        assert re.fullmatch("[0-9]{3}", message["content"])


SPELLED = ("<turn|>", "<|tool_call>", "<bos>", "a<channel|>b")


@pytest.mark.parametrize("number", [0, 4])
class TestSpelledMarks:
    """Texts of a form that look like control tokens are text, for drafts or not."""

    def message(self, client, number, **asked):
        fields = {"max_tokens": 60, "seed": 1, "reasoning_effort": "none"}
        speculative = {"num_draft_tokens": number}
        response = client.chat(speculative=speculative, **fields, **asked)
        assert response.status == 200, response.body
        return response.json()["choices"][0]

    def test_in_forms(self, client, number):
        for text in (*SPELLED, '<|"|>'):
            forms: dict[str, tuple[Any, str]] = {
                "json": ({"const": [text]}, json.dumps([text])),
                "choice": ([text], text),
            }
            for name, (form, whole) in forms.items():
                asked = {"structured_outputs": {name: form}}
                found = self.message(client, number, **asked)
                assert found["message"]["content"] == whole
                assert found["finish_reason"] == "stop"

    def test_in_calls(self, client, number):
        for value in SPELLED:
            parameters = {
                "type": "object",
                "properties": {"k": {"enum": [value]}},
                "required": ["k"],
            }
            function = {"name": "f", "parameters": parameters}
            found = self.message(
                client,
                number,
                tools=[{"type": "function", "function": function}],
                tool_choice="required",
                parallel_tool_calls=False,
            )
            (call,) = found["message"]["tool_calls"]
            assert json.loads(call["function"]["arguments"]) == {"k": value}


class TestForcedCalls:
    """What the random pair cannot say by itself, it must say."""

    TOOLS: tuple[dict[str, Any], ...] = (
        {
            "type": "function",
            "function": {
                "name": "vote",
                "parameters": {
                    "type": "object",
                    "properties": {
                        "answer": {"enum": ["yes", "no"]},
                        "weight": {"type": "integer", "minimum": 1, "maximum": 3},
                    },
                    "required": ["answer", "weight"],
                },
            },
        },
        {"type": "function", "function": {"name": "stop_now"}},
    )

    def ask(self, client, **settings):
        settings = {"max_tokens": 99, "seed": 3, "reasoning_effort": "none", **settings}
        body = {"messages": QUESTION, "tools": self.TOOLS, **settings}
        return client.ask("POST", "/v1/chat/completions", body)

    def calls(self, response):
        assert response.status == 200, response.body
        choice = response.json()["choices"][0]
        assert choice["finish_reason"] == "tool_calls"
        assert not choice["message"]["content"]
        found = [call["function"] for call in choice["message"]["tool_calls"]]
        for call in found:
            arguments = json.loads(call["arguments"])
            if call["name"] == "vote":
                assert arguments["answer"] in ("yes", "no")
                assert arguments["weight"] in (1, 2, 3)
                assert len(arguments) == 2
            else:
                assert (call["name"], arguments) == ("stop_now", {})
        return found

    @pytest.mark.parametrize("name", ["vote", "stop_now"])
    def test_named(self, client, name):
        named = {"type": "function", "function": {"name": name}}
        (call,) = self.calls(self.ask(client, tool_choice=named))
        assert call["name"] == name

    def test_required(self, client):
        settings = {"tool_choice": "required", "parallel_tool_calls": False}
        for seed in range(2):
            assert len(self.calls(self.ask(client, **settings, seed=seed))) == 1

    def test_drafts_change_nothing(self, client):
        settings = {"tool_choice": "required", "parallel_tool_calls": False}
        first, second = (
            self.calls(
                self.ask(client, **settings, speculative={"num_draft_tokens": count})
            )
            for count in (0, 4)
        )
        assert first == second

    def test_a_stream(self, client):
        named = {"type": "function", "function": {"name": "vote"}}
        whole = self.calls(self.ask(client, tool_choice=named))
        events = self.ask(client, tool_choice=named, stream=True).events
        deltas = [event["choices"][0]["delta"] for event in events if event["choices"]]
        calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
        names = "".join(call["function"].get("name") or "" for call in calls)
        texts = "".join(call["function"].get("arguments") or "" for call in calls)
        assert [{"name": names, "arguments": texts}] == whole
        assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"

    def test_strict_tools_are_held_to_when_they_are_called(
        self, monkeypatch, client, gemma_tokenizer
    ):
        """The pair says text, then begins a call; the rest is not its own choice."""
        function: dict[str, Any] = {**self.TOOLS[0]["function"], "strict": True}
        strict = {"type": "function", "function": function}
        begun = "Hm.<|tool_call>call:vote{weight:"
        tokenizer = gemma_tokenizer(FORM)
        for tools, is_held in (([strict], True), ([self.TOOLS[0]], False)):
            let_say(monkeypatch, tokenizer, f"{begun}2}}<tool_call|><|tool_response>")
            response = self.ask(client, tools=tools, max_tokens=80)
            message = response.json()["choices"][0]["message"]
            called = [c["function"]["arguments"] for c in message.get("tool_calls", [])]
            assert (called == ['{"weight": 2}']) != is_held

    def test_calls_or_a_form(self, monkeypatch, client, gemma_tokenizer):
        """The model chooses which; the rest is not its own choice."""
        call = '<|tool_call>call:vote{answer:<|"|>no<|"|>,weight:2}<tool_call|>'
        schema: dict[str, Any] = {"properties": {"a": {"const": 1}}, "required": ["a"]}
        asks = (
            (f"{call}<|tool_response>", None, [{"answer": "no", "weight": 2}]),
            ('{"a":1}<turn|>', '{"a":1}', None),
            ('{"a":2}<turn|>', '{"a":1}', None),
            ("{It is as follows.<turn|>", '{"a":1}', None),
        )
        schema |= {"type": "object", "additionalProperties": False}
        given = {"name": "x", "schema": schema, "strict": True}
        form = {"type": "json_schema", "json_schema": given}
        vote = {"type": "function", "function": self.TOOLS[0]["function"]}
        for said, content, calls in asks:
            let_say(monkeypatch, gemma_tokenizer(FORM), said)
            response = self.ask(client, tools=[vote], response_format=form)
            choice = response.json()["choices"][0]
            message = choice["message"]
            called = [c["function"]["arguments"] for c in message.get("tool_calls", [])]
            assert (message["content"] or None) == content
            assert ([json.loads(each) for each in called] or None) == calls
            assert choice["finish_reason"] == ("tool_calls" if calls else "stop")

    def test_where_calls_are_required_a_form_means_nothing(self, client):
        form = {"structured_outputs": {"regex": "a"}}
        self.calls(self.ask(client, tool_choice="required", **form))
        free = self.ask(client, tool_choice="none", **form).json()["choices"][0]
        assert free["message"]["content"] == "a"

    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            ({"tool_choice": "any"}, "must be auto, none, required or a function's"),
            ({"tool_choice": {"type": "x"}}, "must be auto, none, required or a func"),
            ({"tool_choice": "required", "tools": []}, "one of the 0 tools"),
            (
                {"tool_choice": {"type": "function", "function": {"name": "x"}}},
                "one of the 2 tools",
            ),
        ],
    )
    def test_mistakes(self, client, settings, words):
        response = self.ask(client, **settings)
        assert response.status == 400
        assert words in response.message
        assert response.json()["error"]["param"] == "tool_choice"

    def test_a_schema_that_cannot_be_held_to(self, client):
        parameters = {"type": "object", "properties": {"a": {"not": {}}}}
        odd = {"type": "function", "function": {"name": "f", "parameters": parameters}}
        response = self.ask(client, tools=[odd], tool_choice="required")
        assert response.status == 400
        assert (
            "not: {} at /tools/0/function/parameters/properties/a" in response.message
        )
        assert response.json()["error"]["param"] == "tools"
        assert self.ask(client, tools=[odd], max_tokens=3).status == 200

    def test_it_is_described(self, client):
        described = client.get("/openapi.json").json()
        bodies = described["components"]["schemas"]
        schema = {
            "$ref": "#/components/schemas/ChatBody",
            "components": {"schemas": bodies},
        }
        check = jsonschema.Draft202012Validator(schema)
        named: Any = {"type": "function", "function": {"name": "vote"}}
        choices: list[Any] = ["any", {"type": "function"}]
        for choice in ("required", named):
            body = {"messages": QUESTION, "tool_choice": choice}
            assert check.is_valid({**body, "tools": list(self.TOOLS)})
            assert not check.is_valid(body)
        for choice in choices:
            body = {"messages": QUESTION, "tool_choice": choice}
            assert not check.is_valid({**body, "tools": list(self.TOOLS)})


class TestClients:
    """Recorded requests of LangChain and Instructor: they find what they look for."""

    BOX = Box(colour="blue", count=2, note=None)
    JSON = '{"colour":"blue","count":2,"note":null}'
    SAID: ClassVar = {
        CONTENT: f"{JSON}<turn|>",
        FENCED: f"```json\n{JSON}\n```<turn|>",
        CALL: '<|tool_call>call:Box{colour:<|"|>blue<|"|>,count:2,note:null}'
        "<tool_call|><|tool_response>",
    }

    def found(self, client, shape, *, stream):
        """What a client finds in an answer."""
        body = {"messages": QUESTION, "max_tokens": 99, "stream": stream}
        body |= {"reasoning_effort": "none", **shape.fields}
        response = client.ask("POST", "/v1/chat/completions", body)
        assert response.status == 200, response.body
        message, reason = (_streamed if stream else _whole)(response)
        if shape.place == CALL:
            (call,) = message["tool_calls"]
            assert (call["type"], call["function"]["name"]) == ("function", "Box")
            assert call["id"]
            assert not message["content"]
            assert reason == "tool_calls"
            return Box.model_validate_json(call["function"]["arguments"])
        assert not message.get("tool_calls")
        assert reason == "stop"
        if shape.place == CONTENT:
            return Box.model_validate_json(message["content"])
        (inside,) = re.findall("```json\n(.*)\n```", message["content"])
        return Box.model_validate_json(inside)

    @pytest.mark.parametrize("name", SHAPES)
    def test_find_what_the_model_means(
        self, monkeypatch, client, gemma_tokenizer, name
    ):
        shape = SHAPES[name]
        let_say(monkeypatch, gemma_tokenizer(FORM), self.SAID[shape.place])
        assert self.found(client, shape, stream=False) == self.BOX

    @pytest.mark.parametrize(
        "name",
        [
            "LangChain, json_schema",
            "LangChain, any tool",
            "LangChain, tools",
            "Instructor, MD_JSON",
        ],
    )
    def test_find_the_same_in_a_stream(
        self, monkeypatch, client, gemma_tokenizer, name
    ):
        shape = SHAPES[name]
        let_say(monkeypatch, gemma_tokenizer(FORM), self.SAID[shape.place])
        assert self.found(client, shape, stream=True) == self.BOX

    @pytest.mark.parametrize(
        "name", [name for name, shape in SHAPES.items() if shape.is_held]
    )
    def test_find_an_object_whatever_the_model_means(
        self, monkeypatch, client, gemma_tokenizer, name
    ):
        """Each field has a value of its own, whatever that is."""
        let_say(monkeypatch, gemma_tokenizer(FORM), "Sure! Red.<turn|>")
        assert self.found(client, SHAPES[name], stream=False).count in (1, 2, 3)


def _whole(response):
    """The message of an answer, and how it ends."""
    choice = response.json()["choices"][0]
    return choice["message"], choice["finish_reason"]


def _streamed(response):
    """The message that a client makes of a stream's deltas, as OpenAI's client does."""
    choices = [event["choices"][0] for event in response.events if event["choices"]]
    calls: dict[int, dict[str, Any]] = {}
    for delta in [call for c in choices for call in c["delta"].get("tool_calls", [])]:
        index, function = delta["index"], delta["function"]
        if index not in calls:
            assert delta.keys() == {"index", "id", "type", "function"}
            assert function["name"]
            calls[index] = {**delta, "function": {**function}}
        else:
            assert (delta.keys(), function.keys()) == (
                {"index", "function"},
                {"arguments"},
            )
            calls[index]["function"]["arguments"] += function["arguments"]
    assert [*calls] == [*range(len(calls))]
    content = "".join(c["delta"].get("content") or "" for c in choices)
    found = {"content": content, "tool_calls": [*calls.values()]}
    return found, choices[-1]["finish_reason"]
