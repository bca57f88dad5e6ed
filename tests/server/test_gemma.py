"""The server of a pair of Gemma's ids, in this process, which says written answers.

Run: python -m pytest tests/server/test_gemma.py
"""

import contextlib
import functools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_gemma_mtp.server.schema import ChatBody
from mlx_gemma_mtp.server.vocabulary import Places
from tests.gemma import FORMS
from tests.gemma_pair import let_say
from tests.server.serving import pair_server, prompts_of

pytestmark = [pytest.mark.gemma, pytest.mark.usefixtures("plain_graphs")]


@pytest.mark.parametrize("form", ["may-e2b", "july-12b"])
def test_the_server_says_the_answers(monkeypatch, server, gemma_tokenizer, form):
    answers = ["Rayleigh scattering 🌈 𓀀.", "Dusk.\n\n  - red"]
    tokenizer, client = gemma_tokenizer(form), server(form)
    prompts = let_say(monkeypatch, tokenizer, *(f"{text}<turn|>" for text in answers))
    messages = [{"role": "user", "content": "Why is the sky blue?"}]
    for expected in answers:
        settings = {"chat_template_kwargs": {"enable_thinking": False}}
        body = {"messages": messages, **settings}
        choice = client.ask("POST", "/v1/chat/completions", body).json()["choices"][0]
        assert choice["message"]["content"] == expected
        assert choice["finish_reason"] == "stop"
        messages.append({"role": "assistant", "content": expected})
        messages.append({"role": "user", "content": "And red?"})
    opening = "<|channel>thought\n<channel|>" if form == "july-12b" else ""
    assert tokenizer.decode(prompts[0]) == (
        f"<bos><|turn>user\nWhy is the sky blue?<turn|>\n<|turn>model\n{opening}"
    )
    assert tokenizer.decode(prompts[1]).endswith(f"<|turn>model\n{opening}")


WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "d",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        },
    },
}
PARIS = '<|tool_call>call:get_weather{city:<|"|>Paris<|"|>,days:3}<tool_call|>'
OSLO = PARIS.replace("Paris", "Oslo")
THOUGHT = "<|channel>thought\nI should call.\n<channel|>"
QUESTION = [{"role": "user", "content": "Weather in Paris, and a long question " * 8}]


class Served:
    """A server that says one answer after another."""

    def __init__(self, client, prompts, tokenizer):
        self.client = client
        self.prompts = prompts
        self.tokenizer = tokenizer

    def chat(self, messages=QUESTION, *, path="/v1/chat/completions", **settings):
        body = {"messages": messages, "max_tokens": 80, **settings}
        response = self.client.ask("POST", path, body)
        assert response.status == 200, response.body
        return response.json()

    def message(self, messages=QUESTION, **settings):
        return self.chat(messages, **settings)["choices"][0]["message"]

    @property
    def last_prompt(self):
        return self.tokenizer.decode(self.prompts[-1])


@pytest.fixture(scope="module")
def server(gemma_pair_folder):
    """A client of a form's server; each runs until the last test."""
    with contextlib.ExitStack() as running:

        @functools.cache
        def client_of(form):
            client, _ = running.enter_context(pair_server(gemma_pair_folder(form)))
            return client

        yield client_of


@pytest.fixture
def served(monkeypatch, server, gemma_tokenizer, request):
    """A server of the form and with the answers that the test names."""
    form, *answers = request.param
    tokenizer = gemma_tokenizer(form)
    prompts = let_say(monkeypatch, tokenizer, *answers)
    return Served(server(form), prompts, tokenizer)


def says(form, *answers):
    return pytest.mark.parametrize("served", [(form, *answers)], indirect=True)


@says("may-12b", f"{THOUGHT}{PARIS}<|tool_response>", "Sunny.<turn|>")
@pytest.mark.parametrize("stream", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_thought_and_a_call_go_back_and_nothing_is_read_again(served, stream):
    settings = {"tools": [WEATHER], "reasoning_effort": "low"}
    asked = [{"role": "system", "content": f"{stream}"}, *QUESTION]
    if stream:
        body = {"messages": asked, "stream": True, **settings}
        events = served.client.ask("POST", "/v1/chat/completions", body).events
        deltas = [event["choices"][0]["delta"] for event in events if event["choices"]]
        message = {
            "role": "assistant",
            "content": "".join(delta.get("content") or "" for delta in deltas),
            "reasoning": "".join(delta.get("reasoning", "") for delta in deltas),
            "tool_calls": [c for d in deltas for c in d.get("tool_calls", [])],
        }
        assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"
        (number,) = [call.pop("index") for call in message["tool_calls"]]
        assert number == 0
    else:
        choice = served.chat(asked, **settings)["choices"][0]
        assert choice["finish_reason"] == "tool_calls"
        message = choice["message"]
    assert message["reasoning"] == "I should call."
    assert not message["content"]
    (call,) = message["tool_calls"]
    assert call["function"]["name"] == "get_weather"
    assert json.loads(call["function"]["arguments"]) == {"city": "Paris", "days": 3}
    before = len(served.prompts[0])
    result = {"role": "tool", "tool_call_id": call["id"], "content": "20 degrees"}
    answer = served.chat([*asked, message, result], **settings)
    assert answer["choices"][0]["message"]["content"] == "Sunny."
    num_answer = len(served.tokenizer.encode(THOUGHT + PARIS, add_special_tokens=False))
    details = answer["usage"]["prompt_tokens_details"]
    assert details["cached_tokens"] == before + num_answer


LONG = f"{'I shall look. ' * 30}\n\n"


@says("july-12b", f"{THOUGHT}{LONG}{PARIS}<|tool_response>", "Sunny.<turn|>")
def test_a_text_before_a_call_goes_back_and_nothing_is_read_again(served):
    settings = {"tools": [WEATHER], "reasoning_effort": "low", "max_tokens": 400}
    message = served.message(**settings)
    assert message["content"] == LONG
    (call,) = message["tool_calls"]
    result = {"role": "tool", "tool_call_id": call["id"], "content": "20 degrees"}
    answer = served.chat([*QUESTION, message, result], **settings)
    said = f"{THOUGHT}{LONG}{PARIS}"
    num_answer = len(served.tokenizer.encode(said, add_special_tokens=False))
    details = answer["usage"]["prompt_tokens_details"]
    assert details["cached_tokens"] == len(served.prompts[0]) + num_answer
    assert f"{said}<|tool_response>" in served.last_prompt


@says("may-12b", "Sunny.<turn|>")
@pytest.mark.parametrize("path", ["/v1/messages", "/v1/responses"])
def test_a_text_before_a_call_in_other_dialects(served, path):
    """The model reads both in this order, in a turn that is open."""
    given = {"name": "get_weather", "arguments": '{"city": "Paris", "days": 3}'}
    used = {"name": "get_weather", "input": json.loads(given["arguments"])}
    text: dict[str, object] = {"type": "text", "text": "I look."}
    found = {"type": "tool_result", "tool_use_id": "a", "content": "ok"}
    said: list[dict[str, object]] = [text, {"type": "tool_use", "id": "a", **used}]
    bodies = {
        "/v1/messages": {
            "max_tokens": 9,
            "messages": [
                *QUESTION,
                {"role": "assistant", "content": said},
                {"role": "user", "content": [found]},
            ],
        },
        "/v1/responses": {
            "input": [
                *QUESTION,
                {"role": "assistant", "content": "I look."},
                {"type": "function_call", "call_id": "a", **given},
                {"type": "function_call_output", "call_id": "a", "output": "ok"},
            ],
        },
    }
    assert served.client.ask("POST", path, bodies[path]).status == 200
    result = '<|tool_response>response:get_weather{value:<|"|>ok<|"|>}'
    expected = f"<|turn>model\nI look.{PARIS}{result}<tool_response|>"
    assert served.last_prompt.endswith(expected)


@says("july-12b", f"{PARIS}{OSLO}<|tool_response>")
def test_calls_one_at_a_time(served):
    assert len(served.message(tools=[WEATHER])["tool_calls"]) == 2
    settings = {"tools": [WEATHER], "parallel_tool_calls": False}
    (call,) = served.message(**settings)["tool_calls"]
    assert "Paris" in call["function"]["arguments"]
    body = {"messages": QUESTION, "stream": True, **settings}
    events = served.client.ask("POST", "/v1/chat/completions", body).events
    deltas = [event["choices"][0]["delta"] for event in events]
    assert sum(len(delta.get("tool_calls", [])) for delta in deltas) == 1


@says("july-12b", f"{PARIS}<|tool_response>")
def test_a_call_that_the_limit_cuts_off(served):
    choice = served.chat(tools=[WEATHER], max_tokens=8)["choices"][0]
    assert choice["finish_reason"] == "length"
    assert "tool_calls" not in choice["message"]
    assert choice["message"]["content"].startswith("call:get_weather{")


@says("july-e2b", "Hm<turn|>")
@pytest.mark.parametrize(
    ("settings", "is_thinking"),
    [
        ({}, True),  # mlx-lm's default
        ({"reasoning_effort": "none"}, False),
        ({"reasoning_effort": "NONE"}, False),
        ({"reasoning_effort": "minimal"}, True),
        ({"reasoning_effort": "high"}, True),
        (
            {
                "reasoning_effort": "high",
                "chat_template_kwargs": {"enable_thinking": False},
            },
            False,
        ),
    ],
)
def test_whether_the_model_thinks(served, settings, is_thinking):
    served.message(**settings)
    assert ("<|think|>" in served.last_prompt) is is_thinking


@says("july-12b", "Yes<turn|>")
def test_the_path_without_a_version(served):
    assert served.message(path="/chat/completions")["content"] == "Yes"


BEGUN = [*QUESTION, {"role": "assistant", "content": "  Because \n"}]


@says("july-12b", "of it.<turn|>")
class TestContinuing:
    def test_an_answer_that_has_begun(self, served):
        """Byte for byte, behind what opens an answer; the answer is what follows."""
        assert served.message(BEGUN, reasoning_effort="none")["content"] == "of it."
        opening = "<|turn>model\n<|channel>thought\n<channel|>"
        assert served.last_prompt.endswith(f"{opening}  Because \n")
        served.message(BEGUN, continue_final_message=True)
        assert served.last_prompt.endswith("<|turn>model\n  Because \n")

    def test_a_thought_that_has_begun(self, served):
        begun = {"role": "assistant", "content": None, "reasoning": "First, "}
        message = served.message([*QUESTION, begun])
        assert (message["content"], message["reasoning"]) == ("", "of it.")
        opening = "<|turn>model\n<|channel>thought\n"
        assert served.last_prompt.endswith(f"{opening}First, ")

    def test_a_thought_and_an_answer(self, served):
        begun = {"role": "assistant", "content": "Because", "reasoning_content": "Hm"}
        assert served.message([*QUESTION, begun])["content"] == "of it."
        assert served.last_prompt.endswith("thought\nHm\n<channel|>Because")

    def test_behind_the_result_of_a_call(self, served):
        """The template has opened a thought there, which this text is none of."""
        call = {"id": "0", "function": {"name": "get_weather", "arguments": "{}"}}
        messages = [
            *QUESTION,
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "0", "content": "ok"},
            {"role": "assistant", "content": "So"},
        ]
        assert served.message(messages)["content"] == "of it."
        assert served.last_prompt.endswith(
            "<tool_response|><|channel>thought\n<channel|>So"
        )

    def test_a_new_answer_behind_one_that_is_whole(self, served):
        served.message(BEGUN, continue_final_message=False)
        assert served.last_prompt.endswith("<|turn>model\n")

    def test_nothing_to_continue(self, served):
        body = {"messages": QUESTION, "continue_final_message": True}
        response = served.client.ask("POST", "/v1/chat/completions", body)
        assert response.status == 400
        error = response.json()["error"]
        assert error["param"] == "continue_final_message"
        assert "'user'" in error["message"]


@says("july-12b", "ok<turn|>")
def test_text_begins_once(served):
    for text in ("Why", "<bos>Why"):
        body = {"prompt": text, "max_tokens": 3}
        assert served.client.ask("POST", "/v1/completions", body).status == 200
        assert served.last_prompt == "<bos>Why"


@says("july-12b", "A 👩\u200d👧 𓀀 é!<turn|>")
@pytest.mark.parametrize("stream", [False, True])
def test_places_of_tokens_in_the_text(served, stream):
    """Also of those that are a part of a character."""
    body = {"prompt": "Why", "max_tokens": 60, "logprobs": 0, "stream": stream}
    response = served.client.ask("POST", "/v1/completions", body)
    parts = response.events if stream else [response.json()]
    choices = [choice for part in parts for choice in part["choices"]]
    text = "".join(choice["text"] for choice in choices)
    found = {
        key: [each for choice in choices for each in choice["logprobs"][key]]
        for key in ("tokens", "text_offset")
    }
    assert text == "A 👩\u200d👧 𓀀 é!"
    assert any(token.startswith("bytes:") for token in found["tokens"])
    data = b""
    for token, place in zip(found["tokens"], found["text_offset"], strict=True):
        assert place == len(data.decode("utf-8", "ignore"))
        if token.startswith("bytes:"):
            data += bytes.fromhex(token.removeprefix("bytes:").replace("\\x", ""))
        else:
            assert token == "<turn|>" or text[place:].startswith(token)
            data += token.encode()
    assert found["text_offset"][-1] == len(text)


def call_with(**fields):
    """An answer with a call, and its result without what tells whose it is."""
    call = {"id": "a", "function": {"name": "get_weather", "arguments": "{}"}}
    asked = {"role": "assistant", "content": None, "tool_calls": [call]}
    return [*QUESTION, asked, {"role": "tool", "content": "ok", **fields}]


@says("may-12b", "Yes<turn|>")
class TestOddConversations:
    @pytest.mark.parametrize(
        ("fields", "name"),
        [
            ({}, "get_weather"),
            ({"tool_call_id": "a"}, "get_weather"),
            ({"tool_call_id": "b"}, "get_weather"),
            ({"tool_call_id": "b", "name": "other"}, "other"),
            ({"tool_call_id": None, "name": None}, "get_weather"),
        ],
    )
    def test_results_have_the_names_of_their_tools(self, served, fields, name):
        assert served.message(call_with(**fields))["content"] == "Yes"
        assert f"response:{name}{{value:" in served.last_prompt

    def test_an_answer_alone_is_no_beginning(self, served):
        served.message([{"role": "assistant", "content": "Hi"}])
        assert served.last_prompt.endswith("Hi<turn|>\n<|turn>model\n")

    @pytest.mark.parametrize("reasoning", [5, ["a"], {"a": 1}, True])
    def test_thoughts_are_texts(self, served, reasoning):
        for key in ("reasoning", "reasoning_content"):
            begun = {"role": "assistant", "content": "", key: reasoning}
            body = {"messages": [*QUESTION, begun]}
            response = served.client.ask("POST", "/v1/chat/completions", body)
            assert response.status == 400
            assert key in response.json()["error"]["message"]


BROKEN = [
    "[1]",
    "5",
    '"s"',
    "None",
    '{"city": "Par',
    '{"a": NaN}',
    '{"a": 1e999}',
    '{"a": "\\ud800"}',
    '{"a": ' + "9" * 5000 + "}",
    '{"a":' * 151 + "1" + "}" * 151,
    '{"a":' * 9999 + "1" + "}" * 9999,
    "[" * 100_000,
]


def prompt_of(tokenizer, messages):
    """The prompt of a request's messages."""
    body = ChatBody.model_validate({"messages": messages})
    told = [message.plain() for message in body.messages]
    return tokenizer.decode(prompts_of(tokenizer).of_messages(told).tokens)


def prompt_with(tokenizer, arguments):
    """The prompt of a conversation in which a call had these arguments."""
    messages = call_with()
    calls = messages[1]["tool_calls"]
    calls[0]["function"]["arguments"] = arguments
    calls.append({"id": "b", "function": {"name": "f", "arguments": '{"days": 3}'}})
    return prompt_of(tokenizer, messages)


@pytest.mark.parametrize("form", ["may-12b", "july-12b"])
@pytest.mark.parametrize("arguments", BROKEN, ids=range(len(BROKEN)))
def test_broken_arguments_end_no_conversation(gemma_tokenizer, form, arguments):
    """They are passed on as they are, also where the template raises for text."""
    prompt = prompt_with(gemma_tokenizer(form), arguments)
    before, behind = "{", "}"
    if FORMS[form].refuses_text_arguments:
        before, behind = '{arguments:<|"|>', '<|"|>}'
    assert f"call:get_weather{before}{arguments}{behind}<tool_call|>" in prompt
    assert "call:f{days:3}<tool_call|>" in prompt


@pytest.mark.parametrize("form", ["may-12b", "july-12b"])
def test_no_arguments_end_a_conversation(gemma_tokenizer, form):
    tokenizer = gemma_tokenizer(form)

    @settings(max_examples=60)
    @given(st.text(st.one_of(st.sampled_from('{}[]":,\\ud8<|>1'), st.characters())))
    def ask(arguments):
        assert "call:f{days:3}<tool_call|>" in prompt_with(tokenizer, arguments)

    ask()


@pytest.mark.parametrize("form", ["april-e2b", "may-12b", "july-12b"])
@pytest.mark.parametrize("arguments", [{}, {"arguments": None}, {"arguments": " "}])
def test_calls_need_no_arguments(gemma_tokenizer, form, arguments):
    messages = call_with()
    messages[1]["tool_calls"][0]["function"] = {"name": "f", **arguments}
    assert "call:f{}<tool_call|>" in prompt_of(gemma_tokenizer(form), messages)


@says("april-e2b", "Yes<turn|>")
class TestFieldsOfTheTemplates:
    """What is no text of a history, but read before the template sees it."""

    @pytest.mark.parametrize("value", [[1], {}, True])
    @pytest.mark.parametrize("place", ["id", "tool_call_id"])
    def test_names_of_calls(self, served, place, value):
        messages = call_with()
        where = messages[1]["tool_calls"][0] if place == "id" else messages[2]
        where[place] = value
        body = {"messages": messages}
        response = served.client.ask("POST", "/v1/chat/completions", body)
        assert response.status == 400
        assert f".{place}: input should be a valid" in response.message

    @pytest.mark.parametrize("value", [5, "a", [5], {}])
    def test_results_of_the_first_days(self, served, value):
        messages = call_with()
        messages[1]["tool_responses"] = value
        body = {"messages": messages}
        response = served.client.ask("POST", "/v1/chat/completions", body)
        assert response.status == 400
        assert "tool_responses" in response.message

    def test_no_results_of_the_first_days(self, served):
        messages = call_with()
        messages[1]["tool_responses"] = None
        assert served.message(messages)["content"] == "Yes"
        assert "response:get_weather{" in served.last_prompt


@says("july-12b", "Yes<turn|>")
def test_a_refusal_is_text(served):
    """A part of a message, or the field that OpenAI's own answers have."""
    for refused in (
        {"content": [{"type": "refusal", "refusal": "I cannot."}]},
        {"content": None, "refusal": "I cannot."},
        {"content": "I cannot.", "refusal": None},
    ):
        served.message([*QUESTION, {"role": "assistant", **refused}, *QUESTION])
        assert "<|turn>model\nI cannot.<turn|>" in served.last_prompt


@says("july-12b", "Yes<turn|>No<eos>Yes")
def test_a_text_that_no_end_ends(served):
    """Ends are control tokens, so no part of the content."""
    choice = served.chat(ignore_eos=True, max_tokens=5)["choices"][0]
    assert choice["message"]["content"] == "YesNoYes"
    assert choice["finish_reason"] == "length"


@says("july-12b", "so<turn|>")
@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("is_behind_call", [True, False])
@pytest.mark.parametrize(
    "begun",
    [
        {"content": "<|channel>thought\nHm.\n<channel|>It is"},
        {"content": "It is", "reasoning": "Hm."},
        {"content": "", "reasoning": "Hm."},
    ],
)
def test_a_thought_that_was_given_stands_once(served, thinking, is_behind_call, begun):
    messages = call_with() if is_behind_call else QUESTION
    settings = {"chat_template_kwargs": {"enable_thinking": thinking}}
    served.message([*messages, {"role": "assistant", **begun}], **settings)
    end = "\n<channel|>It is" if begun["content"] else ""
    turn = "<tool_response|>" if is_behind_call else "<|turn>model\n"
    expected = f"{turn}<|channel>thought\nHm.{end}"
    assert served.last_prompt.endswith(expected)


@says("july-12b", "Let <tool_call|> me.<turn|>")
def test_the_plain_text_of_completions_has_its_marks(served):
    body = {"prompt": "Why", "max_tokens": 20}
    response = served.client.ask("POST", "/v1/completions", body).json()
    assert response["choices"][0]["text"] == "Let <tool_call|> me."
    assert served.message()["content"] == "Let  me."


def test_places_behind_half_a_character():
    places = Places()
    tokens = [b"\xf0", b"\x9f", b"a", b"b", b"\xf0", b"\xf0", b"\x9f", b"", b"\xc3\xa9"]
    assert [places.add(token) for token in tokens] == [0, 0, 1, 2, 3, 4, 4, 4, 5]
