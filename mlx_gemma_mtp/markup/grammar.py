"""Rules of a context-free grammar, and their text for llguidance, a dialect of Lark's.

Knows nothing of what the rules are for.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ..errors import RequestError

_MAX_RULES = 5000
_MAX_STEPS = 300_000  # about half a second of Python


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


def is_unicode(text: str) -> bool:
    """Whether a text can be written: no half of a surrogate pair stands alone in it."""
    try:
        text.encode()
    except UnicodeError:
        return False
    return True


def quoted(text: str) -> str:
    """A text as Lark has it."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def text_item(text: str) -> Item:
    """A text, of ordinary tokens."""
    return Item(quoted(text))


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
        self._num_steps = 0
        self._productive: set[str] = set()  # rules that have a text
        # The other ones, and which alternatives of which rules wait for each: it stands
        # before the rest of the items. So all is looked at once.
        self._waiting: dict[str, list[tuple[str, Iterator[Item]]]] = {}

    def spend(self, num_steps: int) -> None:
        """Count work that rules do not show: whoever writes them says how much.

        Raises:
            RequestError: It is too much in all.
        """
        self._num_steps += num_steps
        if self._num_steps > _MAX_STEPS:
            raise RequestError(
                f"the schemas of tools must be compiled in at most {_MAX_STEPS} steps: "
                "got more. Send fewer or smaller ones."
            )

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
        self._rules[name] = []
        self.extend(name, alternatives)
        return name

    def extend(self, name: str, alternatives: Iterable[Sequence[Item]]) -> None:
        """Add alternatives to a rule."""
        for items in alternatives:
            self._rules[name].append(items)
            self._look_at(name, iter(items))

    def terminal(self, expression: str) -> Item:
        """A text of one regular expression, in Lark's syntax of terminals."""
        name = self._terminals.setdefault(expression, f"T{len(self._terminals)}")
        return Item(name)

    def has_text(self, name: str) -> bool:
        """Whether any text is of a rule."""
        return name in self._productive

    def text(self, start: str) -> str:
        """The whole grammar.

        Args:
            start: The rule that texts are of.
        """
        lines = [f"start: {start}"]
        for name in self._reached(start):
            alternatives = (
                " ".join(self._kept(items)) for items in self._kept_of(name)
            )
            lines.append(f"{name}: {' | '.join(alternatives)}")
        lines += [f"{name}: {body}" for body, name in self._terminals.items()]
        return "\n".join([*lines, ""])

    def _look_at(self, name: str, items: Iterator[Item]) -> None:
        """See whether an alternative gives its rule a text, now or later."""
        work = [(name, items)]
        while work:
            name, rest = work.pop()
            if name in self._productive:
                continue
            missing = next((item.rule for item in rest if self._lacks(item)), None)
            if missing is not None:
                self._waiting.setdefault(missing, []).append((name, rest))
                continue
            self._productive.add(name)
            work += self._waiting.pop(name, [])

    def _lacks(self, item: Item) -> bool:
        """Whether an item has no text as far as is known, and may not be left out."""
        has_text = item.rule is None or item.rule in self._productive
        return not has_text and not item.is_optional

    def _reached(self, start: str) -> Iterator[str]:
        """The rules that texts of one have, it first."""
        waiting, seen = [start], {start}
        while waiting:
            name = waiting.pop()
            yield name
            for items in self._kept_of(name):
                named = {i.rule for i in items if i.rule in self._productive} - seen
                waiting += sorted(rule for rule in named if rule)
                seen |= {rule for rule in named if rule}

    def _kept_of(self, name: str) -> Iterator[Sequence[Item]]:
        """The alternatives of a rule that have a text."""
        for items in self._rules[name]:
            if not any(map(self._lacks, items)):
                yield items

    def _kept(self, items: Sequence[Item]) -> Iterator[str]:
        """The items of an alternative that have a text, as they are written."""
        kept = [i.text for i in items if i.rule is None or i.rule in self._productive]
        yield from kept or ['""']
