"""What no JSON schema can say of a body: schemathesis does not try it.

Loaded by schemathesis, which ``make test-schema`` installs.
"""

from __future__ import annotations

from typing import Any

import schemathesis

from tests.server.agreement import agrees


@schemathesis.hook
def filter_case(_: Any, case: Any) -> bool:
    """Whether the fields of a body agree with each other."""
    return not isinstance(case.body, dict) or agrees(case.body)
