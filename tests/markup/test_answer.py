"""What an answer's text means, whatever pieces it comes in."""

import re
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_gemma_mtp.generation.stop import StopStrings
from mlx_gemma_mtp.generation.text_pieces import TextPieces
from mlx_gemma_mtp.markup.answer import (
    CONTENT,
    REASONING,
    AnswerReader,
    Marks,
    cut,
    marks_of,
    plain,
    spelled,
)
from mlx_gemma_mtp.markup.tool_calls import QUOTE
from mlx_gemma_mtp.markup.tools import Tools
from tests.gemma import SPECIAL

NAMES = frozenset(SPECIAL.values()) - {"<mask>", "<unk>"}
MARKS = Marks(NAMES)
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
    found, _ = read("[<tool_call|>x", opening="Look <|tool_call>call:f{a:")
    assert found == ("[x", "", [])
    found, _ = read("x}", opening=f"Look <|tool_call>call:f{{a:{QUOTE}")
    assert found == ("x}", "", [])


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


def test_marks_are_those_of_the_tokenizer(whole_gemma_tokenizer):
    found = marks_of(whole_gemma_tokenizer("may-e2b"))
    assert found.tokens == {i: name for i, name in SPECIAL.items() if name in NAMES}
    assert all(found.pattern.fullmatch(name) for name in NAMES)
    reader = AnswerReader(Marks(()))
    (part,) = reader.read(f"a{THOUGHT}b", is_last=True)
    assert part.text == f"a{THOUGHT}b"


def test_marks_that_a_template_writes_as_text():
    """A tokenizer without them spells them: what spells one counts for it then."""

    class Tokenizer:
        chat_template = "{{ bos_token }}<|tool_call><tool_call|>"

        def get_added_vocab(self):
            return {"<bos>": 2}

    found = marks_of(Tokenizer())
    assert found.tokens == {}
    assert found.pattern.fullmatch("<|tool_call>")


class TestSpelledMarks:
    """Text of ordinary tokens that looks like a mark is text."""

    @pytest.mark.parametrize("size", [1, 2, 3, 100])
    def test_is_content(self, size):
        text = '["<pad>", "<eos>"] <channel|> <|channel>thought\n' + CALL_TEXT
        assert read(spelled(text), size=size)[0] == (text, "", [])
        found, _ = read(f"a{THOUGHT}{spelled(text)}<channel|>b", size=size)
        assert found == ("ab", text, [])

    def test_is_an_argument(self):
        value = spelled("<div><eos>")
        text = f"<|tool_call>call:f{{a:{QUOTE}{value}{QUOTE}}}<tool_call|>"
        assert read(text)[0] == ("", "", [("f", {"a": "<div><eos>"})])

    @given(st.text("ab<|"), st.integers(0, 20))
    def test_cut(self, text, count):
        for marked in (text, spelled(text), f"{text}{spelled(text)}"):
            begin, rest = cut(marked, count)
            assert begin + rest == marked
            assert plain(begin) == plain(marked)[:count]

    @given(st.text("ab<\ufdd0"), st.integers(0, 20))
    def test_no_character_is_lost(self, text, count):
        """That which is put behind each < may be in the text itself."""
        assert plain(spelled(text)) == text
        begin, rest = cut(spelled(text), count)
        assert (plain(begin), plain(rest)) == (text[:count], text[count:])

    @pytest.mark.parametrize("size", [1, 2, 3, 100])
    def test_no_character_of_an_answer_is_lost(self, size):
        text = "a<\ufdd0<<\ufdd0\ufdd0b\ufdd0"
        assert read(spelled(text), size=size)[0] == (text, "", [])
        found, _ = read(f"a{THOUGHT}{spelled(text)}<channel|>b", size=size)
        assert found == ("ab", text, [])
        call = f"<|tool_call>call:f{{\ufdd0:{QUOTE}{spelled(text)}{QUOTE}}}<tool_call|>"
        assert read(call, size=size)[0] == ("", "", [("f", {"\ufdd0": text})])

    @pytest.mark.gemma
    @pytest.mark.parametrize("stop", [None, "Z", "<", "<eos>", "]", "🌈"])
    def test_tokens_tell(self, gemma_tokenizer, stop):
        """Marks spelled by single characters, then one that is a token."""
        tokenizer = gemma_tokenizer("may-12b")
        spelled_ids = tokenizer.convert_tokens_to_ids([*'["<eos>","<|channel>"]'])
        assert not {0, 1, 2, 100} & set(spelled_ids)
        rest = tokenizer.encode(" < 🌈<|channel>thought\nHm", add_special_tokens=False)
        pieces = TextPieces(
            tokenizer.detokenizer, StopStrings(stop), marks_of(tokenizer)
        )
        text = ""
        for token in [*spelled_ids, *rest]:
            text += "" if pieces.is_stopped else pieces.add(token, None)
        text += "" if pieces.is_stopped else pieces.add(tokenizer.eos_token_id, "stop")
        whole = '["<eos>","<|channel>"] < 🌈'
        end = whole.find(stop) if stop in ("<", "<eos>", "]", "🌈") else len(whole)
        thought = "Hm" if end == len(whole) else ""
        assert read(text)[0] == (whole[:end], thought, [])


def reference(text):
    """What a text without calls means, line ends apart: a second way to the same."""
    said = {CONTENT: "", REASONING: ""}
    kind = CONTENT
    for piece in re.split(f"({'|'.join(map(re.escape, NAMES))})", text):
        if piece in NAMES:
            kind = {"<|channel>": REASONING, "<channel|>": CONTENT}.get(piece, kind)
            said[kind] += {QUOTE: '"', "<|channel>": "\0"}.get(piece, "")
        else:
            said[kind] += piece
    thought = re.sub(r"\0(thought\b)?", "", said[REASONING])
    return said[CONTENT], thought.replace("\n", "")


_WORD = st.text("abc <\n", min_size=1, max_size=5)
_PIECES = st.lists(
    _WORD | st.sampled_from([*sorted(NAMES), "thought\n", "call:f{a:1}"]), max_size=25
)


class TestAnyAnswer:
    @given(_PIECES, st.integers(1, 30))
    @settings(max_examples=300)
    def test_pieces_of_any_length_mean_the_same(self, pieces, size):
        text = "".join(pieces)
        assert read(text, size=size)[0] == read(text)[0]

    @given(_PIECES)
    @settings(max_examples=300)
    def test_no_text_is_lost_and_no_mark_is_shown(self, pieces):
        """Line ends of thoughts have tests of their own."""
        for text in ("".join(pieces), "".join(map(_spelled_word, pieces))):
            (content, thought, _), _ = read(text, tools=None)
            expected = tuple(map(plain, reference(text)))
            assert (content, thought.replace("\n", "")) == expected

    @given(_PIECES, _PIECES)
    @settings(max_examples=300)
    def test_nothing_of_an_opening_is_said(self, opening, pieces):
        """What is said is the end of what both together say."""
        before, text = "".join(opening), "".join(pieces)
        whole, _ = read(before + text)
        found, _ = read(text, opening=before)
        assert whole[0].endswith(found[0])
        assert whole[1].endswith(found[1])
        assert whole[2][len(whole[2]) - len(found[2]) :] == found[2]


def _spelled_word(piece):
    return piece if piece in NAMES else spelled(piece)


def num_calls(function):
    """How many functions are called, a measure of work that no clock disturbs."""
    count = 0

    def profile(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


def read_in_pieces(text, opening=""):
    reader = AnswerReader(MARKS, TOOLS, opening=opening)
    for start in range(0, len(text), 100):
        reader.read(text[start : start + 100])
    reader.read("", is_last=True)


UNITS = [
    "<|tool_call>",
    "<|tool_call>call:f{a:1}",
    "<|channel>",
    QUOTE,
    "<",
    f"<|tool_call>call:f{{a:{QUOTE}",
]
INSIDE = ["[", "{", "a:", '"', '" ', "' '", " ", ",", "a=", "\\", "a:{", "a:1,"]
STARTS = ["call:f{", 'call:f{a:"', "call:f{a:'", "call:f{a:"]


class TestWork:
    @pytest.mark.parametrize("unit", UNITS)
    def test_grows_with_the_text(self, unit):
        for opening in ("", "<|tool_call>", "<|tool_call>call:f{a:", THOUGHT):
            read_in_pieces(unit, opening)  # what happens once
            one, two = (
                num_calls(lambda n=n, o=opening: read_in_pieces(unit * n, o))
                for n in (300, 600)
            )
            assert two <= 2.2 * one

    @pytest.mark.parametrize("inside", INSIDE)
    def test_grows_with_a_call(self, inside):
        for start in STARTS:
            text = f"<|tool_call>{start}"
            one, two = (
                num_calls(lambda n=n, t=text: read(t + inside * n)) for n in (500, 1000)
            )
            assert two <= 2.2 * one

    def test_does_not_grow_with_the_tools(self):
        """Names and keys are looked up."""

        def work(count):
            keys = {f"key{i}": {"type": "string"} for i in range(count)}
            functions = [
                {"name": f"tool{i}", "parameters": {"properties": keys}}
                for i in range(count)
            ]
            tools = Tools([{"function": function} for function in functions])
            arguments = ",".join(f"key{i}:x" for i in range(50))
            text = f"<|tool_call>call:tool7{{{arguments}}}<tool_call|>"
            assert len(read(text, tools=tools)[0][2][0][1]) == 50  # what happens once
            return num_calls(lambda: read(text, tools=tools))

        assert work(400) <= 1.1 * work(100)

    @pytest.mark.parametrize("unit", [*UNITS, *(f"<|tool_call>{s}" for s in STARTS)])
    def test_much_text_is_read(self, unit):
        """Steps inside a pattern are no calls: quadratic ones would never end."""
        read_in_pieces(unit * (300_000 // len(unit)))

    @pytest.mark.parametrize("inside", INSIDE)
    def test_a_long_call_is_read(self, inside):
        for start in STARTS[:3]:
            read(f"<|tool_call>{start}{inside * (300_000 // len(inside))}<tool_call|>")
