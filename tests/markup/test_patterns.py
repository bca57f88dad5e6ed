"""Patterns of schemas: what is matched as a whole is what a search finds.

The whole expressions are Rust's; those of these patterns are Python's too.
"""

import re

import pytest

from mlx_gemma_mtp.markup.patterns import FORMATS, UnknownPatternError, literal, whole

TEXTS = [
    *("", "a", "b", "ab", "abc", "aab", "ba", "bb", "a1", "12", "x y", "\n", "a\nb"),
    *(
        "a.b",
        "a-b",
        "/",
        "a/b",
        "{",
        "}",
        "]",
        "[",
        "é",
        "日本",
        "A_1",
        "a|b",
        "^",
        "$",
    ),
    *("\\", "aaa", "b2c3", "\t", "a{2}", "(a)"),
]


@pytest.mark.parametrize(
    "pattern",
    [
        *("a", "^a", "b$", "^ab?$", "^a|b$", "a|^b", "(a|b)c?", "^(?:ab)+$", "", "^$"),
        *(r"\d", r"^\w+$", r"\s", r"^\S*$", r"[^\d]", "[a-c]{2,}", "^a{1,2}$", "a{2}?"),
        *(r"^.$", "a.b", r"\.", r"\/", r"^[\w.-]+$", "x{", "}", r"^[^\s/]+$", r"\W|\D"),
        *(
            "^a+?b*?$",
            r"^\u00e9$",
            r"\x61",
            "(?P<n>a)b",
            "[|^$]",
            r"\|",
            r"^\\$",
            "[&~-]",
            "[-a]b|[a-]c",
            r"[\t-\n]",
            r"[\x61-\u0062]c",
            "(a{2}|b){3}",
            "(a)(b)?()",
        ),
    ],
)
def test_whole_texts(pattern):
    expression = re.compile(whole(pattern))
    for text in TEXTS:
        found = re.search(pattern, text, re.ASCII) is not None
        if text.endswith("\n") and pattern.endswith("$"):
            continue  # before a line end at the end, $ is Python's own
        assert bool(expression.fullmatch(text)) == found, (pattern, text)


@pytest.mark.parametrize(
    "pattern",
    [
        *("a(?=b)", "(?!a)", "(?<=a)b", "(?i)a", r"(a)\1", r"a\b", "a^b", "a$b", "[a"),
        *("a)|(b", "(a", "a)b", "*a", "a|*b", "(+)", "a**", "a{2}{3}", "^*", "{2}"),
        *("[z-a]", r"[\x62-a]", "a{5,2}", "a{1001}", "((a{99}b){99}c){99}", "\ud800"),
        *("(" * 101 + ")" * 101, "a" * 3 + "{99999}"),
        *("a++", "[]", r"[\S]", r"\ud800", r"\u{110000}", "a\\", 3, None),
    ],
)
def test_what_has_no_whole_expression(pattern):
    with pytest.raises(UnknownPatternError):
        whole(pattern)


@pytest.mark.parametrize("text", TEXTS)
def test_literals(text):
    matches = re.compile(literal(text))
    assert [each for each in TEXTS if matches.fullmatch(each)] == [text]


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        (
            "date",
            ["2024-02-28", "2023-12-31"],
            ["2023-02-29", "2023-13-01", "20230101"],
        ),
        ("time", ["23:59:59Z", "00:00:00.5+01:30"], ["24:00:00Z", "10:20:30"]),
        ("date-time", ["2024-02-28T10:20:30Z"], ["2024-02-28 10:20:30Z"]),
        ("duration", ["P3D", "PT5M", "P1DT2H"], ["P", "3D", "PT"]),
        ("email", ["a.b+c@d.org"], ["a@", "@b", "a b@c"]),
        ("hostname", ["a-b.org", "localhost"], ["-a.org", "a..b"]),
        ("ipv4", ["0.0.0.0", "255.249.10.1"], ["256.1.1.1", "1.2.3", "01.1.1.1"]),
        ("ipv6", ["1:2:3:4:5:6:7:abcd"], ["1:2", "g:2:3:4:5:6:7:8"]),
        ("uuid", ["123e4567-e89b-12d3-a456-426614174000"], ["123e4567"]),
        ("uri", ["https://a.org/b?c=d#e"], ["a.org", "https://a b"]),
    ],
)
def test_formats(name, good, bad):
    expression = re.compile(FORMATS[name])
    assert all(map(expression.fullmatch, good))
    assert not any(map(expression.fullmatch, bad))
