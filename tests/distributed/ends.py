"""A rank that dies, stops or fails at a random moment, and how the others end.

python -m scripts.studies.rank_ends         50 moments: a table of the seconds it takes
"""

from __future__ import annotations

import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from tests.distributed.launching import start_with
from tests.tiny import SHORT, family_folder

KINDS = {
    "killed": signal.SIGKILL,
    "stopped": signal.SIGSTOP,
    "failing": signal.SIGUSR1,  # an exception in the rank's script
}
SIZES = (2, 4)
_SPREAD_S = 2.0  # moments lie in the seconds behind the first text
_PATIENCE_S = 100


@dataclass
class Left:
    """How a rank ended by itself.

    Attributes:
        rank: Which one.
        status: Its exit status.
        line: The last one that it wrote and that names a rank; MLX may add some.
        seconds: From the moment to its end.
    """

    rank: int
    status: int
    line: str
    seconds: float


class NotStartedError(Exception):
    """The ranks did not all come to their first text."""


def others(kind: str, size: int, seed: int, folder: Path) -> list[Left]:
    """How the others end when something happens to one.

    Args:
        kind: One of ``KINDS``.
        size: Number of ranks.
        seed: Of the rank and of the moment.
        folder: An empty place.

    Raises:
        NotStartedError: Nothing could happen to one.
    """
    draw = random.Random(f"{kind} {size} {seed}")
    words = ["-m", "tests.distributed.parts", f"endless:{family_folder(SHORT)}"]
    processes = start_with(size, words, folder)
    try:
        for process in processes:
            if process.stdout.readline() != "text\n":
                _, errors = process.communicate(timeout=_PATIENCE_S)
                raise NotStartedError(f"{kind} of {size}, moment {seed}: {errors}")
        time.sleep(_SPREAD_S * draw.random())
        victim = draw.randrange(size)
        start = time.monotonic()
        processes[victim].send_signal(KINDS[kind])
        left = []
        for rank, process in enumerate(processes):
            if rank != victim:
                _, errors = process.communicate(timeout=_PATIENCE_S)
                named = [line for line in errors.splitlines() if "Rank " in line]
                line = named[-1] if named else errors
                seconds = time.monotonic() - start
                left.append(Left(rank, process.returncode, line, seconds))
        return left
    finally:
        for process in processes:
            process.kill()
            process.communicate()
