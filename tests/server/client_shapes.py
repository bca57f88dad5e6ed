"""What clients of structured answers send: recorded from langchain-openai 1.7.4 and
instructor 1.17.0, with a schema of these tests' own.

The schema is what they make of a class of pydantic's with these three fields.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, Field

CONTENT, CALL, FENCED = "content", "call", "fenced"


class Box(BaseModel):
    """A box."""

    colour: Literal["red", "blue"] = Field(description="its colour")
    count: int = Field(ge=1, le=3)
    note: Literal["fragile"] | None = None


@dataclass(frozen=True)
class Shape:
    """A request of a client's, and where it looks for the answer.

    Attributes:
        fields: What it sends beside messages and model.
        place: ``CONTENT``, ``CALL``, or ``FENCED``: content with a fence around it.
        is_held: Whether the worst model is asked as well: the answer has an end.
    """

    fields: dict[str, Any]
    place: str
    is_held: bool = True


def _schema(*, has_titles: bool = False, is_strict: bool = False) -> dict[str, Any]:
    """The schema of a box, as the clients rewrite it."""
    note: dict[str, Any] = {"anyOf": [{"const": "fragile", "type": "string"}]}
    note["anyOf"].append({"type": "null"})
    properties: dict[str, dict[str, Any]] = {
        "colour": {
            "description": "its colour",
            "enum": ["red", "blue"],
            "type": "string",
        },
        "count": {"maximum": 3, "minimum": 1, "type": "integer"},
        "note": note,
    }
    for name, schema in properties.items():
        schema |= {"title": name.title()} if has_titles else {}
    found: dict[str, Any] = {
        "properties": properties,
        "required": ["colour", "count"],
        "type": "object",
    }
    if is_strict:
        found |= {"required": [*properties], "additionalProperties": False}
    else:
        note["default"] = None
    return found


def _format(*, is_strict: bool, **more: Any) -> dict[str, Any]:
    schema = _schema(has_titles=True, is_strict=is_strict)
    schema |= {"description": "A box.", "title": "Box"}
    given = {"schema": schema, "name": "Box", **more}
    return {"response_format": {"type": "json_schema", "json_schema": given}}


def _tools(schema: dict[str, Any], **more: Any) -> dict[str, Any]:
    function = {"name": "Box", "description": "A box.", "parameters": schema, **more}
    return {"tools": [{"type": "function", "function": function}]}


_NAMED = {"tool_choice": {"type": "function", "function": {"name": "Box"}}}
_ALONE = {**_NAMED, "parallel_tool_calls": False}
_ANY_OBJECT = {"response_format": {"type": "json_object"}}
_STRICT = _tools(_schema(is_strict=True), strict=True)
SHAPES = {
    "LangChain, json_schema": Shape(_format(is_strict=True, strict=True), CONTENT),
    "LangChain, function_calling": Shape({**_ALONE, **_tools(_schema())}, CALL),
    "LangChain, function_calling, strict": Shape({**_ALONE, **_STRICT}, CALL),
    "LangChain, function_calling, not strict": Shape(
        {**_ALONE, **_tools(_schema(), strict=False)}, CALL
    ),
    "LangChain, json_mode": Shape(_ANY_OBJECT, CONTENT, is_held=False),
    "LangChain, any tool": Shape(
        {"tool_choice": "required", "parallel_tool_calls": False, **_STRICT}, CALL
    ),
    "LangChain, tools": Shape(
        {"tool_choice": "auto", **_tools(_schema())}, CALL, is_held=False
    ),
    "LangChain, tools and a form": Shape(
        {**_STRICT, **_format(is_strict=True, strict=True)}, CALL, is_held=False
    ),
    "no word of strictness": Shape(
        {**_ALONE, **_tools(_schema(), strict=None)}, CALL, is_held=False
    ),
    # TOOLS_STRICT sends the same in this version, and JSON what json_mode does.
    "Instructor, TOOLS": Shape(
        {**_NAMED, **_tools(_schema(has_titles=True))}, CALL, is_held=False
    ),
    # Without additionalProperties a box may have more in it, without end.
    "Instructor, JSON_SCHEMA": Shape(_format(is_strict=False), CONTENT, is_held=False),
    "Instructor, MD_JSON": Shape({}, FENCED, is_held=False),
}
