"""One measured run of an engine: seconds, tokens, rounds, memory."""

from __future__ import annotations

import resource
import sys
import time
from itertools import islice
from typing import Any

import mlx.core as mx

from .step import Engine, Step

_WARM_UP_STEPS = 4


def warm_up(
    engine: Engine, prompts: list[list[int]], max_tokens: int, sampling: dict[str, Any]
) -> None:
    """Run the first rounds of a request, so that everything is compiled.

    An engine that chooses as it goes gets a whole request.
    """
    steps: Any = engine.steps(prompts, max_tokens, sampling)
    for _ in islice(steps, None if engine.is_adaptive else _WARM_UP_STEPS):
        pass
    steps.close()


def measure(
    engine: Engine, prompts: list[list[int]], max_tokens: int, sampling: dict[str, Any]
) -> dict[str, float]:
    """Decode to the end; the clock starts behind the first step.

    Returns:
        ``tokens`` and ``seconds`` behind the first step, ``steps`` (rounds of all rows
        together), ``rounds`` (counted for each row), ``drafted``, ``accepted``,
        ``host_s`` (what the calling thread worked, waiting not counted),
        ``prefill_s``, ``peak_memory_gb`` (MLX's, of this run) and ``max_rss_gb`` (the
        process's, so far).
    """
    mx.reset_peak_memory()
    began = time.perf_counter()
    steps = iter(engine.steps(prompts, max_tokens, sampling))
    next(steps)
    start, host_start = time.perf_counter(), time.thread_time()
    found: list[Step] = list(steps)
    seconds = time.perf_counter() - start
    return {
        "tokens": sum(step.num_tokens for step in found),
        "seconds": seconds,
        "host_s": time.thread_time() - host_start,
        "prefill_s": start - began,
        "steps": len(found),
        "rounds": sum(step.rounds for step in found),
        "drafted": sum(step.drafted for step in found),
        "accepted": sum(step.accepted for step in found),
        "peak_memory_gb": mx.get_peak_memory() / 1e9,
        "max_rss_gb": max_rss_gb(),
    }


def max_rss_gb() -> float:
    """The most memory that this process has had, in GB (10**9 bytes)."""
    found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found * (1 if sys.platform == "darwin" else 1024) / 1e9
