"""Grammars: which rules have a text, by an oracle that looks at all again and again."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_gemma_mtp.errors import RequestError
from mlx_gemma_mtp.markup.grammar import Grammar, Item, quoted, rule_item, text_item

Rules = Mapping[str, Sequence[Sequence[Item]]]
NAMES = [f"r{i}" for i in range(5)]
ITEMS = st.one_of(
    st.just(text_item("x")),
    st.sampled_from(NAMES).map(rule_item),
    st.sampled_from(NAMES).map(lambda name: Item(f"{name}*", name, is_optional=True)),
)
RULES = st.lists(
    st.lists(st.lists(ITEMS, max_size=3), max_size=3),
    min_size=len(NAMES),
    max_size=len(NAMES),
).map(lambda found: dict(zip(NAMES, found, strict=True)))


def productive(rules: Rules) -> set[str]:
    """The rules that have a text."""
    found: set[str] = set()
    for _ in rules:
        found = {
            name
            for name, alternatives in rules.items()
            if any(
                all(i.rule is None or i.is_optional or i.rule in found for i in items)
                for items in alternatives
            )
        }
    return found


def made(rules: Rules, order: Sequence[str]) -> Grammar:
    """A grammar that gets its rules' alternatives in some order."""
    grammar = Grammar()
    assert [grammar.rule() for _ in rules] == list(rules)
    for name in order:
        grammar.extend(name, rules[name])
    return grammar


@settings(max_examples=200)
@given(RULES, st.permutations(NAMES))
def test_rules_that_have_a_text(rules, order):
    grammar = made(rules, order)
    expected = productive(rules)
    assert {name for name in rules if grammar.has_text(name)} == expected
    for start in expected:
        lines = grammar.text(start).splitlines()
        named = {name for line in lines for name in re.findall(r"r\d", line)}
        written = {line.partition(":")[0] for line in lines[1:]}
        assert lines[0] == f"start: {start}"
        assert written == named <= expected


def test_each_item_is_looked_at_once(monkeypatch):
    """Also where each rule waits for the next one, which comes last."""
    seen: list[Item] = []
    lacks = Grammar._lacks

    def counted(grammar, item):
        seen.append(item)
        return lacks(grammar, item)

    monkeypatch.setattr(Grammar, "_lacks", counted)
    grammar, count = Grammar(), 1000
    for i in range(count):
        grammar.rule([text_item("x"), rule_item(f"r{i + 1}")], [rule_item(f"r{i + 1}")])
        assert not grammar.has_text("r0")
    grammar.rule([text_item("x")])
    assert all(grammar.has_text(f"r{i}") for i in range(count))
    assert len(seen) <= 3 * count + 1


def test_too_much_work():
    grammar = Grammar()
    for _ in range(3):
        grammar.spend(100_000)
    with pytest.raises(RequestError, match="in at most 300000 steps: got more"):
        grammar.spend(1)


def test_texts():
    assert quoted('é"\\\n\x7f') == '"é\\"\\\\\\n\\u007f"'
