"""Calls of tools that are held to their schemas: all that the grammar allows is valid.

Texts are drawn token by token from Gemma's own vocabulary as the grammar allows them.
"""

import json
import random

import jsonschema
import numpy as np
import pytest
from llguidance import LLMatcher
from llguidance.hf import from_tokenizer
from transformers import AutoTokenizer

from mlx_gemma_mtp.errors import RequestError
from mlx_gemma_mtp.markup.answer import CALL, AnswerReader, marks_of, spelled
from mlx_gemma_mtp.markup.tool_grammar import AUTO, tool_grammar
from mlx_gemma_mtp.markup.tools import Tools
from tests.gemma import EOS_IDS, FORMS, SPECIAL, VOCAB_SIZE, write_tokenizer
from tests.markup.schemas import Generator
from tests.markup.test_tool_calls import call_of

MARKS = {text: token for token, text in SPECIAL.items()}
NUM_FAST, NUM_SLOW = 40, 1000
_MOST_TOKENS = 3000
_PLACE = "/tools/0/function/parameters"


def tool(parameters, name="f", **more):
    function = {"name": name, "parameters": parameters, **more}
    return {"type": "function", "function": function}


class Vocabulary:
    """Gemma's tokens: texts become tokens, and a grammar draws texts."""

    def __init__(self, folder):
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.marks = marks_of(self.tokenizer)
        self._engine = from_tokenizer(self.tokenizer, eos_token=list(EOS_IDS))
        texts = [self._engine.decode_str([token]) for token in range(VOCAB_SIZE)]
        # Most places of the small vocabulary hold what is never text.
        self.common = np.array([not text.startswith("<unused") for text in texts])
        ends = set(',}]"') | {"<tool_call|>", '<|"|>', "<channel|>"}
        self.ends = np.array([text in ends for text in texts])
        self.ends[list(EOS_IDS)] = True

    def matcher(self, grammar):
        matcher = LLMatcher(self._engine, LLMatcher.grammar_from_lark(grammar))
        assert not matcher.is_error(), matcher.get_error()
        return matcher

    def takes(self, grammar, text):
        """Whether a grammar allows a whole text."""
        matcher = self.matcher(grammar)
        tokens = self.tokenizer.encode(text, add_special_tokens=False)
        return matcher.try_consume_tokens(tokens) == len(tokens) and bool(
            matcher.is_accepting()
        )

    def drawn(self, grammar, seed):
        """Tokens of a text that a grammar allows."""
        choose = random.Random(seed)
        matcher, found = self.matcher(grammar), []
        while not matcher.is_stopped():
            assert len(found) < _MOST_TOKENS
            packed = np.frombuffer(matcher.compute_bitmask(), np.uint8)
            allowed = np.unpackbits(packed, bitorder="little")[:VOCAB_SIZE] != 0
            token = self._choice(choose, allowed, is_long=len(found) > 200)
            assert matcher.consume_token(token), matcher.get_error()
            found.append(token)
        return found[:-1]

    def _choice(self, choose, allowed, *, is_long):
        fits = [allowed & self.ends, allowed & self.common, allowed]
        weights = (60 if is_long else 4, 8, 1)
        kept = [(np.flatnonzero(f), w) for f, w in zip(fits, weights) if f.any()]
        assert kept, "the grammar has no way on"
        (places,) = choose.choices(*zip(*kept))
        return int(choose.choice(places))

    def read(self, tokens, tools):
        """The parts of an answer."""
        reader = AnswerReader(self.marks, Tools(tools))
        text = "".join(
            SPECIAL[run[0]] if is_mark else spelled(self.tokenizer.decode(run))
            for is_mark, run in _runs(tokens)
        )
        parts = reader.read(text, is_last=True)
        assert (reader.num_unread, reader.is_cut_off) == (0, False), text
        return parts


def _runs(tokens):
    """Marks one by one, and the tokens between them."""
    run = []
    for token in tokens:
        if token in SPECIAL:
            yield from [(False, run)] if run else []
            yield True, [token]
            run = []
        else:
            run.append(token)
    yield from [(False, run)] if run else []


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gemma")
    return Vocabulary(write_tokenizer(folder, FORMS["july-e2b"]))


def check_schema(gemma, seed):
    """All that a random schema's grammar allows is valid, and what is valid is allowed."""
    generator = Generator(seed)
    schema = generator.document()
    tools = [tool(schema)]
    grammar = tool_grammar(tools, MARKS)
    for each in range(2):
        calls = [p.call for p in gemma.read(gemma.drawn(grammar, each), tools) if p.call]
        assert calls
        for call in calls:
            assert call.name == "f"
            jsonschema.validate(call.arguments, schema)
            json.dumps(call.arguments, allow_nan=False)
    for _ in range(3):
        arguments = generator.value(schema)
        jsonschema.validate(arguments, schema)
        text = f"<|tool_call>{call_of('f', arguments)}<tool_call|>"
        assert gemma.takes(grammar, text), (schema, text)


@pytest.mark.parametrize("seed", range(NUM_FAST))
def test_random_schemas(gemma, seed):
    check_schema(gemma, seed)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(NUM_FAST, NUM_SLOW, 40))
def test_a_thousand_random_schemas(gemma, first):
    for seed in range(first, first + 40):
        check_schema(gemma, seed)
