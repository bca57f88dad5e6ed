"""JSON schemas taken apart: references, unions and intersections.

What is left are alternatives without any of these: plain schemas that a value must meet
all of. Knows nothing of how values are written.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from ..errors import RequestError, cut, shorten

_MAX_ALTERNATIVES = 64
_APPLIED = ("$ref", "allOf", "anyOf", "oneOf")
# What says nothing of values that are to be written.
_NOTES = frozenset(
    "title description default examples example deprecated readOnly writeOnly $comment"
    " $schema $id $defs definitions discriminator contentEncoding contentMediaType"
    " strict $anchor xml externalDocs".split()
)
TYPES = ("string", "integer", "number", "boolean", "null", "array", "object")


@dataclass(frozen=True)
class Part:
    """A schema and where it stands.

    Attributes:
        schema: The schema.
        place: Its JSON pointer.
    """

    schema: Any
    place: str

    def at(self, *names: object) -> Part:
        """A part of it."""
        schema, place = self.schema, self.place
        for name in names:
            schema = schema[name]
            place += f"/{str(name).replace('~', '~0').replace('/', '~1')}"
        return Part(schema, place)


Node = tuple[Part, ...]  # a value meets all of them


def key_of(node: Node) -> frozenset[str]:
    """What two nodes of one document share if they are the same."""
    return frozenset(part.place for part in node)


class SchemaError(RequestError):
    """A schema that cannot be written as a grammar."""


def lacking(place: str, keyword: str, value: Any, why: str = "") -> SchemaError:
    """The error of a keyword that has no grammar.

    Args:
        place: JSON pointer of the schema that has it.
        keyword: The keyword.
        value: Its value.
        why: What is wrong with this value; nothing where none is understood.
    """
    at = f"{cut(place or '/')} ({why})" if why else cut(place or "/")
    return SchemaError(
        f"the tool's schema must be one that answers can be held to: got "
        f"{keyword}: {shorten(value)} at {at}. Leave it out, or send "
        "tool_choice: auto without strict."
    )


class Schemas:
    """Takes the schemas of one document apart.

    Args:
        root: The document, which references start from.
        spend: Is told how much work there is.
    """

    def __init__(self, root: Part, spend: Callable[[int], None]) -> None:
        self._root = root
        self._spend = spend
        self._known: dict[str, list[Node]] = {}
        self._values: dict[frozenset[str], set[str] | None] = {}
        self._open: set[str] = set()  # places that are taken apart right now

    def alternatives(self, node: Node) -> list[Node]:
        """What a value may be: it meets all plain schemas of one of these.

        Raises:
            RequestError: A schema is not well-formed, or has unions that are too large
                or of which more than one alternative may hold where one must.
        """
        place = node[0].place if node else ""
        return self._product([self._of(part) for part in node], place)

    def _of(self, part: Part) -> list[Node]:
        """The alternatives of one schema."""
        if part.place in self._open:
            raise lacking(part.place, "$ref", part.place, "it goes round")
        if part.place not in self._known:
            self._spend(1 + (len(part.schema) if isinstance(part.schema, dict) else 0))
            self._open.add(part.place)
            self._known[part.place] = self._taken_apart(part)
            self._open.remove(part.place)
        return self._known[part.place]

    def _taken_apart(self, part: Part) -> list[Node]:
        schema = part.schema
        if isinstance(schema, bool):
            return [()] if schema else []
        if not isinstance(schema, Mapping):
            raise lacking(part.place, "a schema", schema, "it must be an object")
        rest = {
            name: value
            for name, value in schema.items()
            if name not in _NOTES and name not in _APPLIED
        }
        factors: list[list[Node]] = [[(Part(rest, part.place),)] if rest else [()]]
        if "$ref" in schema:
            factors.append(self._of(self._referred(part)))
        for index in range(len(listed(part, "allOf"))):
            factors.append(self._of(part.at("allOf", index)))
        for word in ("anyOf", "oneOf"):
            if word in schema:
                factors.append(self._union(part, word))
        return self._product(factors, part.place)

    def _union(self, part: Part, word: str) -> list[Node]:
        options = [
            self._of(part.at(word, index)) for index in range(len(listed(part, word)))
        ]
        if word == "oneOf" and not self._are_apart(options):
            why = "more than one of them may hold; anyOf allows that"
            raise lacking(part.place, word, part.schema[word], why)
        found = [node for option in options for node in option]
        _check_number(len(found), part.place)
        return found

    def _product(self, factors: Sequence[list[Node]], place: str) -> list[Node]:
        """The intersection of unions, as a union of intersections."""
        count = math.prod(map(len, factors))
        _check_number(count, place)
        self._spend(sum(1 + sum(map(len, nodes)) for nodes in factors))
        if count > 1:
            self._spend(count * sum(max(map(len, nodes)) for nodes in factors))
        found = {}
        for nodes in itertools.product(*factors):
            parts = {part.place: part for node in nodes for part in node}
            found[frozenset(parts)] = tuple(parts.values())
        return list(found.values())

    def _referred(self, part: Part) -> Part:
        """What ``#/$defs/Name`` names."""
        reference = part.schema["$ref"]
        if not isinstance(reference, str) or not reference.startswith("#"):
            raise lacking(part.place, "$ref", reference, "it must begin with #")
        found = self._root
        for word in unquote(reference[1:]).split("/")[1:]:
            self._spend(1)
            name: Any = word.replace("~1", "/").replace("~0", "~")  # RFC 6901, 3
            name = (
                int(name)
                if isinstance(found.schema, list) and _is_index(name)
                else name
            )
            try:
                found = found.at(name)
            except (KeyError, IndexError, TypeError):
                raise lacking(
                    part.place, "$ref", reference, "nothing is there"
                ) from None
        return found

    def _are_apart(self, options: Sequence[list[Node]]) -> bool:
        """Whether no value is of two options, as far as this can be told."""
        return all(
            self._is_apart(one, other)
            for i, first in enumerate(options)
            for second in options[:i]
            for one in first
            for other in second
        )

    def _is_apart(self, one: Node, other: Node) -> bool:
        self._spend(len(one) + len(other))
        if not types_of(one) & types_of(other):
            return True
        first, second = self._values_of(one), self._values_of(other)
        if first is not None and second is not None:
            return not first & second
        needed, of_other = needed_of(one), needed_of(other)
        self._spend(len(needed) + len(of_other))
        return any(self._is_key_apart(one, other, key) for key in needed & of_other)

    def _is_key_apart(self, one: Node, other: Node, key: str) -> bool:
        """Whether objects of two kinds are told apart by a key that both must have."""
        if types_of(one) | types_of(other) != {"object"}:
            return False
        first, second = self._values_at(one, key), self._values_at(other, key)
        return first is not None and second is not None and not first & second

    def _values_of(self, node: Node) -> set[str] | None:
        """As ``values_of``, which reads all of them, and here is asked often."""
        key = key_of(node)
        if key not in self._values:
            self._values[key] = values_of(node)
        found = self._values[key]
        self._spend(len(found or ()))
        return found

    def _values_at(self, node: Node, key: str) -> set[str] | None:
        """The values that a property may have, where they are listed."""
        found: set[str] | None = None
        for part in node:
            if key in mapping_of(part, "properties"):
                options = self.alternatives((part.at("properties", key),))
                listed = [self._values_of(option) for option in options]
                known = [each for each in listed if each is not None]
                if len(known) == len(listed):
                    found = set().union(*known)
        return found


def _check_number(count: int, place: str) -> None:
    if count > _MAX_ALTERNATIVES:
        why = f"most are {_MAX_ALTERNATIVES}"
        raise lacking(place, "alternatives of unions", count, why)


def types_of(node: Node) -> set[str]:
    """The types that a value may have; each integer is a number too.

    Raises:
        RequestError: A type has no such name.
    """
    found = set(TYPES) - {"integer"}
    for part in node:
        if "type" not in part.schema:
            continue
        given = part.schema["type"]
        names = given if isinstance(given, list) else [given]
        if not all(isinstance(name, str) and name in TYPES for name in names):
            raise lacking(part.place, "type", given, f"types are {', '.join(TYPES)}")
        found = {kind for kind in map(_common(set(names)), found) if kind}
    return found


def _common(names: set[str]) -> Any:
    """Narrows a type to what is among some types."""

    def common(kind: str) -> str | None:
        if kind in names:
            return kind
        if kind == "number" and "integer" in names:
            return "integer"
        return "integer" if kind == "integer" and "number" in names else None

    return common


def values_of(node: Node) -> set[str] | None:
    """The values that are listed, as texts that equal values share; None for any."""
    found: set[str] | None = None
    for part in node:
        for values in listed_values(part):
            texts = {equal_text(value) for value in values}
            found = texts if found is None else found & texts
    return found


def listed_values(part: Part) -> Iterator[list[Any]]:
    """The lists of values that a schema has: of enum and of const."""
    if "enum" in part.schema:
        yield listed(part, "enum")
    if "const" in part.schema:
        yield [part.schema["const"]]


def equal_text(value: Any) -> str:
    """A text that two values share if JSON schema says that they are equal."""
    return json.dumps(_plain(value), sort_keys=True)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list) else value


def needed_of(node: Node) -> set[str]:
    """The keys that an object must have.

    Raises:
        RequestError: One of them is no text.
    """
    found: set[str] = set()
    for part in node:
        names = listed(part, "required")
        if not all(isinstance(name, str) for name in names):
            raise lacking(part.place, "required", names, "all must be texts")
        found.update(names)
    return found


def mapping_of(part: Part, word: str) -> Mapping[str, Any]:
    """The object that a keyword has; an empty one where there is no such keyword.

    Raises:
        RequestError: It has something else.
    """
    found = part.schema.get(word, {})
    if not isinstance(found, Mapping):
        raise lacking(part.place, word, found, "it must be an object")
    return found


def listed(part: Part, word: str) -> list[Any]:
    """The list that a keyword has; an empty one where the schema has no such keyword.

    Raises:
        RequestError: It has something else.
    """
    found = part.schema.get(word, [])
    if not isinstance(found, list):
        raise lacking(part.place, word, found, "it must be a list")
    return found


def _is_index(name: str) -> bool:
    return name.isascii() and name.isdecimal() and len(name) < 9
