"""Decimal numbers with bounds, as regular expressions of their texts.

A number has no exponent. Near an open bound it has so few digits that it is another
float than the bound. Knows nothing of schemas.
"""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal

LARGEST_BOUND = 10**15  # from here on floats are whole numbers
_NUM_KEPT = 15  # digits that tell floats apart
_NUM_DIGITS = 30  # behind the point, where more or fewer of them change nothing
_ANY = rf"(?:\.[0-9]{{1,{_NUM_DIGITS}}})?"
_INTEGER = "(?:0|[1-9][0-9]{0,299})"


def at_least(bound: float, *, is_open: bool = False) -> str:
    """The texts of the numbers from a bound on, or behind it where it is open."""
    positive, negative = _sides(Decimal(repr(bound)), is_open=is_open)
    return "|".join([*positive, *(f"-(?:{text})" for text in negative)])


def at_most(bound: float, *, is_open: bool = False) -> str:
    """The texts of the numbers up to a bound, or before it where it is open."""
    negative, positive = _sides(-Decimal(repr(bound)), is_open=is_open)
    return "|".join([*positive, *(f"-(?:{text})" for text in negative)])


def _sides(bound: Decimal, *, is_open: bool) -> tuple[list[str], list[str]]:
    """Sizes of the numbers from a bound on: of positive and of negative ones."""
    whole, _, rest = f"{abs(bound):f}".partition(".")
    rest = rest.rstrip("0")
    if bound > 0 or (bound == 0 and is_open):
        larger = [f"(?:{text}){_ANY}" for text in _larger(whole)]
        return [*larger, *_behind(whole, rest, is_open=is_open)], []
    num_digits = _num_digits(whole, is_open=is_open)
    some = rf"(?:\.[0-9]{{1,{num_digits}}})?"
    smaller = [f"(?:{text}){some}" for text in _smaller(whole)]
    return [f"{_INTEGER}{_ANY}"], [*smaller, *_before(whole, rest, is_open=is_open)]


def _num_digits(whole: str, *, is_open: bool) -> int:
    """Most digits behind the point that cannot be rounded to a bound."""
    return max(_NUM_KEPT - len(whole), 1) if is_open else _NUM_DIGITS


def _behind(whole: str, rest: str, *, is_open: bool) -> Iterator[str]:
    """A whole part, and all digits behind the point that make it large enough."""
    if not rest and not is_open:
        yield f"{whole}{_ANY}"
        return
    num_digits = _num_digits(whole, is_open=is_open)
    for place, digit in enumerate(rest[:num_digits]):
        if digit != "9":
            more = f"[{int(digit) + 1}-9][0-9]{{0,{_NUM_DIGITS}}}"
            yield rf"{whole}\.{rest[:place]}{more}"
    zeros = num_digits - len(rest) - 1
    if not is_open:
        yield rf"{whole}\.{rest}[0-9]{{0,{_NUM_DIGITS}}}"
    elif zeros >= 0:
        yield rf"{whole}\.{rest}0{{0,{zeros}}}[1-9][0-9]{{0,{_NUM_DIGITS}}}"


def _before(whole: str, rest: str, *, is_open: bool) -> Iterator[str]:
    """A whole part, and all digits behind the point that leave it small enough."""
    zeros = f"0{{0,{_NUM_DIGITS}}}"
    if rest or not is_open:
        yield rf"{whole}(?:\.0{zeros})?"
    num_digits = _num_digits(whole, is_open=is_open)
    for place, digit in enumerate(rest[:num_digits]):
        if place:
            yield rf"{whole}\.{rest[:place]}{zeros}"
        if digit != "0":
            less = f"[0-{int(digit) - 1}][0-9]{{0,{num_digits - place - 1}}}"
            yield rf"{whole}\.{rest[:place]}{less}"
    if rest and not is_open:
        yield rf"{whole}\.{rest}{zeros}"


def _larger(whole: str) -> Iterator[str]:
    """Whole numbers that are larger than one."""
    for place, digit in enumerate(whole):
        if digit != "9":
            behind = len(whole) - place - 1
            yield f"{whole[:place]}[{int(digit) + 1}-9][0-9]{{{behind}}}"
    yield f"[1-9][0-9]{{{len(whole)},299}}"


def _smaller(whole: str) -> Iterator[str]:
    """Whole numbers from 0 on that are smaller than one."""
    if len(whole) > 1:
        yield f"0|[1-9][0-9]{{0,{len(whole) - 2}}}"
    for place, digit in enumerate(whole):
        first = 1 if place == 0 and len(whole) > 1 else 0
        if int(digit) > first:
            behind = len(whole) - place - 1
            yield f"{whole[:place]}[{first}-{int(digit) - 1}][0-9]{{{behind}}}"
