"""JSON schemas that tests let pairs write: each kind of keyword, most bounded."""

from __future__ import annotations

from typing import Any


def obj(**properties: Any) -> dict[str, Any]:
    """A closed object with all of its keys."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


SHORT = {"type": "string", "maxLength": 8}
DIGIT = {"type": "integer", "minimum": 0, "maximum": 9}
POINT = obj(x=DIGIT, y=DIGIT)


def array(items: Any, most: int = 3, least: int = 0) -> dict[str, Any]:
    """A bounded list."""
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


SCHEMAS: dict[str, dict[str, Any]] = {
    # types
    "null": {"type": "null"},
    "boolean": {"type": "boolean"},
    "short string": SHORT,
    "string of a length": {"type": "string", "minLength": 3, "maxLength": 5},
    "empty string": {"type": "string", "maxLength": 0},
    "one of two types": {"type": ["boolean", "null"]},
    "empty object": obj(),
    "empty list": array({}, most=0),
    # numbers
    "digit": DIGIT,
    "negative": {"type": "integer", "minimum": -120, "maximum": -7},
    "across zero": {"type": "integer", "minimum": -3, "maximum": 12},
    "large range": {"type": "integer", "minimum": 1000, "maximum": 99999},
    "exclusive": {"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 4},
    "one number": {"type": "integer", "minimum": 7, "maximum": 7},
    "multiples": {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 95},
    "share": {"type": "number", "multipleOf": 0.01, "minimum": 0, "maximum": 1},
    # enums and constants
    "enum of words": {"enum": ["red", "green", "blue"]},
    "enum of all types": {"enum": [1, "1", None, True, [1, 2], {"a": 1}]},
    "enum of prefixes": {"enum": ["a", "ab", "abc", "abcd"]},
    "constant": {"const": "always"},
    "constant object": {"const": {"a": [1, {"b": None}]}},
    "typed enum": {"type": "string", "enum": ["on", "off"]},
    # objects
    "closed object": obj(name=SHORT, age=DIGIT),
    "optional keys": {**obj(a=DIGIT, b=DIGIT, c=DIGIT), "required": []},
    "one required": {**obj(a=DIGIT, b=SHORT), "required": ["b"]},
    "key with a space": obj(**{"first name": SHORT, "last name": SHORT}),
    "key with quotes": obj(**{'say "hi"': DIGIT, "back\\slash": DIGIT}),
    "nested": obj(a=obj(b=obj(c=obj(d=DIGIT)))),
    "many keys": obj(**{f"k{i}": DIGIT for i in range(12)}),
    "typed extra keys": {
        "type": "object",
        "properties": {"a": DIGIT},
        "required": ["a"],
        "additionalProperties": {"type": "boolean"},
        "maxProperties": 3,
    },
    "keys by pattern": {
        "type": "object",
        "patternProperties": {"^x[0-9]$": {"type": "boolean"}},
        "additionalProperties": False,
        "minProperties": 1,
        "maxProperties": 2,
    },
    # lists
    "digits": array(DIGIT),
    "some words": array({"enum": ["a", "b"]}, most=5, least=2),
    "three of a kind": array({"type": "boolean"}, most=3, least=3),
    "list of lists": array(array(DIGIT, most=2), most=2),
    "list of objects": array(POINT, most=2, least=1),
    "tuple": {
        "type": "array",
        "prefixItems": [{"type": "boolean"}, DIGIT, {"enum": ["z"]}],
        "items": False,
        "minItems": 3,
    },
    # patterns and formats
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
    "pattern inside": {"type": "string", "pattern": "^a.{0,3}z$"},
    "alternatives": {"type": "string", "pattern": "^(cat|dog|bird)s?$"},
    "escapes": {"type": "string", "pattern": r"^\d{2}\\\d$"},
    "date": {"type": "string", "format": "date"},
    "time": {"type": "string", "format": "time", "maxLength": 20},
    "uuid": {"type": "string", "format": "uuid"},
    "ip address": {"type": "string", "format": "ipv4"},
    # unions
    "number or word": {"anyOf": [DIGIT, {"enum": ["none"]}]},
    "told apart": {
        "oneOf": [
            obj(kind={"const": "circle"}, radius=DIGIT),
            obj(kind={"const": "square"}, side=DIGIT),
        ]
    },
    "perhaps null": obj(value={"anyOf": [POINT, {"type": "null"}]}),
    "all of": {
        "allOf": [
            {"type": "object", "properties": {"a": DIGIT}, "required": ["a"]},
            {"properties": {"a": {"minimum": 5}}, "additionalProperties": False},
        ]
    },
    "union in a list": array({"anyOf": [DIGIT, {"type": "boolean"}, POINT]}),
    # references
    "reference": {"$defs": {"p": POINT}, **obj(a={"$ref": "#/$defs/p"})},
    "old definitions": {
        "definitions": {"d": DIGIT},
        **obj(a={"$ref": "#/definitions/d"}, b={"$ref": "#/definitions/d"}),
    },
    "reference to a property": obj(a=POINT, b={"$ref": "#/properties/a"}),
    "list that ends": {
        "$defs": {
            "node": obj(
                value=DIGIT,
                next={"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]},
            )
        },
        "$ref": "#/$defs/node",
    },
    "escaped reference": {
        "$defs": {"a/b": DIGIT, "c~d": {"type": "null"}},
        **obj(x={"$ref": "#/$defs/a~1b"}, y={"$ref": "#/$defs/c~0d"}),
    },
    # Unicode
    "words of all scripts": {"enum": ["größe", "日本語", "😀🌈", "中文"]},
    "keys of all scripts": obj(größe=DIGIT, **{"名前": {"enum": ["中", "文"]}}),
    "pattern of letters": {"type": "string", "pattern": "^[äöü€]{1,4}$"},
    "control characters": {"enum": ["a\tb", "line\nend", 'quote"', "back\\"]},
    # What is described and left alone
    "described": {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A thing",
        "description": "of some kind",
        **obj(a={**DIGIT, "description": "a digit", "default": 3, "examples": [1]}),
    },
    "extraction": obj(
        title={"type": "string", "minLength": 1, "maxLength": 12},
        tags=array({"enum": ["x", "y", "z"]}),
        score={"type": "integer", "minimum": 0, "maximum": 100},
        author={"anyOf": [obj(name=SHORT), {"type": "null"}]},
    ),
    "an action": {
        "anyOf": [
            obj(action={"const": "search"}, query=SHORT),
            obj(action={"const": "move"}, to=POINT, fast={"type": "boolean"}),
            obj(action={"const": "stop"}),
        ]
    },
}
FEW = (
    *("across zero", "share", "enum of all types", "optional keys", "keys by pattern"),
    *("list of objects", "tuple", "pattern", "told apart", "reference"),
    *("list that ends", "escaped reference"),
)
