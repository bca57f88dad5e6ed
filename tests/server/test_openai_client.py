"""The real ``openai`` client against the server.

Run: make test-clients
"""

from __future__ import annotations

import asyncio
import inspect
import json
import re
from importlib import import_module
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field

from mlx_gemma_mtp.server.fields import Fields
from mlx_gemma_mtp.server.responses_api.schema import (
    REFUSED,
    WITHOUT_EFFECT,
    ResponsesBody,
)
from mlx_gemma_mtp.server.schema import ChatBody, CompletionBody
from tests.server.served import ROOT, served, served_chat

pytestmark = pytest.mark.clients

KEY = "sesame"
MODEL = "embedded"
CODE = "def area(radius):\n"
GREEDY: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_tokens": 24}
LONG: dict[str, Any] = {**GREEDY, "max_tokens": 200}
PLAIN = {"speculative": {"num_draft_tokens": 0}}
# Repeated text is what the embedded pair goes on with.
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
CALL = "<|tool_call>call:add{a:1}<tool_call|>\n"
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "adds",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
}


class Side(BaseModel):
    """A part of what an answer is to be."""

    width: Annotated[int, Field(ge=0, le=9)]
    is_open: bool


def schema_format(schema: Any) -> dict[str, Any]:
    given = {"name": "answer", "strict": True, "schema": schema}
    return {"type": "json_schema", "json_schema": given}


@pytest.fixture(scope="module")
def openai() -> Any:
    # By name: only `make test-clients` installs it, but every run reads this file.
    return import_module("openai")


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder = tmp_path_factory.mktemp("openai")
    with served_chat(folder, KEY, "--draft-source", "auto") as address:
        yield address


@pytest.fixture(scope="module")
def client(openai, address):
    with openai.OpenAI(
        base_url=f"{address}/v1", api_key=KEY, max_retries=0, timeout=120
    ) as client:
        yield client


def said(content: str) -> Any:
    return [{"role": "user", "content": content}]


class TestModels:
    def test_list(self, client):
        assert [model.id for model in client.models.list()] == [MODEL]

    def test_retrieve(self, client, openai):
        assert client.models.retrieve(MODEL).id == MODEL
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("gpt-4")


class TestCompletions:
    def test_the_text_does_not_depend_on_drafts(self, client):
        drafted = client.completions.create(prompt=CODE, **GREEDY)
        plain = client.completions.create(prompt=CODE, **GREEDY, extra_body=PLAIN)
        assert drafted.choices[0].text == plain.choices[0].text != ""
        assert drafted.object == "text_completion"

    def test_usage(self, client):
        fixed = {"speculative": {"num_draft_tokens": 3}}
        found = client.completions.create(prompt=CODE, **GREEDY, extra_body=fixed)
        plain = client.completions.create(prompt=CODE, **GREEDY, extra_body=PLAIN)
        for usage in (found.usage, plain.usage):
            assert usage.completion_tokens == 24
            assert usage.total_tokens == usage.prompt_tokens + 24
            details = usage.completion_tokens_details  # nothing was predicted
            assert details.accepted_prediction_tokens == 0
            assert details.rejected_prediction_tokens == 0
        assert plain.speculative["drafted"] == 0
        assert found.speculative["accepted"] <= found.speculative["drafted"]

    def test_stream(self, client):
        whole = client.completions.create(prompt=CODE, **GREEDY)
        chunks = list(
            client.completions.create(
                prompt=CODE,
                **GREEDY,
                stream=True,
                stream_options={"include_usage": True},
            )
        )
        *parts, last = chunks
        assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text
        assert parts[-1].choices[0].finish_reason == "length"
        assert len(parts) > 1
        assert last.choices == []
        assert last.usage.completion_tokens == 24

    def test_several_prompts_and_choices(self, client):
        found = client.completions.create(
            model=MODEL,
            prompt=[CODE, "import "],
            n=2,
            temperature=1.0,
            seed=5,
            max_tokens=8,
        )
        assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
        again = client.completions.create(
            model=MODEL, prompt="import ", temperature=1.0, seed=5, max_tokens=8
        )
        assert again.choices[0].text == found.choices[2].text

    def test_token_ids(self, client):
        found = client.completions.create(prompt=[2, 40, 41], **GREEDY)
        assert found.usage.prompt_tokens == 3

    def test_stop_and_bias(self, client):
        whole = client.completions.create(prompt=CODE, **GREEDY).choices[0].text
        stop = whole[8:11]
        found = client.completions.create(prompt=CODE, **GREEDY, stop=stop).choices[0]
        assert found.text == whole[: whole.index(stop)]
        assert found.finish_reason == "stop"
        biased = client.completions.create(
            prompt=CODE, **GREEDY | {"logit_bias": {"300": 100}}
        )
        text = biased.choices[0].text
        assert text == text[: len(text) // 24] * 24 != ""

    def test_logprobs(self, client):
        found = client.completions.create(prompt=CODE, **GREEDY, logprobs=3).choices[0]
        logprobs = found.logprobs
        assert "".join(logprobs.tokens) == found.text
        assert len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == 24
        for own, best in zip(
            logprobs.token_logprobs, logprobs.top_logprobs, strict=True
        ):
            assert len(best) == 3
            assert own == max(best.values()) <= 0  # it is greedy


class TestChat:
    def test_create(self, client):
        found = client.chat.completions.create(messages=said(CODE), **GREEDY)
        message = found.choices[0].message
        assert message.role == "assistant"
        assert (
            message.content
            == client.completions.create(prompt=CODE, **GREEDY).choices[0].text
        )

    def test_predicted_outputs(self, client, openai):
        """The text is the same; the usage says how much of the prediction it has."""
        plain = client.chat.completions.create(messages=said(CODE), **GREEDY)
        text = plain.choices[0].message.content
        sources = {"speculative": {"sources": ["lookup"]}}
        parts = [{"type": "text", "text": text[:9]}, {"type": "text", "text": text[9:]}]
        for content in (text, parts, "Nothing of the kind."):
            found = client.chat.completions.create(
                messages=said(CODE),
                prediction={"type": "content", "content": content},
                extra_body=sources,
                **GREEDY,
            )
            assert found.choices[0].message.content == text
            details = found.usage.completion_tokens_details
            is_right = content != "Nothing of the kind."
            assert (details.accepted_prediction_tokens > 15) == is_right
            assert details.rejected_prediction_tokens >= 0
            assert is_right or details.rejected_prediction_tokens > 0
        wrong: Any
        for wrong in ({"type": "content"}, {"type": "text", "content": "x"}, "x"):
            with pytest.raises(openai.BadRequestError, match="prediction") as refused:
                client.chat.completions.create(
                    messages=said(CODE), prediction=wrong, **GREEDY
                )
            assert "\n" not in refused.value.body["message"]

    def test_content_in_parts_and_other_names(self, client):
        parts = [{"type": "text", "text": "def area"}, {"type": "text", "text": "(r):"}]
        messages: Any = [
            {"role": "developer", "content": "import os\n"},
            {"role": "user", "content": parts},
        ]
        found = client.chat.completions.create(
            model=MODEL, messages=messages, max_completion_tokens=4
        )
        assert found.usage.completion_tokens == 4

    def test_stream(self, client):
        whole = client.chat.completions.create(messages=said(CODE), **GREEDY)
        chunks = list(
            client.chat.completions.create(
                messages=said(CODE),
                **GREEDY,
                stream=True,
                stream_options={"include_usage": True},
            )
        )
        *parts, last = chunks
        text = "".join(part.choices[0].delta.content or "" for part in parts)
        assert text == whole.choices[0].message.content
        assert parts[0].choices[0].delta.role == "assistant"
        assert last.usage == whole.usage.model_copy(
            update={
                name: getattr(last.usage, name)  # these depend on what was learnt
                for name in ("completion_tokens_details", "prompt_tokens_details")
            }
        )
        assert last.speculative["rounds"] >= 1

    def test_the_stream_of_the_clients_helper(self, client):
        """Which refuses texts that are cut off."""
        whole = client.chat.completions.create(messages=said(CODE), **GREEDY)
        text = whole.choices[0].message.content
        stop = text[8:11]
        request = {"messages": said(CODE), **GREEDY, "stop": stop}
        with client.chat.completions.stream(**request) as stream:
            kinds = {event.type for event in stream}
            final = stream.get_final_completion()
        assert {"chunk", "content.delta", "content.done"} <= kinds
        assert final.choices[0].message.content == text[: text.index(stop)]

    def test_a_stream_that_is_left(self, client):
        """The server goes on with others."""
        stream = client.chat.completions.create(
            messages=said(CODE), **GREEDY | {"max_tokens": 500}, stream=True
        )
        next(iter(stream))
        stream.close()
        again = client.chat.completions.create(messages=said(CODE), **GREEDY)
        assert again.usage.completion_tokens == 24

    def test_logprobs(self, client):
        found = client.chat.completions.create(
            messages=said(CODE), **GREEDY, logprobs=True, top_logprobs=2
        )
        content = found.choices[0].logprobs.content
        assert len(content) == 24
        text = b"".join(bytes(token.bytes) for token in content).decode()
        assert text == found.choices[0].message.content
        for token in content:
            assert token.logprob == token.top_logprobs[0].logprob <= 0
            assert len(token.top_logprobs) == 2

    def test_a_tool_is_called(self, client):
        """Many calls in a row are a text to go on with."""
        request: Any = GREEDY | {
            "messages": said(CALL * 4),
            "tools": [TOOL],
            "max_tokens": 40,
        }
        message = client.chat.completions.create(**request).choices[0].message
        call = message.tool_calls[0]
        assert call.function.name == "add"
        assert json.loads(call.function.arguments) == {"a": 1}
        chunks = list(client.chat.completions.create(**request, stream=True))
        calls = [
            call
            for chunk in chunks
            for choice in chunk.choices
            for call in choice.delta.tool_calls or []
        ]
        assert calls[0].function.name == "add"
        text = "".join(c.function.arguments or "" for c in calls if c.index == 0)
        assert json.loads(text) == {"a": 1}
        none = client.chat.completions.create(**request, tool_choice="none")
        assert none.choices[0].message.tool_calls is None


class Box(BaseModel):
    """What an answer is to be."""

    colour: Literal["red", "green", "blue"]
    sides: Annotated[list[Side], Field(max_length=3)]
    note: Annotated[str, Field(max_length=8)] | None


class TestForms:
    @pytest.mark.parametrize("number", [0, 4, "auto"])
    def test_a_class_of_pydantic(self, client, number):
        found = client.chat.completions.parse(
            messages=said(CODE),
            response_format=Box,
            **{**LONG, "temperature": 1, "seed": 3},
            extra_body={"speculative": {"num_draft_tokens": number}},
        )
        (choice,) = found.choices
        assert choice.finish_reason == "stop"
        assert isinstance(choice.message.parsed, Box)
        assert choice.message.parsed == Box.model_validate_json(choice.message.content)

    def test_a_stream_of_one(self, client):
        asked = {"messages": said(CODE), "response_format": Box, **LONG}
        whole = client.chat.completions.parse(**asked)
        with client.chat.completions.stream(**asked) as stream:
            kinds = {event.type for event in stream}
            final = stream.get_final_completion()
        assert "content.delta" in kinds
        assert final.choices[0].message.parsed == whole.choices[0].message.parsed

    def test_one_that_is_cut_off(self, client, openai):
        with pytest.raises(openai.LengthFinishReasonError):
            client.chat.completions.parse(
                messages=said(CODE), response_format=Box, **{**GREEDY, "max_tokens": 3}
            )

    def test_vllms_forms(self, client):
        for create, prompt in (
            (client.completions.create, {"prompt": CODE}),
            (client.chat.completions.create, {"messages": said(CODE)}),
        ):
            form = {"structured_outputs": {"choice": ["yes", "no"]}}
            (choice,) = create(**prompt, **GREEDY, extra_body=form).choices
            text = choice.text if "prompt" in prompt else choice.message.content
            assert text in ("yes", "no")


class Vote(BaseModel):
    """A vote."""

    answer: Literal["yes", "no"]
    weight: Annotated[int, Field(ge=1, le=3)]
    rival: Annotated[str, Field(max_length=4)] | None


@pytest.fixture(scope="module")
def pair_client(openai, tmp_path_factory, gemma_pair_folder):
    """A client of a random pair of Gemma's tokens."""
    folder = tmp_path_factory.mktemp("gemma")
    pair = gemma_pair_folder("july-12b")
    arguments = ("--model", str(pair), "--served-model-name", "pair")
    with (
        served(folder, *arguments) as address,
        openai.OpenAI(
            base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=120
        ) as client,
    ):
        yield client


@pytest.fixture
def vote_request(openai):
    """A request with a tool that the client has made of a class."""
    return {
        "model": "pair",
        "messages": said("Vote."),
        "tools": [openai.pydantic_function_tool(Vote, name="vote")],
        "parallel_tool_calls": False,
        "reasoning_effort": "none",
        "max_tokens": 99,
        "seed": 1,
    }


class TestForcedTools:
    """A random pair writes what it must, and nothing of its own."""

    @pytest.mark.parametrize(
        "choice", ["required", {"type": "function", "function": {"name": "vote"}}]
    )
    def test_arguments_are_of_the_class(self, pair_client, vote_request, choice):
        create = pair_client.chat.completions.parse
        found = create(**vote_request, tool_choice=choice).choices[0]
        assert found.finish_reason == "tool_calls"
        (call,) = found.message.tool_calls
        assert call.function.name == "vote"
        assert isinstance(call.function.parsed_arguments, Vote)

    def test_a_stream(self, pair_client, vote_request):
        create = pair_client.chat.completions.stream
        with create(**vote_request, tool_choice="required") as stream:
            kinds = {event.type for event in stream}
            found = stream.get_final_completion().choices[0].message
        assert "tool_calls.function.arguments.delta" in kinds
        (call,) = found.tool_calls
        assert isinstance(call.function.parsed_arguments, Vote)

    def test_a_keyword_that_cannot_be_held_to(self, pair_client, openai, vote_request):
        parameters = {"type": "object", "properties": {"a": {"not": {}}}}
        odd = {"type": "function", "function": {"name": "f", "parameters": parameters}}
        request = {**vote_request, "tools": [odd], "tool_choice": "required"}
        with pytest.raises(openai.BadRequestError, match="/properties/a") as error:
            pair_client.chat.completions.create(**request)
        assert error.value.param == "tools"


RESPONSE: dict[str, Any] = {"model": MODEL, "max_output_tokens": 24}


class TestResponses:
    def test_whole(self, client):
        found = client.responses.create(input=CODE, **RESPONSE)
        assert (found.status, found.incomplete_details.reason) == (
            "incomplete",
            "max_output_tokens",
        )
        assert found.output_text
        assert found.usage.output_tokens == 24
        assert found._request_id

    def test_a_stream(self, client):
        greedy = {**RESPONSE, "temperature": 0}
        whole = client.responses.create(input=CODE, **greedy)
        events = list(client.responses.create(input=CODE, stream=True, **greedy))
        assert [event.sequence_number for event in events] == [*range(len(events))]
        assert events[-1].type == "response.incomplete"
        assert events[-1].response.output_text == whole.output_text
        deltas = [e.delta for e in events if e.type == "response.output_text.delta"]
        assert "".join(deltas) == whole.output_text

    def test_a_form(self, client):
        asked = {"input": CODE, "text_format": Side, "model": MODEL}
        found = client.responses.parse(**asked, max_output_tokens=200)
        assert isinstance(found.output_parsed, Side)
        with client.responses.stream(**asked, max_output_tokens=200) as stream:
            kinds = {event.type for event in stream}
            final = stream.get_final_response()
        assert "response.output_text.delta" in kinds
        assert isinstance(final.output_parsed, Side)

    def test_a_call_and_its_result(self, pair_client, openai):
        tool = openai.pydantic_function_tool(Vote, name="vote")["function"]
        request: Any = {
            "model": "pair",
            "input": said("Vote."),
            "tools": [{"type": "function", **tool}],
            "tool_choice": "required",
            "parallel_tool_calls": False,
            "reasoning": {"effort": "none"},
            "max_output_tokens": 99,
            "extra_body": {"seed": 1},
        }
        found = pair_client.responses.create(**request)
        (call,) = found.output
        assert (call.type, call.name) == ("function_call", "vote")
        assert Vote.model_validate_json(call.arguments)
        result = {
            "type": "function_call_output",
            "call_id": call.call_id,
            "output": "done",
        }
        request["input"] += [*found.output, result]
        request |= {"tool_choice": "none", "max_output_tokens": 4}
        assert pair_client.responses.create(**request).usage.output_tokens <= 4

    def test_mistakes(self, client, openai):
        with pytest.raises(openai.BadRequestError, match="Send the items") as error:
            client.responses.create(
                input=CODE, previous_response_id="resp_1", **RESPONSE
            )
        assert error.value.param == "previous_response_id"
        with pytest.raises(openai.NotFoundError, match="Nothing is stored"):
            client.responses.retrieve("resp_1")


class TestErrors:
    @pytest.mark.parametrize(
        ("changes", "name", "words"),
        [
            ({"model": "gpt-4"}, "NotFoundError", "gpt-4"),
            ({"max_tokens": 0}, "BadRequestError", "max_tokens"),
            (
                {"messages": [{"role": "user", "content": [IMAGE]}]},
                "BadRequestError",
                "this server reads text only: got an image",
            ),
            ({"functions": [TOOL["function"]]}, "BadRequestError", "Send tools"),
            ({"modalities": ["audio"]}, "BadRequestError", "text only"),
            ({"temperature": -1}, "BadRequestError", "temperature"),
            ({"messages": []}, "BadRequestError", "messages"),
            ({"logit_bias": {"x": 1}}, "BadRequestError", "logit_bias"),
            ({"tools": [TOOL], "tool_choice": "required"}, "BadRequestError", "tool"),
            (
                {"response_format": {"type": "xml"}},
                "BadRequestError",
                "response_format",
            ),
            (
                {"response_format": schema_format({"not": {}})},
                "BadRequestError",
                "the keyword not at #",
            ),
            (
                {"extra_body": {"speculative": {"num_draft_tokens": 9}}},
                "BadRequestError",
                "num_draft_tokens",
            ),
        ],
    )
    @pytest.mark.parametrize("stream", [False, True])
    def test_mistakes(self, client, openai, changes, name, words, stream):
        request: Any = {"messages": said(CODE), **GREEDY, **changes}
        with pytest.raises(getattr(openai, name), match=words) as error:
            client.chat.completions.create(**request, stream=stream)
        assert error.value.body["message"]

    def test_a_limit_that_the_context_does_not_leave(self, client):
        for limit in (10**6, -1, None):
            request = {**GREEDY, "max_tokens": limit, "messages": said("a " * 990)}
            found = client.chat.completions.create(**request)
            assert found.usage.total_tokens == 1024
            assert found.choices[0].finish_reason == "length"

    def test_every_parameter_is_known(self, client, caplog):
        """Obeyed, refused, or without effect on the text."""
        fields = Fields()
        for method, body in (
            (client.chat.completions.create, ChatBody),
            (client.completions.create, CompletionBody),
        ):
            names = set(inspect.signature(method).parameters) - set(body.model_fields)
            extra = dict.fromkeys(n for n in names if not n.startswith("extra_"))
            assert extra.pop("timeout", "") is None
            if body is ChatBody:
                fields.check_chat(extra, [])
            else:
                fields.check_completion(extra)
        names = set(inspect.signature(client.responses.create).parameters)
        names -= set(ResponsesBody.model_fields)
        extra = dict.fromkeys(n for n in names if not n.startswith("extra_"))
        assert extra.pop("timeout", "") is None
        fields.check(extra, REFUSED, WITHOUT_EFFECT)
        assert caplog.messages == []

    def test_fewest_tokens_and_other_ends(self, client):
        extra = {"ignore_eos": True, "min_tokens": 9, "cache_salt": "x"}
        found = client.completions.create(
            prompt=CODE, **{**GREEDY, "max_tokens": 9}, extra_body=extra
        )
        assert found.usage.completion_tokens == 9

    def test_a_wrong_key(self, client, openai):
        other = client.with_options(api_key="another")
        with pytest.raises(openai.AuthenticationError):
            other.models.list()
        with pytest.raises(openai.AuthenticationError):
            other.chat.completions.create(messages=said(CODE), **GREEDY)

    def test_a_path_that_is_not_served(self, client, openai):
        with pytest.raises(openai.NotFoundError):
            client.embeddings.create(model=MODEL, input="a")


class TestNames:
    def test_requests_and_mistakes_have_one(self, client, openai):
        whole = client.completions.create(**GREEDY, prompt=CODE)
        named = {"x-request-id": "mine"}
        given = client.completions.create(**GREEDY, prompt=CODE, extra_headers=named)
        with pytest.raises(openai.BadRequestError) as error:
            client.completions.create(model=MODEL, prompt=[])
        names = [whole._request_id, given._request_id, error.value.request_id]
        assert names[1] == "mine"
        assert len(set(names)) == 3
        assert all(names)


class TestAsync:
    def test_streams_side_by_side(self, client, openai, address):
        """Each gets the text that it gets alone."""
        prompts = [CODE, "import os\n", "class Stack:\n", "for i in range("]
        alone = [
            client.completions.create(prompt=prompt, **GREEDY).choices[0].text
            for prompt in prompts
        ]

        async def text_of(together: Any, prompt: str) -> str:
            stream = await together.completions.create(
                prompt=prompt, **GREEDY, stream=True
            )
            return "".join([chunk.choices[0].text async for chunk in stream])

        async def texts() -> list[str]:
            async with openai.AsyncOpenAI(
                base_url=f"{address}/v1", api_key=KEY, max_retries=0
            ) as together:
                return await asyncio.gather(
                    *(text_of(together, prompt) for prompt in prompts)
                )

        assert asyncio.run(texts()) == alone


@pytest.mark.parametrize("number", [0, 1])
def test_examples_of_the_docs(address, capsys, number):
    """Its page's lines, at another address and with this server's key."""
    page = (ROOT / "docs" / "server.md").read_text(encoding="utf-8")
    codes = re.findall(r"```py\n(.*?)```", page, re.DOTALL)
    assert len(codes) == 2
    code = codes[number].replace("http://127.0.0.1:8080", address)
    code = code.replace('api_key="none"', f'api_key="{KEY}"')
    # Its classes stand in a module of their own.
    exec(compile(code, "server.md", "exec"), {"__name__": "example"})
    assert capsys.readouterr().out.strip()
