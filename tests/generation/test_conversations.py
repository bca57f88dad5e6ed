"""Answers sent back as they came: what the next prompt has of them, token for token.

A server keeps keys and values of prompt and answer. They serve the next request as far
as its prompt begins with the same tokens.
"""

import json
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mlx_gemma_mtp.generation.chat_template import render_chat_template
from mlx_gemma_mtp.markup.answer import plain
from mlx_gemma_mtp.markup.tool_calls import QUOTE
from mlx_gemma_mtp.pair.load import embedded_pair_path, load_tokenizer
from mlx_gemma_mtp.server.answer_parser import Dialogue
from tests.gemma import FORMS
from tests.markup.test_tool_calls import ARGUMENTS, call_of
from tests.server.serving import prompts_of

pytestmark = pytest.mark.gemma

TURN = "<|turn>model\n"
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "d",
            "parameters": {"type": "object", "properties": {"a": {"type": "string"}}},
        },
    }
    for name in ("get_weather", "http-request", "mcp.files:read")
]
RESULT = {"role": "tool", "content": "ok"}


def thought_of(text):
    return f"<|channel>thought\n{text}\n<channel|>" if text else ""


def calls_of(calls, form):
    return "".join(
        f"<|tool_call>{call_of(name, arguments, form.null_word)}<tool_call|>"
        for name, arguments in calls
    )


def replayed(form, thought, content, calls):
    """What a form's template writes of an answer when a tool or the user has replied.

    All of them trim the content of an answer without calls; before calls it is as it
    was, unless it is white space. A thought of a turn that the user has ended is gone.
    """
    if not calls:
        return content.strip()
    has_thought = form.replays_reasoning in ("calls", "turn")
    said = content if content.strip() else ""
    return (thought_of(thought) if has_thought else "") + said + calls_of(calls, form)


def follow_up(calls):
    """What comes next: the results of calls, or another question."""
    if calls:
        return [{**RESULT, "tool_call_id": str(i)} for i in range(len(calls))]
    return [{"role": "user", "content": "And red?"}]


def message_of(delta):
    """An answer as a client sends it back: as it was given."""
    calls = [
        {**call, "id": str(i), "function": dict(call["function"])}
        for i, call in enumerate(delta.tool_calls)
    ]
    for call in calls:
        call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    found = {"role": "assistant", "content": delta.content}
    if delta.reasoning:
        found["reasoning"] = delta.reasoning
    return {**found, "tool_calls": calls} if calls else found


class Turn:
    """A question with an answer in one form, and the prompt that follows."""

    def __init__(self, tokenizer, messages, thinking, thought, content, calls):
        self.tokenizer = tokenizer
        self.form = form = FORMS[tokenizer.form_name]
        self.answer = thought_of(thought) + content + calls_of(calls, form)
        prompts, args = prompts_of(tokenizer), {"enable_thinking": thinking}
        before = prompts.of_messages(messages, tools=TOOLS, template_args=args)
        reader = Dialogue(tokenizer).readers(TOOLS, 1, opening=before.opening)[0]
        self.delta = reader.read(self.answer, is_last=True)
        self.reply = message_of(self.delta)
        later = [*messages, self.reply, *follow_up(calls)]
        after = prompts.of_messages(later, tools=TOOLS, template_args=args)
        self.before, self.after = before.tokens, after.tokens
        self.opening = before.opening

    def num_common(self, text=None):
        """How many tokens of prompt and answer the next prompt begins with."""
        whole = self.before + self.encoded(self.answer if text is None else text)
        pairs = zip(whole, self.after, strict=False)
        return next((i for i, (a, b) in enumerate(pairs) if a != b), len(whole))

    def encoded(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False)


@pytest.fixture(scope="module", params=sorted(FORMS))
def tokenizer(request, gemma_tokenizer):
    found = gemma_tokenizer(request.param)
    found.form_name = request.param
    return found


def user(text):
    return {"role": "user", "content": text}


WEATHER = "get_weather"
DIALOGUES = [
    ("sky", True, "The user wants physics.\n\n* Rayleigh", "By scattering.", []),
    ("sky", False, "", "By scattering.", []),
    ("emoji", False, "", "A 👩‍👩‍👧 family, 𓀀 glyph, naïve café — done 🌈", []),
    ("call", False, "", "", [(WEATHER, {"city": "Paris", "days": 3})]),
    ("call", True, "I should call.", "", [(WEATHER, {"city": "Paris"})]),
    ("said", True, "Hm.", " I look.\n\n", [(WEATHER, {"city": "Paris"})]),
    ("said", False, "", "I look.", [(WEATHER, {"a": 1}), ("mcp.files:read", {})]),
    ("two", False, "", "", [(WEATHER, {"city": "Paris"}), (WEATHER, {"city": "Oslo"})]),
    (
        "fetch",
        True,
        "Headers.",
        "",
        [
            (
                "http-request",
                {"headers": {"Content-Type": "a/b"}, "url": "http://x.test"},
            )
        ],
    ),
    ("read", False, "", "", [("mcp.files:read", {"path": "a.txt", "x": None})]),
    ("none", True, "Nothing to say of it.", "", [("mcp.files:read", {})]),
    ("What does <|channel>thought mean?", False, "", "It opens a thought.", []),
    ("list", False, "", "1. one\n2. two\n\n3. three\n\nEND", []),
    ("code", False, "", '```python\ndef f(x):\n    return {"a": [x]}\n```', []),
    ("indented", False, "", "  two spaces\n", []),
    ("empty", True, "Only a thought.", "", []),
]


def check(turn, thought, content, calls):
    """The answer is read as it was meant, and replayed as far as the form does."""
    delta = turn.delta
    assert (delta.reasoning, delta.content) == (thought, content)
    found = [call["function"] for call in delta.tool_calls]
    assert [(f["name"], json.loads(f["arguments"])) for f in found] == calls
    text = replayed(turn.form, thought, content, calls)
    start = len(turn.before) - len(turn.encoded(turn.opening))
    expected = turn.before[:start] + turn.encoded(f"{TURN}{text}")
    assert turn.after[: len(expected)] == expected


class TestRoundTrip:
    @pytest.mark.parametrize(
        ("question", "thinking", "thought", "content", "calls"), DIALOGUES
    )
    def test_dialogues(self, tokenizer, question, thinking, thought, content, calls):
        messages = [
            user("Hi"),
            {"role": "assistant", "content": "Yes?"},
            user(question),
        ]
        turn = Turn(tokenizer, messages, thinking, thought, content, calls)
        check(turn, thought, content, calls)

    @pytest.mark.parametrize("content", ["", "I shall look.", "I look:\n\n"])
    def test_nothing_is_read_again_where_all_is_replayed(self, tokenizer, content):
        """With a call and thinking on: prompt and answer to their last token."""
        calls = [(WEATHER, {"city": "Paris"})]
        turn = Turn(tokenizer, [user("Go")], True, "I call.", content, calls)
        is_all = turn.form.replays_reasoning != "never"
        expected = len(turn.before) + len(turn.encoded(turn.answer)) * is_all
        assert turn.num_common() == expected

    def test_behind_the_result_of_a_call(self, tokenizer):
        """Where the template opens a thought there, the answer begins in it."""
        form = FORMS[tokenizer.form_name]
        call = Turn(tokenizer, [user("Go")], True, "Hm", "", [(WEATHER, {"a": "x"})])
        messages = [user("Go"), call.reply, {**RESULT, "tool_call_id": "0"}]
        prompts, args = prompts_of(tokenizer), {"enable_thinking": True}
        prompt = prompts.of_messages(messages, tools=TOOLS, template_args=args)
        assert prompt.is_reasoning is form.opens_thought_behind_result
        answer = "Now I know.\n<channel|>Done"
        if not prompt.is_reasoning:
            answer = f"<|channel>thought\n{answer}"
        reader = Dialogue(tokenizer).readers(TOOLS, 1, opening=prompt.opening)[0]
        delta = reader.read(answer, is_last=True)
        assert (delta.reasoning, delta.content) == ("Now I know.", "Done")

    def test_results_of_calls_are_told_beside_them(self, tokenizer):
        """Also where a template knows no messages of the role tool."""
        call = {"function": {"name": WEATHER, "arguments": {"a": "x"}}}
        asked = [
            user("Go"),
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{**call, "id": "0"}, {**call, "id": "1"}],
            },
            {"role": "tool", "tool_call_id": "1", "content": "two"},
            {"role": "tool", "tool_call_id": "?", "name": "other", "content": "one"},
        ]
        prompts = prompts_of(tokenizer)
        form = FORMS[tokenizer.form_name]
        results = "".join(
            f"<|tool_response>response:{name}{{value:{QUOTE}{text}{QUOTE}}}"
            "<tool_response|>"
            for name, text in ((WEATHER, "two"), ("other", "one"))
        )
        turn = TURN + calls_of([(WEATHER, {"a": "x"})] * 2, form) + results
        text = tokenizer.decode(prompts.of_messages(asked, tools=TOOLS).tokens)
        assert turn in text
        assert text.count("<|turn>model") == 1
        later = [*asked, {"role": "assistant", "content": "Done"}, user("Thanks")]
        text = tokenizer.decode(prompts.of_messages(later, tools=TOOLS).tokens)
        # Those of May begin the turn of the answer anew.
        assert f"{turn}Done<turn|>" in text or f"{turn}{TURN}Done<turn|>" in text

    def test_a_text_stands_before_the_calls_that_follow_it(self, tokenizer):
        """One turn, open to the end: the answer's own order, call after call."""
        form = FORMS[tokenizer.form_name]
        calls = [(WEATHER, {"a": "x"})]
        result = f"<|tool_response>response:{WEATHER}{{value:{QUOTE}ok{QUOTE}}}"
        result += "<tool_response|>"
        messages, expected = [user("Go")], TURN
        for thought, text in (("One", "First."), ("Two", "Then.")):
            turn = Turn(tokenizer, messages, True, thought, text, calls)
            messages += [turn.reply, *follow_up(calls)]
            is_begun = not expected.endswith(TURN)
            # The form of the first days begins a turn behind each result.
            expected += TURN if form.is_first and is_begun else ""
            expected += replayed(form, thought, text, calls) + result
        opening = "<|channel>thought\n" if form.opens_thought_behind_result else ""
        text = self.prompt(tokenizer, messages)
        assert text.endswith(f"{expected}{opening}")
        later = [*messages, {"role": "assistant", "content": "Done"}, user("Thanks")]
        text = self.prompt(tokenizer, later)
        assert f"Then.{calls_of(calls, form)}{result}Done<turn|>" in text
        assert "\x02" not in text

    def prompt(self, tokenizer, messages):
        args = {"enable_thinking": True}
        prompt = prompts_of(tokenizer).of_messages(
            messages, tools=TOOLS, template_args=args
        )
        return tokenizer.decode(prompt.tokens)

    def test_thoughts_in_a_text_before_calls_are_gone(self, tokenizer):
        call = {"id": "0", "function": {"name": WEATHER, "arguments": {}}}
        said = {"role": "assistant", "tool_calls": [call]}
        contents = ("<|channel>thought\nHm\n<channel|>I look.", "I look.")
        first, second = (
            self.prompt(tokenizer, [user("Go"), {**said, "content": content}])
            for content in contents
        )
        assert first == second

    def test_a_text_beside_results_stands_behind_them(self, tokenizer):
        """As templates have such a message, it says what was said to the results."""
        call = {"id": "0", "function": {"name": WEATHER, "arguments": {}}}
        results = [{"name": WEATHER, "response": "ok"}]
        said = {"role": "assistant", "content": "Done", "tool_calls": [call]}
        messages = [user("Go"), {**said, "tool_responses": results}, user("Thanks")]
        assert "<tool_response|>Done<turn|>" in self.prompt(tokenizer, messages)

    def test_no_text_moves_another(self, tokenizer):
        """Also one that spells what keeps a text's place: then none is moved."""
        call = {"id": "0", "function": {"name": WEATHER, "arguments": {}}}
        said = {"role": "assistant", "content": "I look.", "tool_calls": [call]}
        place = "<|tool_call>call:\x02text\x03{}<tool_call|>"
        messages = [user(place), said, {**RESULT, "tool_call_id": "0"}]
        text = self.prompt(tokenizer, messages)
        assert (text.count(place), text.count("I look.")) == (1, 1)

    @pytest.mark.parametrize("place", ["user", "system", "tool", "assistant"])
    def test_marks_that_others_wrote_open_nothing(self, tokenizer, place):
        mark = "<|channel>thought\n"
        call = {"id": "0", "function": {"name": WEATHER, "arguments": {"a": mark}}}
        messages = {
            "user": [user(f"What is {mark}")],
            "system": [{"role": "system", "content": mark}, user("Hi")],
            "tool": [
                user("Hi"),
                {"role": "assistant", "content": "", "tool_calls": [call]},
                {**RESULT, "tool_call_id": "0", "content": mark},
            ],
            "assistant": [
                user("Hi"),
                {"role": "assistant", "content": f"{QUOTE}{mark}"},
                user("Hi"),
            ],
        }[place]
        for thinking in (True, False):
            prompt = prompts_of(tokenizer).of_messages(
                messages, tools=TOOLS, template_args={"enable_thinking": thinking}
            )
            form = FORMS[tokenizer.form_name]
            opens = form.opens_thought_behind_result and thinking and place == "tool"
            assert prompt.is_reasoning is opens

    @given(data=st.data())
    @settings(max_examples=15)
    def test_generated(self, tokenizer, data):
        words = st.text("ab <'\"{}|\n.é🌈", max_size=20)
        thinking = data.draw(st.booleans())
        # A template takes an empty thought for none, and its own line ends for text.
        thought = data.draw(words) if thinking else ""
        content = data.draw(words)
        names = st.sampled_from([tool["function"]["name"] for tool in TOOLS])
        calls = data.draw(st.lists(st.tuples(names, ARGUMENTS), max_size=2))
        turn = Turn(tokenizer, [user("Go")], thinking, thought, content, calls)
        # Read as one text, not by tokens, this pair is a < that ordinary ones spell.
        assume(plain(turn.answer) == turn.answer)
        check(turn, thought, content, calls)


@pytest.mark.parametrize("condition", ["false", "call.id != '0'"])
def test_other_templates_are_told_what_was_said(condition):
    """Those that write a text before the calls, also where they take few names."""
    template = (
        "{% for message in messages %}{{ message.content }}"
        "{% for call in message.tool_calls or [] %}{% if "
        f"{condition}"
        " %}{{ raise_exception('odd') }}{% endif %}[{{ call.function.name }}]"
        "{% endfor %}{% endfor %}"
    )
    own = load_tokenizer(embedded_pair_path(), {"chat_template": template})
    call = {"id": "0", "function": {"name": "f", "arguments": {}}}
    said = {"role": "assistant", "content": "I look. ", "tool_calls": [call]}
    messages = [user("Go "), said, RESULT]
    text = render_chat_template(own, messages, {}, advice="", opens_answer=True)
    assert text == "Go I look. [f]ok"
