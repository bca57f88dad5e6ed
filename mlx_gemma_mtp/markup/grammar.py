"""Rules of a context-free grammar, and their text for llguidance, a dialect of Lark's.

Knows nothing of what the rules are for.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ..errors import RequestError

_MAX_RULES = 5000


@dataclass(frozen=True)
class Item:
    """Something in a rule's alternative.

    Attributes:
        text: How it is written.
        rule: The rule in it, if there is one.
        is_optional: Whether the item may be left out where no text is of that rule.
    """

    text: str
    rule: str | None = None
    is_optional: bool = False


def text_item(text: str) -> Item:
    """A text, of ordinary tokens."""
    return Item(json.dumps(text))


def rule_item(name: str) -> Item:
    """A text of a rule."""
    return Item(name, name)


def token_item(token: int) -> Item:
    """One token."""
    return Item(f"<[{token}]>")


class Grammar:
    """Collects rules and terminals."""

    def __init__(self) -> None:
        self._rules: dict[str, list[Sequence[Item]]] = {}
        self._terminals: dict[str, str] = {}

    def rule(self, *alternatives: Sequence[Item]) -> str:
        """Add a rule; one without alternatives has no text.

        Returns:
            Its name.

        Raises:
            RequestError: There are too many.
        """
        name = f"r{len(self._rules)}"
        if len(self._rules) == _MAX_RULES:
            raise RequestError(
                f"the schemas of tools must need at most {_MAX_RULES} rules of a "
                "grammar: got more. Send fewer or smaller ones."
            )
        self._rules[name] = list(alternatives)
        return name

    def extend(self, name: str, alternatives: Iterable[Sequence[Item]]) -> None:
        """Add alternatives to a rule."""
        self._rules[name] += alternatives

    def terminal(self, expression: str) -> Item:
        """A text of one regular expression, in Lark's syntax of terminals."""
        name = self._terminals.setdefault(expression, f"T{len(self._terminals)}")
        return Item(name)

    def has_text(self, name: str) -> bool:
        """Whether any text is of a rule."""
        return name in self._productive()

    def text(self, start: str) -> str:
        """The whole grammar.

        Args:
            start: The rule that texts are of.
        """
        productive = self._productive()
        lines = [f"start: {start}"]
        for name in self._reached(start, productive):
            alternatives = (
                " ".join(_kept(items, productive))
                for items in self._rules[name]
                if _may_be(items, productive)
            )
            lines.append(f"{name}: {' | '.join(alternatives)}")
        lines += [f"{name}: {body}" for body, name in self._terminals.items()]
        return "\n".join([*lines, ""])

    def _productive(self) -> set[str]:
        """The rules that have a text."""
        found: set[str] = set()
        size = -1
        while len(found) > size:
            size = len(found)
            found |= {
                name
                for name, alternatives in self._rules.items()
                if name not in found and any(_may_be(a, found) for a in alternatives)
            }
        return found

    def _reached(self, start: str, productive: set[str]) -> Iterator[str]:
        """The rules that texts of one have, it first."""
        waiting, seen = [start], {start}
        while waiting:
            name = waiting.pop()
            yield name
            for items in self._rules[name]:
                if _may_be(items, productive):
                    named = {item.rule for item in items if item.rule in productive}
                    waiting += sorted(rule for rule in named - seen if rule)
                    seen |= {rule for rule in named if rule}


def _may_be(items: Sequence[Item], productive: set[str]) -> bool:
    return all(
        item.rule is None or item.is_optional or item.rule in productive
        for item in items
    )


def _kept(items: Sequence[Item], productive: set[str]) -> Iterator[str]:
    kept = [i.text for i in items if i.rule is None or i.rule in productive]
    yield from kept or ['""']
