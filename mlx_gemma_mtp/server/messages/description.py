"""Which values of the right type are refused, for ``/openapi.json``."""

from __future__ import annotations

from typing import Any

from ..fields import refused_fields
from .schema import REFUSED

_NAMED = {
    "if": {"properties": {"type": {"const": "tool"}}, "required": ["type"]},
    "then": {
        "properties": {"name": {"type": "string", "minLength": 1}},
        "required": ["name"],
    },
}
_OWN_TOOLS = {"anyOf": [{"enum": [None, "custom"]}]}


def narrow(schemas: dict[str, Any], *, has_tools: bool) -> None:
    """Say it.

    Args:
        schemas: Those of all bodies, by their names.
        has_tools: Whether the chat template has tools.
    """
    for name in ("CountBody", "MessagesBody"):
        fields = schemas[name]["properties"]
        fields.update(refused_fields(REFUSED))
        if not has_tools:
            fields["tools"] = {"anyOf": [{"type": "array", "maxItems": 0}, _NULL]}
            fields["tool_choice"] = {"enum": [None]}
    schemas["MessagesTool"]["properties"]["type"] = _OWN_TOOLS
    schemas["MessagesToolChoice"].update(_NAMED)


_NULL = {"type": "null"}
