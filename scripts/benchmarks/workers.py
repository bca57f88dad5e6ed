"""The processes that engines run in, seen from the one that tells them what to do.

Only one of them computes at a time: a request waits for its answer.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mlx_gemma_mtp.store import FOLDER_VARIABLE

from .engines import EngineSpec
from .models import ModelSpec

ROOT = Path(__file__).parents[2]


class Process:
    """One worker."""

    def __init__(self) -> None:
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "scripts.benchmarks.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(paths),
                # What is learnt here must not outlive it: coins teach nothing true.
                FOLDER_VARIABLE: "",
            },
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request and wait; ``{"error": ...}`` where it cannot be done."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None  # both are pipes
        assert stdout is not None
        try:
            stdin.write(json.dumps(request) + "\n")
            stdin.flush()
            line = stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            return {"error": f"its process has ended, status {self._process.wait()}"}
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """Let it end."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


class Workers:
    """A process for each engine, or one for all.

    Args:
        model: The pair that every process loads.
        engines: The engines.
        one_process: Let all share a process and the weights: for pairs of which the
            memory holds one copy only. Peak memory is then that of all together.

    Attributes:
        names: The engines that can be used, in order.
        skipped: The others, and why.
        vocab_size: The target's.
    """

    def __init__(
        self,
        model: ModelSpec,
        engines: Sequence[EngineSpec],
        *,
        one_process: bool = False,
    ) -> None:
        self._processes: list[Process] = []
        self._of: dict[str, Process] = {}
        self.skipped: dict[str, str] = {}
        self.vocab_size = 0
        for group in [list(engines)] if one_process else [[e] for e in engines]:
            self._start(model, group)

    def _start(self, model: ModelSpec, engines: list[EngineSpec]) -> None:
        process = Process()
        self._processes.append(process)
        specs = [asdict(engine) for engine in engines]
        answer = process.ask(do="load", model=asdict(model), engines=specs)
        for engine in engines:
            reason = answer.get("error") or answer["reasons"][engine.name]
            if reason:
                self.skipped[engine.name] = reason
            else:
                self._of[engine.name] = process
        self.vocab_size = answer.get("vocab_size", self.vocab_size)

    @property
    def names(self) -> list[str]:
        """The engines that can be used, in order."""
        return list(self._of)

    def ask(self, engine: str, do: str, **request: Any) -> dict[str, Any]:
        """Let an engine do something; ``{"error": ...}`` where it cannot."""
        return self._of[engine].ask(do=do, engine=engine, **request)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.close()
