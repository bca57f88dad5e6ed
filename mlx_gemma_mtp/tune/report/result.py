"""The folder of a trained drafter: a checkpoint like a published one, and its record.

``config.json``, ``generation_config.json`` and ``model.safetensors`` are what ``load``,
the converter and other programs read; ``training.json`` says how it was trained, which
the converter takes over into a pair's manifest.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
from mlx.utils import tree_flatten

from ...checkpoints.checkpoint import (
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    TRAINING_NAME,
    open_checkpoint,
)
from ...checkpoints.staging import check_free_space, forget_replaced, staged
from ...errors import OutputError
from ...models.drafter import Drafter
from ...models.drafter_config import DrafterConfig

_WEIGHTS_NAME = "model.safetensors"
_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")


def write_drafter(
    folder: Path,
    drafter: Drafter,
    config: Mapping[str, Any],
    *,
    training: Mapping[str, Any],
    generation_config: Mapping[str, Any] | None = None,
    dtype: mx.Dtype = mx.bfloat16,
    force: bool = False,
    add: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Write a drafter's folder, which appears as a whole or not at all.

    Args:
        folder: Where it will stand.
        drafter: A plain drafter, without adapters.
        config: The ``config.json`` it was made of: that of the drafter before it was
            trained, or of ``fresh_drafter()``. Written as it is, but for its types.
        training: How it was trained, for ``training.json``.
        generation_config: The ``generation_config.json`` beside ``config``, written as
            it is; None or empty for one with the ids in ``config``. The number of
            drafts that the drafter names is added to either.
        dtype: Type of the weights.
        force: Whether a checkpoint that stands there may be replaced.
        add: Called with the folder before it appears, to write a report into it.

    Raises:
        OutputError: Something stands there that may not be replaced, or the place
            cannot be written.
    """
    place = folder.absolute()
    own = _own_config(config, dtype)
    tensors = _tensors(drafter, own, dtype)
    check_free_space(place, sum(array.nbytes for array in tensors.values()))
    with staged(place, force=force) as inside:
        _write_json(inside / CONFIG_NAME, own)
        settings = _generation_config(drafter, own, generation_config)
        _write_json(inside / GENERATION_CONFIG_NAME, settings)
        _write_json(inside / TRAINING_NAME, training)
        add(inside)
        try:
            path = str(inside / _WEIGHTS_NAME)
            mx.save_safetensors(path, tensors, metadata={"format": "pt"})
        except RuntimeError as error:  # what MLX raises where a file cannot be written
            raise OutputError(
                f"{place} must be a folder that can be written: got "
                f"{' '.join(str(error).split()).rstrip('.')}. Check the disk, then run "
                "again."
            ) from error
        open_checkpoint(inside)  # told before anything is replaced
    forget_replaced(place)


def _own_config(config: Mapping[str, Any], dtype: mx.Dtype) -> dict[str, Any]:
    """The ``config.json`` of float weights of a type."""
    name = _name(dtype)
    quantized = ("quantization", "quantization_config")
    own = {key: value for key, value in config.items() if key not in quantized}
    own["dtype"] = name
    if "torch_dtype" in own:
        own["torch_dtype"] = name
    text = own.get("text_config")
    if isinstance(text, Mapping):
        named = {key: name for key in ("dtype", "torch_dtype") if key in text}
        own["text_config"] = {**text, **named}
    return own


def _tensors(
    drafter: Drafter, config: Mapping[str, Any], dtype: mx.Dtype
) -> dict[str, mx.array]:
    """The tensors that a checkpoint with this config has, by their names there."""
    found = _parameters(drafter)
    expected = _parameters(Drafter(DrafterConfig.from_dict(config)))
    assert {name: array.shape for name, array in found.items()} == {
        name: array.shape for name, array in expected.items()
    }, "the drafter must be a plain one of this config"
    return {
        name: array.astype(
            dtype if mx.issubdtype(array.dtype, mx.floating) else mx.int64
        )
        for name, array in found.items()
    }


def _generation_config(
    drafter: Drafter, config: Mapping[str, Any], given: Mapping[str, Any] | None
) -> dict[str, Any]:
    settings = dict(given or {})
    if not settings:
        text = config.get("text_config", {})
        settings = {name: text[name] for name in _TOKENS if name in text}
    num_drafts = drafter.config.num_assistant_tokens
    if num_drafts is not None:
        settings["num_assistant_tokens"] = num_drafts
    return settings


def _parameters(drafter: Drafter) -> dict[str, mx.array]:
    return dict(cast(list[tuple[str, mx.array]], tree_flatten(drafter.parameters())))


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")


def _write_json(path: Path, contents: Mapping[str, Any]) -> None:
    text = json.dumps(dict(contents), indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
