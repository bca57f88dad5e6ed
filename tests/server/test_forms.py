"""Answers of a given form over HTTP: what they hold, and what is refused where.

Run: python -m pytest tests/server/test_forms.py
"""

from __future__ import annotations

import json
import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest

from mlx_gemma_mtp.errors import RequestError
from mlx_gemma_mtp.server import forms as forms_module
from mlx_gemma_mtp.server import lanes as lanes_module
from mlx_gemma_mtp.server.arguments import parse
from mlx_gemma_mtp.server.errors import AnswerError
from mlx_gemma_mtp.server.forced_calls import ForcedCalls
from mlx_gemma_mtp.server.forms import Form, Forms, form_of
from mlx_gemma_mtp.server.schema import ChatBody
from mlx_gemma_mtp.server.serve import serve
from mlx_gemma_mtp.server.web import Web
from mlx_gemma_mtp.structure import masks as masks_module
from mlx_gemma_mtp.structure.constraint import MAX_LENGTH, MAX_TEXTS, json_object
from tests.server.serving import (
    CHAT_TEMPLATE,
    WAIT_S,
    ScriptedDecoder,
    echo,
    make_scripted_request,
    pair_server,
    scripted_means,
    scripted_server,
    wait_until,
)
from tests.server.serving import tokenizer as served_tokenizer
from tests.structure.schemas import SCHEMAS
from tests.tiny import model_folder

pytestmark = pytest.mark.usefixtures("plain_graphs")

COMPLETIONS, CHAT = BOTH = ("/v1/completions", "/v1/chat/completions")
SCHEMA = SCHEMAS["told apart"]
LETTERS = {"regex": "[a-f]{2,4}-[0-9]{3}"}


def json_format(schema: Any = SCHEMA, **fields: Any) -> dict[str, Any]:
    """A body's field that asks for a schema, in OpenAI's words."""
    given = {"name": "answer", "schema": schema, **fields}
    return {"response_format": {"type": "json_schema", "json_schema": given}}


def drafts(number: Any) -> dict[str, Any]:
    return {"speculative": {"num_draft_tokens": number}}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = model_folder(tmp_path_factory.mktemp("forms") / "pair")
    arguments = ("--chat-template", CHAT_TEMPLATE, "--max-tokens", "120")
    with pair_server(folder, *arguments, "--temp", "1") as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    return server[0]


def ask(client, path, **fields):
    return (
        client.complete("x = ", **fields)
        if path == COMPLETIONS
        else client.chat("x = ", **fields)
    )


def choices_of(response):
    """The texts of a whole answer, and how each of them has ended."""
    assert response.status == 200, response.body
    return [
        (c["message"]["content"] if "message" in c else c["text"], c["finish_reason"])
        for c in response.json()["choices"]
    ]


def written(client, path=COMPLETIONS, **fields):
    """The one text of an answer that has ended by itself."""
    ((text, reason),) = choices_of(ask(client, path, **fields))
    assert reason == "stop"
    return text


class TestForms:
    @pytest.mark.parametrize("path", BOTH)
    @pytest.mark.parametrize("strict", [True, False, None])
    def test_a_schema(self, client, path, strict):
        text = written(client, path, seed=1, **json_format(strict=strict))
        jsonschema.validate(json.loads(text), SCHEMA)

    @pytest.mark.parametrize("path", BOTH)
    def test_any_object(self, server, path):
        client, parts = server
        # Ends that are likely: a random pair writes long objects.
        ends = parts.desk.forms.tokenizer.convert_tokens_to_ids(['"', "}", "]"])
        bias = {"logit_bias": {str(token): 4 for token in ends}}
        for asked in (
            {"response_format": {"type": "json_object"}},
            {"structured_outputs": {"json_object": True}},
        ):
            for seed in range(3):
                text = written(client, path, **asked, **bias, seed=seed)
                assert isinstance(json.loads(text), dict)

    @pytest.mark.parametrize("path", BOTH)
    @pytest.mark.parametrize("schema", [SCHEMA, json.dumps(SCHEMA)])
    def test_vllms_schema(self, client, path, schema):
        text = written(client, path, seed=2, structured_outputs={"json": schema})
        assert text == written(client, path, seed=2, **json_format(strict=True))

    @pytest.mark.parametrize("path", BOTH)
    def test_vllms_other_forms(self, client, path):
        def made(**form):
            return written(client, path, seed=4, structured_outputs=form)

        assert re.fullmatch(LETTERS["regex"], made(**LETTERS))
        assert made(choice=["yes", "no", "perhaps €"]) in ("yes", "no", "perhaps €")
        assert re.fullmatch(r"\(+x\)+", made(grammar='start: "(" (start | "x") ")"'))

    def test_what_vllms_client_sends_beside_them(self, client):
        nothing = dict.fromkeys(
            ["json", "choice", "grammar", "json_object", "whitespace_pattern"]
        )
        switches = {"disable_fallback": False, "disable_any_whitespace": False}
        more = {"disable_additional_properties": False, "structural_tag": None}
        asked = {**LETTERS, **nothing, **switches, **more}
        assert re.fullmatch(LETTERS["regex"], written(client, structured_outputs=asked))

    @pytest.mark.parametrize("path", BOTH)
    def test_text_is_free(self, client, path):
        fields = {"seed": 1, "max_tokens": 9}
        free = choices_of(ask(client, path, **fields))
        asked = {"response_format": {"type": "text"}, "structured_outputs": None}
        assert choices_of(ask(client, path, **fields, **asked)) == free


class TestText:
    @pytest.mark.parametrize("path", BOTH)
    @pytest.mark.parametrize("settings", [{"seed": 7}, {"temperature": 0}])
    def test_drafts_change_nothing(self, client, path, settings):
        texts = {
            written(client, path, **settings, **json_format(), **drafts(number))
            for number in (0, 4, "auto")
        }
        assert len(texts) == 1

    @pytest.mark.parametrize("path", BOTH)
    def test_a_stream_has_the_same_text(self, client, path):
        fields = {"seed": 8, **json_format()}
        events = ask(client, path, stream=True, **fields).events
        parts = [event["choices"][0] for event in events]
        found = [
            p["text"] if "text" in p else p["delta"].get("content", "") for p in parts
        ]
        assert "".join(found) == written(client, path, **fields)
        assert parts[-1]["finish_reason"] == "stop"

    def test_each_choice_has_its_seed(self, client):
        fields = {"structured_outputs": LETTERS, **drafts(4)}
        texts = [
            text for text, _ in choices_of(client.complete("x", n=3, seed=5, **fields))
        ]
        alone = [
            choices_of(client.complete("x", seed=5 + i, **fields))[0][0]
            for i in range(3)
        ]
        assert texts == alone
        assert len(set(texts)) == 3
        assert all(re.fullmatch(LETTERS["regex"], text) for text in texts)

    def test_beside_free_rows_and_other_forms(self, client):
        """Each has the text that it has alone."""
        asks: list[dict[str, Any]] = [
            {"structured_outputs": LETTERS},
            json_format(),
            {},
            {"repetition_penalty": 1.5},
            {"structured_outputs": {"choice": ["yes", "no"]}},
            {"temperature": 0},
        ]
        fields = {"seed": 3, "max_tokens": 24, **drafts(3)}

        def text(asked):
            return choices_of(client.complete("x = ", **{**fields, **asked}))

        alone = [text(asked) for asked in asks]
        with ThreadPoolExecutor(len(asks)) as threads:
            assert list(threads.map(text, asks)) == alone

    def test_several_prompts(self, client):
        asked = {"structured_outputs": LETTERS}
        for text, _ in choices_of(client.complete(["a", "b c"], n=2, **asked)):
            assert re.fullmatch(LETTERS["regex"], text)

    def test_the_limit_of_tokens(self, client):
        asked = {"structured_outputs": {"regex": "[a-z]{50}"}, "max_tokens": 5}
        ((text, reason),) = choices_of(client.complete(**asked))
        assert reason == "length"
        assert re.fullmatch("[a-z]{5,}", text)

    def test_stop_strings(self, client):
        asked = {"structured_outputs": {"regex": "a{9}b"}, "stop": "b"}
        assert written(client, **asked) == "a" * 9

    def test_fewest_tokens_beyond_the_form(self, client):
        asked = {"structured_outputs": {"choice": ["a", "aab"]}, "min_tokens": 60}
        assert written(client, **asked) in ("a", "aab")

    @pytest.mark.parametrize("path", BOTH)
    def test_log_probabilities_are_behind_the_mask(self, client, path):
        many = (
            {"logprobs": True, "top_logprobs": 3} if path == CHAT else {"logprobs": 3}
        )
        form = {"structured_outputs": {"regex": "q|z"}}
        response = ask(client, path, seed=1, temperature=0, **form, **many)
        logprobs = response.json()["choices"][0]["logprobs"]
        if path == CHAT:
            first = {
                t["token"]: t["logprob"] for t in logprobs["content"][0]["top_logprobs"]
            }
        else:
            first = logprobs["top_logprobs"][0]
        assert {token for token, value in first.items() if value > -999} == {"q", "z"}

    def test_the_rule_is_told(self, client):
        body = client.complete("x", structured_outputs=LETTERS, seed=1).json()
        assert body["speculative"]["rule"] == "coupled (seed), masked"


DEEP: dict[str, Any] = {"type": "integer"}
for _ in range(90):
    DEEP = {"type": "array", "items": DEEP}
MISTAKES: dict[str, tuple[dict[str, Any], str, str]] = {
    "a keyword that is not there": (
        json_format({"properties": {"a": {"not": {}}}}, strict=True),
        "response_format.json_schema.schema",
        "the keyword not at #/properties/a. Leave it out.",
    ),
    "a schema that is none": (
        json_format({"type": "nothing"}),
        "response_format.json_schema.schema",
        "schema must be one that text can be forced to follow",
    ),
    "a reference to nothing": (
        json_format({"$ref": "#/$defs/x"}),
        "response_format.json_schema.schema",
        "schema must be one that text can be forced to follow",
    ),
    "a schema that is too deep": (
        json_format(DEEP),
        "response_format.json_schema.schema",
        "nested at most 80 deep",
    ),
    "a schema that is too large": (
        json_format({"description": "x" * MAX_LENGTH}),
        "response_format.json_schema.schema",
        f"at most {MAX_LENGTH} characters",
    ),
    "no schema": (
        {"response_format": {"type": "json_schema"}},
        "response_format.json_schema",
        "must hold a schema: got nothing",
    ),
    "an empty schema field": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
        "response_format.json_schema.schema",
        "field required",
    ),
    "a schema of another type": (
        json_format("{}"),
        "response_format.json_schema.schema",
        "valid dictionary",
    ),
    "another type": (
        {"response_format": {"type": "xml"}},
        "response_format.type",
        "should be 'text', 'json_object' or 'json_schema'",
    ),
    "a schema in another place": (
        {"response_format": {"type": "json_object", "schema": {}}},
        "response_format.schema",
        "not permitted",
    ),
    "nothing of vLLM's": ({"structured_outputs": {}}, "structured_outputs", "got none"),
    "two of vLLM's": (
        {"structured_outputs": {"regex": "a", "choice": ["a"]}},
        "structured_outputs",
        "got regex and choice",
    ),
    "both fields": (
        {**json_format(), "structured_outputs": {"regex": "a"}},
        "structured_outputs",
        "must stand without response_format",
    ),
    "a regular expression that is none": (
        {"structured_outputs": {"regex": "a("}},
        "structured_outputs.regex",
        "regex must be one that can be compiled",
    ),
    "a grammar that is none": (
        {"structured_outputs": {"grammar": 'start: "a" | x'}},
        "structured_outputs.grammar",
        "grammar must be one that can be compiled",
    ),
    "a control token that is none": (
        {"structured_outputs": {"grammar": "start: <|nothing|>"}},
        "structured_outputs.grammar",
        "unknown special token",
    ),
    "no choice": (
        {"structured_outputs": {"choice": []}},
        "structured_outputs.choice",
        "at least 1",
    ),
    "an empty choice": (
        {"structured_outputs": {"choice": ["a", ""]}},
        "structured_outputs.choice.1",
        "at least 1 character",
    ),
    "too many choices": (
        {"structured_outputs": {"choice": ["a"] * (MAX_TEXTS + 1)}},
        "structured_outputs.choice",
        f"at most {MAX_TEXTS} items",
    ),
    "JSON text that is none": (
        {"structured_outputs": {"json": "{"}},
        "structured_outputs.json",
        "must be a JSON schema",
    ),
    "tags": (
        {"structured_outputs": {"structural_tag": "{}"}},
        "structured_outputs.structural_tag",
        "should be None",
    ),
    "no text's end": (
        {"structured_outputs": {"regex": "a"}, "ignore_eos": True},
        "ignore_eos",
        "must be left out where an answer has a given form",
    ),
}


class TestRefused:
    @pytest.mark.parametrize("path", BOTH)
    @pytest.mark.parametrize("name", MISTAKES)
    def test_with_the_place(self, server, path, name):
        client, parts = server
        fields, place, reason = MISTAKES[name]
        for stream in (False, True):
            response = ask(client, path, stream=stream, **fields)
            assert response.status == 400
            error = response.json()["error"]
            assert error["param"] == place
            assert reason in response.message
            assert place in response.message
            assert len(response.message) < 1200
            assert response.message.count("\n") == 0
        assert parts.bridge._num_prepared == 0

    def test_beside_tools_of_a_model_without_their_marks(self):
        said = [{"role": "user", "content": "x"}]
        tools = [{"type": "function", "function": {"name": "f"}}]
        asked = {"messages": said, "structured_outputs": {"regex": "a"}}
        body = ChatBody.model_validate(asked)
        form = form_of(body)
        calls = ForcedCalls(served_tokenizer())
        assert calls.of(body, (), form) is form
        with pytest.raises(AnswerError, match="stand without tools") as refused:
            calls.of(body, tools, form)
        assert refused.value.param == "structured_outputs.regex"

    def test_where_the_library_is_missing(self, client, monkeypatch):
        monkeypatch.setitem(sys.modules, "llguidance", None)
        response = client.complete(structured_outputs=LETTERS)
        assert response.status == 400
        assert "Install mlx_gemma_mtp[structure]." in response.message

    def test_where_the_tokenizer_cannot_be_read(self):
        bare = SimpleNamespace(chat_template=None, get_added_vocab=dict)
        forms = Forms(bare)
        for _ in range(2):
            with pytest.raises(AnswerError, match="Use a checkpoint with") as refused:
                forms.compiled(Form("response_format", json_object))
            assert refused.value.status == 400

    @pytest.mark.parametrize("stream", [False, True])
    def test_where_no_token_goes_on(self, client, monkeypatch, stream):
        """Only the row that has come there ends."""
        fields = {"max_tokens": 24, "seed": 1}
        alone = choices_of(client.complete("x", **fields))
        check = masks_module.RowMasks._check

        def failing(masks, words):
            if masks._num_consumed >= 4:
                raise RequestError("regex must leave a token that goes on: got none.")
            check(masks, words)

        monkeypatch.setattr(masks_module.RowMasks, "_check", failing)
        with ThreadPoolExecutor(2) as threads:
            free = threads.submit(client.complete, "x", **fields)
            asked = {"regex": "[a-z]{40}"}
            response = client.complete(structured_outputs=asked, stream=stream)
            assert choices_of(free.result()) == alone
        last = response.body.split(b"data: ")[-1]
        error = json.loads(last)["error"]
        assert "must leave a token that goes on" in error["message"]
        assert response.status == (200 if stream else 400)


class TestDescription:
    @pytest.fixture(scope="class")
    @classmethod
    def described(cls, client):
        return client.get("/openapi.json").json()

    @pytest.mark.parametrize(
        "fields",
        [
            *({"response_format": {"type": kind}} for kind in ("text", "json_object")),
            {"response_format": {"type": "json_object", "json_schema": None}},
            json_format({"const": 1}),
            {"structured_outputs": {"choice": ["a"], "json": None}},
            {"structured_outputs": {"choice": ["a"], "json": {}}},
            {"structured_outputs": {"json_object": True}},
            {"structured_outputs": {"json_object": False}},
            {"structured_outputs": {"regex": "a", "disable_any_whitespace": True}},
            *(
                fields
                for fields, place, _ in MISTAKES.values()
                # Its own words say what is wrong with these, not the description.
                if not place.endswith((".schema", ".regex", ".grammar", ".json"))
                and len(fields) == 1
            ),
        ],
        ids=str,
    )
    def test_takes_what_the_server_takes(self, client, described, fields):
        ((name, value),) = fields.items()
        kind = {"response_format": "ResponseFormat"}.get(name, "StructuredOutputs")
        reference = {"$ref": f"#/components/schemas/{kind}", **described}
        is_valid = jsonschema.Draft202012Validator(reference).is_valid(value)
        response = client.complete(max_tokens=1, **fields)
        assert is_valid == (response.status == 200), response.body


class TestCompiling:
    def test_the_server_answers_meanwhile(self, monkeypatch):
        may_end = threading.Event()
        make = forms_module.regex

        def slow(text):
            assert may_end.wait(WAIT_S)
            return make(text)

        monkeypatch.setattr(forms_module, "regex", slow)
        choices = []

        def make_request(choice):
            choices.append(choice)
            return make_scripted_request(choice)

        means = scripted_means(ScriptedDecoder(echo), make_request=make_request)
        with scripted_server(means) as (client, parts):
            body = {"prompt": "a b", "max_tokens": 2, "structured_outputs": LETTERS}
            opened = [client.connect() for _ in range(3)]
            for connection in opened:
                client.send(connection, "POST", COMPLETIONS, body)
            wait_until(lambda: parts.bridge._num_prepared == 3)
            assert client.complete(max_tokens=2).status == 200
            assert client.get("/health").status == 200
            opened.pop(0).close()  # who was first does not wait any more
            wait_until(lambda: parts.bridge._num_prepared == 2)
            may_end.set()
            for connection in opened:
                assert connection.getresponse().status == 200
                connection.close()
        forced = [choice.constraint is not None for choice in choices]
        assert forced == [False, True, True]

    def test_the_tokenizer_is_built_before_anybody_is_answered(self, monkeypatch):
        happened = []
        monkeypatch.setattr(Forms, "prepare", lambda forms: happened.append("built"))

        def start(web, opened):
            happened.append("answers")
            raise RequestError("enough")

        monkeypatch.setattr(Web, "start", start)
        with pytest.raises(RequestError, match="enough"):
            serve(parse(["--port", "0"]))
        assert happened == ["built", "answers"]

    @pytest.mark.parametrize("error", [RequestError("no such file"), OSError("full")])
    def test_a_failed_build_is_told_and_tried_again(self, monkeypatch, error):
        """The server starts all the same, and a later build may succeed."""
        calls = []
        build = masks_module.grammar_tokenizer

        def failing(tokenizer):
            calls.append(tokenizer)
            if len(calls) < 3:
                raise error
            return build(tokenizer)

        monkeypatch.setattr(forms_module, "grammar_tokenizer", failing)
        monkeypatch.setattr(masks_module, "grammar_tokenizer", failing)
        forms = Forms(served_tokenizer())
        forms.prepare()
        form = Form("response_format", json_object)
        told = AnswerError if isinstance(error, RequestError) else OSError
        with pytest.raises(told, match=str(error)):
            forms.compiled(form)
        assert forms.compiled(form).constraint == json_object()

    def test_what_takes_too_long_is_given_up(self, monkeypatch):
        may_end = threading.Event()
        monkeypatch.setattr(lanes_module, "LIMIT_S", 0.01)
        monkeypatch.setattr(forms_module, "json_object", lambda: may_end.wait(WAIT_S))
        with scripted_server(scripted_means(ScriptedDecoder(echo))) as (client, parts):
            response = client.complete(response_format={"type": "json_object"})
            may_end.set()
            assert response.status == 400
            assert "response_format: it must be compiled within" in response.message
            assert parts.bridge._num_prepared == 0
