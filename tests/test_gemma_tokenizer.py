"""The tests' own Gemma: the rules of its tokenizer, the forms of its chat template.

Run: python -m pytest tests/test_gemma_tokenizer.py, or make test-gemma
"""

from functools import partial

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.tokenizer_utils import SPMStreamingDetokenizer

from mlx_gemma_mtp.pair.load import load_tokenizer
from tests import gemma
from tests.gemma import FORMS

pytestmark = pytest.mark.gemma
S, E, R, F = "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>"
QUESTION = {"role": "user", "content": "Weather in Paris?"}
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Tells it.",
        "parameters": {
            "type": "object",
            "properties": {
                "where": {
                    "type": "object",
                    "properties": {"city": {"type": "string"}},
                    "required": ["city"],
                },
                "days": {"type": "array", "items": {"type": "integer"}},
                "unit": {"type": "string", "description": "Its.", "enum": ["C", "F"]},
            },
            "required": ["where"],
        },
    },
}


def call(*, number="1", **arguments):
    function = {"name": "get_weather", "arguments": arguments}
    return {"id": number, "type": "function", "function": function}


def answer(content=None, **fields):
    return {"role": "assistant", "content": content, **fields}


def result(content, number="1"):
    return {"role": "tool", "tool_call_id": number, "content": content}


@pytest.fixture(scope="module")
def tokenizer(whole_gemma_tokenizer):
    return whole_gemma_tokenizer("may-12b")


@pytest.fixture(scope="module")
def encode(tokenizer):
    return partial(tokenizer.encode, add_special_tokens=False)


@pytest.fixture
def render(whole_gemma_tokenizer):
    """The text that a form makes of messages, up to where the answer begins."""

    def rendered(form, *messages, enable_thinking=False, **config):
        return whole_gemma_tokenizer(form).apply_chat_template(
            list(messages),
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=enable_thinking,
            **config,
        )

    return rendered


def test_the_control_tokens_are_where_they_are_published(tokenizer, encode):
    assert len(tokenizer) == gemma.VOCAB_SIZE
    for i, name in gemma.SPECIAL.items():
        assert tokenizer.convert_ids_to_tokens(i) == name
        assert encode(f"a{name}b")[1:-1] == [i]
        assert i in tokenizer.all_special_ids
    assert len(set(tokenizer.all_special_ids)) == len(gemma.SPECIAL)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (gemma.BOS, gemma.EOS)
    assert tokenizer.eos_token_ids == set(gemma.EOS_IDS)


@pytest.mark.parametrize("text", ["", "a", "<bos>", "<|turn>user\nHello<turn|>\n"])
def test_no_token_is_put_in_front(tokenizer, encode, text):
    assert tokenizer.encode(text) == encode(text)
    assert tokenizer.encode(text, text) == encode(text) * 2


def test_a_pretrained_one_puts_bos_in_front(tmp_path, encode):
    folder = gemma.write_tokenizer(tmp_path / "base", adds_bos=True)
    pretrained = load_tokenizer(folder)
    assert pretrained.encode("Hello") == [gemma.BOS, *encode("Hello")]
    assert pretrained.encode("Hello", add_special_tokens=False) == encode("Hello")
    assert pretrained.encode("<bos>") == [gemma.BOS, gemma.BOS]
    assert not pretrained.has_chat_template


@given(text=st.text())
def test_text_comes_back(encode, tokenizer, text):
    ids = encode(text)
    # The space is its mark's; only so far are they told apart.
    assert tokenizer.decode(ids) == text.replace("▁", " ")
    assert gemma.UNK not in ids


@given(text=st.text(alphabet=st.sampled_from("aé🌈𓀀👩\u200d \n\t<>0x1F")))
def test_streamed_text_is_whole_text(encode, tokenizer, text):
    detokenizer = tokenizer.detokenizer
    for token in encode(text):
        detokenizer.add_token(token)
    detokenizer.finalize()
    assert detokenizer.text == text


def test_the_detokenizer_is_the_one_for_sentence_pieces(tokenizer):
    detokenizer = tokenizer.detokenizer
    assert type(detokenizer) is SPMStreamingDetokenizer
    assert not detokenizer.trim_space


def test_what_has_no_piece_is_bytes(encode):
    assert encode("𓀀") == [238 + byte for byte in "𓀀".encode()]
    assert encode("\0") == [238]
    assert len(encode("🌈")) == len(encode("é")) == 1


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("\n", [107]),
        ("\n\n", [108]),
        ("\n" * 31, [137]),
        ("\n" * 40, [137, 115]),
        ("  ", [138]),
        (" " * 31, [167]),
        (" ", [236743]),
        ("\t\t", [255969]),
        ("\n    \t", [107, 140, 255968]),
    ],
)
def test_runs_of_white_space_are_pieces(encode, text, ids):
    assert encode(text) == ids


def test_words_take_the_space_before_them(encode, tokenizer):
    pieces = tokenizer.convert_ids_to_tokens(encode("call the weather"))
    assert pieces == ["call", "▁the", "▁weather"]
    assert len(encode("<|channel>thought\n")) == 3


@pytest.mark.parametrize("form", sorted(FORMS))
class TestForm:
    def test_a_question(self, render, form):
        opening = "" if "e2b" in form else "<|channel>thought\n<channel|>"
        assert render(form, {"role": "user", "content": " Hi \n"}) == (
            f"<bos><|turn>user\nHi<turn|>\n<|turn>model\n{opening}"
        )

    def test_thinking_and_a_system_prompt(self, render, form):
        end = "" if "april" in form else "\n"
        messages = {"role": "system", "content": "Be brief. "}, QUESTION
        assert render(form, *messages, enable_thinking=True) == (
            f"<bos><|turn>system\n<|think|>{end}Be brief.<turn|>\n"
            "<|turn>user\nWeather in Paris?<turn|>\n<|turn>model\n"
        )

    def test_a_thought_in_the_content_is_left_out(self, render, form):
        said = answer("<|channel>thought\nA greeting.\n<channel|> Hello.\n")
        text = render(form, QUESTION, said, QUESTION)
        assert "<|turn>model\nHello.<turn|>\n<|turn>user\n" in text
        assert "greeting" not in text

    def test_a_tool(self, render, form):
        text = render(form, QUESTION, tools=[TOOL])
        if "april" in form:
            days = 'days:{,items:{type:<|"|>INTEGER<|"|>}type:<|"|>ARRAY<|"|>}'
            where = (
                'where:{,properties:{city:{type:<|"|>STRING<|"|>}},'
                'required:[<|"|>city<|"|>]type:<|"|>OBJECT<|"|>}'
            )
        else:
            days = 'days:{items:{type:<|"|>INTEGER<|"|>},type:<|"|>ARRAY<|"|>}'
            where = (
                'where:{properties:{city:{type:<|"|>STRING<|"|>}},'
                'required:[<|"|>city<|"|>],type:<|"|>OBJECT<|"|>}'
            )
        assert text.startswith(
            "<bos><|turn>system\n<|tool>declaration:get_weather{description:"
            f'<|"|>Tells it.<|"|>,parameters:{{properties:{{{days},'
            'unit:{description:<|"|>Its.<|"|>,enum:[<|"|>C<|"|>,<|"|>F<|"|>],'
            f'type:<|"|>STRING<|"|>}},{where}}},required:[<|"|>where<|"|>],'
            'type:<|"|>OBJECT<|"|>}}<tool|><turn|>\n'
        )

    def test_a_call(self, render, form):
        null = "null" if "july" in form else "None"
        made = call(b={"y": [1, 2.5], "X": True}, a="P", c=None, d={}, e=[])
        text = render(form, QUESTION, answer(tool_calls=[made]))
        written = f"b:{{X:true,y:[1,2.5]}},c:{null},d:{{}},e:[]"
        start = text.index(S)
        end = "<turn|>\n<|turn>model\n" if "april" in form else R
        expected = f'{S}call:get_weather{{a:<|"|>P<|"|>,{written}}}{E}{end}'
        if form == "april-31b":
            expected += "<|channel>thought\n<channel|>"
        assert text[start:] == expected


RESULTS = (
    f"{S}call:get_weather{{a:1}}{E}{S}call:get_weather{{a:2}}{E}"
    f'{R}response:get_weather{{value:<|"|>18 C<|"|>}}{F}'
    f'{R}response:get_weather{{value:<|"|>3 C<|"|>}}{F}'
)
CALLED = (
    QUESTION,
    answer(
        tool_calls=[call(a=1), call(a=2, number="2")], reasoning_content="Two calls."
    ),
    result("18 C"),
    result([{"type": "text", "text": "3 C"}], number="2"),
)


@pytest.mark.parametrize(
    ("form", "opening"),
    [("may-e2b", ""), ("july-e2b", "<|channel>thought\n"), ("may-12b", "")],
)
def test_results_follow_their_calls(render, form, opening):
    start = "<bos><|turn>user\nWeather in Paris?<turn|>\n<|turn>model\n"
    thought = "<|channel>thought\nTwo calls.\n<channel|>"
    text = render(form, *CALLED)
    assert text == start + thought + RESULTS
    text = render(form, *CALLED, enable_thinking=True)
    assert text.endswith(f"{thought}{RESULTS}{opening}")


def test_the_first_forms_take_results_in_the_message_of_the_call(render):
    responses = [{"name": "get_weather", "response": {"value": 3, "at": "noon"}}]
    message = answer(tool_calls=[call(a=1)], tool_responses=responses)
    expected = (
        f"{S}call:get_weather{{a:1}}{E}"
        f'{R}response:get_weather{{at:<|"|>noon<|"|>,value:3}}{F}'
    )
    for form in ("april-e2b", "may-e2b", "july-e2b"):
        assert render(form, QUESTION, message).endswith(f"model\n{expected}")
    opening = "<|channel>thought\n<channel|>"
    assert render("april-31b", QUESTION, message).endswith(expected + opening)
    assert "<|turn>tool\n18 C<turn|>\n" in render("april-e2b", *CALLED)


@pytest.mark.parametrize(
    ("form", "settings", "is_replayed"),
    [
        ("april-31b", {}, False),
        ("may-12b", {}, False),
        ("july-12b", {}, False),
        ("july-12b", {"preserve_thinking": True}, True),
    ],
)
def test_thoughts_of_turns_that_have_ended(render, form, settings, is_replayed):
    text = render(form, *CALLED, answer("18 and 3."), QUESTION, **settings)
    assert ("Two calls." in text) == is_replayed


def test_july_replays_the_thought_of_the_turn_that_is_open(render):
    said = answer("Let me look.", reasoning="I look.")
    assert "I look." not in render("may-12b", QUESTION, said)
    text = render("july-12b", QUESTION, said)
    assert "model\n<|channel>thought\nI look.\n<channel|>Let me look.<turn|>\n" in text


def test_answers_that_follow_each_other_are_one_turn(render):
    said = (QUESTION, answer("One."), answer("Two."))
    assert "<|turn>model\nOne.<turn|>\nTwo.<turn|>\n" in render("may-e2b", *said)
    assert "<|turn>model\nOne.Two.<turn|>\n" in render("july-e2b", *said)
    turns = "<|turn>model\nOne.<turn|>\n<|turn>model\nTwo.<turn|>\n"
    assert turns in render("april-e2b", *said)


def test_july_refuses_arguments_that_are_text(render):
    made = {"function": {"name": "f", "arguments": '{"a": 1}'}}
    text = render("may-12b", QUESTION, answer(tool_calls=[made]))
    assert text.endswith(f'{S}call:f{{{{"a": 1}}}}{E}{R}')
    with pytest.raises(jinja2.TemplateError, match="arguments"):
        render("july-12b", QUESTION, answer(tool_calls=[made]))
