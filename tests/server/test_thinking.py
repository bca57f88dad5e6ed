"""How long answers may think: what fields ask for, and what comes of it over HTTP.

Run: python -m pytest tests/server/test_thinking.py
"""

from __future__ import annotations

import json
import sys

import jsonschema
import pytest

from mlx_gemma_mtp.server import thinking as thinking_module
from mlx_gemma_mtp.server.errors import AnswerError
from mlx_gemma_mtp.server.schema import ChatBody, CompletionBody
from mlx_gemma_mtp.server.thinking import LIMITS, ThinkingLimits
from mlx_gemma_mtp.structure.constraint import regex
from mlx_gemma_mtp.structure.masks import BoundConstraint
from tests.gemma import SMALL_SIZE
from tests.gemma_pair import let_say
from tests.server.serving import (
    ScriptedDecoder,
    echo,
    pair_server,
    scripted_means,
    scripted_server,
    tokenizer,
)

pytestmark = pytest.mark.usefixtures("plain_graphs")

MESSAGES = [{"role": "user", "content": "a"}]


@pytest.fixture
def gemma(gemma_tokenizer):
    return gemma_tokenizer("july-e2b")


class TestLimits:
    def limit(self, gemma, *, max_tokens=10**5, is_thinking=True, **fields):
        body = ChatBody.model_validate({"messages": MESSAGES, **fields})
        limits = ThinkingLimits(gemma, SMALL_SIZE)
        limits.check(body)
        found = limits.constraint_of(
            body, None, is_thinking=is_thinking, max_tokens=max_tokens
        )
        return found and found._thoughts.limit

    @pytest.mark.parametrize(
        ("fields", "limit"),
        [
            ({}, None),
            ({"reasoning_effort": "none"}, None),
            ({"reasoning_effort": "minimal"}, 512),
            ({"reasoning_effort": "Low"}, 1024),
            ({"reasoning_effort": "medium"}, 8192),
            *(({"reasoning_effort": e}, None) for e in ("high", "xhigh", "max", "x")),
            ({"max_thinking_tokens": 0}, 0),
            ({"max_thinking_tokens": 7.0}, 7),
            ({"max_thinking_tokens": None, "thinking_token_budget": 8}, 8),
            ({"max_thinking_tokens": 7, "thinking_token_budget": 8}, 7),
            ({"max_thinking_tokens": -1, "thinking_token_budget": 8}, None),
            ({"max_thinking_tokens": 9, "reasoning_effort": "low"}, 9),
            ({"thinking_token_budget": -1, "reasoning_effort": "low"}, None),
            ({"max_thinking_tokens": 9, "reasoning_effort": "none"}, 9),
        ],
        ids=str,
    )
    def test_are_those_of_the_fields(self, gemma, fields, limit):
        assert self.limit(gemma, **fields) == limit

    def test_efforts_mean_nothing_without_thinking(self, gemma):
        asked = {"is_thinking": False}
        assert self.limit(gemma, **asked, reasoning_effort="low") is None
        assert self.limit(gemma, **asked, max_thinking_tokens=3) == 3

    @pytest.mark.parametrize(("max_tokens", "limit"), [(6, None), (7, 7)])
    def test_one_that_is_never_reached_is_none(self, gemma, max_tokens, limit):
        asked = {"max_thinking_tokens": 7, "max_tokens": max_tokens}
        assert self.limit(gemma, **asked) == limit

    def test_a_form_keeps_its_own(self, gemma):
        form = BoundConstraint(regex("[ab]"), gemma)
        body = CompletionBody(prompt="a", max_thinking_tokens=2)
        limits = ThinkingLimits(gemma, SMALL_SIZE)
        found = limits.constraint_of(body, form, is_thinking=False, max_tokens=9)
        assert found is not None
        assert found is not form
        assert found.constraint is form.constraint
        body = CompletionBody(prompt="a")
        same = limits.constraint_of(body, form, is_thinking=False, max_tokens=9)
        assert same is form

    def test_a_model_without_marks_has_none(self):
        limits = ThinkingLimits(tokenizer(), 512)
        assert not limits.are_possible
        body = ChatBody.model_validate(
            {"messages": MESSAGES, "reasoning_effort": "low"}
        )
        limits.check(body)
        assert not limits.constraint_of(body, None, is_thinking=True, max_tokens=9999)
        asked = CompletionBody(prompt="a", thinking_token_budget=2)
        with pytest.raises(AnswerError, match="for this model: got 2") as refused:
            limits.check(asked)
        assert refused.value.param == "thinking_token_budget"


@pytest.fixture(scope="module")
def client(gemma_pair_folder):
    with pair_server(gemma_pair_folder("july-e2b")) as (client, _):
        yield client


THOUGHT = "One. Two. Three. Four."
SAID = f"<|channel>thought\n{THOUGHT}\n<channel|>Yes<turn|>"


class TestAnswers:
    @pytest.fixture(autouse=True)
    def _speech(self, monkeypatch, gemma):
        let_say(monkeypatch, gemma, SAID)

    def ask(self, client, **fields):
        body = client.chat("a b", max_tokens=60, **fields).json()
        (choice,) = body["choices"]
        assert choice["finish_reason"] == "stop"
        return choice["message"]

    @pytest.mark.parametrize(
        "fields",
        [
            {"max_thinking_tokens": 5},
            {"thinking_token_budget": 5, "speculative": {"num_draft_tokens": 0}},
            {"reasoning_effort": "low"},
        ],
        ids=str,
    )
    def test_a_thought_is_cut_and_the_answer_follows(
        self, client, monkeypatch, gemma, fields
    ):
        """It goes on with what it would have thought; llguidance is not needed."""
        monkeypatch.setitem(sys.modules, "llguidance", None)
        monkeypatch.setattr(thinking_module, "EFFORTS", {"low": 5})
        message = self.ask(client, **fields)
        tokens = gemma.encode(THOUGHT, add_special_tokens=False)
        assert message["reasoning"] == gemma.decode(tokens[:4])
        assert message["content"].endswith("Yes")

    @pytest.mark.parametrize(
        "fields", [{"max_thinking_tokens": 40}, {"reasoning_effort": "high"}], ids=str
    )
    def test_a_short_thought_is_whole(self, client, fields):
        message = self.ask(client, **fields)
        assert (message["reasoning"], message["content"]) == (THOUGHT, "Yes")

    def test_a_form_follows(self, client):
        asked = {"structured_outputs": {"json": {"const": {"a": 1}}}}
        message = self.ask(client, max_thinking_tokens=5, **asked)
        assert json.loads(message["content"]) == {"a": 1}
        assert 0 < len(message["reasoning"]) < len(THOUGHT)

    def test_completions_have_it_too(self, client, gemma):
        prompt = gemma.apply_chat_template(
            MESSAGES,
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=True,
        )
        # Behind the ban all tokens are alike: drawn, the first one might be an end.
        fields = {"max_thinking_tokens": 0, "max_tokens": 4, "temperature": 0}
        text = client.complete(prompt, **fields).json()["choices"][0]["text"]
        assert "<|channel>" not in text
        assert "thought" in text


@pytest.mark.parametrize("name", LIMITS)
@pytest.mark.parametrize(
    ("value", "status"), [(-2, 400), (1.5, 400), ("3", 400), (True, 400), (-1, 200)]
)
def test_what_is_no_limit_is_refused(client, name, value, status):
    response = client.complete("a", max_tokens=1, **{name: value})
    assert response.status == status
    if status == 400:
        assert response.json()["error"]["param"] == name
        assert response.message.startswith(f"{name}: ")
        assert "\n" not in response.message


@pytest.mark.parametrize("name", LIMITS)
@pytest.mark.parametrize(
    ("kind", "needed"), [("ChatBody", {"messages": MESSAGES}), ("CompletionBody", {})]
)
def test_the_description_says_whether_there_are_limits(client, name, kind, needed):
    with scripted_server(scripted_means(ScriptedDecoder(echo))) as (other, _):
        for each in (client, other):
            described = each.get("/openapi.json").json()
            reference = {"$ref": f"#/components/schemas/{kind}", **described}
            validator = jsonschema.Draft202012Validator(reference)
            for value in (None, -1, 0, 5, -2, 2**40):
                fields = {"max_tokens": 1, name: value}
                response = (each.chat if needed else each.complete)("a", **fields)
                is_valid = validator.is_valid({"prompt": "a", **needed, **fields})
                assert is_valid == (response.status == 200)
