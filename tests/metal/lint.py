"""Checks Metal text for what g++ accepts and Metal's compiler does not.

clang stands in for Metal's front end: pointers of different address spaces are
different types, there is no double, and only what lint.hpp declares exists. A few rules
that clang cannot know are checked by pattern.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from clang import cindex

from tests.metal.build import COMMENT, STORAGE

DECLARATIONS = Path(__file__).parent / "lint.hpp"
FLAGS = (
    "-xc++",
    "-std=c++17",
    "-nostdinc",
    "--target=x86_64-linux-gnu",
    f"-I{DECLARATIONS.parent}",
    "-Wno-unknown-attributes",  # [[kernel]], [[buffer(0)]] ...
    "-Wdouble-promotion",
)
# -Wdouble-promotion also warns of bfloat to float, which is what kernels should do.
FLOAT_PROMOTION = re.compile(r"increases floating-point precision: .* to 'float'")
# MSL 4.1 has no default address space: every pointer and reference must name its own.
# The patterns know the types by which kernels declare pointers, and templates' T and U.
POINTER = re.compile(
    r"(?P<before>(?:\b\w+\s+)*)\b"
    r"(?P<type>bool|u?char|u?short|u?int|float|half|bfloat|atomic_\w+|atomic<\w+>"
    r"|u?int\d+_t|b?float16_t|(?:float|half|u?int|ushort)[234]|T|U)"
    r"\s*(?:\*|&(?!&))\s*(?:const\s+)?(?P<name>\w+)\s*[=,);\[]"
)
# A cast to a pointer. In clang it may change the address space, in Metal it may not: of
# `(type)(pointer)` the lint makes a cast of C++ that may not either.
CAST = re.compile(r"\(\s*(?P<type>(?:\w+\s+)*\w+\s*\*)\s*\)")
# A vector made of its parts, as lint.hpp declares it.
VECTOR = re.compile(r"\b((?:float|half|u?int|ushort|uchar)[234])\(")
ADDRESS_SPACE = re.compile(r"\b(device|constant|threadgroup|thread)\b")


def lint(text: str) -> list[str]:
    """What is wrong with Metal text, one line each; empty if nothing is."""
    return [*_non_ascii(text), *_without_address_space(text), *_clang_findings(text)]


def _non_ascii(text: str) -> list[str]:
    """MLX hands the text over as ASCII: other characters, in comments too, break it."""
    return [
        f"line {number}: must be ASCII: got {character!r}"
        for number, line in enumerate(text.split("\n"), 1)
        for character in line
        if not character.isascii()
    ]


def _without_address_space(text: str) -> list[str]:
    code = COMMENT.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)
    return [
        f"line {number}: pointer or reference without address space: {name}"
        for number, line in enumerate(code.split("\n"), 1)
        for name in _names_without_address_space(line)
    ]


def _names_without_address_space(line: str) -> list[str]:
    declared = [
        match["name"]
        for match in POINTER.finditer(line)
        if _declares(match) and not ADDRESS_SPACE.search(match["before"])
    ]
    casts = [match["type"] for match in CAST.finditer(line)]
    return declared + [cast for cast in casts if not ADDRESS_SPACE.search(cast)]


def _declares(match: re.Match[str]) -> bool:
    """Whether a match is a declaration, not a product such as ``return T * x;``."""
    return "return" not in match["before"].split()


@cache
def _index() -> cindex.Index:
    return cindex.Index.create()


def _clang_findings(text: str) -> list[str]:
    # In C++ only static variables may have an address space of their own.
    text = STORAGE.sub(r"static threadgroup \1 \2\3;", text)
    text = re.sub(CAST.pattern + r"(?=\()", r"reinterpret_cast<\g<type>>", text)
    text = VECTOR.sub(r"make_\1(", text)
    text = re.sub(r"(?m)^[ \t]*#[ \t]*include\s*<metal_\w+>", "", text)
    # The attribute of an explicit instantiation, which clang does not allow there.
    text = re.sub(r"template \[\[host_name\(.*?\)\]\] \[\[kernel\]\]", "template", text)
    source = f'#include "lint.hpp"\n#line 1 "kernel"\n{text}'
    unit = _index().parse("kernel.cpp", FLAGS, [("kernel.cpp", source)])
    return [
        f"line {diagnostic.location.line}: {diagnostic.spelling}"
        for diagnostic in unit.diagnostics
        if diagnostic.severity >= cindex.Diagnostic.Warning
        and not FLOAT_PROMOTION.search(diagnostic.spelling)
    ]
