"""How long work tells how far it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

# Called with what is being done and how many bytes that is; what it gives is called
# with the bytes done since the last call.
Progress = Callable[[str, int], AbstractContextManager[Callable[[int], Any]]]


@contextmanager
def silent(what: str, num_bytes: int) -> Iterator[Callable[[int], Any]]:
    """Tell nobody.

    Args:
        what: What is being done.
        num_bytes: How many bytes that is.

    Yields:
        A function that takes the bytes done since its last call.
    """
    yield lambda num_done: None
