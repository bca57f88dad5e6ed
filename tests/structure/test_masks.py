"""Masks: the tokens that go on, by enumeration; blocks, ends, laws, logits.

Run: python -m pytest tests/structure/test_masks.py
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from functools import cache
from itertools import product
from typing import Any

import jsonschema
import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_gemma_mtp.errors import RequestError
from mlx_gemma_mtp.markup.tool_calls import QUOTE
from mlx_gemma_mtp.sampling.host import HostRow
from mlx_gemma_mtp.sampling.masks import allow
from mlx_gemma_mtp.sampling.params import SamplingParams
from mlx_gemma_mtp.structure import masks as masks_module
from mlx_gemma_mtp.structure.constraint import (
    MAX_TEXTS,
    choice,
    either,
    grammar,
    json_object,
    json_schema,
    regex,
)
from mlx_gemma_mtp.structure.masks import BoundConstraint
from tests.gemma import (
    BOS,
    END_OF_CHANNEL,
    END_OF_RESULT,
    END_OF_TURN,
    EOS_IDS,
    SPECIAL,
    START_OF_CHANNEL,
    START_OF_TURN,
)
from tests.gemma import VOCAB_SIZE as GEMMA_SIZE
from tests.sampling.test_distribution import chi_squared_bound
from tests.structure.schemas import SCHEMAS
from tests.tiny import END_OF_TURN as TINY_END_OF_TURN
from tests.tiny import EOS, VOCAB_SIZE, tiny_tokenizer

THINK = 98
ENDS = frozenset({EOS, TINY_END_OF_TURN})
PROMPT = [2, 17, 300]
SPELLED = ("<turn|>", "<|tool_call>", "<bos>", '<|"|>', "<eos>", "<|channel>")


@cache
def tiny():
    return TokenizerWrapper(tiny_tokenizer(), eos_token_ids=sorted(ENDS))


@cache
def pieces():
    """The texts of all tokens that are text."""
    vocabulary = tiny().get_vocab()
    special = {"<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>"}
    return {
        i: piece.replace("▁", " ")
        for piece, i in vocabulary.items()
        if piece not in special and not piece.startswith("<0x")
    }


def row_of(constraint, prompt=PROMPT, ends=ENDS):
    return BoundConstraint(constraint, tiny()).row(prompt, ends)


def allowed(words):
    """The ids that a mask allows."""
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")
    return set(np.flatnonzero(bits).tolist())


def expected(texts, prefix):
    """The tokens that go on from a text to one of some; the ends behind a whole one."""
    found = {
        i
        for i, piece in pieces().items()
        if any(text.startswith(prefix + piece) for text in texts)
    }
    return found | (ENDS if prefix in texts else set())


# All texts of small languages; none has a place where only one text can go on, for
# there llguidance allows the tokenizer's own tokens alone.
LANGUAGES: dict[str, set[str]] = {
    "[ab][abc]?": {a + b for a, b in product("ab", ["", *"abc"])},
    "[st]{1,3}": {"".join(p) for n in (1, 2, 3) for p in product("st", repeat=n)},
}


ENDLESS = "(the|tin|in|a)+"


class TestMasks:
    @pytest.mark.parametrize("asked", LANGUAGES)
    def test_are_those_of_all_texts(self, asked):
        """At every place that tokens lead to."""
        texts, seen = LANGUAGES[asked], set[str]()
        bound = BoundConstraint(regex(asked), tiny())

        def visit(prefix, path):
            row = bound.row(PROMPT, ENDS)
            for token in path:
                row.advance(token)
            found = allowed(row.block(()).words[0])
            assert found == expected(texts, prefix), prefix
            seen.add(prefix)
            for token in found - ENDS:
                text = prefix + pieces()[token]
                if text not in seen:
                    visit(text, [*path, token])

        visit("", [])
        assert seen >= texts

    @settings(max_examples=60)
    @given(st.data())
    def test_of_a_block_are_those_of_each_place(self, data):
        """Drafts that fit, that do not, and that end the row; nothing stays behind."""
        asked = data.draw(st.sampled_from([*LANGUAGES, ENDLESS, "[st]*x", "ab|abc"]))
        bound = BoundConstraint(regex(asked), tiny())
        row, path = bound.row(PROMPT, ENDS), list[int]()
        for _ in range(3):
            first = row.block(()).words[0]
            ids = sorted({*allowed(first), 40, 5})
            drafts = data.draw(st.lists(st.sampled_from(ids), max_size=5))
            block = row.block(drafts).words
            assert block.shape == (len(drafts) + 1, len(first))
            assert np.array_equal(row.block(()).words, [first])
            other = bound.row(PROMPT, ENDS)
            for token in path:
                other.advance(token)
            num_seen = 0
            for words, token in zip(block, [*drafts, None], strict=True):
                assert np.array_equal(words, other.block(()).words[0])
                num_seen += 1
                if token in ENDS or token not in allowed(words):
                    break
                other.advance(token)
            assert (block[num_seen:] == 0xFFFFFFFF).all()
            going_on = sorted(allowed(first) - ENDS)
            if not going_on:
                break
            path.append(data.draw(st.sampled_from(going_on)))
            row.advance(path[-1])

    def test_behind_a_draft_that_is_none_all_are_free(self):
        row = row_of(regex("[ab]{3}"))
        a = tiny().get_vocab()["a"]
        block = row.block([a, 5, a]).words
        assert allowed(block[1]) < set(range(VOCAB_SIZE))
        assert (block[2:] == 0xFFFFFFFF).all()

    def test_only_the_end_follows_a_whole_text(self):
        row = row_of(regex("ab"))
        assert not row.is_complete
        for token in tiny().encode("ab", add_special_tokens=False):
            row.advance(token)
        assert row.is_complete
        assert allowed(row.block(()).words[0]) == ENDS

    def test_ends_are_the_rows_own(self):
        """The tokenizer's that do not end it are banned; others may end it."""
        row = row_of(regex("a*"), ends=frozenset({EOS, 40}))
        found = allowed(row.block(()).words[0])
        assert {EOS, 40} <= found
        assert TINY_END_OF_TURN not in found

    def test_a_token_that_does_not_fit_is_named(self):
        row = row_of(regex("ab"))
        with pytest.raises(RequestError, match="of the row: got 5, which"):
            row.advance(5)

    def test_rows_do_not_share_a_place(self):
        bound = BoundConstraint(regex("ab"), tiny())
        one, other = bound.row(PROMPT, ENDS), bound.row(PROMPT, ENDS)
        before = other.block(()).words
        one.advance(tiny().get_vocab()["a"])
        assert np.array_equal(other.block(()).words, before)
        assert not np.array_equal(one.block(()).words, before)

    def test_text_that_no_token_writes_is_refused(self):
        """The tiny vocabulary has no piece of it."""
        with pytest.raises(RequestError, match="leave a token that goes on: got none"):
            BoundConstraint(regex("[日é]"), tiny())
        row = row_of(regex("a[日é]"))
        row.advance(tiny().get_vocab()["a"])
        with pytest.raises(RequestError, match="behind 1 tokens of the answer"):
            row.block(())

    def test_a_schema_without_an_end_is_refused(self):
        with pytest.raises(RequestError, match="leave a token that goes on"):
            BoundConstraint(json_schema({"$ref": "#"}), tiny())

    def test_control_tokens_that_are_none_are_refused(self):
        lark = grammar("start: <|nothing|>")
        with pytest.raises(RequestError, match="unknown special token"):
            BoundConstraint(lark, tiny())

    def test_what_costs_too_much_is_refused(self, monkeypatch):
        import llguidance

        few = llguidance.LLParserLimits(step_max_items=2, verbose_errors=False)
        monkeypatch.setattr(masks_module, "limits", lambda: few)
        with pytest.raises(RequestError, match="leave a token that goes on"):
            BoundConstraint(grammar('start: ("a" | "b" | start "c")+'), tiny())

    def test_the_largest_choice_can_be_written(self):
        texts = [f"{i:04}" for i in range(MAX_TEXTS)]
        bound = BoundConstraint(choice(texts), tiny())
        chance, found = np.random.default_rng(0), set[str]()
        for _ in range(8):
            row, text = bound.row(PROMPT, ENDS), ""
            while not row.is_complete:
                tokens = allowed(row.block(()).words[0])
                token = int(chance.choice(sorted(tokens)))
                row.advance(token)
                text += pieces()[token]
            found.add(text)
        assert found <= set(texts)
        assert len(found) > 4

    def test_a_text_that_begins_another_is_one(self):
        texts = ["s", "st", "stt", "tt"]
        row, text = row_of(choice(texts)), ""
        for letter in "stt":
            assert allowed(row.block(()).words[0]) == expected(texts, text)
            row.advance(tiny().get_vocab()[letter])
            text += letter
        assert allowed(row.block(()).words[0]) == ENDS

    def test_a_row_goes_through_many_rules(self):
        """One of 600 optional keys has four of them."""
        keys = {f"p{i}": {"type": "null"} for i in range(600)}
        schema = {"type": "object", "properties": keys, "additionalProperties": False}
        row = row_of(json_schema(schema))
        for token in tiny().encode('{"p7":null,"p598":null', add_special_tokens=False):
            assert token in allowed(row.block(()).words[0])
            row.advance(token)

    def test_a_row_that_reaches_its_limits_says_so(self, monkeypatch):
        """Also behind a token that the mask allows; not if that is a draft."""
        import llguidance

        few = llguidance.LLParserLimits(max_items_in_row=100, verbose_errors=False)
        monkeypatch.setattr(masks_module, "limits", lambda: few)
        keys = {f"p{i}": {"type": "null"} for i in range(60)}
        schema = {"type": "object", "properties": keys, "additionalProperties": False}
        brace = tiny().get_vocab()["{"]
        row = row_of(json_schema(schema))
        first = row.block(()).words[0]
        assert brace in allowed(first)
        for _ in range(2):
            block = row.block([brace, brace]).words
            assert np.array_equal(block[0], first)
            for words in block[1:]:  # nothing ends the row before it says so
                assert allowed(~words) == ENDS
        with pytest.raises(RequestError, match=r"got none .* row has 239 "):
            row.advance(brace)

    def test_drafts_that_do_not_stand_cost_a_row_nothing(self, monkeypatch):
        """Each leads to new states of the lexer, whose number is limited."""
        import llguidance

        few = llguidance.LLParserLimits(max_lexer_states=80, verbose_errors=False)
        monkeypatch.setattr(masks_module, "limits", lambda: few)
        bound = BoundConstraint(regex("(q[ab]*a[ab]{9}|[a-c]{2})+"), tiny())
        ids = {letter: tiny().get_vocab()[letter] for letter in "abcq"}
        row = bound.row(PROMPT, ENDS)
        chance = np.random.default_rng(0)
        for i in range(40):
            expected = bound.row(PROMPT, ENDS)
            for _ in range(i):
                expected.advance(ids["c"])
            drafts = [ids["q"], *(ids["ab"[j]] for j in chance.integers(0, 2, 7))]
            if i % 2:
                drafts = [ids["c"], *drafts[:7]]
            found = row.block(drafts).words[0]
            assert np.array_equal(found, expected.block(()).words[0])
            row.advance(ids["c"])

    def test_a_draft_that_is_no_token_is_not_allowed(self):
        """A model may have more ids than its tokenizer, and drafts are not masked."""
        row = row_of(regex("[a-c]{3}"))
        before = row.block(()).words
        for token in (VOCAB_SIZE, VOCAB_SIZE + 31, VOCAB_SIZE + 1000):
            block = row.block([token, 3])
            assert np.array_equal(block.words[:1], before)
            assert (block.words[1:] == 0xFFFFFFFF).all()
            assert block.forced[1:] == [[], []]
        row.advance(tiny().get_vocab()["a"])

    def test_a_row_at_its_limits_leaves_others_alone(self, monkeypatch):
        import llguidance

        few = llguidance.LLParserLimits(max_lexer_states=60, verbose_errors=False)
        monkeypatch.setattr(masks_module, "limits", lambda: few)
        bound = BoundConstraint(regex("[ab]*a[ab]{9}"), tiny())
        row, other = bound.row(PROMPT, ENDS), bound.row(PROMPT, ENDS)
        ids = [tiny().get_vocab()[letter] for letter in "ab"]
        chance = np.random.default_rng(0)

        def write():
            for i in chance.integers(0, 2, 2000).tolist():
                row.block(())
                row.advance(ids[i])

        with pytest.raises(RequestError, match="leave a token that goes on"):
            write()
        for fresh in (other, bound.row(PROMPT, ENDS)):
            fresh.block(())
            fresh.advance(ids[0])
            assert allowed(fresh.block(()).words[0]) >= set(ids)


class TestLaw:
    """Tokens are drawn from the masked distribution, drafts or not."""

    TEXTS = LANGUAGES["[ab][abc]?"]
    NUM_SAMPLES = 300

    def logits(self):
        chance = np.random.default_rng(7)
        return mx.array(chance.normal(size=(3, VOCAB_SIZE)).astype(np.float32))

    def law(self):
        """The chance of each sequence of tokens, by enumeration in float64."""
        logits = np.array(self.logits(), dtype=np.float64)
        found: dict[tuple[int, ...], float] = {}

        def visit(path, text, chance):
            if path and path[-1] in ENDS:
                found[path] = chance
                return
            ids = sorted(expected(self.TEXTS, text))
            weights = np.exp(logits[len(path), ids])
            for token, share in zip(ids, weights / weights.sum(), strict=True):
                more = pieces().get(token, "")
                visit((*path, token), text + more, chance * share)

        visit((), "", 1.0)
        assert math.isclose(sum(found.values()), 1.0)
        return found

    def sample(self, bound, seed, num_drafts):
        """The tokens of one row, whose logits depend on the place alone."""
        row = HostRow(
            PROMPT,
            processors=[bound.processor(PROMPT, ENDS)],
            sampler=None,
            sampling=SamplingParams(temp=1.0, seed=seed),
        )
        logits, found = self.logits(), list[int]()
        chance = np.random.default_rng(seed)
        drafts = chance.integers(0, VOCAB_SIZE, num_drafts).tolist()
        if num_drafts:
            drafts[0] = tiny().get_vocab()["ab"[seed % 2]]
        while not (found and found[-1] in ENDS):
            some = drafts[len(found) : 2]
            block = logits[len(found) : len(found) + len(some) + 1]
            found += row.judge(block, some, is_end=ENDS.__contains__).tokens
        return tuple(found)

    def test_is_the_masked_one(self):
        law = self.law()
        bound = BoundConstraint(regex("[ab][abc]?"), tiny())
        counts = Counter(self.sample(bound, s, 0) for s in range(self.NUM_SAMPLES))
        assert set(counts) <= set(law)
        wanted = {path: p * self.NUM_SAMPLES for path, p in law.items()}
        common = {path for path, n in wanted.items() if n >= 5}
        rare = sum(n for path, n in wanted.items() if path not in common)
        pairs = [(counts[path], wanted[path]) for path in common]
        seen_rare = sum(n for path, n in counts.items() if path not in common)
        pairs += [(seen_rare, rare)] if rare >= 1 else []
        statistic = sum((seen - n) ** 2 / n for seen, n in pairs)
        assert len(pairs) > 4
        assert statistic < chi_squared_bound(len(pairs) - 1, 1e-6)

    def test_drafts_change_no_text(self):
        bound = BoundConstraint(regex("[ab][abc]?"), tiny())
        for seed in range(40):
            assert self.sample(bound, seed, 2) == self.sample(bound, seed, 0)


class TestLogits:
    @settings(max_examples=50)
    @given(
        size=st.integers(1, 100),
        num_words=st.integers(1, 4),
        seed=st.integers(0, 2**32 - 1),
        dtype=st.sampled_from([mx.float32, mx.bfloat16, mx.float16]),
    )
    def test_are_banned_by_bits(self, size, num_words, seed, dtype):
        chance = np.random.default_rng(seed)
        words = chance.integers(0, 2**32, (2, 3, num_words), dtype=np.uint32)
        logits = mx.array(chance.normal(size=(2, 3, size))).astype(dtype)
        found = allow(logits, mx.array(words))
        assert found.dtype == dtype
        wide = np.array(logits.astype(mx.float32))
        for place in np.ndindex(2, 3, size):
            word, bit = divmod(place[-1], 32)
            is_on = word < num_words and words[(*place[:-1], word)] >> bit & 1
            assert found[place].item() == (wide[place] if is_on else -math.inf)


class TestGemma:
    """All of its ids: control tokens, bytes, thoughts."""

    @pytest.fixture
    def tokenizer(self, whole_gemma_tokenizer):
        return whole_gemma_tokenizer("july-e2b")

    def write(self, bound, tokenizer, seed, most=150):
        """Tokens drawn from masks alone; the text, or None where it is too long."""
        chance = np.random.default_rng(seed)
        row, found = bound.row([BOS], EOS_IDS), list[int]()
        while len(found) < most:
            bits = np.unpackbits(
                row.block(()).words[0].view(np.uint8), bitorder="little"
            )
            token = int(chance.choice(np.flatnonzero(bits)))
            if token in EOS_IDS:
                return tokenizer.decode(found, skip_special_tokens=False)
            found.append(token)
            row.advance(token)
        return None

    def test_every_schema_is_followed(self, tokenizer):
        num_long = 0
        for name, schema in SCHEMAS.items():
            bound = BoundConstraint(json_schema(schema), tokenizer)
            text = self.write(bound, tokenizer, seed=len(name))
            num_long += text is None
            if text is not None:
                jsonschema.Draft202012Validator(schema).validate(json.loads(text))
        assert num_long <= 0.1 * len(SCHEMAS)

    def test_choices_are_texts_of_any_characters(self, tokenizer):
        texts = ['say "hi"', "back\\slash", "line\nend", "tab\t", "/x/", "größe", "😀"]
        bound = BoundConstraint(choice(texts), tokenizer)
        found = {self.write(bound, tokenizer, seed) for seed in range(60)}
        assert found <= set(texts)
        assert len(found) > 3

    def test_any_object(self, tokenizer):
        bound = BoundConstraint(json_object(), tokenizer)
        row = bound.row([BOS], EOS_IDS)
        for token in tokenizer.encode('{"a":[1,{"b":null}]}', add_special_tokens=False):
            row.advance(token)
        assert row.is_complete

    def test_text_spells_no_control_token(self, tokenizer):
        row = BoundConstraint(regex(r"(?s:.*)"), tokenizer).row([BOS], EOS_IDS)
        found = allowed(row.block(()).words[0])
        assert not found & {START_OF_CHANNEL, END_OF_CHANNEL, START_OF_TURN, BOS}
        assert set(EOS_IDS) <= found

    def test_control_tokens_stand_in_a_grammar(self, tokenizer):
        lark = grammar('start: <|tool_call> "x" <tool_call|>')
        row = BoundConstraint(lark, tokenizer).row([BOS], EOS_IDS)
        assert allowed(row.block(()).words[0]) == {48}
        row.advance(48)
        x = tokenizer.encode("x", add_special_tokens=False)
        row.advance(x[0])
        assert allowed(row.block(()).words[0]) == {49}

    def test_names_in_a_text_of_a_grammar_are_text(self, tokenizer):
        lark = grammar('start: <|tool_call> "<tool_call|>" /<bos>/ <|"|> // <eos>')
        row = BoundConstraint(lark, tokenizer).row([BOS], EOS_IDS)
        row.advance(48)
        text, quote = "", tokenizer.convert_tokens_to_ids(QUOTE)
        while quote not in (found := allowed(row.block(()).words[0])):
            assert not found & SPECIAL.keys()
            row.advance(min(found))
            text += tokenizer.decode([min(found)])
        assert found == {quote}
        assert text == "<tool_call|><bos>"

    def test_names_stand_in_one_of_two_forms(self, tokenizer):
        both = either(grammar('start: <|tool_call> "x"'), json_schema({"const": 7}))
        row = BoundConstraint(both, tokenizer).row([BOS], EOS_IDS)
        (seven,) = tokenizer.encode("7", add_special_tokens=False)
        found = allowed(row.block(()).words[0])
        assert seven in found
        assert found & SPECIAL.keys() == {48}

    @pytest.mark.parametrize("mark", SPELLED)
    def test_a_text_may_spell_a_control_token(self, tokenizer, mark):
        """Alone, inside others, as one of two, and where it is forced."""
        for text in (mark, f"a{mark}b{mark}"):
            written = json.dumps(text)
            forms = {
                text: [choice([text]), regex(re.escape(text))],
                written: [json_schema({"const": text}), json_schema({"enum": [text]})],
            }
            forms[text].append(grammar(f"start: {written}"))
            for whole, made in ((w, each) for w in forms for each in forms[w]):
                bound = BoundConstraint(made, tokenizer)
                assert self.write(bound, tokenizer, seed=1) == whole
                (forced,) = bound.row([BOS], EOS_IDS).block(()).forced
                assert not SPECIAL.keys() & set(forced)
                assert tokenizer.decode(forced) == whole
        bound = BoundConstraint(choice([mark, "zz"]), tokenizer)
        found = {self.write(bound, tokenizer, seed) for seed in range(30)}
        assert found == {mark, "zz"}

    def test_keys_may_spell_control_tokens(self, tokenizer):
        schema = {
            "type": "object",
            "properties": {mark: {"const": mark} for mark in SPELLED},
            "required": [*SPELLED],
            "additionalProperties": False,
        }
        text = self.write(BoundConstraint(json_schema(schema), tokenizer), tokenizer, 0)
        jsonschema.Draft202012Validator(schema).validate(json.loads(text or ""))

    @pytest.mark.parametrize(
        ("lark", "begun"),
        [
            ('start: <turn|> "a"', ""),
            ('start: "a" <[106]> "b"', "a"),
            ('start: "a" ("b" | <[1-200]> "c")', "a"),
            ('start: "a" <turn|>', "a"),
        ],
    )
    def test_no_end_stands_before_the_end(self, tokenizer, lark, begun):
        """A draft that leads there is no mistake of the row's yet."""
        words = f"no token that ends the turn: got [0-9]+ behind {len(begun)} tokens"
        made = grammar(lark)
        if not begun:
            with pytest.raises(RequestError, match=words):
                BoundConstraint(made, tokenizer)
            return
        row = BoundConstraint(made, tokenizer).row([BOS], EOS_IDS)
        tokens = tokenizer.encode(begun, add_special_tokens=False)
        before = row.block(()).words
        found = row.block([*tokens, END_OF_TURN]).words
        assert np.array_equal(found[:1], before)
        assert all(allowed(~words) == set(EOS_IDS) for words in found[1:])
        for token in tokens:
            row.advance(token)
        with pytest.raises(RequestError, match=words):
            row.advance(GEMMA_SIZE - 1)
        for drafts in ((), (END_OF_TURN,)):
            with pytest.raises(RequestError, match=words):
                row.block(drafts)

    BEGIN = (BOS, START_OF_TURN, 900, 901)
    ASKS = (*BEGIN, THINK, END_OF_TURN, START_OF_TURN, 902)

    @pytest.mark.parametrize(
        ("prompt", "phase"),
        [
            (BEGIN, "answer"),
            (ASKS, "open"),
            ((*BEGIN, START_OF_CHANNEL, 903), "thought"),
            ((*ASKS, START_OF_CHANNEL, 903), "thought"),
            ((*ASKS, START_OF_CHANNEL, 903, END_OF_CHANNEL), "answer"),
            ((*ASKS, START_OF_CHANNEL, END_OF_CHANNEL, 48, END_OF_RESULT), "open"),
            ((*ASKS, START_OF_CHANNEL, 7, END_OF_CHANNEL, START_OF_TURN), "open"),
            ((*ASKS, END_OF_RESULT, START_OF_CHANNEL, 903), "thought"),
            ((), "answer"),
        ],
    )
    def test_the_prompt_says_whether_a_thought_comes(self, tokenizer, prompt, phase):
        row = BoundConstraint(regex("[ab]{2}"), tokenizer).row(prompt, EOS_IDS)
        found = allowed(row.block(()).words[0])
        if phase == "thought":
            assert found >= set(range(GEMMA_SIZE)) - set(EOS_IDS)
            assert not found & set(EOS_IDS)
        else:
            assert (START_OF_CHANNEL in found) == (phase == "open")
            assert len(found) < 20

    def test_a_block_goes_through_a_thought(self, tokenizer):
        row = BoundConstraint(regex("[ab]{2}"), tokenizer).row(self.ASKS, EOS_IDS)
        first = row.block(()).words[0]
        a = tokenizer.convert_tokens_to_ids("a")
        drafts = [START_OF_CHANNEL, 5000, END_OF_CHANNEL, a, START_OF_CHANNEL]
        block = row.block(drafts).words
        assert [len(allowed(words)) > 1000 for words in block] == [
            *(False, True, True, False, False, True)
        ]
        assert START_OF_CHANNEL not in allowed(block[3])
        assert np.array_equal(row.block(()).words[0], first)


def test_a_processor_follows_its_history():
    """Also where it is called for several tokens at once, or for none."""
    bound = BoundConstraint(regex("[ab]{3}"), tiny())
    a = tiny().get_vocab()["a"]
    processor = bound.processor(PROMPT, ENDS)
    logits = mx.zeros((1, VOCAB_SIZE))

    def ids(*tokens: int) -> set[int]:
        found: Any = processor(mx.array([*PROMPT, *tokens]), logits)
        return {i for i, x in enumerate(found[0].tolist()) if x == 0}

    assert ids() == ids()
    assert a in ids(a)
    assert ids(a, a, a) == ENDS


def test_texts_match_the_expression():
    """The language that has no end, by Python's own."""
    row, text = row_of(regex(ENDLESS)), ""
    chance = np.random.default_rng(0)
    for _ in range(40):
        token = int(chance.choice(sorted(allowed(row.block(()).words[0]) - ENDS)))
        row.advance(token)
        text += pieces()[token]
        is_whole = re.fullmatch(ENDLESS, text) is not None
        assert (ENDS <= allowed(row.block(()).words[0])) == is_whole
