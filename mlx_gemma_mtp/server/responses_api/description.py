"""Which values of the right type are refused, for ``/openapi.json``."""

from __future__ import annotations

from typing import Any

from ..fields import refused_fields
from .schema import REFUSED

_NULL = {"type": "null"}
_SCHEMA_IS_THERE = {
    "if": {"properties": {"type": {"const": "json_schema"}}, "required": ["type"]},
    "then": {"properties": {"schema": {"type": "object"}}, "required": ["schema"]},
}
_FREE = {"enum": ["auto", "none", None]}
# Those with names of their own are named in ``tools.ToolNames``.
_NAMED = {
    "if": {
        "properties": {"type": {"enum": ["function", "custom"]}},
        "required": ["type"],
    },
    "then": {
        "properties": {"name": {"type": "string", "minLength": 1}},
        "required": ["name"],
    },
}


def narrow(schemas: dict[str, Any], *, has_tools: bool) -> None:
    """Say it.

    Args:
        schemas: Those of all bodies, by their names.
        has_tools: Whether the chat template has tools.
    """
    fields = schemas["ResponsesBody"]["properties"]
    fields.update(refused_fields(REFUSED))
    if not has_tools:
        fields["tools"] = {"anyOf": [{"type": "array", "maxItems": 0}, _NULL]}
        fields["tool_choice"] = _FREE
    schemas["ResponsesTool"].update(_NAMED)
    schemas["TextFormat"].update(_SCHEMA_IS_THERE)
    text = schemas["TextConfig"]["properties"]
    text["verbosity"] = {"enum": ["medium", None]}
