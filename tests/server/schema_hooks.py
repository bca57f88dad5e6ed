"""What no JSON schema can say of a body: schemathesis does not try it.

Loaded by schemathesis, which ``make test-schema`` installs.
"""

from __future__ import annotations

from typing import Any

import schemathesis


@schemathesis.hook
def filter_case(_: Any, case: Any) -> bool:
    """Whether the fields of a body agree with each other."""
    body = case.body
    if not isinstance(body, dict):
        return True
    if not _can_be_compiled(body) or _states_two_limits(body):
        return False
    least, best_of = body.get("min_tokens"), body.get("best_of")
    return (
        least in (None, 0, body.get("max_tokens"))
        and best_of in (None, 1, body.get("n"))
        and not body.get("continue_final_message")
    )


def _can_be_compiled(body: dict[str, Any]) -> bool:
    """Whether what an answer must be is certain to be no mistake.

    Nobody can say by a schema which schemas, expressions and grammars are none.
    """
    asked = body.get("response_format") or {}
    outputs = body.get("structured_outputs") or {}
    kind = asked.get("type", "text") if isinstance(asked, dict) else "text"
    if not isinstance(outputs, dict) or (kind == "text" and not outputs):
        return True
    is_free = not outputs.get("choice") and not {"json", "regex", "grammar"} & {
        name for name, value in outputs.items() if value is not None
    }
    has_one = (kind == "text") != (not outputs)
    last = (body.get("messages") or [{}])[-1]
    is_begun = isinstance(last, dict) and last.get("role") == "assistant"
    others = (body.get("ignore_eos"), body.get("tools"), is_begun)
    return has_one and kind != "json_schema" and is_free and not any(others)


def _states_two_limits(body: dict[str, Any]) -> bool:
    """Whether thoughts are limited by Anthropic's field, which ours goes before."""
    thinking = body.get("thinking")
    budget = thinking.get("budget_tokens") if isinstance(thinking, dict) else None
    return budget is not None and body.get("max_thinking_tokens") is not None
