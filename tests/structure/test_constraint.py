"""Constraints: what is compiled, and what the mistakes in the others say.

Run: python -m pytest tests/structure/test_constraint.py
"""

from __future__ import annotations

import builtins
import itertools
import json
import sys
from typing import Any, ClassVar

import pytest
from pydantic import BaseModel, ConfigDict

from mlx_gemma_mtp.errors import RequestError
from mlx_gemma_mtp.structure import constraint as constraint_module
from mlx_gemma_mtp.structure.constraint import (
    MAX_DEPTH,
    MAX_ENTRIES,
    MAX_LENGTH,
    MAX_REGEX,
    MAX_TEXTS,
    asked,
    choice,
    either,
    grammar,
    json_object,
    json_schema,
    reason_of,
    regex,
)
from mlx_gemma_mtp.structure.masks import BoundConstraint
from mlx_gemma_mtp.structure.schemas import closed, depth_of, place_of
from tests.server.serving import EOS, tokenizer, tokens_of
from tests.structure.schemas import SCHEMAS


def message(make, *args, **settings):
    with pytest.raises(RequestError) as caught:
        make(*args, **settings)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 600
    return text


def nested(depth):
    schema: dict[str, Any] = {"type": "null"}
    for _ in range(depth - 1):
        schema = {"items": schema}
    return schema


class TestSchemas:
    @pytest.mark.parametrize("name", SCHEMAS)
    def test_is_compiled(self, name):
        assert json_schema(SCHEMAS[name]).what == "schema"

    @pytest.mark.parametrize(
        ("schema", "said"),
        [
            ({"not": {}}, "got the keyword not at #. Leave it out."),
            (
                {"properties": {"a/b": {"items": {"uniqueItems": True}}}},
                "got the keyword uniqueItems at #/properties/a~1b/items. Leave it out.",
            ),
            (
                {"anyOf": [{"type": "null"}, {"if": {}, "then": {}}]},
                "got the keyword if, then at #/anyOf/1. Leave it out.",
            ),
            (
                {
                    "$defs": {"a": {"type": "list"}},
                    "properties": {"x": {"$ref": "#/$defs/a"}},
                },
                "got Invalid type: list at #/$defs/a. Change it there.",
            ),
            (
                {"$ref": "#/$defs/none"},
                "got Pointer '/$defs/none' does not exist at #. Change it there.",
            ),
            (
                {"properties": {"p": {"type": "string", "pattern": "(a"}}},
                "got unclosed group at #/properties/p. Change it there.",
            ),
            (
                {"items": {"type": "string", "format": "colour"}},
                "got Unknown format: colour at #/items. Change it there.",
            ),
            (
                {
                    "type": "object",
                    "properties": {"a": {}, "b": {"enum": []}},
                    "required": ["b"],
                },
                "got Unsatisfiable schema: required property 'b' is unsatisfiable at "
                "#. Change it there.",
            ),
            (
                {"type": "integer", "minimum": 5, "maximum": 3},
                "got Unsatisfiable schema: minimum (5) is greater than maximum (3) at "
                "#. Change it there.",
            ),
        ],
    )
    def test_the_place_is_named(self, schema, said):
        start = "schema must be one that text can be forced to follow: "
        assert message(json_schema, schema) == start + said

    def test_what_is_not_strict_leaves_keywords_out(self):
        schema = {"type": "string", "not": {"const": "a"}}
        assert "the keyword not at #" in message(json_schema, schema)
        json_schema(schema, strict=False)
        json_schema({"oneOf": [{"type": "integer"}, {"type": "number"}]}, strict=False)

    def test_llguidance_takes_no_settings_of_clients(self):
        """White space and keywords that are left out are not the client's to choose."""
        free = {"x-guidance": {"lenient": True}, "not": {}}
        assert "the keyword not at #" in message(json_schema, free)
        other = {"x-guidance": {"whitespace_pattern": " +"}, "type": "null"}
        assert json_schema(other) == json_schema({"type": "null"})

    @pytest.mark.parametrize("word", MAX_ENTRIES)
    def test_what_is_wide_is_refused(self, word):
        """Also where it is spread over a schema, or stands in a grammar."""
        half = MAX_ENTRIES[word] // 2
        parts = [
            {"type": "object", word: {f"^{c}{i}$": {} for i in range(half)}}
            for c in "ab"
        ]
        least = {"$defs": {"p": parts[1]}, **parts[0]}
        assert json_schema({"$defs": {"p": parts[1]}})
        said = f"must have at most {MAX_ENTRIES[word]} {word} in all: got"
        many = {"$defs": {**least["$defs"], "q": {word: {"c": {}}}}, **parts[0]}
        assert f"schema {said} {2 * half + 1}" in message(json_schema, many)
        lark = "start: " + " | ".join(f"%json {json.dumps(p)}" for p in (many, least))
        assert f"a schema of the grammar {said}" in message(grammar, lark)

    @pytest.mark.parametrize("is_long", [True, False])
    def test_the_place_is_looked_for_where_that_is_quick(self, monkeypatch, is_long):
        times = itertools.count(0, 1 if is_long else 0)
        monkeypatch.setattr(constraint_module, "thread_time", times.__next__)
        place = "#" if is_long else "#/properties/a"
        said = message(json_schema, {"properties": {"a": {"not": {}}}})
        assert f"got the keyword not at {place}. Leave it out." in said

    @pytest.mark.parametrize("schema", [3, "[1]", "{", [{}], True, None, int])
    def test_something_else_is_refused(self, schema):
        assert "schema must be a JSON schema, an object: got" in message(
            json_schema, schema
        )

    @pytest.mark.parametrize("value", [float("nan"), {1, 2}, "\ud800", b"x"], ids=type)
    def test_what_json_has_not_is_refused(self, value):
        assert "schema must hold what JSON has" in message(
            json_schema, {"const": value}
        )

    def test_numbers_beyond_all_are_refused(self):
        schema = {"properties": {"a": {"minimum": 10**400}}}
        assert "got number out of range at #/properties/a. Change it there." in message(
            json_schema, schema
        )

    def test_sizes_are_bounded(self):
        assert f"at most {MAX_LENGTH} characters" in message(
            json_schema, {"description": "x" * MAX_LENGTH}
        )
        assert f"at most {MAX_LENGTH} characters" in message(
            json_schema, " " * (MAX_LENGTH + 1)
        )
        json_schema(nested(MAX_DEPTH - 1))
        deep = f"nested at most {MAX_DEPTH} deep"
        assert deep in message(json_schema, nested(MAX_DEPTH))
        assert "what JSON has" in message(json_schema, nested(100_000))

    def test_a_schema_that_holds_itself_is_refused(self):
        schema: dict[str, Any] = {}
        schema["items"] = schema
        assert "what JSON has" in message(json_schema, schema)

    def test_any_object(self):
        assert json_object() == json_schema({"type": "object"})

    def test_objects_of_classes_have_no_other_keys(self):
        class Inner(BaseModel):
            n: int

        class Outer(BaseModel):
            inner: Inner
            properties: dict[str, int]

        class Free(BaseModel):
            model_config = ConfigDict(extra="allow")
            n: int

        made = Outer.model_json_schema()
        assert json_schema(Outer) == json_schema(closed(made))
        found = closed(made)
        assert found["additionalProperties"] is False
        assert found["$defs"]["Inner"]["additionalProperties"] is False
        assert found["properties"]["properties"] == made["properties"]["properties"]
        assert set(found["properties"]) == set(made["properties"])
        assert json_schema(Free) == json_schema(Free.model_json_schema())


class TestTrees:
    def test_depth(self):
        values: list[Any] = [1, [], [1], {"a": [{}]}]
        assert [depth_of(v, 9) for v in values] == [1, 1, 2, 3]
        assert depth_of(nested(1000), 9) == 10

    def test_values_are_no_schemas(self):
        """What stands in an enum or a default has no error of its own."""
        schema = {"default": {"bad": 1}, "enum": [{"bad": 1}], "items": {"bad": 1}}

        def error_of(part):
            return "bad" if "bad" in str(part) else ""

        assert place_of(schema, "bad", error_of) == "#/items"
        value: dict[str, Any] = {"const": {"properties": {}}}
        assert closed(value) == value

    def test_search_ends(self):
        schema = {"properties": {f"p{i}": {"type": "null"} for i in range(10_000)}}
        calls = []

        def error_of(part):
            calls.append(part)
            return ""

        assert place_of(schema, "bad", error_of) == "#"
        assert len(calls) < 1000


class TestOthers:
    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("(a", "got '(a', unclosed group at character 1. Change it there."),
            ("ab(?=c)", "look-ahead and look-behind, is not supported at character 3"),
            ("é[z-a]", "at character 3. Change it there."),
            ("a/b(", "got 'a/b(', unclosed group"),
        ],
    )
    def test_regex_names_the_character(self, text, said):
        assert said in message(regex, text)

    @pytest.mark.parametrize("text", [3, None, b"a", "\ud800"])
    def test_regex_is_text(self, text):
        assert "regex must be text" in message(regex, text)

    def test_regex_is_bounded(self):
        assert f"at most {MAX_REGEX} characters" in message(regex, "a" * 20_000)
        message(regex, "(" * 5000 + ")" * 5000)

    @pytest.mark.parametrize(
        ("lark", "said"),
        [
            ("start: thing", 'unknown name: "thing" at line 1, column 8'),
            ('start: "a"\nb: (', "at line 2, column 5"),
            ("start: " + "(" * 100_000, "too deeply nested"),
            ("", "must be one that can be compiled"),
        ],
    )
    def test_grammar_names_the_place(self, lark, said):
        text = message(grammar, lark)
        assert text.startswith("grammar must be one that can be compiled: got ")
        assert said in text

    def test_grammar_is_bounded(self):
        assert f"at most {MAX_LENGTH} characters" in message(
            grammar, "#" * (MAX_LENGTH + 1)
        )
        assert "grammar must be text" in message(grammar, 5)

    @pytest.mark.parametrize("texts", ["abc", [], [""], ["a", 3], None, {"a"}])
    def test_choice_is_a_list(self, texts):
        assert "choice must be a list of texts, none empty" in message(choice, texts)

    def test_choice_is_bounded(self):
        many = [str(i) for i in range(MAX_TEXTS + 1)]
        assert f"at most {MAX_TEXTS} texts" in message(choice, many)
        assert "choice must be text" in message(choice, ["\ud800"])
        assert choice(("a", "b")).what == "choice"

    def test_texts_are_bounded(self):
        """Masks of a very long one take long."""
        long = "a" * (MAX_REGEX + 1)
        assert "a text of the choice must have at most" in message(choice, [long])
        for lark in (f'start: "{long}"', f"start: /{long}/"):
            assert "a text of the grammar must have at most" in message(grammar, lark)
        grammar(f'start: "a" // {long}')
        for schema in ({"const": long}, {"items": {"enum": [long]}}, {"pattern": long}):
            assert "a text of the schema must have" in message(json_schema, schema)
        json_schema({"description": long})

    def test_choices_have_any_characters(self):
        choice([chr(i) for i in range(1024)])

    def test_asked(self):
        assert asked() is None
        assert asked(regex="a") == regex("a")
        assert asked(schema={}) == json_schema({})
        assert asked(grammar='start: "a"') == grammar('start: "a"')
        assert "got regex and grammar" in message(asked, regex="a", grammar="b")

    def test_messages_without_a_place(self):
        assert reason_of("") == "an error without a reason"
        assert reason_of("schema too large") == "schema too large"

    def test_equal_ones_are_equal(self):
        assert json_schema({"type": "null"}) == json_schema('{"type": "null"}')
        assert len({regex("a"), regex("a"), regex("b")}) == 2
        assert "start" not in repr(regex("a"))


def test_without_the_extra_a_line_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def missing(name, *rest, **more):
        if name.partition(".")[0] == "llguidance":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.delitem(sys.modules, "llguidance", raising=False)
    monkeypatch.setattr(builtins, "__import__", missing)
    for make in (json_object, lambda: regex("a"), lambda: grammar("a")):
        assert message(make) == (
            "llguidance must be installed for text with a given form: got no such "
            "package. Install mlx_gemma_mtp[structure]."
        )


class TestEither:
    """Text of one constraint or of another, of whatever kinds they are."""

    OBJECT: ClassVar = {"type": "object", "properties": {"a": {"const": 1}}}
    MADE = (
        (json_schema({**OBJECT, "additionalProperties": False}), ['{"a":1}', "{}"]),
        (regex("a+b"), ["ab", "aaab"]),
        (choice(["yes", "no", "\x7f"]), ["yes", "no", "\x7f"]),
        (grammar('start: "(" start ")" | "x"'), ["x", "((x))"]),
    )
    OTHERS = ("", "{", "y", "a", "(x", "xx", '{"b":1}', "yesno", "ab{}")

    @pytest.mark.parametrize("second", range(4))
    @pytest.mark.parametrize("first", range(4))
    def test_texts_are_of_one_or_the_other(self, first, second):
        made = either(self.MADE[first][0], self.MADE[second][0])
        row = BoundConstraint(made, tokenizer())
        for index, (_, texts) in enumerate(self.MADE):
            for text in texts:
                assert is_whole(row, text) == (index in (first, second)), text
        assert not any(is_whole(row, text) for text in self.OTHERS)
        assert made.what == f"{self.MADE[first][0].what} or {self.MADE[second][0].what}"


def is_whole(bound, text):
    """Whether a text may stand and end."""
    row = bound.row((), (EOS,))
    for token in tokens_of(text):
        if not row._follow(token):
            return False
    return bool(row.block(()).words[0][EOS // 32] >> EOS % 32 & 1)
