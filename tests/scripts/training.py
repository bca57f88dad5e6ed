"""Trainings of a few steps on a few files, for tests of the scripts that train."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from mlx_gemma_mtp.tune.request import TextSettings
from mlx_gemma_mtp.tune.settings import TrainingSettings

LIBRARY = Path(os.__file__).parent
TEXTS = TextSettings(num_texts=6, prompt_tokens=12, max_tokens=8, num_held_out=2)
TRAINING = TrainingSettings(
    steps=3, minutes=10, batch_size=2, judge_every=1, save_every=2, seed=1
)


def small_corpus() -> dict[str, Any]:
    """A few files of the library's, two of them held out: one is measured on."""
    names = ["json/decoder.py", "json/encoder.py", "textwrap.py", "bisect.py"]
    train = [(name, (LIBRARY / name).read_text("utf-8")) for name in names]
    held_out = [
        (name, (LIBRARY / name).read_text("utf-8"))
        for name in ("unittest/mock.py", "unittest/case.py")
    ]
    return {"python": "3.11", "sha256": "0", "train": train, "held_out": held_out}
