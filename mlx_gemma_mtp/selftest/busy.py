"""Whether other programs, heat or low power mode disturb what is timed here.

A load average would not tell: the self-test is most of it. So a thread that only counts
is timed: what it did not run for, others did. And what is timed again and again on a
quiet machine takes as long every time. Others that keep the GPU busy, and no processor,
show by that alone.
"""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Sequence
from statistics import median, quantiles

_SPIN_S = 0.04  # some turns of a scheduler
_NUM_SPINS = 3
_MOST_TAKEN = 0.15  # of a thread's time, by others
_MOST_SPREAD = 0.3  # half of all timings lie that far apart, over their median
_LEAST_TIMINGS = 4
# What macOS says of a machine that is slower than it could be: a command, what to find
# in its answer, and what that means.
_SIGNS = (
    (("pmset", "-g"), r"\b(lowpowermode|powermode)\s+1\b", "low power mode is on"),
    (("pmset", "-g", "therm"), r"CPU_Speed_Limit\s*=\s*\d{1,2}\b", "heat slows it"),
    (
        ("notifyutil", "-g", "com.apple.system.thermalpressurelevel"),
        r"thermalpressurelevel\s+[1-9]",
        "it is hot",
    ),
)
_ANSWER_S = 5.0


def taken_share() -> float:
    """The share of a thread's time that others had, 0..1: the least of a few looks."""
    return min(_taken() for _ in range(_NUM_SPINS))


def spread(series: Sequence[Sequence[float]]) -> float | None:
    """How far timings of the same thing lie apart: quartiles over the median.

    Args:
        series: Timings of one thing each, seconds.

    Returns:
        The median of all series that are long enough; None without one.
    """
    found = []
    for timings in series:
        if len(timings) >= _LEAST_TIMINGS:
            low, middle, high = quantiles(timings, n=4)
            found.append((high - low) / middle)
    return median(found) if found else None


def caution(taken: float, spread: float | None) -> str:
    """Why timings are not to be relied on, in words; empty where they are.

    Args:
        taken: As from ``taken_share()``, before or after.
        spread: As from ``spread()``.
    """
    reasons = []
    if taken > _MOST_TAKEN:
        reasons.append(f"other programs had {taken:.0%} of a processor's time")
    if spread is not None and spread > _MOST_SPREAD:
        reasons.append(f"timings of the same thing lie {spread:.0%} apart")
    return " and ".join(reasons)


def disturbed() -> str:
    """Why nothing should be timed now, in words; empty where all is quiet."""
    found = [meaning for command, sign, meaning in _SIGNS if _says(command, sign)]
    found += [caution(taken_share(), None)]
    return " and ".join(filter(None, found))


def _says(command: Sequence[str], sign: str) -> bool:
    """Whether a command's answer has a sign; a system without it has none."""
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=_ANSWER_S
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return re.search(sign, answer.stdout) is not None


def _taken() -> float:
    start, used = time.perf_counter(), time.thread_time()
    while time.perf_counter() - start < _SPIN_S:
        pass
    passed = time.perf_counter() - start
    return max(0.0, 1 - (time.thread_time() - used) / passed)
