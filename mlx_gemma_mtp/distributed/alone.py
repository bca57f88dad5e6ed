"""What only one machine can do, and says so where several were launched."""

from __future__ import annotations

import os

from ..errors import RequestError
from .environment import num_launched


def check_alone(what: str) -> None:
    """Check that this process was launched alone.

    Args:
        what: What cannot be done by several, with a verb of one behind it.

    Raises:
        RequestError: Several were launched.
        RanksError: The environment is wrong.
    """
    size = num_launched(os.environ)
    if size > 1:
        raise RequestError(
            f"{what} must be launched alone: got {size} ranks. mlx_gemma_mtp.generate "
            "and the Python functions decode on several machines."
        )
