"""Schemas of tools that mean harm, or nothing: one line that names the place, or a
grammar that the engine of grammars takes.

Run: python -m pytest tests/server/test_forced_calls.py
"""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_gemma_mtp.errors import RequestError
from mlx_gemma_mtp.markup.patterns import FORMATS
from mlx_gemma_mtp.markup.schema_parts import TYPES
from mlx_gemma_mtp.server.errors import AnswerError
from mlx_gemma_mtp.server.forced_calls import ForcedCalls
from mlx_gemma_mtp.server.forms import Form
from mlx_gemma_mtp.server.schema import ChatBody
from mlx_gemma_mtp.structure.constraint import regex
from mlx_gemma_mtp.structure.masks import BoundConstraint
from tests.gemma import SPECIAL
from tests.server.serving import tokenizer

PLACE = "/tools/0/function/parameters"
HUGE = 10**400


class _Tokenizer:
    """As much of Gemma's as tells its marks."""

    chat_template = None

    def get_added_vocab(self) -> dict[str, int]:
        return {text: token for token, text in SPECIAL.items()}


CALLS = ForcedCalls(_Tokenizer())
BODY = ChatBody.model_validate(
    {
        "messages": [{"role": "user", "content": "x"}],
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "tool_choice": "required",
    }
)


def bound(parameters: Any) -> BoundConstraint:
    """What holds an answer to calls of a tool that takes something."""
    function = {"name": "f", "parameters": parameters}
    form = CALLS.of(BODY, [{"type": "function", "function": function}])
    assert form is not None
    return BoundConstraint(form.make(), tokenizer())


def of(schema: Any, **more: Any) -> dict[str, Any]:
    """Arguments that have one value of a schema."""
    return {"type": "object", "properties": {"a": schema}, **more}


def union(schema: Any) -> dict[str, Any]:
    return {"oneOf": [{"type": "object", "required": ["k"], **schema}] * 2}


COUNTED = [{"type": "string", "pattern": f"[a-z]{{{n}}}"} for n in range(200, 1000)]
LONG = "é" * 20_000
HOSTILE: dict[str, tuple[Any, str]] = {
    "no float": (of({"type": "string", "minLength": HUGE}), "minLength"),
    "no float either": (of({"type": "integer", "minimum": HUGE}), "minimum"),
    "a step": (of({"type": "integer", "multipleOf": HUGE}), "multipleOf"),
    "steps": (
        of({"type": "integer", "allOf": [{"multipleOf": n} for n in (997, 1009)]}),
        "multipleOf",
    ),
    "a needed number": (of({}, required=[1]), "required"),
    "a needed list": (of({}, required=[["a"]]), "required"),
    "needed lists of unions": (union({"required": [["a"]]}), "required"),
    "no properties": (union({"properties": 5}), "properties"),
    "half a character": (of({"enum": ["\ud800"]}), "a text"),
    "a key of half a character": (of({"properties": {"\ud800": {}}}), "properties"),
    "a pattern of half a character": (
        of({"type": "string", "pattern": "\ud800"}),
        "pattern",
    ),
    "no number": (of({"enum": [float("inf")]}), "a value: inf"),
    "no number either": (of({"const": [{"b": float("nan")}]}), "a value: nan"),
    "thousands of digits": (of({"enum": [-HUGE]}), "a value: -1000"),
    "a key that cannot be read": (of({"const": {"b,c": 1}}), "a value"),
    "a deep value": (of({"const": json.loads("[" * 99 + "]" * 99)}), "a value"),
    "a long text": (of({"enum": [LONG]}), "a text"),
    "a long key": ({"type": "object", "properties": {LONG: {}}}, "properties"),
    "a long pattern": (of({"type": "string", "pattern": LONG}), "pattern"),
    "many characters": (of({"type": "string", "minLength": 10**6}), "minLength"),
    "many items": (of({"type": "array", "minItems": 10**9}), "minItems"),
    "many entries": (of({"type": "object", "minProperties": 10**9}), "minProperties"),
    "a reference of many digits": (of({"$ref": f"#/enum/{'9' * 5000}"}), "$ref"),
    "no group's end": (of({"type": "string", "pattern": "^(a$"}), "pattern"),
    "no group": (of({"type": "string", "pattern": "a)|(b"}), "pattern"),
    "nothing to repeat": (of({"type": "string", "pattern": "(*a)"}), "pattern"),
    "a count": (of({"type": "string", "pattern": "a{5,2}"}), "pattern"),
    "counts": (of({"type": "string", "pattern": "((a{99}b){99}c){99}"}), "pattern"),
    "a range": (of({"type": "string", "pattern": "[z-a]"}), "pattern"),
    "groups": (of({"type": "string", "pattern": "(" * 300 + ")" * 300}), "pattern"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_the_place_is_named(name):
    schema, words = HOSTILE[name]
    with pytest.raises(RequestError) as caught:
        bound(schema)
    message = str(caught.value)
    assert f"got {words}" in message
    assert f" at {PLACE}" in message
    assert len(message) < 500


def test_what_is_large_together():
    """Nothing takes long: neither what is refused nor what is not."""
    keys = {f"k{i}": {"type": "string"} for i in range(1500)}
    parts = [{"properties": {f"k{i}": {}}} for i in range(900)]
    for schema, words in (
        ({"type": "object", "properties": keys}, "tools must have at most 1000"),
        ({"type": "object", "allOf": parts}, "in at most 300000 steps"),
        (of({"enum": [f"a text {i}" for i in range(20_000)]}), "262144 characters"),
        (
            of({"type": "array", "prefixItems": COUNTED}),
            "grammar of the tools must take less to compile: got fuel exhausted",
        ),
    ):
        with pytest.raises(RequestError, match=words):
            bound(schema)


@pytest.mark.parametrize(
    "schema",
    [
        {"enum": ["\x7f", "\x00", "\u2028", "a\nb", "\\", '"', "😀"]},
        {"type": "string", "maxLength": 10**30},
        {"type": "array", "maxItems": 10**8, "items": {"type": "integer"}},
        {"type": "string", "pattern": r"^[\w-.]+[-a][a-][\n-\r]\n$"},
        {"type": "string", "minLength": 1000},
        {"type": "integer", "multipleOf": 1000, "minimum": 1, "maximum": 10**15},
        {"$ref": "#/$defs/a%20b"},
    ],
    ids=str,
)
def test_what_is_taken(schema):
    assert bound(of(schema, **{"$defs": {"a b": {"type": "null"}}}))


@pytest.mark.parametrize("choice", ["required", "auto"])
def test_an_answer_without_an_end(choice):
    """It is refused before anything is compiled."""
    function = {"name": "f", "strict": True, "parameters": {"not": {}}}
    tools = [{"type": "function", "function": function}]
    body = BODY.model_copy(update={"tool_choice": choice, "ignore_eos": True})
    with pytest.raises(AnswerError, match="ignore_eos must be left out") as caught:
        CALLS.of(body, tools)
    assert caught.value.param == "ignore_eos"


def test_the_place_of_a_mistake_beside_a_form():
    """It is that of the tools, or of the form."""
    body = BODY.model_copy(update={"tool_choice": "auto"})
    for parameters, pattern, place in (
        ({"not": {}}, "a", "tools"),
        ({}, "a", None),
        ({}, "(a", "structured_outputs.regex"),
    ):
        function = {"name": "f", "strict": True, "parameters": parameters}
        tools = [{"type": "function", "function": function}]
        form = CALLS.of(
            body, tools, Form("structured_outputs.regex", partial(regex, pattern))
        )
        assert form is not None
        if place is None:
            assert form.made().what == "grammar of the tools or regex"
            continue
        with pytest.raises(AnswerError, match=f"^{place}: ") as caught:
            form.made()
        assert caught.value.param == place


_NAMES = st.sampled_from(["a", "b", "a:b", "", "é", "$defs", '<|"|>', "\ud800"])
_TEXTS = st.one_of(
    st.sampled_from([*TYPES, *FORMATS, "#", "#/$defs/a", "#/properties/a", "#/a%2"]),
    st.text(st.sampled_from(r"ab(|)[^]\d{1,2}*+?.$-/<é" + "\n\x7f\ud800"), max_size=8),
    _NAMES,
)
_NUMBERS = st.one_of(
    st.integers(-2, 70), st.floats(), st.sampled_from([HUGE, -HUGE, 1e308, 5000])
)
_VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), _NUMBERS, _TEXTS),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(_NAMES, inner, max_size=3)
    ),
    max_leaves=4,
)


def _schemas(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Keywords with values that look right, and now and then with others."""
    schemas = st.dictionaries(_NAMES, inner, max_size=3)
    lists = st.lists(inner, max_size=3)
    right: dict[str, st.SearchStrategy[Any]] = {
        **dict.fromkeys(("properties", "$defs"), schemas),
        **dict.fromkeys(("allOf", "anyOf", "oneOf", "prefixItems"), lists),
        **dict.fromkeys(("items", "additionalProperties"), inner),
        **dict.fromkeys(("minLength", "maxLength", "minItems", "maxItems"), _NUMBERS),
        **dict.fromkeys(("minProperties", "maxProperties", "multipleOf"), _NUMBERS),
        **dict.fromkeys(("minimum", "maximum", "exclusiveMaximum"), _NUMBERS),
        **dict.fromkeys(("pattern", "format", "$ref"), _TEXTS),
        "type": st.one_of(st.sampled_from(TYPES), st.lists(_TEXTS, max_size=2)),
        "required": st.lists(_NAMES, max_size=2),
        "enum": st.lists(_VALUES, max_size=3),
        "const": _VALUES,
    }
    words = st.lists(st.sampled_from([*right]), max_size=3, unique=True)
    odd = st.fixed_dictionaries({"type": st.just("object"), "oneOf": lists | _VALUES})

    @st.composite
    def schema(draw: st.DrawFn) -> dict[str, Any]:
        is_odd = st.integers(0, 15).map(lambda n: n == 0)
        return {w: draw(_VALUES if draw(is_odd) else right[w]) for w in draw(words)}

    return st.one_of(schema(), odd)


SCHEMAS = st.recursive(
    st.one_of(st.booleans(), st.just({}), _VALUES), _schemas, max_leaves=8
)
ARGUMENTS = st.builds(
    lambda properties, more: {**more, "type": "object", "properties": properties},
    st.dictionaries(_NAMES, SCHEMAS, max_size=3),
    st.fixed_dictionaries({"$defs": st.fixed_dictionaries({"a": SCHEMAS})}),
)


@settings(max_examples=200)
@given(st.one_of(ARGUMENTS, ARGUMENTS, SCHEMAS))
def test_any_schema(schema):
    """One line that names the place, or a grammar of which texts can be made."""
    try:
        found = bound(schema)
    except RequestError as error:
        message = str(error)
        assert f" at {PLACE}" in message, message
    else:
        found.row((), ()).block(())
