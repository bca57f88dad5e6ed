"""Requests of agents in the shapes that they have, written by hand, and their meaning.

Texts are short and our own; fields, blocks and their order are the agents'.
"""

from __future__ import annotations

from typing import Any

_EPHEMERAL = {"type": "ephemeral"}
_BASH = {
    "type": "object",
    "properties": {
        "command": {"type": "string", "description": "The command"},
        "timeout": {"type": "number"},
    },
    "required": ["command"],
    "additionalProperties": False,
    "$schema": "http://json-schema.org/draft-07/schema#",
}
CLAUDE_CODE: dict[str, Any] = {
    "model": "embedded",
    "max_tokens": 32000,
    "stream": True,
    "temperature": 1,
    "metadata": {"user_id": "user_0_account__session_0"},
    "thinking": {"type": "adaptive"},
    "output_config": {"effort": "medium"},
    "context_management": {
        "edits": [{"type": "clear_thinking_20251015", "keep": "all"}]
    },
    "system": [
        {
            "type": "text",
            "text": "x-anthropic-billing-header: cc_version=2.1.100.7b4; "
            "cc_entrypoint=cli; cch=eb6c6;",
        },
        {"type": "text", "text": "You are an agent.", "cache_control": _EPHEMERAL},
        {"type": "text", "text": "# Tools\nUse them.", "cache_control": _EPHEMERAL},
    ],
    "tools": [
        {"name": "Bash", "description": "Runs a command.", "input_schema": _BASH},
    ],
    "messages": [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "<system-reminder>\nA.\n</system-reminder>"},
                {
                    "type": "text",
                    "text": "List the files.",
                    "cache_control": _EPHEMERAL,
                },
            ],
        },
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "I list.", "signature": "unsigned"},
                {
                    "type": "tool_use",
                    "id": "toolu_1",
                    "name": "Bash",
                    "input": {"command": "ls"},
                },
            ],
        },
        {
            "role": "user",
            "content": [
                {
                    "tool_use_id": "toolu_1",
                    "type": "tool_result",
                    "content": "a.py",
                    "is_error": False,
                    "cache_control": _EPHEMERAL,
                },
            ],
        },
    ],
}
CLAUDE_CODE_CHAT: dict[str, Any] = {
    "model": "embedded",
    "max_tokens": 32000,
    "stream": True,
    "temperature": 1,
    "reasoning_effort": "medium",
    "tools": [
        {
            "type": "function",
            "function": {
                "name": "Bash",
                "description": "Runs a command.",
                "parameters": _BASH,
            },
        }
    ],
    "messages": [
        {"role": "system", "content": "You are an agent.\n\n# Tools\nUse them."},
        {
            "role": "user",
            "content": "<system-reminder>\nA.\n</system-reminder>\n\nList the files.",
        },
        {
            "role": "assistant",
            "content": "",
            "reasoning": "I list.",
            "tool_calls": [
                {
                    "id": "toolu_1",
                    "type": "function",
                    "function": {"name": "Bash", "arguments": {"command": "ls"}},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "toolu_1", "content": "a.py"},
    ],
}
_SHELL = {
    "type": "object",
    "properties": {
        "cmd": {"type": "string", "description": "The command"},
        "yield_time_ms": {"type": "number"},
    },
    "required": ["cmd"],
    "additionalProperties": False,
}
_SPAWN = {
    "type": "object",
    "properties": {"message": {"type": "string"}},
    "required": ["message"],
    "additionalProperties": False,
}
CODEX: dict[str, Any] = {
    "model": "embedded",
    "instructions": "You are Codex.",
    "input": [
        {
            "type": "message",
            "role": "developer",
            "content": [
                {"type": "input_text", "text": "<permissions>A.</permissions>"},
                {"type": "input_text", "text": "<mode>B.</mode>"},
            ],
        },
        {
            "type": "message",
            "role": "user",
            "content": [
                {"type": "input_text", "text": "# AGENTS.md"},
                {"type": "input_text", "text": "<environment_context/>"},
            ],
        },
        {
            "type": "message",
            "role": "user",
            "content": [{"type": "input_text", "text": "List the files."}],
        },
        {
            "type": "reasoning",
            "summary": [],
            "content": None,
            "encrypted_content": "plain:SSBsaXN0Lg==",
        },
        {
            "type": "message",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "I look."}],
            "phase": "commentary",
        },
        {
            "type": "function_call",
            "name": "exec_command",
            "arguments": '{"cmd":"ls"}',
            "call_id": "call_1",
        },
        {
            "type": "function_call",
            "name": "spawn",
            "namespace": "agents",
            "arguments": '{"message":"go"}',
            "call_id": "call_2",
        },
        {
            "type": "custom_tool_call",
            "status": "completed",
            "call_id": "call_3",
            "name": "apply_patch",
            "input": "*** Begin",
        },
        {"type": "function_call_output", "call_id": "call_1", "output": "a.py"},
        {
            "type": "function_call_output",
            "call_id": "call_2",
            "output": [{"type": "input_text", "text": "gone"}],
        },
        {"type": "custom_tool_call_output", "call_id": "call_3", "output": "Done"},
    ],
    "tools": [
        {
            "type": "function",
            "name": "exec_command",
            "description": "Runs a command.",
            "strict": False,
            "parameters": _SHELL,
        },
        {
            "type": "namespace",
            "name": "agents",
            "description": "Other agents.",
            "tools": [
                {
                    "type": "function",
                    "name": "spawn",
                    "description": "Starts one.",
                    "strict": False,
                    "parameters": _SPAWN,
                }
            ],
        },
        {
            "type": "custom",
            "name": "apply_patch",
            "description": "Edits files.",
            "format": {"type": "grammar", "syntax": "lark", "definition": "start: A"},
        },
        {"type": "web_search", "external_web_access": False},
    ],
    "tool_choice": "auto",
    "parallel_tool_calls": False,
    "reasoning": None,
    "store": False,
    "stream": True,
    "include": ["reasoning.encrypted_content"],
    "prompt_cache_key": "0",
    "client_metadata": {"x": "y"},
}


def _function(name: str, description: str, parameters: Any, **more: Any) -> Any:
    function = {"name": name, "description": description, "parameters": parameters}
    return {"type": "function", "function": {**function, **more}}


def _call(name: str, call_id: str, arguments: Any) -> Any:
    function = {"name": name, "arguments": arguments}
    return {"id": call_id, "type": "function", "function": function}


CODEX_CHAT: dict[str, Any] = {
    "model": "embedded",
    "stream": True,
    "messages": [
        {
            "role": "system",
            "content": "You are Codex.\n\n<permissions>A.</permissions>\n\n"
            "<mode>B.</mode>",
        },
        {"role": "user", "content": "# AGENTS.md\n\n<environment_context/>"},
        {"role": "user", "content": "List the files."},
        {
            "role": "assistant",
            "content": "I look.",
            "reasoning": "I list.",
            "tool_calls": [
                _call("exec_command", "call_1", {"cmd": "ls"}),
                _call("agents__spawn", "call_2", {"message": "go"}),
                _call("apply_patch", "call_3", {"input": "*** Begin"}),
            ],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "a.py"},
        {"role": "tool", "tool_call_id": "call_2", "content": "gone"},
        {"role": "tool", "tool_call_id": "call_3", "content": "Done"},
    ],
    "tools": [
        _function("exec_command", "Runs a command.", _SHELL, strict=False),
        _function("agents__spawn", "Starts one.", _SPAWN, strict=False),
        _function(
            "apply_patch",
            "Edits files.\n\nIts input follows this grammar (lark):\nstart: A",
            {
                "type": "object",
                "properties": {"input": {"type": "string"}},
                "required": ["input"],
            },
        ),
    ],
    "tool_choice": "auto",
    "parallel_tool_calls": False,
}
