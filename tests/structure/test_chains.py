"""Chains of definitions: how long they are, and that no long one ends the process.

Run: python -m pytest tests/structure/test_chains.py
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_gemma_mtp.errors import RequestError
from mlx_gemma_mtp.structure.chains import longest, rules_reach, schema_reach
from mlx_gemma_mtp.structure.constraint import MAX_REACH, grammar, json_schema

LONG = 3_000


def chain(link, num, start="#/$defs/a0", base="#/$defs/a"):
    """A schema whose definitions refer to the next one each."""
    defs: dict[str, Any] = {f"a{i}": link(f"{base}{i + 1}") for i in range(num)}
    return {"$ref": start, "$defs": {**defs, f"a{num}": {"type": "null"}}}


LINKS = {
    "alone": lambda ref: {"$ref": ref},
    "items": lambda ref: {"items": {"$ref": ref}},
    "allOf": lambda ref: {"allOf": [{"$ref": ref}]},
    "properties": lambda ref: {"properties": {"x": {"$ref": ref}}},
}


def rules(num, *, name="r", mark="", rest=""):
    """A grammar whose rules name the next one each."""
    links = [f'{mark}{name}{i}: "a" {rest}{name}{i + 1}' for i in range(num)]
    return "\n".join([f"start: {name}0", *links, f'{name}{num}: "b"'])


@settings(max_examples=200)
@given(st.data())
def test_the_longest_path_is_that_of_components(data):
    """By plain reachability."""
    nodes = range(data.draw(st.integers(1, 7)))
    weights = {n: data.draw(st.integers(0, 5)) for n in nodes}
    inner = {n: data.draw(st.lists(st.sampled_from(nodes), max_size=3)) for n in nodes}
    reached = {n: {n} for n in nodes}
    for _ in nodes:
        for n in nodes:
            reached[n].update(*(reached[m] for m in inner[n]))

    def most(n):
        members = {m for m in reached[n] if n in reached[m]}
        behind = {k for m in members for k in inner[m]} - members
        return sum(weights[m] for m in members) + max(map(most, behind), default=0)

    assert longest(weights, inner) == max(map(most, nodes))


def test_levels_of_a_schema():
    assert schema_reach({"type": "null"}) == 1
    assert schema_reach({"items": {"items": {}}}) == 3
    assert schema_reach(chain(LINKS["alone"], 10)) == 13
    assert schema_reach(chain(LINKS["items"], 10)) == 23
    assert schema_reach({"items": {"$ref": "#"}}) == 2
    assert schema_reach({"$ref": "#/none/0/a"}) == 1
    both = {"a": {"$ref": "#/$defs/b"}, "b": {"items": {"$ref": "#/$defs/a"}}}
    assert schema_reach({"$ref": "#/$defs/a", "$defs": both}) == 5


def test_levels_of_rules():
    assert rules_reach("") == 0
    assert rules_reach('start: "a"') == 1
    assert rules_reach(rules(10)) == 12
    assert rules_reach('start: a a | b\na: "b"\nb: "start:"') == 2
    assert rules_reach("start: a\na: /x\nb: / b\nb: c // start\nc: <[1-2]>") == 4


@pytest.mark.parametrize("link", LINKS)
def test_long_chains_of_definitions_are_refused(link):
    with pytest.raises(RequestError, match=f"at most {MAX_REACH} levels deep"):
        json_schema(chain(LINKS[link], LONG))
    json_schema(chain(LINKS[link], 200))


def named(key, start, base):
    made = chain(LINKS["items"], LONG, start, base)
    for name, part in made["$defs"].items():
        part[key] = f"{start[:-2]}{name}".removeprefix("#")
    return made


@pytest.mark.parametrize(
    "schema",
    [
        chain(LINKS["items"], LONG, "#/%24defs/a0", "#/%24defs/a"),
        named("$anchor", "#a0", "#a"),
        named("$id", "http://x.y/a0", "http://x.y/a"),
        {
            "$ref": "http://x.y/z",
            "items": {"$id": "http://x.y/z", **chain(LINKS["items"], LONG)},
        },
    ],
    ids=["escaped", "anchors", "ids", "document inside"],
)
def test_no_way_to_refer_leads_deeper(schema):
    with pytest.raises(RequestError, match=f"at most {MAX_REACH} levels deep"):
        json_schema(schema)


@pytest.mark.parametrize(
    "lark",
    [
        rules(LONG),
        rules(LONG, name="T"),
        rules(LONG, mark="?"),
        rules(LONG, rest="\n  | "),
        rules(LONG, rest='"\\"" // "\n | '),
        "start: r0\n"
        + "\n".join(f"r{i}: /x\nf{i}: / r{i + 1}" for i in range(LONG))
        + f'\nr{LONG}: "b"',
        rules(LONG, rest='<|"|> '),
        rules(LONG, rest="</> "),
    ],
    ids=[
        *("rules", "terminals", "marks", "lines", "comments", "expressions"),
        *("quotes in names", "slashes in names"),
    ],
)
def test_long_chains_of_rules_are_refused(lark):
    with pytest.raises(RequestError, match=f"at most {MAX_REACH} rules"):
        grammar(lark)


def test_schemas_in_a_grammar_are_bounded():
    text = str(chain(LINKS["items"], LONG)).replace("'", '"')
    with pytest.raises(RequestError, match="a schema of the grammar must be at most"):
        grammar(f"start: %json {text}")
    with pytest.raises(RequestError, match="grammar must be one that can be compiled"):
        grammar("start: %json {")


def test_many_rules_that_are_no_chain_are_compiled():
    names = [f"r{i}" for i in range(2 * MAX_REACH)]
    grammar("\n".join([f"start: {' | '.join(names)}", *(f'{n}: "{n}"' for n in names)]))


def test_the_longest_that_are_allowed_end_no_process():
    """A stack that ends has no exception: the process would be gone."""
    code = """
from mlx_gemma_mtp.structure.constraint import MAX_REACH, grammar, json_schema
from tests.structure.test_chains import LINKS, chain, rules
for link, levels in (("alone", 1), ("items", 2), ("allOf", 3), ("properties", 3)):
    json_schema(chain(LINKS[link], MAX_REACH // levels - 4))
grammar(rules(MAX_REACH - 2))
grammar(rules(MAX_REACH - 2, name="T"))
"""
    subprocess.run([sys.executable, "-c", code], check=True)
