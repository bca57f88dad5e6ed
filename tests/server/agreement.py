"""Whether the fields of a body agree with each other, which no JSON schema can say.

For requests that are made from the description: what does not agree is refused rightly.
Knows the fields of every dialect, and nothing of how requests are made.
"""

from __future__ import annotations

from typing import Any


def agrees(body: dict[str, Any]) -> bool:
    """Whether a body that the description allows is certain to be answered."""
    least, best_of = body.get("min_tokens"), body.get("best_of")
    return (
        _can_be_compiled(body)
        and not _states_two_limits(body)
        and least in (None, 0, body.get("max_tokens"))
        and best_of in (None, 1, body.get("n"))
        and not body.get("continue_final_message")
    )


def _can_be_compiled(body: dict[str, Any]) -> bool:
    """Whether what an answer must be is certain to be no mistake.

    Nobody can say by a schema which schemas, expressions and grammars are none.
    """
    forms = _forms(body)
    outputs = body.get("structured_outputs") or {}
    if not isinstance(outputs, dict) or not (forms or outputs):
        return True
    is_free = not outputs.get("choice") and not {"json", "regex", "grammar"} & {
        name for name, value in outputs.items() if value is not None
    }
    has_one = not (forms and outputs)
    has_schema = any(form.get("type") == "json_schema" for form in forms)
    others = (body.get("ignore_eos"), body.get("tools"), _is_begun(body))
    return has_one and not has_schema and is_free and not any(others)


def _forms(body: dict[str, Any]) -> list[dict[str, Any]]:
    """What an answer must be, by the fields of OpenAI's and Anthropic's dialects."""
    outer = (body.get("output_config"), body.get("text"))
    found = [body.get("response_format"), body.get("output_format")]
    found += [place.get("format") for place in outer if isinstance(place, dict)]
    forms = [form for form in found if isinstance(form, dict)]
    return [form for form in forms if form.get("type", "text") != "text"]


def _is_begun(body: dict[str, Any]) -> bool:
    """Whether the last turn is the assistant's: the answer may have a beginning."""
    turns = body.get("messages") or body.get("input") or [{}]
    last = turns[-1]
    return isinstance(last, dict) and last.get("role") == "assistant"


def _states_two_limits(body: dict[str, Any]) -> bool:
    """Whether thoughts are limited by Anthropic's field, which ours goes before."""
    thinking = body.get("thinking")
    budget = thinking.get("budget_tokens") if isinstance(thinking, dict) else None
    return budget is not None and body.get("max_thinking_tokens") is not None
