"""Texts as tokens and back, as vLLM's server has it.

Run: python -m pytest tests/server/test_tokenizing.py
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.server.serving import (
    VOCAB_SIZE,
    ScriptedDecoder,
    echo,
    prompts_of,
    scripted_means,
    scripted_server,
    tokenizer,
    tokens_of,
)

SAID = [{"role": "system", "content": "Be."}, {"role": "user", "content": "a b"}]


@pytest.fixture(scope="module")
def client():
    with scripted_server(scripted_means(ScriptedDecoder(echo))) as (client, _):
        yield client


def tokenize(client, **fields):
    response = client.ask("POST", "/tokenize", fields)
    assert response.status == 200, response.body
    return response.json()


def detokenize(client, tokens):
    response = client.ask("POST", "/detokenize", {"tokens": tokens})
    assert response.status == 200, response.body
    return response.json()["prompt"]


def test_a_text(client):
    found = tokenize(client, prompt="a b c")
    assert found == {
        "count": 4,
        "max_model_len": 1024,
        "tokens": [2, *tokens_of("a b c")],
    }
    found = tokenize(client, prompt="a b c", add_special_tokens=False)
    assert found["tokens"] == tokens_of("a b c")
    for pieces in (True, False):
        found = tokenize(client, prompt="a b", return_token_strs=pieces)
        expected = tokenizer().convert_ids_to_tokens(found["tokens"])
        assert found.get("token_strs") == (expected if pieces else None)


def test_a_conversation(client):
    found = tokenize(client, messages=SAID)
    for opens in (True, False):  # which this template does not tell apart
        assert tokenize(client, messages=SAID, add_generation_prompt=opens) == found
    body = {"messages": SAID, "max_tokens": 1}
    usage = client.ask("POST", "/v1/chat/completions", body).json()["usage"]
    assert found["count"] == usage["prompt_tokens"]
    assert found["tokens"] == [2, *tokens_of("# Be.\na b")]


def test_where_an_answer_begins(gemma_tokenizer):
    """By a template that writes something there."""
    prompts = prompts_of(gemma_tokenizer("may-12b"))
    opened = prompts.of_messages(SAID).tokens
    closed = prompts.of_messages(SAID, opens_answer=False).tokens
    assert opened[: len(closed)] == closed
    text = gemma_tokenizer("may-12b").decode(opened[len(closed) :])
    assert text.startswith("<|turn>model\n")


@pytest.mark.parametrize(
    ("path", "fields", "message"),
    [
        ("/tokenize", {}, "prompt or messages: got both or none"),
        ("/tokenize", {"prompt": "a", "messages": SAID}, "got both or none"),
        ("/tokenize", {"prompt": [1]}, "valid string"),
        ("/tokenize", {"messages": SAID, "add_special_tokens": True}, "left out"),
        ("/tokenize", {"messages": [{"role": "user", "content": 5}]}, "messages.0"),
        ("/tokenize", {"prompt": "a " * 2000, "model": "x"}, "model must be"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [VOCAB_SIZE]}, "from 0 to 1023: got 1024"),
        ("/detokenize", {"tokens": [-1]}, "greater than or equal to 0"),
    ],
)
def test_mistakes(client, path, fields, message):
    response = client.ask("POST", path, fields)
    assert response.status in (400, 404)
    assert message in response.message


def test_no_tokens_are_no_text(client):
    assert detokenize(client, []) == ""


@settings(max_examples=30)
@given(st.text(max_size=20))
def test_there_and_back(client, text):
    found = tokenize(client, prompt=text, add_special_tokens=False)
    assert found["tokens"] == tokens_of(text)
    assert detokenize(client, found["tokens"]) == tokenizer().decode(tokens_of(text))
