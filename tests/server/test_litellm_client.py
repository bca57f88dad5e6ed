"""The real ``litellm`` against the server.

Run: make test-clients
"""

from __future__ import annotations

import json
import os
import warnings
from functools import partial
from importlib import import_module
from typing import Any

import pytest

from tests.server.served import served, served_chat

# It loads its parts late, libraries warn of some, and it makes failures of warnings.
pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore")]

KEY = "sesame"
CODE = [{"role": "user", "content": "def area(radius):\n"}]
VOTE = {
    "type": "function",
    "function": {
        "name": "vote",
        "description": "votes",
        "parameters": {
            "type": "object",
            "properties": {"answer": {"enum": ["yes", "no"]}},
            "required": ["answer"],
        },
    },
}


@pytest.fixture(scope="module")
def litellm() -> Any:
    # By name: only `make test-clients` installs it, but every run reads this file.
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it asks the network
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return import_module("litellm")


@pytest.fixture(scope="module")
def complete(litellm, tmp_path_factory):
    """``litellm.completion`` of the embedded pair."""
    settings = {"api_key": KEY, "max_retries": 0, "timeout": 120}
    with served_chat(tmp_path_factory.mktemp("litellm"), KEY) as address:
        yield partial(
            litellm.completion,
            model="openai/embedded",
            api_base=f"{address}/v1",
            messages=CODE,
            max_tokens=24,
            temperature=0,
            **settings,
        )


@pytest.fixture(scope="module")
def complete_with_tools(litellm, tmp_path_factory, gemma_pair_folder):
    """The same of a random pair of Gemma's tokens, which writes what it must."""
    arguments = ("--model", str(gemma_pair_folder("july-12b")))
    with served(
        tmp_path_factory.mktemp("gemma"), *arguments, "--served-model-name", "pair"
    ) as address:
        yield partial(
            litellm.completion,
            model="openai/pair",
            api_base=f"{address}/v1",
            api_key="none",
            messages=[{"role": "user", "content": "Vote."}],
            max_tokens=200,
            max_retries=0,
            timeout=120,
            seed=1,
            tools=[VOTE],
            extra_body={"reasoning_effort": "none"},
        )


def test_a_chat_and_its_stream(litellm, complete):
    whole = complete()
    (choice,) = whole.choices
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.finish_reason == "length"
    assert whole.usage.completion_tokens == 24
    chunks = list(complete(stream=True, stream_options={"include_usage": True}))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == choice.message.content
    again = litellm.stream_chunk_builder(chunks)
    assert again.choices[0].finish_reason == "length"
    assert again.usage.completion_tokens == 24


def test_a_call_and_its_result(litellm, complete_with_tools):
    asked: dict[str, Any] = {"tool_choice": "required", "parallel_tool_calls": False}
    (choice,) = complete_with_tools(**asked).choices
    (call,) = choice.message.tool_calls
    assert (call.function.name, choice.finish_reason) == ("vote", "tool_calls")
    assert json.loads(call.function.arguments)["answer"] in ("yes", "no")
    stream = complete_with_tools(**asked, stream=True)
    (streamed,) = litellm.stream_chunk_builder(list(stream)).choices
    (same,) = streamed.message.tool_calls
    assert same.function == call.function
    result = {"role": "tool", "tool_call_id": call.id, "content": "done"}
    question = {"role": "user", "content": "Vote."}
    messages = [question, choice.message.model_dump(exclude_none=True), result]
    answer = complete_with_tools(messages=messages, tool_choice="none", max_tokens=4)
    assert answer.usage.completion_tokens <= 4


def test_mistakes_are_its_own_errors(litellm, complete):
    with pytest.raises(litellm.AuthenticationError):
        complete(api_key="another")
    with pytest.raises(litellm.NotFoundError, match="claude"):
        complete(model="openai/claude")
    with pytest.raises(litellm.BadRequestError, match="at most"):
        complete(messages=[{"role": "user", "content": "a " * 2000}])
