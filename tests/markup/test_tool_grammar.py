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
from mlx_gemma_mtp.markup.answer import AnswerReader, marks_of, spelled
from mlx_gemma_mtp.markup.tool_grammar import AUTO, REQUIRED, tool_grammar
from mlx_gemma_mtp.markup.tools import Tools
from tests.gemma import EOS_IDS, FORMS, SPECIAL, VOCAB_SIZE, write_tokenizer
from tests.markup.schemas import Generator
from tests.markup.test_tool_calls import call_of

MARKS = {text: token for token, text in SPECIAL.items()}
NUM_FAST, NUM_SLOW = 25, 1000
_LONG, _MOST_TOKENS = 100, 3000
CLOSING = ("<channel|>", "<tool_call|>", '<|"|>', "}", "]")
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
        ids = {text: token for token, text in enumerate(texts)} | MARKS
        # What brings a text to its end soonest, first.
        self.closing = [*EOS_IDS, *(ids[mark] for mark in CLOSING)]
        # What a key, a pattern or a format is not complete without.
        self.missing = [ids[character] for character in ":/b@"]
        self.ends = np.isin(np.arange(VOCAB_SIZE), [*self.closing, ids[","]])

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

    def drawn(self, grammar, seed, keys=()):
        """Tokens of a text that a grammar allows.

        Args:
            grammar: The grammar.
            seed: Of all choices.
            keys: What a long text does not end without.
        """
        choose = random.Random(seed)
        encode = self.tokenizer.encode
        keys = [encode(f"{key}:", add_special_tokens=False) for key in keys]
        matcher = self.matcher(grammar)
        found: list[int] = []
        while not matcher.is_stopped():
            assert len(found) < _MOST_TOKENS
            is_long = len(found) > _LONG
            begun = is_long and self.ends[found[-1]] and choose.random() < 0.5
            fits = [k for k in keys if begun and matcher.validate_tokens(k) == len(k)]
            tokens = choose.choice(fits) if fits else []
            if is_long and not fits:
                tokens = self._closing(choose, matcher)
            tokens = tokens or [self._choice(choose, matcher)]
            assert matcher.consume_tokens(tokens), matcher.get_error()
            found += tokens
        return found[:-1]

    def _closing(self, choose, matcher):
        """What brings a text nearer to its end, most of the time."""
        allowed = _allowed(matcher)
        closing = [token for token in self.closing if allowed[token]]
        if closing and choose.random() < 0.8:
            return closing[:1]
        missing = [[token] for token in self.missing if allowed[token]]
        return choose.choice([*missing, []])

    def _choice(self, choose, matcher):
        allowed = _allowed(matcher)
        fits = [allowed & self.ends, allowed & self.common, allowed]
        kept = [
            (np.flatnonzero(f), w)
            for f, w in zip(fits, (4, 8, 1), strict=True)
            if f.any()
        ]
        assert kept, "the grammar has no way on"
        (places,) = choose.choices(*zip(*kept, strict=True))
        return int(choose.choice(places))

    def read(self, tokens, tools):
        """The parts of an answer."""
        reader = AnswerReader(self.marks, Tools(tools))
        text = "".join(
            SPECIAL[run[0]] if is_mark else spelled(str(self.tokenizer.decode(run)))
            for is_mark, run in _runs(tokens)
        )
        parts = reader.read(text, is_last=True)
        assert (reader.num_unread, reader.is_cut_off) == (0, False), text
        return parts


def _allowed(matcher):
    """Whether each token may come next."""
    packed = np.frombuffer(matcher.compute_bitmask(), np.uint8)
    return np.unpackbits(packed, bitorder="little")[:VOCAB_SIZE] != 0


def needed(schema):
    """All keys that a schema or one inside it needs."""
    if isinstance(schema, dict):
        yield from schema.get("required", ())
        schema = list(schema.values())
    for each in schema if isinstance(schema, list) else ():
        yield from needed(each)


def _runs(tokens):
    """Marks one by one, and the tokens between them."""
    run: list[int] = []
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
    """All that a random schema's grammar allows is valid, and the other way round."""
    generator = Generator(seed)
    schema = generator.document()
    tools = [tool(schema)]
    grammar = tool_grammar(tools, MARKS)
    keys = sorted(set(needed(schema)))
    for each in range(2):
        parts = gemma.read(gemma.drawn(grammar, each, keys), tools)
        calls = [part.call for part in parts if part.call]
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


def call(inside, name="f"):
    return f"<|tool_call>call:{name}{{{inside}}}<tool_call|>"


class TestAnswers:
    """What may stand around calls."""

    tools = (
        tool({"type": "object", "properties": {"a": {"type": "integer"}}}, strict=True),
        tool({"type": "object", "properties": {"b": {"type": "null"}}}, name="g"),
        tool(None, name="f.x"),
    )

    def test_required(self, gemma):
        grammar = tool_grammar(self.tools, MARKS)
        assert gemma.takes(grammar, call("a:1"))
        assert gemma.takes(grammar, call("") + call("b:null", "g") + call("", "f.x"))
        thought = '<|channel>thought\nI <|"|> {a:1}\n<channel|>'
        assert gemma.takes(grammar, thought + call("a:1"))
        assert gemma.takes(grammar, thought * 2 + call("b:None", "g"))
        for text in ("", "Hello", thought, "Hello" + call("a:1"), call("a:1") + "."):
            assert not gemma.takes(grammar, text)
        for text in (call("b:1"), call("a:1", "g"), call("", "h"), call("a:1", "f.x")):
            assert not gemma.takes(grammar, text)

    def test_thoughts_may_be_left_to_others(self, gemma):
        grammar = tool_grammar(self.tools, MARKS, has_thoughts=False)
        assert gemma.takes(grammar, call("a:1"))
        assert not gemma.takes(grammar, f"<|channel>thought\n<channel|>{call('a:1')}")

    def test_one_call(self, gemma):
        grammar = tool_grammar(self.tools, MARKS, is_parallel=False)
        assert gemma.takes(grammar, call("b:null", "g"))
        assert not gemma.takes(grammar, call("a:1") * 2)

    def test_a_named_tool_is_called_once(self, gemma):
        grammar = tool_grammar(self.tools, MARKS, name="g")
        assert gemma.takes(grammar, call("", "g"))
        assert not gemma.takes(grammar, call("a:1"))
        assert not gemma.takes(grammar, call("", "g") * 2)
        with pytest.raises(RequestError, match="got 'h'"):
            tool_grammar(self.tools, MARKS, name="h")

    @pytest.mark.parametrize("is_parallel", [True, False])
    def test_auto(self, gemma, is_parallel):
        grammar = tool_grammar(self.tools, MARKS, choice=AUTO, is_parallel=is_parallel)
        thought = "<|channel>thought\nI\n<channel|>"
        texts = ["", "Hello {a:1}", f"{thought}Hello", f"Hello{thought}{call('a:1')}."]
        for text in texts:
            assert gemma.takes(grammar, text)
        # Of tools that are not strict any arguments are taken.
        assert gemma.takes(grammar, call('x:[1,{y:<|"|>z<|"|>}]', "g"))
        assert gemma.takes(grammar, call("a:1") * 2) == is_parallel
        assert not gemma.takes(grammar, call("x:1"))
        assert not gemma.takes(grammar, call("", "h"))

    def test_auto_without_text(self, gemma):
        """Calls alone: what else there may be is of another grammar."""
        grammar = tool_grammar(self.tools, MARKS, choice=AUTO, has_text=False)
        assert gemma.takes(grammar, call("a:1") + call("x:[1]", "g"))
        for text in ("", "Hello", call("x:1"), f"Hello{call('a:1')}"):
            assert not gemma.takes(grammar, text)

    def test_marks_are_tokens(self, gemma):
        """Ordinary tokens that spell a mark are none."""
        grammar = tool_grammar(self.tools, MARKS)
        spelled_out = [
            *gemma.tokenizer.encode("<|tool_", add_special_tokens=False),
            *gemma.tokenizer.encode("call>call:f{}", add_special_tokens=False),
            MARKS["<tool_call|>"],
        ]
        assert gemma.matcher(grammar).try_consume_tokens(spelled_out) == 0

    def test_a_model_without_thoughts(self, gemma):
        marks = {mark: token for mark, token in MARKS.items() if "channel" not in mark}
        for choice in (AUTO, REQUIRED):
            grammar = tool_grammar(self.tools, marks, choice=choice)
            assert gemma.takes(grammar, call("a:1"))
            assert not gemma.takes(grammar, f"<|channel>x<channel|>{call('a:1')}")


def takes(gemma, schema, inside):
    return gemma.takes(tool_grammar([tool(schema)], MARKS), call(inside))


class TestValues:
    """What the grammar of one value allows, and what it does not."""

    @pytest.mark.parametrize(
        ("schema", "good", "bad"),
        [
            ({"type": "integer"}, ["0", "-12"], ["01", "1.0", "1e3", "true", ""]),
            ({"type": "integer", "minimum": 0.5, "maximum": 3}, ["1", "3"], ["0", "4"]),
            ({"type": "number", "multipleOf": 3}, ["0", "-9"], ["4", "1.5"]),
            ({"type": "number"}, ["1e+20", "-0.5", "1e-07"], ["1e999", ".5", "nan"]),
            ({"exclusiveMaximum": 5, "type": "number"}, ["4.99"], ["5", "5.0", "6"]),
            ({"type": ["null", "boolean"]}, ["null", "None", "true"], ["True", "0"]),
            ({"type": "string"}, ['<|"|>a}]<b|"\n<|"|>', '<|"|><|"|>'], ['"a"', "a"]),
            ({"type": "string", "maxLength": 2}, ['<|"|>é😀<|"|>'], ['<|"|>abc<|"|>']),
            ({"minLength": 1, "type": "string"}, ['<|"|>a<|"|>'], ['<|"|><|"|>']),
            ({"items": {"type": "null"}, "type": "array"}, ["[]", "[null]"], ["[1]"]),
            ({"type": "array", "maxItems": 1}, ["[]", "[{}]"], ["[1,1]"]),
            ({"type": "array", "minItems": 2}, ["[1,[]]"], ["[]", "[1]", "[1,]"]),
            ({"prefixItems": [{"const": 1}], "type": "array"}, ["[]", "[1]"], ["[2]"]),
            ({"enum": ["a", 1, None]}, ['<|"|>a<|"|>', "1", "null"], ["2", "a"]),
            ({"enum": ["a", 1], "type": "integer"}, ["1"], ['<|"|>a<|"|>']),
            ({"const": {"b": 1, "A": "x"}}, ['{A:<|"|>x<|"|>,b:1}'], ["{b:1}"]),
            ({"allOf": [{"minimum": 1}, {"type": "integer"}]}, ["1"], ["0", "1.5"]),
            ({"anyOf": [{"const": 1}, {"const": 2}]}, ["1", "2"], ["3"]),
            ({"type": "object"}, ["{}", "{a-b c:1,d:[{}]}"], ["{a}", "{ a:1}", "[]"]),
            ({"type": "object", "properties": {}}, ["{}"], ["{a:1}"]),
            ({"properties": {"k": False}, "type": "object"}, ["{}"], ["{k:1}"]),
            (
                {
                    "type": "object",
                    "maxProperties": 1,
                    "properties": {"k": {}, "l": {}},
                },
                ["{}", "{k:1}", "{l:1}"],
                ["{k:1,l:1}"],
            ),
            (
                {"minProperties": 1, "type": "object", "additionalProperties": {}},
                ["{k:1}", "{k:1,l:2,m:3}"],
                ["{}"],
            ),
        ],
    )
    def test_values(self, gemma, schema, good, bad):
        outer = {"type": "object", "properties": {"v": schema}}
        for value in good:
            assert takes(gemma, outer, f"v:{value}"), value
        for value in bad:
            assert not takes(gemma, outer, f"v:{value}"), value

    def test_keys_are_in_the_order_of_the_template(self, gemma):
        properties = {name: {"type": "integer"} for name in ("b", "C", "a")}
        schema = {"type": "object", "properties": properties, "required": ["b"]}
        for inside in ("b:1", "a:1,b:2", "b:2,C:3", "a:1,b:2,C:3"):
            assert takes(gemma, schema, inside)
        for inside in ("", "a:1", "b:2,a:1", "C:3,b:2", "a:1,a:1,b:1", "b:1,", ",b:1"):
            assert not takes(gemma, schema, inside)

    def test_other_keys_stand_among_declared_ones(self, gemma):
        schema = {
            "type": "object",
            "properties": {"b": {"type": "null"}},
            "required": ["b"],
            "additionalProperties": {"type": "integer"},
        }
        for inside in ("b:null", "a:1,b:null", "a:1,b:null,c:2,d:3"):
            assert takes(gemma, schema, inside)
        for inside in ("a:1", "a:null,b:null", "b:null,b:1", "b:1"):
            assert not takes(gemma, schema, inside)

    def test_a_text_is_not_the_mark_at_its_end(self, gemma):
        schema = {"type": "object", "properties": {"v": {"type": "string"}}}
        grammar = tool_grammar([tool(schema)], MARKS)
        encode = gemma.tokenizer.encode
        matcher = gemma.matcher(grammar)
        opening = encode('<|tool_call>call:f{v:<|"|>', add_special_tokens=False)
        assert matcher.consume_tokens(opening)
        for text in ("<|", '"|'):
            assert matcher.consume_tokens(encode(text, add_special_tokens=False))
        (last,) = encode(">", add_special_tokens=False)
        assert matcher.try_consume_tokens([last]) == 0


class TestErrors:
    """A schema that cannot be held to is refused by keyword and place."""

    @pytest.mark.parametrize(
        ("schema", "keyword", "place"),
        [
            ({"not": {}}, "not", ""),
            ({"properties": {"a/b": {"uniqueItems": True}}}, "uniqueItems", "a~1b"),
            ({"patternProperties": {"a": {}}}, "patternProperties", ""),
            ({"properties": {"a": {"if": {}, "then": {}}}}, "if", "a"),
            ({"properties": {"a": {"multipleOf": 0.1}}}, "multipleOf", "a"),
            ({"properties": {"a": {"minimum": "1"}}}, "minimum", "a"),
            ({"properties": {"a": {"pattern": "a(?=b)"}}}, "pattern", "a"),
            ({"properties": {"a": {"pattern": 1}}}, "pattern", "a"),
            ({"properties": {"a": {"format": "iri"}}}, "format", "a"),
            ({"properties": {"a": {"type": "text"}}}, "type", "a"),
            ({"properties": {"a": {"items": [{}]}}}, "items", "a"),
            ({"properties": {"a": {"enum": ["b"], "minLength": 1}}}, "minLength", "a"),
            ({"properties": {"a": {"enum": ['<|"|>']}}}, "a text", "a"),
            ({"properties": {"a": {"maxLength": -1}}}, "maxLength", "a"),
            ({"properties": {"a": {"oneOf": [{}, {"type": "null"}]}}}, "oneOf", "a"),
            ({"properties": {"a": {"$ref": "#/$defs/x"}}}, "$ref", "a"),
            ({"properties": {"a": {"$ref": "http://a"}}}, "$ref", "a"),
            ({"properties": {"a": 1}}, "a schema", "a"),
            ({"$ref": "#"}, "$ref", ""),
            ({"properties": {"a": {}, "a:b": {}}}, "properties", ""),
            ({"required": "a"}, "required", ""),
            ({"minProperties": 2}, "minProperties", ""),
            ({"maxProperties": 65}, "maxProperties", ""),
            ({"properties": []}, "properties", ""),
            ({"anyOf": [{"const": i} for i in range(65)]}, "alternatives", ""),
            ({"type": "array"}, "a schema", ""),
            ({"properties": {"a": False}, "required": ["a"]}, "a schema", ""),
            ({"properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "a schema", ""),
        ],
    )
    def test_message(self, schema, keyword, place):
        with pytest.raises(RequestError) as caught:
            tool_grammar([tool({"type": "object", **schema})], MARKS)
        message = str(caught.value)
        at = f"{_PLACE}/properties/{place}" if place else _PLACE
        assert f"got {keyword}" in message
        assert f" at {at}" in message
        assert message.startswith("the tool's schema must be one")

    def test_too_much(self):
        deep: dict[str, object] = {}
        for _ in range(400):
            deep = {"type": "array", "items": deep}
        with pytest.raises(RequestError, match="nested too deeply"):
            tool_grammar([tool({"type": "object", "properties": {"a": deep}})], MARKS)
        wide = {f"k{i}": {"type": "null"} for i in range(3000)}
        with pytest.raises(RequestError, match="at most 5000 rules"):
            tool_grammar([tool({"type": "object", "properties": wide})], MARKS)

    def test_tools_that_are_not_strict_may_have_any_schema(self):
        tools = [tool({"not": {}}), tool(None, name="g", strict=True)]
        assert tool_grammar(tools, MARKS, choice=AUTO)
        with pytest.raises(RequestError, match=r"got not: \{\} at /tools/0/"):
            tool_grammar(tools, MARKS)
