"""A server whose engine computes for minutes: what signals do then is for tests.

Run: python -m tests.server.busy_server load|step|encode ARGUMENTS
"""

from __future__ import annotations

import sys
import threading
from typing import Any

import mlx.core as mx

from mlx_gemma_mtp.server import prompts
from mlx_gemma_mtp.server import serve as serving
from mlx_gemma_mtp.server.arguments import parse
from mlx_gemma_mtp.server.served_model import ServedModel
from mlx_gemma_mtp.server.settings import Settings
from tests.server.serving import ScriptedDecoder, echo, scripted_engine, scripted_means


def compute() -> None:
    """One evaluation of MLX's that takes some ten minutes."""
    matrix = mx.random.uniform(shape=(2048, 2048))
    for _ in range(2000):
        matrix = matrix @ matrix / 2048
    sys.stdout.write("computing\n")
    sys.stdout.flush()
    mx.eval(matrix)
    raise AssertionError("the evaluation was to take longer than anybody waits")


class BusyDecoder(ScriptedDecoder):
    """Computes once it has emitted something."""

    def step(self) -> Any:
        if self.steps == 3:
            compute()
        return super().step()


def encode(tokenizer: Any, text: str, *, continues: bool = False) -> list[int]:
    """A text that takes for ever."""
    sys.stdout.write("computing\n")
    sys.stdout.flush()
    threading.Event().wait()
    raise AssertionError(tokenizer, text, continues)


def load(settings: Settings) -> ServedModel:
    """An engine in place of a model's."""
    if sys.argv[1] == "load":
        compute()
    if sys.argv[1] == "encode":
        prompts.encode_text = encode
    return scripted_engine(settings, scripted_means(BusyDecoder(echo)))


if __name__ == "__main__":
    mx.set_default_device(mx.cpu)
    serving.load_served_model = load
    raise SystemExit(serving.serve(parse(["--port", "0", *sys.argv[2:]])))
