"""A constraint: what a text must be, checked when it is made.

llguidance compiles it; what it says against one becomes a line that names the place.
Knows nothing of tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from time import thread_time
from typing import Any

from ..errors import RequestError, shorten
from ..markup.grammar import is_unicode, quoted
from .chains import rules_reach, schema_reach
from .lark import literals, numbered
from .library import limits, llguidance
from .schemas import closed, count_of, depth_of, longest_text, place_of

MAX_LENGTH = 262_144  # characters of a schema, a grammar, or all texts of a choice
MAX_REGEX = 16_384  # characters; also of each text in another form
MAX_DEPTH = 80  # of nested objects and lists; llguidance reads no more than 120
MAX_TEXTS = 4_096  # of a choice
MAX_REACH = 1_000  # levels or rules that lead to each other: llguidance recurses

# Of all schemas of a text: llguidance compares them in pairs.
MAX_ENTRIES = {"properties": 1_000, "patternProperties": 200}
_LONG_S = 0.3  # what took longer to compile is not compiled part by part

_OPTIONS = "x-guidance"  # llguidance's key for its settings: not for clients
_UNKNOWN = re.compile(r"Unimplemented keys: \[(.*)\]")
_PLACE = re.compile(r"(?:at )?(\d+)\((\d+)\): (.*)")
_REGEX_ERROR = re.compile(r"^error: (.*)$", re.MULTILINE)
_TEXT_PLACE = re.compile(r" at line \d+ column \d+$")
_JSON_PART = re.compile(r"%json\s*(?={)")
_COSTS = re.compile("fuel exhausted|too many expressions|too big")
_CARET = re.compile(r"regex parse error:\n {4}(.*)\n {4}( *)\^")


@dataclass(frozen=True)
class Constraint:
    """What a text must be, from its first character to its last.

    Attributes:
        what: What it was given as, schema, regex, choice or grammar, or is called.
        grammar: For llguidance.
    """

    what: str
    grammar: str = field(repr=False)

    def numbered(self, tokens: Mapping[str, int]) -> Constraint:
        """The same, with control tokens by their numbers and not by their names.

        Args:
            tokens: The control tokens of a tokenizer, by their names.
        """
        if not self.grammar.startswith("{"):
            return replace(self, grammar=numbered(self.grammar, tokens))
        made = json.loads(self.grammar)
        for part in made["grammars"]:
            if part.get("lark_grammar"):
                part["lark_grammar"] = numbered(part["lark_grammar"], tokens)
        return replace(self, grammar=json.dumps(made))


def json_schema(schema: Any, *, strict: bool = True) -> Constraint:
    """A constraint to JSON that a schema accepts, with no white space between parts.

    Args:
        schema: A JSON schema: an object, its text, or a class of pydantic's.
        strict: Refuse keywords that text cannot be forced to follow; else they are left
            out, and ``oneOf`` counts as ``anyOf``.

    Raises:
        RequestError: It is no schema, is too large, no text follows it, or a keyword is
            refused; the message has the JSON pointer of the place.
    """
    found = _schema_of(schema)
    text = _text_of(found)
    _check_size("schema", len(text), MAX_LENGTH, "characters")
    read = json.loads(text)
    _check_size("a text of the schema", longest_text(read), MAX_REGEX, "characters")
    _check_schemas("schema", [read])
    begin = thread_time()
    made, error = _compiled(text, strict=strict)
    if error:
        is_quick = thread_time() - begin < _LONG_S
        raise _schema_error(found, error, strict=strict, is_quick=is_quick)
    return Constraint("schema", made)


def json_object() -> Constraint:
    """A constraint to any JSON object."""
    return json_schema({"type": "object"})


def regex(text: str) -> Constraint:
    """A constraint to text that a regular expression matches as a whole.

    Args:
        text: The expression, in the syntax of Rust's ``regex`` crate; it has no
            look-around and no back references.

    Raises:
        RequestError: It cannot be compiled; the message names the character.
    """
    _check_text("regex", text)
    _check_size("regex", len(text), MAX_REGEX, "characters")
    grammar = llguidance().LLMatcher.grammar_from_regex(text)
    error = _error_of(grammar)
    if error:
        raise RequestError(
            "regex must be one that can be compiled: got "
            f"{shorten(text)}, {_regex_reason(error, text)}. Change it there."
        )
    return Constraint("regex", grammar)


def choice(texts: Sequence[str]) -> Constraint:
    """A constraint to one of some texts.

    Args:
        texts: At least one, none of them empty.

    Raises:
        RequestError: They are something else, or too many.
    """
    is_list = isinstance(texts, Sequence) and not isinstance(texts, str)
    if not is_list or not texts or not all(isinstance(t, str) and t for t in texts):
        raise RequestError(
            f"choice must be a list of texts, none empty: got {shorten(texts)}. For "
            "example ['yes', 'no']."
        )
    _check_size("choice", len(texts), MAX_TEXTS, "texts")
    _check_size("choice", sum(map(len, texts)), MAX_LENGTH, "characters")
    for text in texts:
        _check_text("choice", text)
        _check_size("a text of the choice", len(text), MAX_REGEX, "characters")
    # One terminal: its texts cost the parser nothing.
    lark = f"start: TEXT\nTEXT: {' | '.join(map(quoted, texts))}"
    return Constraint("choice", _checked_lark("choice", lark))


def grammar(lark: str, *, what: str = "grammar") -> Constraint:
    """A constraint to text of a grammar.

    Args:
        lark: The grammar, in llguidance's form of Lark. Control tokens stand in it by
            their names, which begin with ``<`` and end with ``>``, or as ``<[106]>``.
        what: What errors call it.

    Raises:
        RequestError: It cannot be compiled; the message names line and column. Names of
            control tokens are checked with a tokenizer, in ``BoundConstraint``.
    """
    _check_text(what, lark)
    _check_size(what, len(lark), MAX_LENGTH, "characters")
    longest = max(map(len, literals(lark)), default=0)
    _check_size(f"a text of the {what}", longest, MAX_REGEX, "characters")
    _check_reach(what, lark)
    return Constraint(what, _checked_lark(what, lark))


def either(first: Constraint, second: Constraint) -> Constraint:
    """A constraint to text of one constraint or of another; neither is such a one.

    Raises:
        RequestError: They cannot be compiled together.
    """
    both = {"first": first, "second": second}
    parts = [
        {"name": "either", "lark_grammar": "start: @first | @second"},
        *({**_part_of(each.grammar), "name": name} for name, each in both.items()),
    ]
    what = f"{first.what} or {second.what}"
    made = json.dumps({"grammars": parts})
    error = _error_of(made)
    if error:
        raise refusal(what, error)
    return Constraint(what, made)


def asked(
    *, schema: Any = None, regex: str | None = None, grammar: str | None = None
) -> Constraint | None:
    """The constraint that is asked for, if any.

    Args:
        schema: See ``json_schema``; strict.
        regex: See ``regex``.
        grammar: See ``grammar``.

    Raises:
        RequestError: More than one is given, or it cannot be compiled.
    """
    given = {"schema": schema, "regex": regex, "grammar": grammar}
    found = {what: value for what, value in given.items() if value is not None}
    if len(found) > 1:
        raise RequestError(
            f"a text must have one given form: got {' and '.join(found)}. Leave out "
            "all but one."
        )
    return next((_MAKERS[what](value) for what, value in found.items()), None)


def refusal(what: str, error: str) -> RequestError:
    """What llguidance says against a constraint, as a mistake of the user's.

    Args:
        what: See ``Constraint``.
        error: Its message, of several lines perhaps.
    """
    if _COSTS.search(error):
        return RequestError(
            f"{what} must take less to compile: got {reason_of(error)}. Use shorter "
            "expressions with smaller counts, or fewer of them."
        )
    return RequestError(
        f"{what} must be one that can be compiled: got {reason_of(error)}. Change it "
        "there."
    )


def reason_of(error: str) -> str:
    """The reason in a message of llguidance's, in a line, with the place it names."""
    unknown = _UNKNOWN.search(error)
    if unknown is not None:
        return f"the keyword {unknown[1].replace(chr(34), '')}"
    inner = _REGEX_ERROR.search(error)
    first = (error.splitlines() or ["an error without a reason"])[0]
    found = _PLACE.match(first)
    text = inner[1] if inner is not None else found[3] if found is not None else first
    place = f" at line {found[1]}, column {found[2]}" if found is not None else ""
    return f"{text.rstrip('.')}{place}"


_MAKERS: Mapping[str, Callable[[Any], Constraint]] = {
    "schema": json_schema,
    "regex": regex,
    "grammar": grammar,
}


def _checked_lark(what: str, lark: str) -> str:
    """The grammar of a text in Lark's form.

    Raises:
        RequestError: It cannot be compiled.
    """
    made: str = llguidance().LLMatcher.grammar_from_lark(lark)
    error = _error_of(made)
    if error:
        raise refusal(what, error)
    return made


def _part_of(grammar: str) -> dict[str, Any]:
    """A grammar of llguidance's as a part of another."""
    if not grammar.startswith("{"):  # Lark stays as it is
        return {"lark_grammar": grammar}
    (part,) = json.loads(grammar)["grammars"]
    return {key: value for key, value in part.items() if value is not None}


def _schema_of(schema: Any) -> Mapping[str, Any]:
    """A schema as an object.

    Raises:
        RequestError: It is none.
    """
    made = getattr(schema, "model_json_schema", None)
    if isinstance(schema, type) and callable(made):
        return closed(made())  # pydantic drops other keys, unless it says so
    found = schema
    if isinstance(found, str):
        _check_size("schema", len(found), MAX_LENGTH, "characters")
        try:
            found = json.loads(found)
        except (ValueError, RecursionError):
            found = schema
    if isinstance(found, Mapping):
        return found
    raise RequestError(
        f"schema must be a JSON schema, an object: got {shorten(schema)}. For example "
        '{"type": "object"}.'
    )


def _text_of(schema: Mapping[str, Any]) -> str:
    """A schema as JSON, without settings of llguidance's.

    Raises:
        RequestError: JSON has not what is in it, or it is nested too deeply.
    """
    given = {key: value for key, value in schema.items() if key != _OPTIONS}
    try:
        text = json.dumps(given, ensure_ascii=False, allow_nan=False)
        text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(
            f"schema must hold what JSON has: got {shorten(schema)}, {error}. Change "
            "it."
        ) from error
    if depth_of(given, MAX_DEPTH) > MAX_DEPTH:
        raise RequestError(
            f"schema must be nested at most {MAX_DEPTH} deep: got more. Use $defs and "
            "$ref."
        )
    return text


def _compiled(schema: str, *, strict: bool) -> tuple[str, str]:
    """llguidance's grammar of a schema's text, and what it says against it."""
    options = {
        "whitespace_flexible": False,  # then more tokens are forced
        "lenient": not strict,
        "coerce_one_of": not strict,
    }
    matcher = llguidance().LLMatcher
    try:
        made: str = matcher.grammar_from_json_schema(schema, overrides=options)
    except ValueError as error:  # the place is one of the text's, not the client's
        return "", _TEXT_PLACE.sub("", str(error))
    return made, _error_of(made)


def _schema_error(
    schema: Mapping[str, Any], error: str, *, strict: bool, is_quick: bool
) -> RequestError:
    """What is wrong with a schema, and where, if that is found quickly."""

    def error_of(part: Mapping[str, Any]) -> str:
        return _compiled(_text_of(part), strict=strict)[1]

    place = place_of(schema, error, error_of) if is_quick else "#"
    advice = "Leave it out" if _UNKNOWN.search(error) else "Change it there"
    return RequestError(
        f"schema must be one that text can be forced to follow: got {reason_of(error)} "
        f"at {place}. {advice}."
    )


def _error_of(grammar: str) -> str:
    """What llguidance says against a grammar; empty where nothing."""
    validate = llguidance().LLMatcher.validate_grammar_with_warnings
    is_error, messages = validate(grammar, limits=limits())
    return str(messages[0]) if is_error else ""


def _regex_reason(error: str, text: str) -> str:
    """What is wrong with an expression, and with which of its characters."""
    inner = _REGEX_ERROR.search(error)
    caret = _CARET.search(error)
    reason = inner[1] if inner is not None else error.splitlines()[0]
    if caret is None or caret[1] != text:
        return reason
    return f"{reason} at character {len(caret[2]) + 1}"


def _check_text(what: str, text: Any) -> None:
    """Check that something is text, and Unicode.

    Raises:
        RequestError: It is not.
    """
    if not isinstance(text, str) or not is_unicode(text):
        raise RequestError(
            f"{what} must be text: got {shorten(text)}. Write it as a string."
        )


def _check_size(what: str, size: int, most: int, unit: str) -> None:
    """Check a number of characters or texts.

    Raises:
        RequestError: There are too many.
    """
    if size > most:
        raise RequestError(
            f"{what} must have at most {most} {unit}: got {size}. Make it smaller."
        )


def _check_reach(what: str, lark: str) -> None:
    """Check how long a chain of a grammar's rules is, and the schemas in it.

    Raises:
        RequestError: It is too long.
    """
    if rules_reach(lark) > MAX_REACH:
        raise RequestError(
            f"{what} must have at most {MAX_REACH} rules that lead to each other: got "
            "more. Use fewer rules."
        )
    schemas = []
    for match in _JSON_PART.finditer(lark):
        try:
            schema, _ = json.JSONDecoder().raw_decode(lark, match.end())
        except (ValueError, RecursionError):
            continue  # llguidance does not read it either, and says where
        schemas.append(schema)
    _check_schemas(f"a schema of the {what}", schemas)


def _check_schemas(what: str, schemas: Sequence[Mapping[str, Any]]) -> None:
    """Check how deep schemas are where references are followed, and how wide.

    Raises:
        RequestError: One is too deep, or all together are too wide.
    """
    if any(schema_reach(schema) > MAX_REACH for schema in schemas):
        raise RequestError(
            f"{what} must be at most {MAX_REACH} levels deep with references followed: "
            "got more. Use fewer definitions that lead to each other."
        )
    for word, most in MAX_ENTRIES.items():
        count = sum(count_of(schema, word) for schema in schemas)
        _check_size(what, count, most, f"{word} in all")
