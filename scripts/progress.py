"""What scripts tell of their progress, on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def log(message: str) -> None:
    """Print one line."""
    print(f"[{time.strftime('%H:%M:%S')}] {message}", file=sys.stderr, flush=True)


@contextmanager
def logged(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Print how far work is, each time that some of it is done."""
    yield lambda done: log(f"{what}: {done:,} of {total:,}")
