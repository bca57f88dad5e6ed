"""A checkpoint's weights into modules: mlx-lm's target and this package's drafter.

mlx-lm's own loader builds the target and reads its weights; this file gives it settings
that leave nothing to its defaults, reads the drafter, and turns every mistake into one
line. Knows nothing of pairs, of the Hub or of tokenizers.
"""

from __future__ import annotations

import glob
import inspect
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
from mlx_lm.models.switch_layers import SwitchLinear

from ..constants import TARGET_MODEL_TYPES
from ..errors import CheckpointError, cut
from ..models.drafter import Drafter
from ..models.drafter_config import DrafterConfig
from ..models.tensor_names import (
    TOKEN_ORDERING,
    Names,
    drafter_names,
    head_copies,
    target_names,
)
from ..models.text_config import check_model_type, check_target, text_config
from .checkpoint import SAME_CHECKPOINT, Checkpoint, have_same_data, open_checkpoint
from .packing import check_packing, next_step, stored_formats
from .quantization import Format

_MAX_NAMED_TENSORS = 4


class _Target(gemma4.Model):
    """mlx-lm's target, which here reads the names of every program, and text alone."""

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        args = self.language_model.args
        return super().sanitize(_parameters(weights, args, is_text_only=False))


class _TextTarget(gemma4_text.Model):
    """The same for checkpoints that hold the text model alone."""

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        return super().sanitize(_parameters(weights, self.args, is_text_only=True))


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
    check_packing(checkpoint)
    names = drafter_names(checkpoint.tensors)
    _check_centroid_head(checkpoint, names, config)
    formats = stored_formats(checkpoint, names, parameter_shapes(drafter))
    with one_line(f"the drafter in {cut(folder)}", next_step(checkpoint)):
        weights = drafter.sanitize(_read_weights(checkpoint))
        _check_token_ordering(weights, config)
        nn.quantize(drafter, class_predicate=as_stored(formats))
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
    with one_line(f"the target in {cut(checkpoint.folder)}"):
        model: nn.Module = module.Model(module.ModelArgs.from_dict(settings))
    return model


def parameter_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shape of each parameter of a model by its name.

    Args:
        model: Any model, such as a skeleton.
    """
    leaves: Any = tree_flatten(model.parameters())
    return {name: tuple(array.shape) for name, array in leaves}


def as_stored(formats: Mapping[str, Format]) -> Any:
    """Return what tells ``nn.quantize`` the formats of a checkpoint.

    Args:
        formats: Module path to format, as from ``stored_formats()``.
    """

    def predicate(path: str, module: nn.Module) -> bool | dict[str, Any]:
        return formats[path].as_config() if path in formats else False

    return predicate


def drafter_skeleton(checkpoint: Checkpoint) -> Drafter:
    """Return a drafter without reading a weight: its parameters are lazy.

    Args:
        checkpoint: The drafter, of which only the configs count.

    Raises:
        CheckpointError: The config is no drafter's.
    """
    source = str(checkpoint.config_path)
    settings = checkpoint.config
    if _repeats_embedding(checkpoint):
        settings = {**settings, "tie_word_embeddings": True}
    config = DrafterConfig.from_dict(settings, source=source)
    num_drafts = checkpoint.generation_config.get("num_assistant_tokens")
    if type(num_drafts) is int:
        config = replace(config, num_assistant_tokens=num_drafts)
    with one_line(f"the drafter in {cut(checkpoint.folder)}"):
        return Drafter(config)


def _repeats_embedding(checkpoint: Checkpoint) -> bool:
    """Tell whether a drafter stores a head that is nothing but its embedding again."""
    tensors = checkpoint.tensors
    copies = head_copies(tensors)
    return bool(copies) and all(
        embedding in tensors and have_same_data(tensors[head], tensors[embedding])
        for head, embedding in copies.items()
    )


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
    check_packing(checkpoint)
    # mlx-lm reads config.json again and lets these keys win.
    settings["quantization"] = _quantization(checkpoint, settings)
    settings["quantization_config"] = settings["quantization"]
    settings["model_file"] = None  # never code from the checkpoint
    if glob.escape(str(folder)) != str(folder):  # mlx-lm globs for the weights
        raise CheckpointError(
            f"the path {cut(folder)} must be free of * ? and [: got one of "
            "them. Rename or link the folder."
        )
    with one_line(f"the target in {cut(folder)}", next_step(checkpoint)):
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
    where = cut(folder)
    half = (mx.bfloat16, mx.float16)
    parameters: Any = tree_flatten(model.parameters())
    for name, array in parameters:
        if "switch_glu" in name and name.endswith(".weight") and array.dtype in half:
            raise CheckpointError(
                f"{name} in {where} must be float32 or quantized on the CPU: got "
                f"{array.dtype}. Quantize it (mlx_lm.convert -q), or use a GPU."
            )
        if name.endswith(".global_scale"):
            raise CheckpointError(
                f"the experts in {where} must be without global_scale on the CPU: got "
                f"{name}. Use a GPU, or quantize the float checkpoint."
            )


def _target_classes(config: dict[str, Any]) -> tuple[type, type]:
    return _Target, gemma4.ModelArgs


def _text_classes(config: dict[str, Any]) -> tuple[type, type]:
    return _TextTarget, gemma4_text.ModelArgs


def _quantization(
    checkpoint: Checkpoint, settings: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Return mlx-lm's quantization map of a target, None for float weights.

    It names every matrix, so that mlx-lm has nothing to guess.
    """
    is_text_only = settings["model_type"] == "gemma4_text"
    text = settings if is_text_only else settings["text_config"]
    names = target_names(checkpoint.tensors, text, is_text_only=is_text_only)
    shapes = parameter_shapes(target_skeleton(checkpoint))
    formats = stored_formats(checkpoint, names, shapes)
    if not formats:
        return None
    has_global_scale = any(found.has_global_scale for found in formats.values())
    known = inspect.signature(SwitchLinear.to_quantized).parameters
    if has_global_scale and "global_scale" not in known:
        raise CheckpointError(
            f"the experts in {cut(checkpoint.folder)} must be without "
            "global_scale for this mlx-lm: got some. Update it (0.32.2 reads them)."
        )
    # The first three keys are mlx-lm's defaults, which no matrix is left to take.
    entries = {path: found.as_config() for path, found in formats.items()}
    return {**Format(4, 64).as_config(), **entries}


def _parameters(
    weights: Mapping[str, mx.array], args: gemma4_text.ModelArgs, *, is_text_only: bool
) -> dict[str, mx.array]:
    """Turn checkpoint tensors of any naming into the parameters of mlx-lm's model."""
    names = target_names(weights, vars(args), is_text_only=is_text_only)
    return {
        name: mx.contiguous(
            mx.split(weights[share.tensor], share.count, axis=-2)[share.index]
        )
        if share.count > 1
        else weights[share.tensor]
        for name, share in names.parameters.items()
    }


def _read_weights(checkpoint: Checkpoint) -> dict[str, mx.array]:
    weights: dict[str, mx.array] = {}
    for file in sorted({tensor.file for tensor in checkpoint.tensors.values()}):
        loaded = mx.load(str(file))
        assert isinstance(loaded, dict)  # of a safetensors file it always is
        weights.update(loaded)
    return weights


def _check_centroid_head(
    checkpoint: Checkpoint, names: Names, config: DrafterConfig
) -> None:
    """Hold ``use_ordered_embeddings`` against the tensors that are there."""
    for name in ("masked_embedding.centroids.weight", TOKEN_ORDERING):
        is_there = name in names.parameters
        if is_there != config.use_ordered_embeddings:
            raise CheckpointError(
                f"{name} in {cut(checkpoint.folder)} must be "
                f"{'absent' if is_there else 'there'}, as config.json says "
                f"use_ordered_embeddings {config.use_ordered_embeddings}: got "
                f"{'it' if is_there else 'no such tensor'}. {SAME_CHECKPOINT}"
            )


def _check_token_ordering(weights: dict[str, mx.array], config: DrafterConfig) -> None:
    """Check that the centroid head's token ids are each id once.

    An id outside the vocabulary would read foreign memory in a gather.
    """
    if not config.use_ordered_embeddings:
        return
    ordering = weights[TOKEN_ORDERING]
    every_id = mx.arange(config.text_config["vocab_size"], dtype=ordering.dtype)
    if not mx.array_equal(mx.sort(ordering.flatten()), every_id):
        raise ValueError(f"{TOKEN_ORDERING} is no order of all token ids")


@contextmanager
def one_line(what: str, next_step: str = SAME_CHECKPOINT) -> Iterator[None]:
    """Turn whatever a library raises on a checkpoint into one line.

    Args:
        what: What is being read, for the message.
        next_step: What the user can do about it, a sentence.

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
            f"{_summary(error)}. {next_step}"
        ) from error


def _summary(error: Exception) -> str:
    """Shorten a library's message: one line, only the first few tensors by name."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    names = [line.rstrip(",.") for line in lines[1:]]
    num_unnamed = len(names) - _MAX_NAMED_TENSORS
    if num_unnamed > 0:
        names = [*names[:_MAX_NAMED_TENSORS], f"and {num_unnamed} more"]
    text = " ".join([*lines[:1], ", ".join(names)]).strip().rstrip(".")
    return text if len(text) <= 240 else f"{text[:237]}..."
