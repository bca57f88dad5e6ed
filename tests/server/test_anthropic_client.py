"""The real ``anthropic`` client against the server.

Run: make test-clients
"""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import Any

import pytest

from mlx_gemma_mtp.server.fields import Fields
from mlx_gemma_mtp.server.messages.schema import REFUSED, WITHOUT_EFFECT, MessagesBody
from tests.server.served import served, served_chat

pytestmark = pytest.mark.clients

KEY = "sesame"
CODE = "def area(radius):\n"
SHORT: dict[str, Any] = {"model": "embedded", "max_tokens": 24}
# The client knows these fields no more; the API has them.
GREEDY: dict[str, Any] = {"extra_body": {"temperature": 0}}
VOTE = {
    "name": "vote",
    "description": "votes",
    "input_schema": {
        "type": "object",
        "properties": {"answer": {"enum": ["yes", "no"]}},
        "required": ["answer"],
    },
}


@pytest.fixture(scope="module")
def anthropic() -> Any:
    # By name: only `make test-clients` installs it, but every run reads this file.
    return import_module("anthropic")


@pytest.fixture(scope="module")
def client(anthropic, tmp_path_factory):
    with (
        served_chat(tmp_path_factory.mktemp("anthropic"), KEY) as address,
        anthropic.Anthropic(
            base_url=address, api_key=KEY, max_retries=0, timeout=120
        ) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def pair_client(anthropic, tmp_path_factory, gemma_pair_folder):
    """A client of a random pair of Gemma's tokens."""
    folder = tmp_path_factory.mktemp("gemma")
    pair = gemma_pair_folder("july-12b")
    arguments = ("--model", str(pair), "--served-model-name", "pair")
    with (
        served(folder, *arguments) as address,
        anthropic.Anthropic(
            base_url=address, api_key="none", max_retries=0, timeout=120
        ) as client,
    ):
        yield client


def said(content: str) -> Any:
    return [{"role": "user", "content": content}]


class TestMessages:
    def test_whole(self, client):
        found = client.messages.create(messages=said(CODE), **SHORT, **GREEDY)
        (block,) = found.content
        assert (block.type, found.role, found.model) == (
            "text",
            "assistant",
            "embedded",
        )
        assert block.text
        assert found.stop_reason == "max_tokens"
        assert found.usage.output_tokens == 24
        assert found._request_id

    def test_a_stream(self, client):
        whole = client.messages.create(messages=said(CODE), **SHORT, **GREEDY)
        request = {"messages": said(CODE), **SHORT, **GREEDY}
        with client.messages.stream(**request) as stream:
            text = "".join(stream.text_stream)
            final = stream.get_final_message()
        assert text == final.content[0].text == whole.content[0].text
        assert final.stop_reason == "max_tokens"
        assert final.usage.output_tokens == 24
        events = client.messages.create(**request, stream=True)
        kinds = [event.type for event in events]
        assert kinds[0] == "message_start"
        assert kinds[-2:] == ["message_delta", "message_stop"]

    def test_the_betas_path(self, client):
        found = client.beta.messages.create(
            messages=said(CODE), betas=["context-management-2025-06-27"], **SHORT
        )
        assert found.content[0].text

    def test_tokens_are_counted(self, client):
        request = {"messages": said(CODE), "system": "Be brief.", "model": "embedded"}
        count = client.messages.count_tokens(**request).input_tokens
        usage = client.messages.create(**request, max_tokens=1).usage
        assert count == usage.input_tokens + usage.cache_read_input_tokens

    def test_a_stop_string(self, client):
        whole = client.messages.create(messages=said(CODE), **SHORT, **GREEDY)
        stop = whole.content[0].text[9:12]
        found = client.messages.create(
            messages=said(CODE), stop_sequences=[stop], **SHORT, **GREEDY
        )
        assert (found.stop_reason, found.stop_sequence) == ("stop_sequence", stop)


class TestTools:
    """A random pair writes what it must, and nothing of its own."""

    @pytest.fixture
    def request_(self):
        return {
            "model": "pair",
            "max_tokens": 200,
            "messages": said("Vote."),
            "tools": [VOTE],
            "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
            "extra_body": {"seed": 1},
        }

    def test_a_call_and_its_result(self, pair_client, request_):
        found = pair_client.messages.create(**request_)
        (call,) = found.content
        assert (call.type, call.name, found.stop_reason) == (
            "tool_use",
            "vote",
            "tool_use",
        )
        assert call.input["answer"] in ("yes", "no")
        result = {"type": "tool_result", "tool_use_id": call.id, "content": "done"}
        request_["messages"] += [
            {"role": "assistant", "content": found.content},
            {"role": "user", "content": [result]},
        ]
        request_["tool_choice"] = {"type": "none"}
        request_["max_tokens"] = 4
        assert pair_client.messages.create(**request_).usage.output_tokens <= 4

    def test_a_stream(self, pair_client, request_):
        with pair_client.messages.stream(**request_) as stream:
            kinds = {event.type for event in stream}
            (call,) = stream.get_final_message().content
        assert "input_json" in kinds
        assert call.input["answer"] in ("yes", "no")

    def test_a_limited_thought(self, pair_client):
        thinking = {"type": "enabled", "budget_tokens": 1024}
        begun = [
            *said("Vote."),
            {"role": "assistant", "content": "<|channel>thought\n"},
        ]
        found = pair_client.messages.create(
            model="pair",
            max_tokens=12,
            messages=begun,
            thinking=thinking,
            extra_body={"seed": 2, "max_thinking_tokens": 5},
        )
        assert found.content[0].type == "thinking"
        assert found.content[0].signature
        assert 0 < found.usage.output_tokens_details.thinking_tokens <= 6

    def test_a_form(self, pair_client):
        schema = {
            "type": "object",
            "properties": {"answer": {"enum": ["yes", "no"]}},
            "required": ["answer"],
            "additionalProperties": False,
        }
        form = {"format": {"type": "json_schema", "schema": schema}}
        found = pair_client.messages.create(
            model="pair", max_tokens=60, messages=said("Vote."), output_config=form
        )
        assert found.content[0].text in ('{"answer":"yes"}', '{"answer":"no"}')


class TestErrors:
    def test_every_parameter_is_known(self, client, caplog):
        """Obeyed, refused, or without effect on the text."""
        for method in (client.messages.create, client.beta.messages.create):
            names = set(inspect.signature(method).parameters)
            extra = dict.fromkeys(
                name
                for name in names - set(MessagesBody.model_fields)
                if not name.startswith("extra_")
            )
            assert extra.pop("timeout", "") is None
            Fields().check(extra, REFUSED, WITHOUT_EFFECT)
        assert caplog.messages == []

    @pytest.mark.parametrize(
        ("changes", "name", "words"),
        [
            ({"model": "claude"}, "NotFoundError", "claude"),
            ({"max_tokens": 0}, "BadRequestError", "max_tokens"),
            ({"messages": []}, "BadRequestError", "messages"),
            (
                {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
                "BadRequestError",
                "no tools of its own",
            ),
            ({"messages": said("a " * 2000)}, "BadRequestError", "prompt is too long"),
        ],
    )
    def test_mistakes(self, client, anthropic, changes, name, words):
        request = {"messages": said(CODE), **SHORT, **changes}
        with pytest.raises(getattr(anthropic, name), match=words) as error:
            client.messages.create(**request)
        assert error.value.request_id

    def test_a_wrong_key(self, client, anthropic):
        other = client.with_options(api_key="another")
        with pytest.raises(anthropic.AuthenticationError):
            other.messages.create(messages=said(CODE), **SHORT)
