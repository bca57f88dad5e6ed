"""Keywords of plain JSON schemas: which are known, and what some schemas say together.

Knows nothing of how values are written.
"""

from __future__ import annotations

import math
from typing import Any

from .ranges import LARGEST_BOUND
from .schema_parts import Node, Part, lacking, listed, mapping_of

LOWER = ("minimum", "exclusiveMinimum")
UPPER = ("maximum", "exclusiveMaximum")
MOST_NEEDED = 1000  # characters or items; engines of grammars count each of them
_LARGEST = 10**300  # JSON's numbers are floats elsewhere
_MOST_STEP = 10**6
_ENDLESS = 10**9  # characters or items: no answer has as many
LISTS = ("type", "enum", "const")
KNOWN = frozenset(
    (
        *LISTS,
        *("minLength", "maxLength", "pattern", "format", *LOWER, *UPPER),
        *("multipleOf", "items", "prefixItems", "minItems", "maxItems", "properties"),
        *("required", "additionalProperties", "minProperties", "maxProperties"),
    )
)
# Keywords that hold for each value where they have this value.
_HARMLESS: dict[str, tuple[Any, ...]] = {
    "uniqueItems": (False,),
    "patternProperties": ({},),
    "propertyNames": ({}, True, {"type": "string"}),
    "dependentRequired": ({},),
    "unevaluatedProperties": (True,),
    "unevaluatedItems": (True,),
    "additionalItems": (True, False),
    "nullable": (True, False),  # OpenAPI's; JSON schema knows nothing of it
}


def check_keywords(part: Part) -> None:
    """Raise for a keyword that nothing here holds values to."""
    for word, value in part.schema.items():
        if word in KNOWN or word.startswith("x-"):
            continue
        if not any(value == each for each in _HARMLESS.get(word, ())):
            raise lacking(part.place, word, value)


def kinds_of(value: Any) -> set[str]:
    """The types that a value of JSON's has."""
    match value:
        case None:
            return {"null"}
        case bool():
            return {"boolean"}
        case int():
            return {"integer", "number"}
        case float():
            return {"integer", "number"} if value.is_integer() else {"number"}
        case str():
            return {"string"}
        case list():
            return {"array"}
        case _:
            return {"object"}


def is_written(value: Any) -> bool:
    """Whether a value that is no text, list or object can be written and read back."""
    if isinstance(value, float):
        return math.isfinite(value)
    return not isinstance(value, int) or abs(value) < _LARGEST


def item_of(node: Node, index: int) -> Node:
    """What an item of a list must meet."""
    found = []
    for part in node:
        if index < len(listed(part, "prefixItems")):
            found.append(part.at("prefixItems", index))
        elif isinstance(part.schema.get("items"), list):
            why = "prefixItems is the name for it"
            raise lacking(part.place, "items", part.schema["items"], why)
        elif "items" in part.schema:
            found.append(part.at("items"))
    return tuple(found)


def property_of(node: Node, key: str) -> Node:
    """What the value of a property must meet."""
    found = []
    for part in node:
        if key in mapping_of(part, "properties"):
            found.append(part.at("properties", key))
        elif "additionalProperties" in part.schema:
            found.append(part.at("additionalProperties"))
    return tuple(found)


def least_of(node: Node, word: str) -> int:
    """The number of characters, items or entries that there must be.

    Raises:
        RequestError: It is none, or so large that engines of grammars give up.
    """
    return max(_counts_of(node, word, MOST_NEEDED), default=0)


def most_of(node: Node, word: str) -> int | None:
    """The number of characters, items or entries that there may be; None for any.

    Raises:
        RequestError: It is none.
    """
    counts = _counts_of(node, word, None)
    return min((count for count in counts if count < _ENDLESS), default=None)


def _counts_of(node: Node, word: str, most: int | None) -> list[int]:
    """Numbers of characters, items or entries."""
    given = given_of(node, word)
    for part, value in given:
        if not _is_number(value) or value != int(value) or value < 0:
            raise lacking(part.place, word, value, "it must be a whole number from 0")
        if most is not None and value > most:
            raise lacking(part.place, word, value, f"most is {most}")
    return [int(value) for _, value in given]


def bounds_of(node: Node) -> dict[str, Any]:
    """The closest bounds of a number, by their keywords."""
    found: dict[str, Any] = {}
    for word in (*LOWER, *UPPER):
        for part, value in given_of(node, word):
            if not _is_number(value) or abs(value) > LARGEST_BOUND:
                why = f"it must be a number up to {LARGEST_BOUND:.0e}"
                raise lacking(part.place, word, value, why)
            pick = max if word in LOWER else min
            found[word] = pick(found.get(word, value), value)
    return found


def step_of(node: Node) -> int | None:
    """What a number must be a multiple of; None for nothing.

    Raises:
        RequestError: It is no whole number, or too large.
    """
    step = 1
    given = given_of(node, "multipleOf")
    for part, value in given:
        if not _is_number(value) or value != int(value) or value <= 0:
            why = "it must be a whole number from 1"
            raise lacking(part.place, "multipleOf", value, why)
        step = math.lcm(step, int(value))
        if step > _MOST_STEP:
            raise lacking(part.place, "multipleOf", value, f"most is {_MOST_STEP}")
    return step if given else None


def given_of(node: Node, word: str) -> list[tuple[Part, Any]]:
    """The schemas that have a keyword, and what it says there."""
    return [(part, part.schema[word]) for part in node if word in part.schema]


def _is_number(value: Any) -> bool:
    if isinstance(value, int):  # of any size: some are no float
        return not isinstance(value, bool)
    return isinstance(value, float) and math.isfinite(value)
