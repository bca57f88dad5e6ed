"""JSON schemas as trees: how deep they are, where something is wrong, closed objects.

Knows nothing of llguidance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

_NAMED = ("properties", "patternProperties", "$defs", "definitions")
_DEFINITIONS = ("$defs", "definitions")
_VALUES = ("const", "enum", "default", "examples")  # no schemas are in them
_NOTES = ("title", "description", "$comment", "default", "examples")
_MOST = 400  # parts to compile


def depth_of(value: Any, most: int) -> int:
    """How deeply a value is nested, up to one more than ``most``."""
    depth, level = 0, [value]
    while level and depth <= most:
        inner: list[Any] = []
        for each in level:
            inner += each.values() if isinstance(each, Mapping) else ()
            inner += each if isinstance(each, (list, tuple)) else ()
        level, depth = inner, depth + 1
    return depth


def longest_text(value: Any) -> int:
    """The length of the longest text in a schema that is no note on it."""
    longest, stack = 0, [value]
    while stack:
        each = stack.pop()
        if isinstance(each, str):
            longest = max(longest, len(each))
        elif isinstance(each, Mapping):
            stack += each
            stack += (
                inner
                for key, inner in each.items()
                if key not in _NOTES or not isinstance(inner, str)
            )
        elif isinstance(each, (list, tuple)):
            stack += each
    return longest


def count_of(value: Any, word: str) -> int:
    """The entries of all objects that a keyword has, anywhere in a schema."""
    count, stack = 0, [value]
    while stack:
        each = stack.pop()
        if isinstance(each, Mapping):
            inner = each.get(word)
            count += len(inner) if isinstance(inner, Mapping) else 0
            stack += each.values()
        elif isinstance(each, (list, tuple)):
            stack += each
    return count


def closed(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A schema in which objects that name their keys have no others.

    Those that say themselves whether they have others stay as they are.
    """
    found: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _VALUES:
            found[key] = value
        elif key in _NAMED and isinstance(value, Mapping):
            found[key] = {name: _closed(inner) for name, inner in value.items()}
        else:
            is_list = isinstance(value, (list, tuple))
            found[key] = [_closed(v) for v in value] if is_list else _closed(value)
    if "properties" in found:
        found.setdefault("additionalProperties", False)
    return found


def _closed(value: Any) -> Any:
    return closed(value) if isinstance(value, Mapping) else value


def place_of(
    schema: Mapping[str, Any],
    error: str,
    error_of: Callable[[Mapping[str, Any]], str],
) -> str:
    """The JSON pointer of the smallest part that has an error, as ``#/a/b``.

    A compiler that says what is wrong and not where gets the parts one by one.

    Args:
        schema: A schema that has the error.
        error: What is said against it.
        error_of: What is said against another schema; empty for nothing.
    """
    # What parts may refer to: llguidance looks at a definition where one does.
    shared = {key: schema[key] for key in _DEFINITIONS if key in schema}
    place, part, num_left = "#", schema, _MOST
    is_found = True
    while is_found:
        is_found = False
        for key, inner in _parts(part):
            num_left -= 1
            if num_left >= 0 and error_of({**shared, **inner}) == error:
                place, part, is_found = f"{place}/{key}", inner, True
                break
    return place


def _parts(schema: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The schemas right inside one, each with its place there."""
    # Definitions come first: a part that refers to one has its error too.
    for key, value in sorted(
        schema.items(), key=lambda item: item[0] not in _DEFINITIONS
    ):
        if key in _VALUES:
            continue
        if isinstance(value, Mapping):
            if key in _NAMED:
                inner = value.items()
                yield from _objects(key, inner)
            else:
                yield _escaped(key), value
        elif isinstance(value, (list, tuple)):
            yield from _objects(key, enumerate(value))


def _objects(key: str, inner: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for name, value in inner:
        if isinstance(value, Mapping):
            yield f"{_escaped(key)}/{_escaped(str(name))}", value


def _escaped(name: str) -> str:
    """A name as JSON pointers have it: RFC 6901, 3."""
    return name.replace("~", "~0").replace("/", "~1")
