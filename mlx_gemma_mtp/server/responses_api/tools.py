"""The tools of a response as functions of a chat, and calls of these back again.

A chat knows functions only. A custom tool, whose input is any text, is a function with
one string; a tool within a namespace has the namespace in its name. What servers of
OpenAI's run is left out: the model is not told of it, and calls it never.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from ..errors import bad_request
from .schema import ResponsesTool

_BETWEEN = "__"  # a namespace and a name
_INPUT = "input"
_PARAMETERS = {
    "type": "object",
    "properties": {_INPUT: {"type": "string"}},
    "required": [_INPUT],
}


@dataclass(frozen=True)
class Origin:
    """What a function of a chat was in a response.

    Attributes:
        name: The tool's.
        namespace: Where it is in one.
        is_custom: Whether its input is any text.
    """

    name: str
    namespace: str | None = None
    is_custom: bool = False


class ToolNames:
    """The tools of one request.

    Args:
        tools: As they were declared.

    Attributes:
        functions: The same as a chat has them.
        left_out: The types of those that a chat has not.

    Raises:
        AnswerError: One has no name.
    """

    def __init__(self, tools: Sequence[ResponsesTool]) -> None:
        self._origins: dict[str, Origin] = {}
        self.left_out: list[str] = []
        self.functions = list(self._functions(tools, None, "tools"))

    def origin(self, name: str) -> Origin:
        """What a function was."""
        return self._origins.get(name, Origin(name))

    def _functions(
        self, tools: Sequence[ResponsesTool], namespace: str | None, place: str
    ) -> Iterator[dict[str, Any]]:
        for number, tool in enumerate(tools):
            where = f"{place}[{number}]"
            if tool.type in ("function", "custom"):
                yield self._function(tool, namespace, where)
            elif tool.type == "namespace" and namespace is None:
                inner = _inner(tool, where)
                yield from self._functions(inner, tool.name, f"{where}.tools")
            else:
                self.left_out.append(tool.type)

    def _function(
        self, tool: ResponsesTool, namespace: str | None, place: str
    ) -> dict[str, Any]:
        if tool.name is None:
            raise bad_request(
                f"{place}.name must name the tool: got none. Add it.", f"{place}.name"
            )
        is_custom = tool.type == "custom"
        name = called(tool.name, namespace)
        self._origins[name] = Origin(tool.name, namespace, is_custom)
        function: dict[str, Any] = {"name": name}
        description = _described(tool) if is_custom else tool.description
        if description is not None:
            function["description"] = description
        parameters = _PARAMETERS if is_custom else tool.parameters
        if parameters is not None:
            function["parameters"] = parameters
        if tool.strict is not None and not is_custom:
            function["strict"] = tool.strict
        return {"type": "function", "function": function}


def called(name: str, namespace: str | None) -> str:
    """What a chat calls a tool."""
    return name if namespace is None else f"{namespace}{_BETWEEN}{name}"


def arguments_of(text: str) -> str:
    """The arguments of a custom tool's call, as JSON."""
    return json.dumps({_INPUT: text}, ensure_ascii=False)


def text_of(arguments: dict[str, Any]) -> str:
    """The input of a custom tool in a call's arguments."""
    found = arguments.get(_INPUT, "")
    return found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)


def _inner(tool: ResponsesTool, place: str) -> list[ResponsesTool]:
    """The tools of a namespace.

    Raises:
        AnswerError: One is none.
    """
    try:
        return [ResponsesTool.model_validate(each) for each in tool.tools or ()]
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, (f"{place}.tools", *first["loc"])))
        raise bad_request(f"{name}: {first['msg']}."[:300], name[:100]) from None


def _described(tool: ResponsesTool) -> str | None:
    """What is said of a custom tool, with the form of its input."""
    form = (tool.format or {}).get("definition")
    if not isinstance(form, str):
        return tool.description
    syntax = (tool.format or {}).get("syntax", "")
    rule = f"Its input follows this grammar ({syntax}):\n{form}"
    return f"{tool.description}\n\n{rule}" if tool.description else rule
