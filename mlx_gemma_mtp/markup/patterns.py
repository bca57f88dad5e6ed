"""Patterns of JSON schemas as regular expressions without look-around and anchors.

A schema's ``pattern`` is ECMA-262's and found anywhere in a text; engines of grammars
match whole texts, in the syntax of Rust's ``regex``, and a slash ends them. Knows
nothing of schemas or of grammars.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from .grammar import is_unicode

_CLASSES = {
    "d": "[0-9]",
    "D": "[^0-9]",
    "w": "[A-Za-z0-9_]",
    "W": "[^A-Za-z0-9_]",
    "s": r"[ \t\n\r\x0b\x0c]",
    "S": r"[^ \t\n\r\x0b\x0c]",
}
_CONTROLS = {"n": "\n", "r": "\r", "t": "\t", "f": "\f", "v": "\v"}
_ANY = "[^\\n\\r]"  # what a dot means
_COUNT = re.compile(r"\{([0-9]+)(?:,([0-9]*))?\}")
_REPEATS = ("*", "+", "?")
_MOST_COUNTED = 1000  # repeats of repeats multiply
_MOST_NESTED = 100  # groups; engines follow them by recursion
_HEX = re.compile(r"x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})|u\{([0-9A-Fa-f]{1,6})\}")
_GROUP = re.compile(r"\((?:\?:|\?P?<[A-Za-z_][A-Za-z0-9_]*>|(?!\?))")
_SPECIAL = frozenset(r".^$*+?()[]{}|\/-&~#")

_HOUR, _MINUTE = "(?:[01][0-9]|2[0-3])", "[0-5][0-9]"
_DATE = (
    "[0-9]{4}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])"
    "|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)|02-(?:0[1-9]|1[0-9]|2[0-8]))"
)
_TIME = rf"{_HOUR}:{_MINUTE}:{_MINUTE}(?:\.[0-9]{{1,9}})?(?:[zZ]|[+-]{_HOUR}:{_MINUTE})"
_OCTET = "(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_LABEL = "[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_HOST = rf"{_LABEL}(?:\.{_LABEL}){{0,7}}"
_ATOM = r"[A-Za-z0-9!#$%\&'*+\/=?^_`{|}\~-]+"
# All texts of these are of the format. Leap days are not among those of a date.
FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"(?:{_DATE})[tT]{_TIME}",
    "duration": (
        "P(?:[0-9]{1,9}W|[0-9]{1,9}D(?:T[0-9]{1,9}[HMS])?|T[0-9]{1,9}[HMS]"
        "|[0-9]{1,9}[MY](?:T[0-9]{1,9}[HMS])?)"
    ),
    "email": rf"{_ATOM}(?:\.{_ATOM})*@{_HOST}",
    "hostname": _HOST,
    "ipv4": rf"{_OCTET}(?:\.{_OCTET}){{3}}",
    "ipv6": "(?:[0-9A-Fa-f]{1,4}:){7}[0-9A-Fa-f]{1,4}",
    "uuid": "[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}",
    "uri": r"[A-Za-z][A-Za-z0-9+.-]*:\/\/[A-Za-z0-9._\~:\/?#@!$\&'()*+,;=-]+",
}


class UnknownPatternError(ValueError):
    """A pattern is none, or no whole texts can be matched by it; says why."""


def literal(text: str) -> str:
    """A text as a regular expression."""
    return "".join(map(_character, text))


def whole(pattern: Any) -> str:
    """A regular expression of all texts in which a schema's pattern is found.

    Args:
        pattern: The pattern, as ECMA-262 has it.

    Raises:
        UnknownPatternError: It is no pattern, counts too far, or has look-around,
            references, or anchors inside.
    """
    if not isinstance(pattern, str):
        raise UnknownPatternError("it must be a text")
    if not is_unicode(pattern):
        raise UnknownPatternError("half of a surrogate pair stands in it")
    _check_groups(pattern)
    return "|".join(map(_found_in, _alternatives(pattern)))


def _character(character: str) -> str:
    if character in _SPECIAL:
        return f"\\{character}"
    if character.isprintable() or character == " ":
        return character
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\x{{{code:x}}}"


def _check_groups(pattern: str) -> None:
    """Raise where a group has no end or no beginning, or has too much in it."""
    most = [1]  # repeats of one inside the other, in each group that is open
    last = 1  # of what stands last
    for part in _parts(pattern):
        count = _COUNT.fullmatch(part)
        if count is not None:
            last *= _most_counted(count)
        elif part == ")" and len(most) == 1:
            raise UnknownPatternError("a group has no beginning")
        else:
            last = most.pop() if part == ")" else 1
            most += [1] if part[0] == "(" else []
        most[-1] = max(most[-1], last)
        if max(last, most[-1]) > _MOST_COUNTED:
            raise UnknownPatternError(f"it counts beyond {_MOST_COUNTED}")
        if len(most) > _MOST_NESTED:
            raise UnknownPatternError(f"it nests beyond {_MOST_NESTED} groups")
    if len(most) > 1:
        raise UnknownPatternError("a group has no end")


def _most_counted(count: re.Match[str]) -> int:
    """How many repeats a count allows, or needs where there is no limit."""
    least, most = count.groups()
    if max(len(least), len(most or "")) > len(f"{_MOST_COUNTED}"):
        return _MOST_COUNTED + 1
    if most and int(least) > int(most):
        raise UnknownPatternError(f"{count.group()!r} counts backwards")
    return max(int(most or least), 1)


def _alternatives(pattern: str) -> list[str]:
    """What stands between the bars that are in no group."""
    found, depth = [""], 0
    for part in _parts(pattern):
        depth += (part[0] == "(") - (part == ")")
        if part == "|" and depth == 0:
            found.append("")
        else:
            found[-1] += part
    return found


def _found_in(pattern: str) -> str:
    """One alternative: anchors are allowed at its ends."""
    parts = list(_parts(pattern))
    is_begun = parts[:1] == ["^"]
    is_ended = parts[-1:] == ["$"]
    inner = parts[is_begun : len(parts) - is_ended]
    text = "".join(map(_translated, _greedy(inner)))
    before, behind = (
        "" if is_there else "(?s:.*)" for is_there in (is_begun, is_ended)
    )
    return f"{before}(?:{text}){behind}"


def _parts(pattern: str) -> Iterator[str]:
    """Escapes, classes, openings of groups, counts, and single characters."""
    at = 0
    while at < len(pattern):
        end = _end_of_part(pattern, at)
        yield pattern[at:end]
        at = end


def _end_of_part(pattern: str, at: int) -> int:
    character = pattern[at]
    if character == "\\":
        hexadecimal = _HEX.match(pattern, at + 1)
        return hexadecimal.end() if hexadecimal else at + 2
    if character == "[":
        return _end_of_class(pattern, at)
    if character == "(":
        group = _GROUP.match(pattern, at)
        if group is None:
            raise UnknownPatternError(f"{pattern[at : at + 3]!r} begins a group")
        return group.end()
    if character == "{":
        count = _COUNT.match(pattern, at)
        return count.end() if count else at + 1
    return at + 1


def _end_of_class(pattern: str, at: int) -> int:
    end = at + 1 + pattern.startswith("^", at + 1)
    while end < len(pattern) and pattern[end] != "]":
        end += 2 if pattern[end] == "\\" else 1
    if end >= len(pattern):
        raise UnknownPatternError("a class has no end")
    return end + 1


def _greedy(parts: list[str]) -> Iterator[str]:
    """The parts without the marks of lazy repeats, which match the same texts."""
    is_repeat, is_begun = False, False  # whether there is something to repeat
    for part in parts:
        if is_repeat and part == "?":
            is_repeat = False
            continue
        is_repeat = part in _REPEATS or _COUNT.fullmatch(part) is not None
        if is_repeat and not is_begun:
            raise UnknownPatternError(f"{part!r} repeats nothing")
        is_begun = not (is_repeat or part == "|" or part[0] == "(")
        yield part


def _translated(part: str) -> str:
    if part[0] == "\\":
        return _escape(part)
    if part[0] == "[":
        return _class(part)
    if part[0] == "(":
        return "(?:"
    if part in ("^", "$"):
        raise UnknownPatternError(f"{part!r} stands inside it")
    if part == ".":
        return _ANY
    if part in (*_REPEATS, "|", ")") or _COUNT.fullmatch(part):
        return part
    return _character(part)


def _escape(part: str) -> str:
    """What a backslash and what is behind it mean."""
    return _CLASSES.get(part[1:]) or _character(_meant(part))


def _meant(part: str) -> str:
    """The one character that an escape, or a character of a class, means."""
    behind = part[1:]
    if part[0] != "\\":
        return part
    hexadecimal = _HEX.fullmatch(behind)
    if hexadecimal:
        return _character_of(next(filter(None, hexadecimal.groups())))
    if behind in _CONTROLS:
        return _CONTROLS[behind]
    if not behind or (behind.isascii() and behind.isalnum()):
        raise UnknownPatternError(f"{part!r} stands in it")
    return behind


def _character_of(digits: str) -> str:
    code = int(digits, 16)
    if code > 0x10FFFF or 0xD800 <= code < 0xE000:
        raise UnknownPatternError(f"{digits!r} is no character")
    return chr(code)


def _class(part: str) -> str:
    """A class: in Rust's, other marks mean sets, and a bracket another class."""
    is_negated = part.startswith("[^")
    inside = part[1 + is_negated : -1]
    if not inside:
        raise UnknownPatternError("a class is empty")
    parts = list(_parts_of_class(inside))
    found, at = "", 0
    while at < len(parts):
        one, last = parts[at], parts[at + 2 : at + 3]
        is_range = parts[at + 1 : at + 2] == ["-"] and last
        if is_range and not {one[1:], last[0][1:]} & _CLASSES.keys():
            found += _range(one, last[0])
            at += 3
        else:
            found += _inner(one)
            at += 1
    return f"[{'^' * is_negated}{found}]"


def _parts_of_class(inside: str) -> Iterator[str]:
    """Escapes, and single characters."""
    at = 0
    while at < len(inside):
        end = _end_of_part(inside, at) if inside[at] == "\\" else at + 1
        yield inside[at:end]
        at = end


def _range(first: str, last: str) -> str:
    """The characters from one to another."""
    if _meant(first) > _meant(last):
        raise UnknownPatternError(f"'{first}-{last}' goes backwards")
    return f"{_inner(first)}-{_inner(last)}"


def _inner(part: str) -> str:
    """A part of a class; another class loses its brackets."""
    name = part[1:]
    if name not in _CLASSES:
        return _character(_meant(part))
    if name.isupper():
        raise UnknownPatternError(f"{part!r} stands in a class")
    return _CLASSES[name][1:-1]
