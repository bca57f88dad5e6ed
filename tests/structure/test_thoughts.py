"""Limited thoughts: the masks of every place, by a second count; blocks; texts.

Run: python -m pytest tests/structure/test_thoughts.py
"""

from __future__ import annotations

import json
import sys
from typing import Any

import jsonschema
import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from mlx_gemma_mtp.errors import RequestError
from mlx_gemma_mtp.generation.text import stream_generate
from mlx_gemma_mtp.pair.load import load
from mlx_gemma_mtp.structure.constraint import regex
from mlx_gemma_mtp.structure.masks import BoundConstraint, RowMasks
from mlx_gemma_mtp.structure.thoughts import Thoughts
from tests.gemma import (
    BOS,
    END_OF_CHANNEL,
    END_OF_RESULT,
    END_OF_TURN,
    EOS_IDS,
    START_OF_CHANNEL,
    START_OF_TURN,
)
from tests.gemma import VOCAB_SIZE as GEMMA_SIZE
from tests.structure.schemas import SCHEMAS
from tests.structure.test_masks import ENDS, THINK, allowed, tiny
from tests.tiny import VOCAB_SIZE, model_folder, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("plain_graphs")

# A vocabulary of one word of bits, to count by hand.
EOS, START, END, ASKS, TURN, NAME, LINE = range(7)
ALL = set(range(32))
PROMPTS: dict[str, tuple[int, ...]] = {
    "silent": (TURN, 9, TURN),
    "asked": (TURN, ASKS, TURN),
    "opened": (TURN, ASKS, TURN, START),
    "half named": (TURN, ASKS, TURN, START, NAME),
    "named": (TURN, ASKS, TURN, START, NAME, LINE),
    "begun": (TURN, ASKS, TURN, START, NAME, LINE, 9, 9, 9),
    "closed": (TURN, ASKS, TURN, START, NAME, LINE, END),
}


def row_of(prompt, limit):
    """A row of any form."""
    thoughts = Thoughts(
        START, END, ASKS, frozenset({TURN}), (NAME, LINE), limit, may_recur=True
    )
    return RowMasks(
        lambda: None,
        what="the limit",
        place=thoughts.behind(prompt),
        thoughts=thoughts,
        ends={EOS},
        foreign_ends=(),
        num_words=1,
    )


def thoughts_in(tokens):
    """The thoughts in tokens, and whether the last one is open."""
    found, rest = list[list[int]](), list(tokens)
    while START in rest:
        rest = rest[rest.index(START) + 1 :]
        if END not in rest:
            return [*found, rest], True
        found.append(rest[: rest.index(END)])
        rest = rest[rest.index(END) + 1 :]
    return found, False


def without_name(thought):
    """What is thought."""
    for name in ([NAME, LINE], [NAME]):
        if thought[: len(name)] == name:
            return thought[len(name) :]
    return thought


def expected(prompt, tokens, limit):
    """What may come behind tokens, counted anew from the first one."""
    turn = prompt[max(i for i, token in enumerate(prompt) if token == TURN) :]
    thoughts, is_open = thoughts_in([*turn, *tokens])
    given_thoughts, _ = thoughts_in(turn)
    num = sum(len(without_name(thought)) for thought in thoughts)
    num -= sum(len(without_name(thought)) for thought in given_thoughts)
    if not is_open:
        return ALL if num < limit else ALL - {START}
    if num < limit - 1:
        return ALL
    if thoughts[-1] in ([], [NAME]):
        return {(NAME, LINE)[len(thoughts[-1])]}
    return {LINE, END} if num < limit else {END}


class TestMasks:
    """Of text of any form."""

    @settings(max_examples=150)
    @given(st.data(), st.sampled_from(sorted(PROMPTS)), st.integers(0, 5))
    def test_are_those_of_a_second_count(self, data, name, limit):
        prompt = PROMPTS[name]
        row, tokens = row_of(prompt, limit), list[int]()
        likely = (START, END, NAME, LINE, 9, 10)
        for _ in range(data.draw(st.integers(1, 14))):
            found = allowed(row.block(()).words[0])
            assert found == expected(prompt, tokens, limit)
            tokens.append(data.draw(st.sampled_from(sorted(found & set(likely)))))
            row.advance(tokens[-1])
        thoughts, _ = thoughts_in([*prompt, *tokens])
        begun = thoughts_in(prompt)[0]
        num = sum(len(without_name(t)) for t in thoughts)
        assert num - sum(len(without_name(t)) for t in begun) <= limit

    @settings(max_examples=150)
    @given(
        prompt=st.sampled_from(sorted(PROMPTS)),
        limit=st.integers(0, 5),
        before=st.lists(st.sampled_from((START, END, NAME, LINE, 9)), max_size=6),
        drafts=st.lists(st.sampled_from((EOS, START, END, NAME, LINE, 9)), max_size=8),
    )
    def test_of_a_block_are_those_of_each_place(self, prompt, limit, before, drafts):
        """Drafts that may stand, that may not, and that end the row."""
        rows = [row_of(PROMPTS[prompt], limit) for _ in range(2)]
        for token in before:
            if token in allowed(rows[0].block(()).words[0]):
                for each in rows:
                    each.advance(token)
        row, other = rows
        first = row.block(()).words[0]
        block = row.block(drafts).words
        assert block.shape == (len(drafts) + 1, 1)
        assert np.array_equal(row.block(()).words, [first])
        num_seen = 0
        for words, token in zip(block, [*drafts, None], strict=True):
            assert np.array_equal(words, other.block(()).words[0])
            num_seen += 1
            if token in (None, EOS) or token not in allowed(words):
                break
            other.advance(token)
        assert (block[num_seen:] == 0xFFFFFFFF).all()

    @pytest.mark.parametrize(
        ("prompt", "limit", "tokens", "found"),
        [
            ("silent", 0, (), ALL - {START}),
            ("silent", 1, (), ALL),
            ("asked", 0, (9,), ALL - {START}),
            ("opened", 0, (), {NAME}),
            ("half named", 0, (), {LINE}),
            ("named", 0, (), {END}),
            ("begun", 0, (), {END}),
            ("begun", 3, (), ALL),
            ("begun", 3, (9, 9), {LINE, END}),
            ("begun", 3, (9, 9, LINE), {END}),
            ("asked", 1, (START,), {NAME}),
            ("asked", 1, (START, NAME, LINE), {LINE, END}),
            ("asked", 2, (START, NAME, LINE), ALL),
            ("asked", 2, (START, NAME, 9), {LINE, END}),
            ("asked", 2, (START, 9, END), ALL),
            ("asked", 2, (START, 9, END, 9, START), {NAME}),
            ("asked", 2, (START, 9, LINE, END), ALL - {START}),
            ("closed", 2, (9,), ALL),
        ],
    )
    def test_by_hand(self, prompt, limit, tokens, found):
        row = row_of(PROMPTS[prompt], limit)
        for token in tokens:
            row.advance(token)
        block = row.block(())
        assert allowed(block.words[0]) == found
        assert block.forced == [list(found) if len(found) == 1 else []]
        assert not row.is_complete

    def test_a_token_that_does_not_fit_is_named(self):
        row = row_of(PROMPTS["named"], 0)
        with pytest.raises(RequestError, match="of the row: got 9, which"):
            row.advance(9)


class TestGemma:
    ASKS = (BOS, START_OF_TURN, THINK, END_OF_TURN, START_OF_TURN, 902)

    @pytest.fixture
    def tokenizer(self, whole_gemma_tokenizer):
        return whole_gemma_tokenizer("july-e2b")

    def test_a_form_stands_behind_a_limited_thought(self, tokenizer):
        line, name, a = (
            tokenizer.encode(text, add_special_tokens=False)[0]
            for text in ("\n", "thought", "a")
        )
        bound = BoundConstraint(regex("[ab]{2}"), tokenizer).limited(3)
        row = bound.row(self.ASKS, EOS_IDS)
        drafts = [START_OF_CHANNEL, name, line, 5000, 5001, line, END_OF_CHANNEL, a]
        block = row.block(drafts).words
        assert START_OF_CHANNEL in allowed(block[0])
        for words in block[1:5]:
            assert allowed(words) >= set(range(GEMMA_SIZE)) - set(EOS_IDS)
            assert not allowed(words) & set(EOS_IDS)
        assert allowed(block[5]) == {line, END_OF_CHANNEL}
        assert allowed(block[6]) == {END_OF_CHANNEL}
        assert a in allowed(block[7])
        assert START_OF_CHANNEL not in allowed(block[7])
        for token in drafts[:4]:
            row.advance(token)
        assert np.array_equal(row.block(drafts[4:]).words, block[4:])

    def test_a_thought_asks_nothing_of_the_form(self, tokenizer):
        """Its masks may take milliseconds, and a thought has thousands of tokens."""

        class Silent:
            def compute_bitmask(self):
                raise AssertionError("a mask of the form")

        bound = BoundConstraint(regex("[a-c]{3}"), tokenizer)
        row = bound.row([START_OF_CHANNEL], EOS_IDS)
        row._matcher = Silent()
        for words in row.block([5000, 5001]).words:
            assert allowed(words) >= set(range(GEMMA_SIZE)) - set(EOS_IDS)
            assert not allowed(words) & set(EOS_IDS)

    def test_none_begins_where_there_is_none_to_come(self, tokenizer):
        bound = BoundConstraint(regex("[ab]{2}"), tokenizer)
        for limit, may_begin in ((0, False), (1, True)):
            row = bound.limited(limit).row(self.ASKS, EOS_IDS)
            found = allowed(row.block(()).words[0])
            assert (START_OF_CHANNEL in found) is may_begin
            assert len(found) > 1
        assert START_OF_CHANNEL in allowed(
            bound.row(self.ASKS, EOS_IDS).block(()).words[0]
        )

    @pytest.mark.parametrize("vocab_size", [GEMMA_SIZE, GEMMA_SIZE + 7])
    def test_any_form_needs_no_library(self, tokenizer, monkeypatch, vocab_size):
        """And all of the model's ids are allowed, more than the tokenizer's perhaps."""
        monkeypatch.setitem(sys.modules, "llguidance", None)
        bound = BoundConstraint(None, tokenizer, vocab_size=vocab_size).limited(1)
        prompt = (*self.ASKS, END_OF_RESULT, START_OF_CHANNEL)
        row = bound.row(prompt, EOS_IDS)
        assert len(allowed(row.block(()).words[0])) == 1
        row = bound.row(self.ASKS, EOS_IDS)
        assert allowed(row.block(()).words[0]) >= set(range(vocab_size))

    def test_a_limit_is_the_copys_own(self, tokenizer):
        bound = BoundConstraint(None, tokenizer, vocab_size=GEMMA_SIZE)
        prompt = (*self.ASKS, START_OF_CHANNEL, 903)
        assert len(allowed(bound.limited(0).row(prompt, ()).block(()).words[0])) == 1
        assert len(allowed(bound.limited(2).row(prompt, ()).block(()).words[0])) > 1
        assert len(allowed(bound.row(prompt, ()).block(()).words[0])) == GEMMA_SIZE


def test_a_model_without_marks_is_refused():
    bound = BoundConstraint(None, tiny(), vocab_size=VOCAB_SIZE)
    assert not bound.can_be_limited
    with pytest.raises(RequestError, match=r"left out for this model: got 5\. Its"):
        bound.limited(5)


# Ids of the tiny tokenizer that are no text by themselves, and marks in their place.
MARKS = {"<0xE2>": "<|channel>", "<0x82>": "<channel|>", "<0xAC>": "<|think|>"}
ASKING = "<bos><|turn>user\n<|think|>x<turn|>\n<|turn>model\n"
SILENT = "<bos><|turn>user\nx<turn|>\n<|turn>model\n"
OPENED = f"{ASKING}<|channel>thought\n"


def thinking_tokenizer():
    """The tiny one with the marks of thoughts as control tokens."""
    made = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    vocabulary = made["model"]["vocab"]
    for byte, mark in MARKS.items():
        place = vocabulary[mark] = vocabulary.pop(byte)
        like = made["added_tokens"][0]
        made["added_tokens"].append({**like, "id": place, "content": mark})
    made["added_tokens"].sort(key=lambda token: token["id"])
    whole = Tokenizer.from_str(json.dumps(made))
    return TokenizerWrapper(
        PreTrainedTokenizerFast(tokenizer_object=whole, bos_token="<bos>"),
        eos_token_ids=sorted(ENDS),
    )


class TestTexts:
    """Of a random pair, which ends a thought by chance alone."""

    KS = (0, 4, "auto")

    @pytest.fixture(scope="class")
    @classmethod
    def pair(cls, tmp_path_factory):
        folder = model_folder(tmp_path_factory.mktemp("thoughts") / "pair")
        return load(folder)[0], thinking_tokenizer()

    @pytest.fixture(scope="class")
    @classmethod
    def ids(cls, pair):
        """Those of the marks."""
        return pair[1].convert_tokens_to_ids(list(MARKS.values()))

    def responses(self, pair, prompt, **settings):
        settings = {"max_tokens": 10, "temp": 1.0, "exactness": "fast", **settings}
        model, tokenizer = pair
        return list(stream_generate(model, tokenizer, prompt, **settings))

    def tokens(self, pair, prompt, **settings):
        return [r.token for r in self.responses(pair, prompt, **settings)]

    @pytest.mark.parametrize(
        ("limit", "sampling"),
        [(0, {"seed": 1}), (2, {"seed": 1}), (6, {"seed": 1}), (6, {"temp": 0.0})],
        ids=str,
    )
    def test_are_the_same_for_every_k(self, pair, ids, sampling, limit):
        asked = {"max_thinking_tokens": limit, **sampling}
        texts = [
            self.tokens(pair, OPENED, num_draft_tokens=k, **asked) for k in self.KS
        ]
        assert texts == [texts[0]] * len(texts)
        end = texts[0].index(ids[1])
        assert limit - 1 <= end <= limit
        free = self.tokens(pair, OPENED, num_draft_tokens=0, **sampling)
        num_free = max(limit - 1, 0)
        assert texts[0][:num_free] == free[:num_free]
        assert len(texts[0]) > end + 1

    def test_without_a_seed(self, pair, ids):
        """Drafts are judged by block verification."""
        asked = {"max_thinking_tokens": 3, "num_draft_tokens": 4}
        found = self.responses(pair, OPENED, **asked)
        assert {ids[1], *ENDS} & {r.token for r in found[:4]}
        assert found[-1].rule == "block verification, masked"

    def test_all_thoughts_of_a_text_count(self, pair, ids):
        """Of one that would think again and again."""
        start, end, _ = ids
        num_prompt = len(pair[1].encode(SILENT, add_special_tokens=False))

        def thinking(tokens: mx.array, logits: mx.array) -> mx.array:
            said: Any = tokens[num_prompt:].tolist()
            is_thought = said.count(start) > said.count(end)
            logits[:, start] = -1e4 if is_thought else 1e4
            is_long = is_thought and len(said) % 4 == 3
            logits[:, end] = 1e4 if is_long else -1e4
            return logits

        asked = {"logits_processors": [thinking], "max_thinking_tokens": 6, "seed": 1}
        text, *others = (
            self.tokens(pair, SILENT, **asked, max_tokens=15, num_draft_tokens=k)
            for k in self.KS
        )
        assert others == [text] * len(others)
        assert text[:9:4] == [start] * 3
        assert text[3:12:4] == [end] * 3
        assert not {start, end} & {*text[1:3], *text[5:7], *text[9:11], *text[12:]}

    def test_none_begins(self, pair, ids):
        def begun(tokens: mx.array, logits: mx.array) -> mx.array:
            logits[:, ids[0]] = 1e4
            return logits

        asked = {"logits_processors": [begun], "max_thinking_tokens": 0}
        for prompt in (SILENT, ASKING):
            assert ids[0] not in self.tokens(pair, prompt, **asked, seed=1)

    def test_a_limit_that_is_not_reached_changes_nothing(self, pair):
        free = self.tokens(pair, OPENED, seed=1)
        assert self.tokens(pair, OPENED, seed=1, max_thinking_tokens=13) == free

    @pytest.mark.parametrize("number", KS)
    def test_an_answer_of_a_form_follows(self, pair, ids, number):
        schema = SCHEMAS["told apart"]
        asked = {"schema": schema, "max_thinking_tokens": 5, "max_tokens": 120}
        found = self.responses(pair, OPENED, **asked, seed=3, num_draft_tokens=number)
        end = [r.token for r in found].index(ids[1])
        assert end <= 5
        assert found[-1].finish_reason == "stop"
        answer = "".join(r.text for r in found[end + 1 :])
        jsonschema.validate(json.loads(answer), schema)

    def test_the_library_is_not_needed(self, pair, ids, monkeypatch):
        monkeypatch.setitem(sys.modules, "llguidance", None)
        found = self.tokens(pair, OPENED, seed=1, max_thinking_tokens=2)
        assert ids[1] in found[:3]
        with pytest.raises(RequestError, match="llguidance must be installed"):
            self.tokens(pair, OPENED, regex="a", max_thinking_tokens=2)

    @pytest.mark.parametrize("value", [-1, 1.5, True, "8"])
    def test_what_is_no_limit_is_refused(self, pair, value):
        with pytest.raises(RequestError, match="max_thinking_tokens must be 0 or more"):
            self.tokens(pair, OPENED, max_thinking_tokens=value)

    def test_a_model_without_marks_is_refused(self, pair):
        with pytest.raises(RequestError, match="must be left out for this model"):
            self.tokens((pair[0], tiny()), "x", max_thinking_tokens=3)

    @pytest.mark.slow
    def test_of_gemmas_ids(self, whole_gemma_pair_folder, whole_gemma_tokenizer):
        pair = (
            load(whole_gemma_pair_folder("july-e2b"))[0],
            whole_gemma_tokenizer("july-e2b"),
        )
        asked = {"max_tokens": 8, "seed": 1, "max_thinking_tokens": 3}
        texts = [self.tokens(pair, OPENED, **asked, num_draft_tokens=k) for k in (0, 3)]
        assert texts[0] == texts[1]
        assert texts[0].index(END_OF_CHANNEL) in (2, 3)
