"""A checkpoint's weights into modules: mlx-lm's target and this package's drafter.

mlx-lm's own loader builds the target and reads its weights; this file gives it settings
that leave nothing to its defaults, reads the drafter, and turns every mistake into one
line. Knows nothing of pairs, of the Hub or of tokenizers.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
from mlx.utils import tree_flatten
from mlx_lm.models import gemma4, gemma4_text

from .checkpoint import Checkpoint, open_checkpoint
from .config import (
    TARGET_MODEL_TYPES,
    DrafterConfig,
    check_model_type,
    check_target,
    quantization_map,
    text_config,
)
from .drafter import Drafter
from .errors import CheckpointError
from .quantization import stored_format
from .tensor_names import unused_in_target

_SAME_CHECKPOINT = "Take config.json and weights from the same checkpoint"
_MAX_NAMED_TENSORS = 4


class _Target(gemma4.Model):
    """mlx-lm's target, which here also drops the parts that text does not use."""

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        kept = _text_weights(weights, self.language_model.args)
        return super().sanitize(kept)


class _TextTarget(gemma4_text.Model):
    """The same for checkpoints that hold the text model alone."""

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        return super().sanitize(_text_weights(weights, self.args))


def load_target(folder: str | Path, *, lazy: bool = False) -> nn.Module:
    """Load a target from a local folder with mlx-lm's loader.

    Args:
        folder: A checkpoint of any Gemma 4 family, float or quantized by mlx-lm,
            in either config layout.
        lazy: Leave the weights in their files until they are used.

    Returns:
        A ``mlx_lm.models.gemma4.Model``, or a ``gemma4_text.Model`` if the
        checkpoint holds the text model alone.

    Raises:
        CheckpointError: The folder is damaged, is no Gemma 4 target, or its tensors
            do not agree with its config.
    """
    return read_target(open_checkpoint(folder), lazy=lazy)


def load_drafter(folder: str | Path) -> Drafter:
    """Load an MTP drafter from a local folder.

    Args:
        folder: A drafter's checkpoint, float or quantized, in either config layout.

    Raises:
        CheckpointError: The folder is damaged, is no Gemma 4 drafter, or its tensors
            do not agree with its config.
    """
    checkpoint = open_checkpoint(folder)
    drafter = drafter_skeleton(checkpoint)
    config = drafter.config
    _check_centroid_head(checkpoint, config)
    with one_line(f"the drafter in {folder}"):
        weights = drafter.sanitize(_read_weights(checkpoint))
        _check_token_ordering(weights, config)
        _quantize_as_stored(drafter, weights)
        drafter.eval()
        drafter.load_weights(list(weights.items()), strict=True)
        mx.eval(drafter.parameters())
    return drafter


def target_settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what mlx-lm must read in a target's config, either layout.

    Args:
        checkpoint: A target's checkpoint.

    Returns:
        Keys and values to put over those of ``config.json``. ``model_type`` is
        ``gemma4``, or ``gemma4_text`` if the checkpoint holds the text model alone,
        whose settings then stand beside it instead of in ``text_config``.

    Raises:
        CheckpointError: No Gemma 4 target, or settings that none can have.
    """
    source = str(checkpoint.config_path)
    kind = check_model_type(checkpoint.config, TARGET_MODEL_TYPES, source=source)
    text = text_config(checkpoint.config, source=source)
    check_target(text, source=source)
    if kind.endswith("_text"):
        return {**text, "text_config": {}}
    # mlx-lm's gemma4.ModelArgs would put its own vocab_size over the text model's, so
    # it is named outside too.
    vocab_size = text["vocab_size"]
    return {"model_type": "gemma4", "text_config": text, "vocab_size": vocab_size}


def target_skeleton(checkpoint: Checkpoint) -> nn.Module:
    """Return a target's model as mlx-lm builds it, without reading a weight.

    Args:
        checkpoint: A target's checkpoint, of which only the config counts.

    Returns:
        A float ``gemma4.Model`` or ``gemma4_text.Model`` whose parameters are lazy:
        good for names and shapes, and to put weights in.

    Raises:
        CheckpointError: The config is no Gemma 4 target's.
    """
    settings = target_settings(checkpoint)
    is_text_only = settings["model_type"] == "gemma4_text"
    module = gemma4_text if is_text_only else gemma4
    with one_line(f"the target in {checkpoint.folder}"):
        model: nn.Module = module.Model(module.ModelArgs.from_dict(settings))
    return model


def drafter_skeleton(checkpoint: Checkpoint) -> Drafter:
    """Return a drafter without reading a weight: its parameters are lazy.

    Args:
        checkpoint: The drafter, of which only the configs count.

    Raises:
        CheckpointError: The config is no drafter's.
    """
    source = str(checkpoint.config_path)
    config = DrafterConfig.from_dict(checkpoint.config, source=source)
    num_drafts = checkpoint.generation_config.get("num_assistant_tokens")
    if type(num_drafts) is int:
        config = replace(config, num_assistant_tokens=num_drafts)
    with one_line(f"the drafter in {checkpoint.folder}"):
        return Drafter(config)


def read_target(checkpoint: Checkpoint, *, lazy: bool) -> nn.Module:
    """Load a target whose headers have been read, with mlx-lm's loader.

    Args:
        checkpoint: The target.
        lazy: Leave the weights in their files until they are used.

    Raises:
        CheckpointError: It is no Gemma 4 target, or its tensors do not agree with its
            config.
    """
    folder, settings = checkpoint.folder, target_settings(checkpoint)
    is_text_only = settings["model_type"] == "gemma4_text"
    # mlx-lm reads config.json again and lets these keys win.
    settings["quantization"] = _target_quantization(checkpoint)
    settings["quantization_config"] = settings["quantization"]
    settings["model_file"] = None  # never code from the checkpoint
    if glob.escape(str(folder)) != str(folder):  # mlx-lm globs for the weights
        raise CheckpointError(
            f"the path {folder} must be free of * ? and [: got one of them. Rename or "
            "link the folder."
        )
    with one_line(f"the target in {folder}"):
        model, _ = mlx_lm.utils.load_model(
            folder,
            lazy=lazy,
            strict=True,
            model_config=settings,
            get_model_classes=_text_classes if is_text_only else _target_classes,
        )
    _check_device(model, folder)
    # The subclass has done its work: what the caller gets is mlx-lm's own model.
    model.__class__ = gemma4_text.Model if is_text_only else gemma4.Model
    return model


def _check_device(model: nn.Module, folder: Path) -> None:
    """Refuse what MLX's CPU backend cannot run, before a generation fails on it."""
    if mx.default_device() != mx.Device(mx.cpu):
        return
    half = (mx.bfloat16, mx.float16)
    parameters: Any = tree_flatten(model.parameters())
    for name, array in parameters:
        if "switch_glu" in name and name.endswith(".weight") and array.dtype in half:
            raise CheckpointError(
                f"{name} in {folder} must be float32 or quantized on the CPU: got "
                f"{array.dtype}. Quantize it (mlx_lm.convert -q), or use a GPU."
            )


def _target_classes(config: dict[str, Any]) -> tuple[type, type]:
    return _Target, gemma4.ModelArgs


def _text_classes(config: dict[str, Any]) -> tuple[type, type]:
    return _TextTarget, gemma4_text.ModelArgs


def _target_quantization(checkpoint: Checkpoint) -> dict[str, Any] | None:
    source = str(checkpoint.config_path)
    quantization = quantization_map(checkpoint.config, source=source)
    has_scales = any(name.endswith(".scales") for name in checkpoint.tensors)
    if quantization is None and has_scales:
        # The config lost its map. mlx-lm takes what the map does not name from the
        # shapes, and these defaults only switch that on.
        return {"group_size": 64, "bits": 4}
    return quantization


def _text_weights(
    weights: Mapping[str, mx.array], args: gemma4_text.ModelArgs
) -> dict[str, mx.array]:
    """Drop what the text model has no use for, in either naming of the tensors."""
    first_shared = args.num_hidden_layers - args.num_kv_shared_layers
    is_tied = args.tie_word_embeddings
    return {
        name: array
        for name, array in weights.items()
        if not unused_in_target(name, first_shared_layer=first_shared, is_tied=is_tied)
    }


def _read_weights(checkpoint: Checkpoint) -> dict[str, mx.array]:
    weights: dict[str, mx.array] = {}
    for file in sorted({tensor.file for tensor in checkpoint.tensors.values()}):
        loaded = mx.load(str(file))
        assert isinstance(loaded, dict)  # of a safetensors file it always is
        weights.update(loaded)
    return weights


def _check_centroid_head(checkpoint: Checkpoint, config: DrafterConfig) -> None:
    """Hold ``use_ordered_embeddings`` against the tensors that are there."""
    for name in ("centroids.weight", "token_ordering"):
        is_there = f"masked_embedding.{name}" in checkpoint.tensors
        if is_there != config.use_ordered_embeddings:
            raise CheckpointError(
                f"masked_embedding.{name} in {checkpoint.folder} must be "
                f"{'absent' if is_there else 'there'}, as config.json says "
                f"use_ordered_embeddings {config.use_ordered_embeddings}: got "
                f"{'it' if is_there else 'no such tensor'}. {_SAME_CHECKPOINT}."
            )


def _check_token_ordering(weights: dict[str, mx.array], config: DrafterConfig) -> None:
    """Check that the centroid head's token ids are each id once.

    An id outside the vocabulary would read foreign memory in a gather.
    """
    if not config.use_ordered_embeddings:
        return
    ordering = weights["masked_embedding.token_ordering"]
    every_id = mx.arange(config.text_config["vocab_size"], dtype=ordering.dtype)
    if not mx.array_equal(mx.sort(ordering.flatten()), every_id):
        raise ValueError("masked_embedding.token_ordering is no order of all token ids")


def _quantize_as_stored(drafter: Drafter, weights: Mapping[str, mx.array]) -> None:
    """Quantize the modules whose tensors are, each as its shapes say."""

    def stored(path: str, module: nn.Module) -> bool | dict[str, Any]:
        is_quantized = f"{path}.scales" in weights
        if not is_quantized or not isinstance(module, (nn.Linear, nn.Embedding)):
            return False
        weight, scales = weights[f"{path}.weight"], weights[f"{path}.scales"]
        found = None
        if weight.dtype == mx.uint32:
            found = stored_format(
                module.weight.shape[-1],
                num_words=weight.shape[-1],
                num_scales=scales.shape[-1],
                has_byte_scales=scales.dtype == mx.uint8,
            )
        if found is None:
            raise ValueError(
                f"{path} has {weight.dtype} {weight.shape} with scales {scales.dtype} "
                f"{scales.shape}"
            )
        return found.as_config()

    nn.quantize(drafter, class_predicate=stored)


@contextmanager
def one_line(what: str, next_step: str = _SAME_CHECKPOINT) -> Iterator[None]:
    """Turn whatever a library raises on a checkpoint into one line.

    Args:
        what: What is being read, for the message.
        next_step: What the user can do about it.

    Raises:
        CheckpointError: Whatever was raised inside, as one line.
    """
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{what} must be complete and of one piece with its config: got "
            f"{_summary(error)}. {next_step}, or download it again."
        ) from error


def _summary(error: Exception) -> str:
    """Shorten a library's message: one line, only the first few tensors by name."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    names = [line.rstrip(",.") for line in lines[1:]]
    num_unnamed = len(names) - _MAX_NAMED_TENSORS
    if num_unnamed > 0:
        names = [*names[:_MAX_NAMED_TENSORS], f"and {num_unnamed} more"]
    text = " ".join([*lines[:1], ", ".join(names)]).strip().rstrip(".")
    return text if len(text) <= 400 else f"{text[:397]}..."
