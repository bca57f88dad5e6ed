"""Tools as a request declares them: their names, and what their schemas say.

Knows nothing of how calls are written.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

_OTHERS = ("anyOf", "oneOf", "allOf")
_MAX_ALTERNATIVES = 32  # of a schema, one inside the other
# A name that no mark of the format nor white space is in. Few tools declare others.
_NAME = re.compile(r"[^\s,{}\[\]:=\"'<]+")
_MAX_ODD = 64


class Names:
    """Declared names, found at a place of a text.

    Args:
        names: The names.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._all = frozenset(names)
        odd = [name for name in self._all if not _NAME.fullmatch(name)]
        self._odd = sorted(odd, key=len, reverse=True)[:_MAX_ODD]

    def __contains__(self, name: str) -> bool:
        return name in self._all

    def at(self, text: str, place: int) -> Iterator[str]:
        """Those that may stand at a place, longest first."""
        yield from (name for name in self._odd if text.startswith(name, place))
        match = _NAME.match(text, place)
        if match is not None and match.group() in self._all:
            yield match.group()


class Schema:
    """As much of a JSON schema as helps to read a value; any value is taken for one.

    Args:
        given: The schema.
        root: The schema that references start from; None for this one.
    """

    def __init__(self, given: Any, root: Any = None) -> None:
        self._root = given if root is None else root
        self._given = given
        self._known: dict[str, Schema] = {}

    @cached_property
    def keys(self) -> Names:
        """The declared keys of an object."""
        return Names(self._properties)

    @cached_property
    def _options(self) -> list[Mapping[str, Any]]:
        return list(self._alternatives(self._given, set(), _MAX_ALTERNATIVES))

    @cached_property
    def _properties(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for option in self._options:
            for name, schema in _object(option.get("properties")).items():
                found.setdefault(name, schema)
        return found

    def of(self, key: str) -> Schema:
        """The schema of an object's value."""
        if key not in self._properties:
            return self._other
        if key not in self._known:
            self._known[key] = Schema(self._properties[key], self._root)
        return self._known[key]

    @cached_property
    def items(self) -> Schema:
        """The schema of a list's values."""
        return self._first("items")

    @cached_property
    def is_string(self) -> bool:
        """Whether a string may stand here."""
        return any(
            isinstance(each, str) and each.lower() == "string"
            for option in self._options
            for each in _listed(option.get("type"))
        )

    @cached_property
    def _other(self) -> Schema:
        """The schema of keys that are not declared."""
        return self._first("additionalProperties")

    def _first(self, word: str) -> Schema:
        found = (option[word] for option in self._options if option.get(word))
        return Schema(next(found, {}), self._root)

    def _alternatives(
        self, given: Any, seen: set[str], depth: int
    ) -> Iterator[Mapping[str, Any]]:
        """The schema itself, what it refers to, and what else it may be."""
        schema = _object(given)
        yield schema
        reference = schema.get("$ref")
        others = [o for word in _OTHERS for o in _listed(schema.get(word))]
        if isinstance(reference, str) and reference not in seen:
            seen.add(reference)
            others.append(self._at(reference))
        for other in others if depth else ():
            yield from self._alternatives(other, seen, depth - 1)

    def _at(self, reference: str) -> Any:
        """What ``#/$defs/Name`` names."""
        found = self._root
        for part in reference.removeprefix("#").split("/")[1:]:
            name = part.replace("~1", "/").replace("~0", "~")  # RFC 6901, 3
            found = _object(found).get(name)
        return found


class Tools:
    """The tools that may be called.

    Args:
        given: Tools as OpenAI's API has them.
    """

    def __init__(self, given: Sequence[Any]) -> None:
        functions = [_object(_object(tool).get("function")) for tool in given]
        self._schemas = {
            str(function.get("name")): Schema(function.get("parameters") or {})
            for function in functions
        }

    @cached_property
    def names(self) -> Names:
        """What they are called."""
        return Names(self._schemas)

    def schema_of(self, name: str) -> Schema:
        """What a tool takes; of another one nothing is known."""
        return self._schemas.get(name) or Schema({})


def _object(given: Any) -> Mapping[str, Any]:
    return given if isinstance(given, Mapping) else {}


def _listed(given: Any) -> list[Any]:
    return given if isinstance(given, list) else [] if given is None else [given]
