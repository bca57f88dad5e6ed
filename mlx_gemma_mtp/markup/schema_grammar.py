"""Values of a JSON schema, as Gemma 4's chat template writes them, in a grammar.

All that the rules allow, the schema allows. Where the schema says nothing of other keys
than the declared ones, there are none; keys stand in the template's order. A keyword
that cannot be held to is an error. Knows nothing of calls, marks around them or tools.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import RequestError
from .grammar import Grammar, Item, is_unicode, quoted, rule_item, text_item
from .patterns import FORMATS, UnknownPatternError, literal, whole
from .ranges import at_least, at_most
from .schema_parts import (
    Node,
    Part,
    Schemas,
    equal_text,
    key_of,
    lacking,
    listed,
    listed_values,
    mapping_of,
    needed_of,
    types_of,
    values_of,
)
from .schema_words import (
    KNOWN,
    LISTS,
    LOWER,
    UPPER,
    bounds_of,
    check_keywords,
    given_of,
    is_written,
    item_of,
    kinds_of,
    least_of,
    most_of,
    property_of,
    step_of,
)
from .tool_calls import MAX_DEPTH, QUOTE

_Alternatives = list[list[Item]]

# Not so long that Python's numbers are none of JSON's.
_DIGITS = "(?:0|[1-9][0-9]{0,299})"
_INTEGER = rf"/-?{_DIGITS}/"
_NUMBER = (
    rf"/-?{_DIGITS}(?:\.[0-9]{{1,300}})?"
    r"|-?[0-9](?:\.[0-9]{1,300})?[eE][+-]?(?:[0-2]?[0-9]{1,2}|30[0-7])/"
)
_NO_QUOTE = f"~/(?s:.*){literal(QUOTE)}(?s:.*)/"
_KEY = r"""[^\s,{}\[\]:="'<]+(?: [^\s,{}\[\]:="'<]+)*"""  # of what is not declared
_MAX_TEXT = 16_000  # characters of a text or an expression, as they are written
_MAX_DEPTH = MAX_DEPTH // 2  # of listed values: others stand around them
_MAX_COUNTED = 64  # properties, where there are others beside the declared ones


class SchemaGrammar:
    """Writes the rules of a document's schemas.

    Args:
        grammar: Where to.
        root: The document, and its place in the request.
        quote: The mark around strings.
    """

    def __init__(self, grammar: Grammar, root: Part, quote: Item) -> None:
        self._grammar = grammar
        self._root = root
        self._schemas = Schemas(root, grammar.spend)
        self._quote = quote
        self._names: dict[frozenset[str], str] = {}
        self._depth = 0

    def arguments(self) -> Item:
        """The objects that the document allows.

        Raises:
            RequestError: It has a keyword without a rule, or allows no object.
        """
        rule = self._grammar.rule()
        try:
            for option in self._schemas.alternatives((self._root,)):
                kinds = types_of(option) & {"object"}
                self._grammar.extend(rule, self._plain(option, kinds))
        except RecursionError:
            raise self._refused("it is nested too deeply") from None
        if not self._grammar.has_text(rule):
            raise self._refused("no object meets it")
        return rule_item(rule)

    def _refused(self, why: str) -> RequestError:
        return lacking(self._root.place, "a schema", self._root.schema, why)

    def _value(self, node: Node) -> Item:
        """The values that meet all of some schemas."""
        key = key_of(node)
        self._grammar.spend(1 + len(node))
        if key not in self._names:
            self._names[key] = name = self._grammar.rule()
            self._depth += 1
            if self._depth > _MAX_DEPTH:
                why = f"it is nested too deeply; most are {_MAX_DEPTH} levels"
                raise lacking(node[0].place, "a schema", node[0].schema, why)
            for option in self._schemas.alternatives(node):
                self._grammar.extend(name, self._plain(option, types_of(option)))
            self._depth -= 1
        return rule_item(self._names[key])

    def _plain(self, node: Node, kinds: set[str]) -> _Alternatives:
        """The values of some types that meet all of some plain schemas."""
        for part in node:
            check_keywords(part)
        if values_of(node) is not None:
            return self._listed(node, kinds)
        found: _Alternatives = []
        for kind in sorted(kinds):
            match kind:
                case "string":
                    found += self._string(node)
                case "integer" | "number":
                    found += self._number(node, kind)
                case "array":
                    found += self._array(node)
                case "object":
                    found += self._object(node)
                case "boolean":
                    found += [[text_item("true")], [text_item("false")]]
                case _:  # forms of the template differ
                    found += [[text_item("null")], [text_item("None")]]
        return found

    def _listed(self, node: Node, kinds: set[str]) -> _Alternatives:
        """The values of an enum."""
        for part in node:
            for word in part.schema:
                if word in KNOWN and word not in LISTS:
                    why = "it stands beside enum or const"
                    raise lacking(part.place, word, part.schema[word], why)
        allowed = values_of(node) or set()
        first = next(values for part in node for values in listed_values(part))
        values = [v for v in first if equal_text(v) in allowed and kinds_of(v) & kinds]
        texts = [value for value in values if isinstance(value, str)]
        found = [self._written(v, node[0]) for v in values if not isinstance(v, str)]
        if texts:
            for text in texts:
                _check_text(text, node[0])
            body = self._grammar.terminal(" | ".join(map(quoted, texts)))
            found.append([self._quote, body, self._quote])
        return found

    def _written(self, value: Any, part: Part, depth: int = 0) -> list[Item]:
        """One value."""
        if depth > _MAX_DEPTH:
            raise lacking(part.place, "a value", value, "it is nested too deeply")
        if isinstance(value, str):
            _check_text(value, part)
            return [self._quote, text_item(value), self._quote]
        if isinstance(value, Mapping):
            pairs = sorted(value.items(), key=lambda pair: _order(pair[0]))
            _check_free_keys(value, part)
            entries = [
                [text_item(f"{key}:"), *self._written(each, part, depth + 1)]
                for key, each in pairs
            ]
            return [text_item("{"), *_joined(entries), text_item("}")]
        if isinstance(value, list):
            items = [self._written(each, part, depth + 1) for each in value]
            return [text_item("["), *_joined(items), text_item("]")]
        if not is_written(value):
            raise lacking(part.place, "a value", value, "JSON has no such number")
        return [text_item(json.dumps(value))]

    def _string(self, node: Node) -> _Alternatives:
        least, most = least_of(node, "minLength"), most_of(node, "maxLength")
        if most is not None and least > most:
            return []
        expressions = [*_expressions(node), _NO_QUOTE]
        if least or most is not None:
            bound = "" if most is None else most
            expressions.insert(0, f"/(?s:.{{{least},{bound}}})/")
        else:
            expressions.insert(0, "/(?s:.*)/")
        body = self._grammar.terminal(" & ".join(expressions))
        return [[self._quote, body, self._quote]]

    def _number(self, node: Node, kind: str) -> _Alternatives:
        bounds = bounds_of(node)
        step = step_of(node)
        if step is not None or kind == "integer":
            return self._integer(bounds, step)
        if not bounds:
            return [[self._grammar.terminal(_NUMBER)]]
        lower = max(bounds.get(word, -math.inf) for word in LOWER)
        upper = min(bounds.get(word, math.inf) for word in UPPER)
        is_open = lower == bounds.get(LOWER[1]) or upper == bounds.get(UPPER[1])
        if lower > upper or (lower == upper and is_open):
            return []
        ranges = [
            (at_least if word in LOWER else at_most)(
                bound, is_open=word.startswith("exclusive")
            )
            for word, bound in bounds.items()
        ]
        return [[self._grammar.terminal(" & ".join(f"/{text}/" for text in ranges))]]

    def _integer(self, bounds: Mapping[str, Any], step: int | None) -> _Alternatives:
        lower = max(
            math.ceil(bounds["minimum"]) if "minimum" in bounds else -math.inf,
            math.floor(bounds[LOWER[1]]) + 1 if LOWER[1] in bounds else -math.inf,
        )
        upper = min(
            math.floor(bounds["maximum"]) if "maximum" in bounds else math.inf,
            math.ceil(bounds[UPPER[1]]) - 1 if UPPER[1] in bounds else math.inf,
        )
        limits: dict[str, Any] = {}
        if lower > -math.inf:
            limits["minimum"] = lower = -(-lower // (step or 1)) * (step or 1)
        if upper < math.inf:
            limits["maximum"] = upper = upper // (step or 1) * (step or 1)
        if step is not None:
            limits["multipleOf"] = step
        if lower > upper:
            return []
        if not limits:
            return [[self._grammar.terminal(_INTEGER)]]
        return [[_json_integer(limits)]]

    def _array(self, node: Node) -> _Alternatives:
        least, given = least_of(node, "minItems"), most_of(node, "maxItems")
        most = math.inf if given is None else given
        if least > most:
            return []
        num_first = max((len(listed(part, "prefixItems")) for part in node), default=0)
        rest = self._value(item_of(node, num_first))
        base = max(num_first, 1)
        # What follows so many items: from base on always the same.
        follows = [_repeated(rest, least - base, most - base)] if most > base else []
        for place in range(int(min(base, most)) - 1, 0, -1):
            more = [text_item(","), self._value(item_of(node, place)), *follows]
            ends: _Alternatives = [[]] if place >= least else []
            follows = [rule_item(self._grammar.rule(more, *ends))]
        found: _Alternatives = [[text_item("[]")]] if least == 0 else []
        if most > 0:
            first = self._value(item_of(node, 0))
            found.append([text_item("["), first, *follows, text_item("]")])
        return found

    def _object(self, node: Node) -> _Alternatives:
        needed = needed_of(node)
        declared = needed.union(*(mapping_of(part, "properties") for part in node))
        _check_keys(declared, node)
        entries = []
        self._grammar.spend(len(node) * (1 + len(declared)))
        for key in sorted(declared, key=_order):
            items = [text_item(f"{key}:"), self._value(property_of(node, key))]
            entries.append((items, key in needed))
        least, most = least_of(node, "minProperties"), most_of(node, "maxProperties")
        other = self._other(node, declared)
        if other is None:
            most = None if most is None or most >= len(entries) else most
        else:
            _check_counts(node, least, most, num_needed=len(needed))
        inside = self._entries(entries, other, least, most)
        return [[text_item("{"), inside, text_item("}")]]

    def _other(self, node: Node, declared: set[str]) -> Item | None:
        """An entry that is not declared; None where none is allowed."""
        given = tuple(
            part.at("additionalProperties")
            for part in node
            if "additionalProperties" in part.schema
        )
        if not given and any("properties" in part.schema for part in node):
            return None
        value = self._value(given)
        if any(part.schema is False for part in given):
            return None
        key = f"/{_KEY}/"
        if declared:
            texts = "|".join(map(literal, sorted(declared)))
            if len(texts) > _MAX_TEXT:
                why = "too many beside keys that are not declared"
                raise lacking(node[0].place, "properties", sorted(declared), why)
            key += f" & ~/{texts}/"
        mark = self._grammar.terminal(f'{self._grammar.terminal(key).text} ":"')
        return rule_item(self._grammar.rule([mark, value]))

    def _entries(
        self,
        declared: Sequence[tuple[list[Item], bool]],
        other: Item | None,
        least: int,
        most: int | None,
    ) -> Item:
        """The inside of an object: declared entries in order, others between them.

        Args:
            declared: Each entry, and whether it must be there.
            other: An entry that is not declared; None where none is allowed.
            least: Fewest entries.
            most: Most entries; None for any number.
        """
        # What follows, by the number of entries before it. From the last number on it
        # is the same, or no entry may follow.
        last = max(least, 1) if most is None else most
        loop = [] if other is None else [_repeated(other, 0, math.inf)]
        below: list[Item] = []
        for entry in (None, *reversed(declared)):
            here: list[Item] = []
            for count in range(last, -1, -1):
                before = [text_item(",")] if count else []
                is_last = count == last
                others = loop if is_last and most is None else []
                found: _Alternatives = []
                if other is not None and not is_last:
                    found.append([*before, other, here[-1]])
                if entry is None:
                    found += [others] if count >= least else []
                else:
                    items, is_needed = entry
                    if not is_last or most is None:
                        next_item = below[min(count + 1, last)]
                        found.append([*others, *before, *items, next_item])
                    found += [] if is_needed else [[below[count]]]
                here.append(rule_item(self._grammar.rule(*found)))
            below = here[::-1]
        return below[0]


def _check_text(text: str, part: Part) -> None:
    """Raise for a text that a grammar cannot have."""
    why = _fault_of(text)
    if why:
        raise lacking(part.place, "a text", text, why)


def _check_keys(declared: set[str], node: Node) -> None:
    """Raise for a key that cannot be read back behind a call's brace or comma."""
    for key in declared:
        beginnings = (key[: mark.start()] for mark in re.finditer(":", key))
        shorter = next((b for b in beginnings if b in declared), None)
        why = _fault_of(key) or ("" if shorter is None else f"{shorter!r} begins it")
        if why:
            raise lacking(node[0].place, "properties", key, why)


def _check_free_keys(value: Mapping[str, Any], part: Part) -> None:
    """Raise for a key of a listed value that cannot be read back: none declares it."""
    for key in value:
        if not re.fullmatch(_KEY, key):
            raise lacking(part.place, "a value", value, f"{key!r:.40} is no bare key")
        _check_text(key, part)


def _fault_of(text: str) -> str:
    """Why a grammar cannot have a text; empty where it can."""
    if QUOTE in text:
        return f"{QUOTE} ends a text"
    if not is_unicode(text):
        return "half of a surrogate pair stands in it"
    is_short = len(quoted(text)) <= _MAX_TEXT
    return "" if is_short else f"most are {_MAX_TEXT} characters"


def _check_counts(node: Node, least: int, most: int | None, *, num_needed: int) -> None:
    """Raise for numbers of keys of which some are not declared.

    These may be the same key twice, which counts once when it is read.
    """
    word, why = "", ""
    if least > max(num_needed, 1):
        word, why = "minProperties", "keys that are not declared may be the same"
    elif (most or 0) > _MAX_COUNTED:
        word, why = "maxProperties", f"most are {_MAX_COUNTED}"
    if word:
        part = next(part for part in node if word in part.schema)
        raise lacking(part.place, word, part.schema[word], why)


def _order(key: str) -> tuple[str, str]:
    """What the template sorts keys by: it pays no regard to case."""
    return key.lower(), key


def _joined(lists: Sequence[list[Item]]) -> list[Item]:
    """Lists with commas between them."""
    found: list[Item] = []
    for each in lists:
        found += [*([text_item(",")] if found else []), *each]
    return found


def _repeated(item: Item, least: float, most: float) -> Item:
    """A comma and an item, so many times."""
    bounds = f"{{{max(int(least), 0)},{'' if most == math.inf else int(most)}}}"
    if bounds == "{0,}":
        bounds = "*"
    return Item(f'("," {item.text}){bounds}', item.rule, is_optional=least <= 0)


def _json_integer(limits: Mapping[str, Any]) -> Item:
    """An integer with bounds, which the engine writes as JSON does."""
    options = {"type": "integer", "x-guidance": {"whitespace_flexible": False}}
    return Item(f"%json {json.dumps({**limits, **options})}")


def _expressions(node: Node) -> list[str]:
    """Regular expressions that a string must match, in Lark's syntax."""
    found = []
    for part, pattern in given_of(node, "pattern"):
        try:
            expression = whole(pattern)
        except UnknownPatternError as error:
            raise lacking(part.place, "pattern", pattern, str(error)) from None
        if len(expression) > _MAX_TEXT:
            why = f"most are {_MAX_TEXT} characters"
            raise lacking(part.place, "pattern", pattern, why)
        found.append(f"/{expression}/")
    for part, name in given_of(node, "format"):
        if not isinstance(name, str) or name not in FORMATS:
            why = f"formats are {', '.join(sorted(FORMATS))}"
            raise lacking(part.place, "format", name, why)
        found.append(f"/{FORMATS[name]}/")
    return found
