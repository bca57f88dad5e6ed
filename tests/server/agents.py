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
