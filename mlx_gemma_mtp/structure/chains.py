"""How deeply definitions that name each other lead: a bound, found without recursion.

llguidance follows them by recursion, which ends the process where the stack ends. Knows
nothing of llguidance.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import unquote

from .lark import rules_alone

_MOST_PLACES = 100_000  # to look up references at
_RULE = re.compile(
    r"^[^\S\n]*[?!]*([\w-]+)(?:[^\S\n]|\[.*\]|\{.*\}|\.-?\d+|::?\w+)*:",
    re.MULTILINE,
)
_NAME = re.compile(r"[\w-]+")


def longest(weights: Mapping[Any, int], inner: Mapping[Any, Sequence[Any]]) -> int:
    """The most that the nodes on a path can weigh together, or somewhat more.

    Nodes that lead to each other count as if one path had them all. The components are
    found as in H. N. Gabow, Path-based depth-first search (2000).

    Args:
        weights: Of each node.
        inner: The nodes that each leads to.
    """
    root = object()  # leads to all
    weights, inner = {**weights, root: 0}, {**inner, root: tuple(weights)}
    order: dict[Any, int] = {}
    totals: dict[Any, int] = {}  # of the nodes whose component is known
    path: list[Any] = []
    bounds: list[int] = []

    def enter(node: Any) -> tuple[Any, Iterator[Any]]:
        order[node] = len(order)
        path.append(node)
        bounds.append(order[node])
        return node, iter(inner[node])

    def leave(node: Any) -> None:
        if bounds[-1] != order[node]:
            return
        bounds.pop()
        members = [path.pop()]
        while members[-1] != node:
            members.append(path.pop())
        behind = (totals.get(each, 0) for m in members for each in inner[m])
        total = sum(weights[m] for m in members) + max(behind, default=0)
        totals.update(dict.fromkeys(members, total))

    work = [enter(root)]
    while work:
        node, rest = work[-1]
        following = next(rest, root)
        if following is root:
            work.pop()
            leave(node)
        elif following not in order:
            work.append(enter(following))
        elif following not in totals:
            while bounds[-1] > order[following]:
                bounds.pop()
    return totals[root]


def rules_reach(lark: str) -> int:
    """How many rules and terminals of a grammar lead one to the next, at most."""
    text = rules_alone(lark)
    found = list(_RULE.finditer(text))
    ends = [*(match.start() for match in found), len(text)][1:]
    words: dict[str, set[str]] = {match[1]: set() for match in found}
    for match, end in zip(found, ends, strict=True):
        words[match[1]].update(_NAME.findall(text, match.end(), end))
    inner = {name: sorted(some & words.keys()) for name, some in words.items()}
    return longest(dict.fromkeys(words, 1), inner)


def schema_reach(schema: Mapping[str, Any]) -> int:
    """How many levels deep a schema is where its references are followed, at most.

    Args:
        schema: As JSON has it.
    """
    return _References(schema).reach()


class _References:
    """The parts of a schema that references lead to.

    Args:
        schema: As JSON has it.
    """

    def __init__(self, schema: Mapping[str, Any]) -> None:
        self._schema = schema
        parts = list(_containers(schema))
        self._refs = {part["$ref"] for part in parts if _has_text(part, "$ref")}
        # Pointers begin at the nearest $id; other references name a part.
        self._bases = [schema, *(p for p in parts[1:] if _has_text(p, "$id"))]
        keys = ("$anchor", "$dynamicAnchor")
        self._named = [*self._bases, *(p for p in parts if _has_text(p, *keys))]

    def reach(self) -> int:
        """See ``schema_reach``; more than there are levels where it costs too much."""
        if len(self._refs) * len(self._bases) > _MOST_PLACES:
            return _MOST_PLACES
        targets: dict[int, Any] = {id(part): part for part in self._named}
        inner: dict[Hashable, list[Hashable]] = {None: [id(p) for p in self._named]}
        for ref in self._refs:
            found = list(self._targets(ref))
            targets.update((id(part), part) for part in found)
            inner[ref] = [id(part) for part in found]
            # An anchor, or another document's part.
            inner[ref] += () if "#/" in ref else (None,)
        weights: dict[Hashable, int] = dict.fromkeys(inner, 0)
        for key, part in targets.items():
            weights[key], inner[key] = _own(part, targets)
        return longest(weights, inner)

    def _targets(self, ref: str) -> Iterator[Any]:
        """The parts that a reference may lead to by its pointer."""
        _, _, pointer = ref.partition("#")
        names = [
            name.replace("~1", "/").replace("~0", "~")
            for name in unquote(pointer).split("/")[1:]
        ]
        for base in self._bases:
            part: Any = base
            for name in names:
                part = _inside(part, name)
            if isinstance(part, (dict, list)):
                yield part


def _own(part: Any, targets: Mapping[int, Any]) -> tuple[int, list[Hashable]]:
    """The levels of a part without other targets in it, and what it leads to."""
    depth, level, found = 0, [part], list[Hashable]()
    while level:
        depth += 1
        inner: list[Any] = []
        for each in level:
            if _has_text(each, "$ref"):
                found.append(each["$ref"])
            for value in _values(each):
                if id(value) in targets:
                    found.append(id(value))
                else:
                    inner.append(value)
        level = inner
    return depth, found


def _containers(value: Any) -> Iterator[Any]:
    """All objects and lists in a value, itself first."""
    stack = [value]
    while stack:
        each = stack.pop()
        yield each
        stack += _values(each)


def _values(part: Any) -> list[Any]:
    """The objects and lists right inside one."""
    values = part.values() if isinstance(part, dict) else part
    return [value for value in values if isinstance(value, (dict, list))]


def _has_text(part: Any, *keys: str) -> bool:
    return isinstance(part, dict) and any(isinstance(part.get(k), str) for k in keys)


def _inside(part: Any, name: str) -> Any:
    """What a pointer's name leads to; None where there is nothing."""
    if isinstance(part, dict):
        return part.get(name)
    if (
        isinstance(part, list)
        and name.isdecimal()
        and len(name) < 9
        and int(name) < len(part)
    ):
        return part[int(name)]
    return None
