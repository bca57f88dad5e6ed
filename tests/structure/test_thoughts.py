"""Limited thoughts: the masks of every place, by a second count; blocks; refusals.

Run: python -m pytest tests/structure/test_thoughts.py
"""

from __future__ import annotations

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_gemma_mtp.errors import RequestError
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
from tests.structure.test_masks import THINK, allowed, tiny
from tests.tiny import VOCAB_SIZE

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
        None,
        what="the limit",
        place=thoughts.behind(prompt),
        thoughts=thoughts,
        ends={EOS},
        foreign_ends=(),
        num_words=1,
    )


def thoughts_in(tokens):
    """The thoughts in tokens, and whether the last one is open."""
    found, rest = [], list(tokens)
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

    @settings(max_examples=300)
    @given(st.data(), st.sampled_from(sorted(PROMPTS)), st.integers(0, 5))
    def test_are_those_of_a_second_count(self, data, name, limit):
        prompt = PROMPTS[name]
        row, tokens = row_of(prompt, limit), list[int]()
        likely = (START, END, NAME, LINE, 9, 10)
        for _ in range(data.draw(st.integers(1, 14))):
            found = allowed(row.block(())[0])
            assert found == expected(prompt, tokens, limit)
            tokens.append(data.draw(st.sampled_from(sorted(found & set(likely)))))
            row.advance(tokens[-1])
        thoughts, _ = thoughts_in([*prompt, *tokens])
        begun = thoughts_in(prompt)[0]
        num = sum(len(without_name(t)) for t in thoughts)
        assert num - sum(len(without_name(t)) for t in begun) <= limit

    @settings(max_examples=200)
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
            if token in allowed(rows[0].block(())[0]):
                for each in rows:
                    each.advance(token)
        row, other = rows
        first = row.block(())[0]
        block = row.block(drafts)
        assert block.shape == (len(drafts) + 1, 1)
        assert np.array_equal(row.block(()), [first])
        num_seen = 0
        for words, token in zip(block, [*drafts, None], strict=True):
            assert np.array_equal(words, other.block(())[0])
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
        assert allowed(row.block(())[0]) == found
        assert not row.is_complete

    def test_a_token_that_does_not_fit_is_named(self):
        row = row_of(PROMPTS["named"], 0)
        with pytest.raises(RequestError, match="the limit must allow .* got 9, which"):
            row.advance(9)


class TestGemma:
    ASKS = (BOS, START_OF_TURN, THINK, END_OF_TURN, START_OF_TURN, 902)

    @pytest.fixture
    def tokenizer(self, gemma_tokenizer):
        return gemma_tokenizer("july-e2b")

    def test_a_form_stands_behind_a_limited_thought(self, tokenizer):
        line, name, a = (
            tokenizer.encode(text, add_special_tokens=False)[0]
            for text in ("\n", "thought", "a")
        )
        bound = BoundConstraint(regex("[ab]{2}"), tokenizer).limited(3)
        row = bound.row(self.ASKS, EOS_IDS)
        drafts = [START_OF_CHANNEL, name, line, 5000, 5001, line, END_OF_CHANNEL, a]
        block = row.block(drafts)
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
        assert np.array_equal(row.block(drafts[4:]), block[4:])

    def test_none_begins_where_there_is_none_to_come(self, tokenizer):
        bound = BoundConstraint(regex("[ab]{2}"), tokenizer)
        for limit, may_begin in ((0, False), (1, True)):
            row = bound.limited(limit).row(self.ASKS, EOS_IDS)
            found = allowed(row.block(())[0])
            assert (START_OF_CHANNEL in found) is may_begin
            assert len(found) > 1
        assert START_OF_CHANNEL in allowed(bound.row(self.ASKS, EOS_IDS).block(())[0])

    @pytest.mark.parametrize("vocab_size", [GEMMA_SIZE, GEMMA_SIZE + 7])
    def test_any_form_needs_no_library(self, tokenizer, monkeypatch, vocab_size):
        """And all of the model's ids are allowed, more than the tokenizer's perhaps."""
        monkeypatch.setitem(sys.modules, "llguidance", None)
        bound = BoundConstraint(None, tokenizer, vocab_size=vocab_size).limited(1)
        prompt = (*self.ASKS, END_OF_RESULT, START_OF_CHANNEL)
        row = bound.row(prompt, EOS_IDS)
        assert len(allowed(row.block(())[0])) == 1
        row = bound.row(self.ASKS, EOS_IDS)
        assert allowed(row.block(())[0]) >= set(range(vocab_size))

    def test_a_limit_is_the_copys_own(self, tokenizer):
        bound = BoundConstraint(None, tokenizer, vocab_size=GEMMA_SIZE)
        prompt = (*self.ASKS, START_OF_CHANNEL, 903)
        assert len(allowed(bound.limited(0).row(prompt, ()).block(())[0])) == 1
        assert len(allowed(bound.limited(2).row(prompt, ()).block(())[0])) > 1
        assert len(allowed(bound.row(prompt, ()).block(())[0])) == GEMMA_SIZE


def test_a_model_without_marks_is_refused():
    bound = BoundConstraint(None, tiny(), vocab_size=VOCAB_SIZE)
    assert not bound.can_be_limited
    with pytest.raises(RequestError, match=r"left out for this model: got 5\. Its"):
        bound.limited(5)
