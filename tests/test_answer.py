"""What an answer's text means, whatever pieces it comes in."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_gemma_mtp.answer import CONTENT, REASONING, AnswerReader, marks_of
from mlx_gemma_mtp.tool_calls import QUOTE, Tools
from tests.gemma import SPECIAL

MARKS = frozenset(SPECIAL.values()) - {"<mask>", "<unk>"}
TOOLS = Tools([{"function": {"name": "f", "parameters": {"properties": {"a": {}}}}}])
CALL_TEXT = f"<|tool_call>call:f{{a:{QUOTE}x{QUOTE}}}<tool_call|>"
THOUGHT = "<|channel>thought\n"


def read(text, *, size=None, opening="", tools=TOOLS):
    """Content, thought and calls of an answer, and its reader."""
    reader = AnswerReader(MARKS, tools, opening=opening)
    size = size or max(len(text), 1)
    parts = [
        part
        for start in range(0, len(text), size)
        for part in reader.read(text[start : start + size])
    ]
    parts += reader.read("", is_last=True)
    said = {
        kind: "".join(part.text for part in parts if part.kind == kind)
        for kind in (CONTENT, REASONING)
    }
    calls = [(call.name, call.arguments) for call in (p.call for p in parts) if call]
    return (said[CONTENT], said[REASONING], calls), reader


@pytest.mark.parametrize(
    ("text", "content", "thought", "num_calls"),
    [
        (f"{THOUGHT}Hm.\n\n<channel|>Yes.\n", "Yes.\n", "Hm.\n", 0),
        (f"{THOUGHT}<channel|>Yes", "Yes", "", 0),
        (f"{THOUGHT}\n<channel|>Yes", "Yes", "", 0),
        ("<|channel>Hm<channel|>Yes", "Yes", "Hm", 0),
        ("<|channel>\nHm<channel|>Yes", "Yes", "Hm", 0),
        ("<|channel>thought Hm<channel|>Yes", "Yes", " Hm", 0),
        ("<|channel>thoughts are<channel|>", "", "thoughts are", 0),
        # Marks where nobody expects them.
        ("Yes<channel|> and no", "Yes and no", "", 0),
        (f"a{THOUGHT}b\n<channel|>c", "ac", "b", 0),
        (f"a{THOUGHT}b\n<channel|>c{THOUGHT}d\n<channel|>e", "ace", "b\nd", 0),
        (f"{THOUGHT}a{THOUGHT}b\n<channel|>c", "c", "a\nb", 0),
        ("a<|turn>b<turn|>c<|think|>d<eos>e<pad>", "abcde", "", 0),
        (f"say {QUOTE}yes{QUOTE}", 'say "yes"', "", 0),
        ("a <mask> of <unk> SVG", "a <mask> of <unk> SVG", "", 0),
        # Calls.
        (f"Let me see.{CALL_TEXT}{CALL_TEXT}", "Let me see.", "", 2),
        (f"{THOUGHT}I call.{CALL_TEXT}\n<channel|>Done", "Done", "I call.", 1),
        (f"{THOUGHT}I call.{CALL_TEXT}more", "", "I call.more", 1),
        (f"{CALL_TEXT}{THOUGHT}Hm\n<channel|>Done", "Done", "Hm", 1),
        (f"{CALL_TEXT[:-12]}{CALL_TEXT}", "", "", 2),
        (f"{CALL_TEXT[:-12]}<turn|>", "", "", 1),
        (CALL_TEXT[:-12], "", "", 1),
        (CALL_TEXT.replace("x", "}<tool_call|><|channel>{"), "", "", 1),
        # Calls that are none.
        ("<|tool_call>call:f{a:<tool_call|>b", "call:f{a:b", "", 0),
        (f"<|tool_call>call:f{{a:{QUOTE}x", 'call:f{a:"x', "", 0),
        (f"{THOUGHT}<|tool_call>x<tool_call|>\n<channel|>c", "c", "x", 0),
        (
            f"<|tool_call>call:f{{a:{QUOTE}x}}<tool_call|>b{CALL_TEXT}",
            'call:f{a:"x}b',
            "",
            1,
        ),
        # Cut off.
        (f"{THOUGHT}Hm\n", "", "Hm\n", 0),
        ("<|channel>thou", "", "thou", 0),
        ("<|channel>thought", "", "", 0),
        ("1 <", "1 <", "", 0),
        ("", "", "", 0),
    ],
)
def test_what_an_answer_means(text, content, thought, num_calls):
    found, _ = read(text)
    assert (found[0], found[1], len(found[2])) == (content, thought, num_calls)
    for size in range(1, len(text)):
        assert read(text, size=size)[0] == found


@pytest.mark.parametrize(
    ("opening", "text", "content", "thought"),
    [
        (f"<|turn>model\n{THOUGHT}", "Hm\n<channel|>Yes", "Yes", "Hm"),
        (f"<|turn>model\n{THOUGHT}<channel|>", "Yes", "Yes", ""),
        # An answer's beginning that was given is no part of it, nor is what was held
        # back of it.
        (f"{THOUGHT}First, ", "then\n<channel|>Yes", "Yes", "then"),
        (f"{THOUGHT}First\n", "then", "", "then"),
        (f"{THOUGHT}First\n", "<channel|>Yes", "Yes", ""),
        ("<|channel>", "thought\nHm", "", "Hm"),
        ("<|channel>thought", "\nHm", "", "Hm"),
        ("<|channel>tho", "rough", "", "rough"),
        (f"{THOUGHT}Hm\n<channel|>1 <", " 2", " 2", ""),
        (f"{THOUGHT}Hm\n<channel|>", f"{THOUGHT}Oh", "", "Oh"),
    ],
)
def test_what_the_prompt_has_opened(opening, text, content, thought):
    for size in range(1, len(text) + 1):
        assert read(text, size=size, opening=opening)[0] == (content, thought, [])


def test_a_call_whose_beginning_was_given():
    found, _ = read(CALL_TEXT[18:], opening=CALL_TEXT[:18])
    assert found == ("", "", [("f", {"a": "x"})])


def test_a_call_that_was_cut_off_is_told_from_one_that_is_none():
    for text, is_cut_off, num_unread in (
        (CALL_TEXT, False, 0),
        ("<|tool_call>nonsense<tool_call|>", False, 1),
        ("<|tool_call>call:f{a:", True, 1),
        (f"<|tool_call>call:f{{a:{QUOTE}x", True, 1),
        (f"<|tool_call>call:f{{a:{QUOTE}x}}<tool_call|>b", False, 1),
    ):
        _, reader = read(text)
        assert (reader.is_cut_off, reader.num_unread) == (is_cut_off, num_unread)


def test_without_tools_the_text_of_a_call_is_content():
    found, _ = read(f"a{CALL_TEXT}b", tools=None)
    assert found == ('acall:f{a:"x"}b', "", [])


def test_marks_are_those_of_the_tokenizer(gemma_tokenizer):
    assert marks_of(gemma_tokenizer("may-e2b")) == MARKS
    reader = AnswerReader(frozenset())
    (part,) = reader.read(f"a{THOUGHT}b", is_last=True)
    assert part.text == f"a{THOUGHT}b"


_WORD = st.text("abc <\n", min_size=1, max_size=5)
_PIECES = st.lists(
    _WORD | st.sampled_from([*sorted(MARKS), "thought\n", "call:f{a:1}"]), max_size=25
)


class TestAnyAnswer:
    @given(_PIECES, st.integers(1, 30))
    @settings(max_examples=1000)
    def test_pieces_of_any_length_mean_the_same(self, pieces, size):
        text = "".join(pieces)
        assert read(text, size=size)[0] == read(text)[0]

    @given(_PIECES)
    @settings(max_examples=1000)
    def test_no_mark_is_shown_and_no_text_is_lost(self, pieces):
        text = "".join(pieces)
        for tools in (TOOLS, None):
            (content, thought, calls), _ = read(text, tools=tools)
            # A word may end in the first character of a mark, which is then a new one.
            bare = re.sub("|".join(map(re.escape, MARKS)), "", text)
            if bare.count("<") == text.count("<") - sum(map(text.count, MARKS)):
                assert not any(mark in content + thought for mark in MARKS)
            letters = "".join(re.findall("[abc]", bare.replace("thought", "")))
            found = content + thought + "".join("call:f{a:1}" for _ in calls)
            found = "".join(re.findall("[abc]", found.replace("thought", "")))
            assert sorted(found) == sorted(letters)


@pytest.mark.parametrize(
    "unit",
    [
        "<|tool_call>",
        "<|tool_call>call:f{a:1}",
        "<|channel>",
        QUOTE,
        "<",
        "<|tool_call>call:f{a:" + QUOTE,
    ],
)
def test_a_megabyte_takes_linear_time(unit):
    """Quadratic, one of them would take longer than any test may."""
    text = unit * (10**6 // len(unit))
    for opening in ("", "<|tool_call>", "<|tool_call>call:f{a:", THOUGHT):
        reader = AnswerReader(MARKS, TOOLS, opening=opening)
        for start in range(0, len(text), 1000):
            reader.read(text[start : start + 1000])
        reader.read("", is_last=True)


@pytest.mark.parametrize(
    "inside", ["[", "{", "a:", '"', '" ', "' '", " ", ",", "a=", "\\", "a:{", "a:1,"]
)
def test_a_long_call_takes_linear_time(inside):
    for start in ("call:f{", 'call:f{a:"', "call:f{a:'", "call:f{a:"):
        text = start + inside * (300_000 // len(inside))
        read(f"<|tool_call>{text}<tool_call|>")
