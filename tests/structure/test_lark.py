"""Words of a grammar: what is text in it, and what a control token's name.

Run: python -m pytest tests/structure/test_lark.py
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_gemma_mtp.structure.lark import literals, numbered, rules_alone

TOKENS = {"<a>": 7, '<|"|>': 52, "<b/>": 8, "<c#>": 9}


@pytest.mark.parametrize(
    ("lark", "found"),
    [
        ("start: <a>", "start: <[7]>"),
        ('start: <a>"<a>"<a>', 'start: <[7]>"<a>"<[7]>'),
        (r'start: "\"<a>" <a>', r'start: "\"<a>" <[7]>'),
        (r"start: /<a>\/<a>/ <a>", r"start: /<a>\/<a>/ <[7]>"),
        ("start: <a> // <a>\nx: <a> # <a>", "start: <[7]> // <a>\nx: <[7]> # <a>"),
        ('start: <|"|> "<a>" <|"|> <a>', 'start: <[52]> "<a>" <[52]> <[7]>'),
        ("start: <b/> <a> <b/>", "start: <[8]> <[7]> <[8]>"),
        ("start: <c#> <a>", "start: <[9]> <[7]>"),
        ("start: <none> <[7]> <[^7]> <aa>", "start: <none> <[7]> <[^7]> <aa>"),
        ('start: %json {"const": "<a>"} <a>', 'start: %json {"const": "<a>"} <[7]>'),
        ("start: %lark { start: <a> } ", "start: %lark { start: <[7]> } "),
    ],
)
def test_names_become_numbers_outside_texts(lark, found):
    assert numbered(lark, TOKENS) == found


WORDS = [*TOKENS, "<none>", '"<a>"', '"x // <a>"', "/<a>/", "rule", "| ( )", "// <a>\n"]


@settings(max_examples=100)
@given(st.lists(st.sampled_from(WORDS)))
def test_words_in_any_order(words):
    lark = "start: " + " ".join(words)
    numbers = [f"<[{TOKENS[w]}]>" if w in TOKENS else w for w in words]
    assert numbered(lark, TOKENS) == "start: " + " ".join(numbers)
    texts = [w for w in words if w[0] in '"/' and not w.startswith("//")]
    assert literals(lark) == texts
    assert rules_alone(lark).split() == [
        "start:",
        *(each for w in words if w in ("rule", "| ( )") for each in w.split()),
    ]


def test_white_space_ends_a_name():
    assert numbered('start: < a> "b>"', {"< a>": 1}) == 'start: < a> "b>"'
    assert literals('start: <\x1c"> "b"') == ['"b"']
