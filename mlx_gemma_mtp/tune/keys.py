"""What decides a run's records and its training: a run with other keys begins anew."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..checkpoints.checkpoint import read_json
from ..pair.pair import Pair, named_arrays
from ..sampling.params import SamplingParams
from .origin import Origin
from .recording.material import Chosen
from .recording.workplace import Key
from .request import TuneRequest

_DIGEST_BYTES = 1 << 24  # of an array, looked at together


def texts_key(
    request: TuneRequest, plain: Pair, params: SamplingParams, chosen: Chosen
) -> Key:
    """What decides the records, by name."""
    texts = asdict(request.texts)
    used = {name: getattr(params, name) for name in (*request.texts.sampling, "seed")}
    return {
        "data": chosen.digest,
        "target": weights_digest(plain.target),
        **texts,
        **used,
        "adapters": _adapter_settings(request.adapter_path),
        "ends": sorted(plain.eos_token_ids),
        "package version": version("mlx_gemma_mtp"),
    }


def training_key(request: TuneRequest, origin: Origin) -> Key:
    """What decides the training beside the records, by name."""
    training = request.training.to_dict()
    del training["save_every"]
    return {
        "drafter": weights_digest(origin.drafter),
        "device": str(mx.default_device()),
        **training,
    }


def _adapter_settings(adapter_path: str | None) -> Mapping[str, Any] | None:
    """What adapters beside their arrays decide, such as their scale."""
    path = None if adapter_path is None else Path(adapter_path) / "adapter_config.json"
    return None if path is None or not path.is_file() else read_json(path)


def weights_digest(module: nn.Module) -> str:
    """A text that tells weights apart, by their shapes, types and sums."""
    found = hashlib.sha256()
    for name, array in named_arrays([module]):
        found.update(f"{name} {array.shape} {array.dtype}\n".encode())
        flat = array.reshape(-1)
        size = _DIGEST_BYTES // array.dtype.size
        for start in range(0, flat.size, size):
            block = mx.view(flat[start : start + size], mx.uint8)
            words = block.astype(mx.uint32)
            places = mx.arange(1, words.size + 1, dtype=mx.uint32)
            sums = mx.stack([words.sum(), (words * places).sum()])
            found.update(np.array(sums).tobytes())
    return found.hexdigest()
