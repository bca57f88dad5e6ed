"""What tests share: the embedded pair in float32, in which mlx-lm's text is equal."""

from __future__ import annotations

import shutil
from pathlib import Path

import mlx.core as mx

from mlx_gemma_mtp.pair.load import embedded_pair_path

PROMPTS = ("def area(radius):\n", "import os\n\n\n", "class Stack:\n", "for x in ")


def float32_pair(folder: Path) -> Path:
    """Copy the embedded pair, target and drafter, with weights of float32."""
    shutil.copytree(embedded_pair_path(), folder)
    for file in folder.rglob("*.safetensors"):
        weights = mx.load(str(file))
        assert isinstance(weights, dict)
        wide = {
            name: array.astype(mx.float32)
            if mx.issubdtype(array.dtype, mx.floating)
            else array
            for name, array in weights.items()
        }
        mx.eval(wide)
        mx.save_safetensors(str(file), wide)
    return folder
