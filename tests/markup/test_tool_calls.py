"""Calls of tools: what the chat template writes is read back, and what models add."""

import json

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mlx_gemma_mtp.markup.tool_calls import (
    MAX_DEPTH,
    QUOTE,
    UnreadableCallError,
    read_calls,
)
from mlx_gemma_mtp.markup.tools import Tools
from tests.gemma import SPECIAL


def written(value, none="null"):
    """A value as the chat template's format_argument writes it."""
    if value is None:
        return none
    if isinstance(value, str):
        return f"{QUOTE}{value}{QUOTE}"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return f"{{{entries(value, none)}}}"
    if isinstance(value, list):
        return f"[{','.join(written(each, none) for each in value)}]"
    return str(value)


def entries(value, none="null"):
    """The inside of an object; jinja's dictsort pays no regard to case."""
    pairs = sorted(value.items(), key=lambda item: item[0].lower())
    return ",".join(f"{key}:{written(each, none)}" for key, each in pairs)


def call_of(name, arguments, none="null"):
    """A call as the chat template writes it."""
    return f"call:{name}{{{entries(arguments, none)}}}"


def tool(name, properties=None, **parameters):
    """A tool as OpenAI's API has it."""
    if properties is not None:
        parameters |= {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def typed(**types):
    """A tool of which each argument has a type."""
    return tool("f", {name: {"type": kind} for name, kind in types.items()})


def arguments_of(text, *tools):
    """The arguments of the only call in a text."""
    (call,) = read_calls(text, Tools(tools))
    return call.arguments


def named(characters):
    return st.text(characters, max_size=12)


ANY = st.characters(exclude_categories=["Cs"])
# The template writes keys bare: what would end one is out of bounds, and a key that
# begins or ends with white space is told from one beside white space by the schema.
KEYS = named(
    st.characters(exclude_categories=["Cs"], exclude_characters=",{}[]")
).filter(
    lambda key: key == key.strip() and not any(mark in key for mark in SPECIAL.values())
)
STRINGS = st.text(ANY, max_size=20).filter(lambda text: QUOTE not in f"{text}<")
NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | STRINGS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4)
    ),
    max_leaves=15,
)
ARGUMENTS = st.dictionaries(KEYS, VALUES, max_size=5)
NAMES = st.text(
    st.characters(categories=["L", "N"], include_characters="_-.:/$"), min_size=1
)


class TestTemplate:
    """What the template writes is read back."""

    @given(NAMES, ARGUMENTS, st.sampled_from(["null", "None"]))
    @settings(max_examples=200, deadline=None)
    def test_round_trip(self, name, arguments, none):
        (call,) = read_calls(call_of(name, arguments, none), Tools([]))
        assert (call.name, call.arguments) == (name, arguments)
        json.dumps(call.arguments, allow_nan=False)

    @given(st.dictionaries(st.text(ANY, max_size=6), VALUES, max_size=5))
    @settings(max_examples=200, deadline=None)
    def test_declared_names_of_any_kind(self, arguments):
        """Also those that hold marks of the format, or are white space."""
        declared: dict[str, object] = {key: {} for key in arguments}
        # Of two such keys a text may be either.
        assume(not any(b.startswith(f"{a}:") for a in declared for b in declared))
        text = call_of("f", arguments)
        assert arguments_of(text, tool("f", declared)) == arguments

    @pytest.mark.parametrize(
        ("text", "arguments"),
        [
            ("call:f{}", {}),
            ("call:f{:1}", {"": 1}),
            ("call:f{a:b:1}", {"a:b": 1}),
            ("call:f{a::{}}", {"a:": {}}),
            ("call:f{Content-Type:1,$ref:2,a b:3,ä.b:4}", None),
            ("call:f{a:{},b:[],c:[[],{}]}", {"a": {}, "b": [], "c": [[], {}]}),
            ("call:f{a:None,b:null}", {"a": None, "b": None}),
            ("call:f{a:1e+20,b:-0.5,c:1e-07,d:-3}", None),
            (
                'call:f{a:<|"|>}]{[<tool_call|>"\'\n<|"|>}',
                {"a": "}]{[<tool_call|>\"'\n"},
            ),
        ],
    )
    def test_literal(self, text, arguments):
        if arguments is None:  # by JSON, whose keys have quotes
            inside = text.removeprefix("call:f{").removesuffix("}").split(",")
            pairs = (entry.rpartition(":") for entry in inside)
            arguments = {key: json.loads(value) for key, _, value in pairs}
        assert arguments_of(text) == arguments

    def test_names_with_marks_of_the_format(self):
        for name in ("server:tool", "mcp.files:read", "a/b", "call:f"):
            (call,) = read_calls(f"call:{name}{{a:1}}", Tools([]))
            assert (call.name, call.arguments) == (name, {"a": 1})

    def test_a_key_that_begins_with_a_space_is_sorted_before_others(self):
        assert arguments_of("call:f{ b:2,a:1}") == {" b": 2, "a": 1}
        assert arguments_of("call:f{a:1, b:2}") == {"a": 1, "b": 2}

    def test_numbers_that_json_has_not_are_words(self):
        text = f"call:f{{a:nan,b:inf,c:-inf,d:NaN,e:Infinity,f:1e999,g:{'9' * 5000}}}"
        found = arguments_of(text)
        assert all(isinstance(value, str) for value in found.values())
        assert found["g"] == "9" * 5000


class TestModels:
    """What models write beside the template."""

    TOOL = typed(city="string", days="integer", on="boolean", at="string")

    @pytest.mark.parametrize(
        ("text", "arguments"),
        [
            ("call:f{city:Paris,days:3}", {"city": "Paris", "days": 3}),
            ("call:f{city:New York, days:3}", {"city": "New York", "days": 3}),
            ("call:f{city=Paris,days=3}", {"city": "Paris", "days": 3}),
            ("call:f{city='Paris',days=3}", {"city": "Paris", "days": 3}),
            ("call:f{city: 'it\\'s',days:3}", {"city": "it's", "days": 3}),
            ("call:f{city:'it's',days:3}", {"city": "it's", "days": 3}),
            ('call:f{"city": "a, {b}", "days": 3}', {"city": "a, {b}", "days": 3}),
            ('call:f{"city": "a\\nb"}', {"city": "a\nb"}),
            ('call:f{city:"C:\\dir"}', {"city": "C:\\dir"}),
            ('call:f{<|"|>city<|"|>:<|"|>x<|"|>}', {"city": "x"}),
            ("call:f{on:True,city:True}", {"on": True, "city": "True"}),
            ("call:f{on:False,days:None}", {"on": False, "days": None}),
            ("call:f{days:3,}", {"days": 3}),
            ("call:f{ days : [ 1 , 2 , ] , }", {"days": [1, 2]}),
            ('call:f{\n  city:<|"|>x<|"|>,\n  days:3\n}\n', {"city": "x", "days": 3}),
            ("call:f{at:12:30}", {"at": "12:30"}),
            ("call:f{at:http://x.test/?a=1}", {"at": "http://x.test/?a=1"}),
            ("call:f{city:007}", {"city": "007"}),
            (" call: f {days:3}", {"days": 3}),
            ("f{days:3}", {"days": 3}),
        ],
    )
    def test_is_read(self, text, arguments):
        assert arguments_of(text, self.TOOL) == arguments

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "nonsense",
            "call:f",
            "call:{a:1}",
            "call:f{a:1",
            "call:f{a}",
            "call:f{a:}",
            "call:f{,}",
            "call:f{a:1}}",
            "call:f{a:1}x",
            "call:f{a:[1}",
            'call:f{a:<|"|>x}',
            "call:f{other:Paris}",  # nothing says that it is a string
            "call:f{days:Paris}",
            "call:f{days:007}",
            "call:the tool f{days:3}",
            "g{days:3}",
        ],
    )
    def test_is_not_read(self, text):
        with pytest.raises(UnreadableCallError):
            read_calls(text, Tools([self.TOOL]))

    def test_several_calls_between_one_pair_of_marks(self):
        calls = read_calls("call:f{days:1}call:f{days:2}, call:g{}", Tools([self.TOOL]))
        assert [(call.name, call.arguments) for call in calls] == [
            ("f", {"days": 1}),
            ("f", {"days": 2}),
            ("g", {}),
        ]

    def test_a_longer_declared_name_goes_first(self):
        assert arguments_of("call:f{a:b:1}", typed(**{"a": "string", "a:b": "integer"}))


class TestSchema:
    @pytest.mark.parametrize(
        "schema",
        [
            {"type": "STRING"},
            {"type": ["null", "string"]},
            {"anyOf": [{"type": "null"}, {"type": "string"}]},
            {"$ref": "#/$defs/Name"},
            {"allOf": [{"oneOf": [{"$ref": "#/$defs/Name"}]}]},
        ],
    )
    def test_a_string_may_stand_there(self, schema):
        definitions = {"Name": {"type": "string"}}
        declared = tool(
            "f", {"a": schema, "l": {"items": schema}}, **{"$defs": definitions}
        )
        text = "call:f{a:Paris,l:[Rome,Oslo]}"
        assert arguments_of(text, declared) == {"a": "Paris", "l": ["Rome", "Oslo"]}

    def test_inside_objects(self):
        inner = {"type": "object", "properties": {"b": {"type": "string"}}}
        more = {"type": "object", "additionalProperties": {"type": "string"}}
        declared = tool("f", {"a": inner, "h": more})
        text = "call:f{a:{b:x},h:{Accept:text/html}}"
        expected = {"a": {"b": "x"}, "h": {"Accept": "text/html"}}
        assert arguments_of(text, declared) == expected

    @pytest.mark.parametrize(
        "given",
        [
            {"$ref": "#"},
            {"$ref": "#/properties/a", "properties": {"a": {"$ref": "#/properties/a"}}},
            {"properties": ["a"], "type": 3, "items": "x", "anyOf": {"type": "string"}},
            "string",
            [],
            None,
        ],
    )
    def test_any_schema_is_taken(self, given):
        tools = [{"function": {"name": "f", "parameters": given}}, {}, None, "f"]
        assert arguments_of("call:f{a:1}", *tools) == {"a": 1}
        with pytest.raises(UnreadableCallError):
            read_calls("call:f{a:b}", Tools(tools))


class TestSafety:
    @given(st.lists(st.sampled_from([*"{}[],:=\"' \\\nacl1-.fn", QUOTE, "call:f{"])))
    @settings(max_examples=120, deadline=None)
    def test_any_text_is_read_or_refused(self, pieces):
        text = "".join(pieces)
        for given_text in (text, f"call:f{{{text}}}"):
            try:
                calls = read_calls(given_text, Tools([typed(a="string", c="object")]))
            except UnreadableCallError:
                continue
            assert calls
            for call in calls:
                json.dumps(call.arguments, allow_nan=False)

    def test_depth(self):
        for opening, closing in (("[", "]"), ("{a:", "}")):
            text = "call:f{a:" + opening * MAX_DEPTH + closing * MAX_DEPTH + "}"
            found = arguments_of(text.replace("a:}", "}"))
            assert json.dumps(found).count(opening[0]) >= MAX_DEPTH
            with pytest.raises(UnreadableCallError, match="too deeply"):
                read_calls("call:f{a:" + opening * 10**6, Tools([]))
