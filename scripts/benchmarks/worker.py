"""A process that holds engines and runs them when it is told to.

Requests come as JSON lines on standard input, answers go as JSON lines to standard
output; whatever else prints goes to standard error.

    python -m scripts.benchmarks.worker
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from typing import Any

from mlx_gemma_mtp.errors import MTPError
from mlx_gemma_mtp.pair.pair import Pair

from .engines import SAMPLINGS, EngineSpec, make_engine
from .graph import graph_figures
from .measure import measure, warm_up
from .models import ModelSpec
from .step import Engine, UnavailableError


class Worker:
    """Engines by name, and what can be asked of them."""

    def __init__(self) -> None:
        self._engines: dict[str, Engine] = {}

    def load(
        self, model: dict[str, Any], engines: list[dict[str, Any]]
    ) -> dict[str, Any]:
        """Load a pair and make engines; a reason for each that cannot be made."""
        spec = ModelSpec(**model)
        pair = spec.load()
        reasons = {}
        for settings in engines:
            engine = EngineSpec(**settings)
            reasons[engine.name] = self._make(engine, pair, spec)
        return {"reasons": reasons, "vocab_size": pair.vocab_size}

    def _make(self, engine: EngineSpec, pair: Pair, model: ModelSpec) -> str | None:
        try:
            self._engines[engine.name] = make_engine(engine, pair, model)
        except UnavailableError as error:
            return str(error)
        return None

    def warm_up(self, engine: str, **request: Any) -> dict[str, Any]:
        """Run the first rounds."""
        warm_up(self._engines[engine], **_settings(request))
        return {}

    def run(self, engine: str, **request: Any) -> dict[str, Any]:
        """Run once and measure."""
        return dict(measure(self._engines[engine], **_settings(request)))

    def graph(self, engine: str, **request: Any) -> dict[str, Any]:
        """Count graphs."""
        return graph_figures(self._engines[engine], **_settings(request))

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Do what a request says, or say why not."""
        try:
            return getattr(self, request.pop("do"))(**request)
        except (MTPError, UnavailableError) as error:
            return {"error": str(error)}
        except Exception as error:  # noqa: BLE001 - one engine must not end the others
            text = " ".join(str(error).split())[:300]
            return {"error": f"{type(error).__name__}: {text}"}


def _settings(request: dict[str, Any]) -> dict[str, Any]:
    return {**request, "sampling": SAMPLINGS[request["sampling"]]}


def main() -> None:
    """Answer until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    worker = Worker()
    with contextlib.suppress(KeyboardInterrupt):
        for line in sys.stdin:
            answers.write(json.dumps(worker.answer(json.loads(line))) + "\n")
            answers.flush()


if __name__ == "__main__":
    main()
