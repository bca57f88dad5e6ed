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
    least, best_of = body.get("min_tokens"), body.get("best_of")
    return (
        least in (None, 0, body.get("max_tokens"))
        and best_of in (None, 1, body.get("n"))
        and not body.get("continue_final_message")
    )
