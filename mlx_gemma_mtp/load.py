"""Path or Hub id in, a target and a drafter known to fit out.

mlx-lm's own loader builds the target and reads its weights; this file gives it
settings that leave nothing to its defaults, loads the drafter, and turns every
mistake into one line. Knows nothing of decoding or of text.
"""

from __future__ import annotations

import glob
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
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
from .errors import CheckpointError, PairingError
from .fit import check_fit
from .pair import Pair, attach, named_arrays
from .pairing import fetch, find_drafter
from .quantization import stored_format
from .target import text_model
from .tensor_names import unused_in_target

logger = logging.getLogger("mlx_gemma_mtp")

_SWITCH_OFF = "Or decode without one: speculative_decoding=False (--no-draft)."
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


def embedded_pair_path() -> Path:
    """Return the folder of the pair in the package; its drafter is in ``drafter/``."""
    return Path(__file__).parent / "embedded"


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
    return _load_target(open_checkpoint(folder), lazy=lazy)


def load_drafter(folder: str | Path) -> Drafter:
    """Load an MTP drafter from a local folder.

    Args:
        folder: A drafter's checkpoint, float or quantized, in either config layout.

    Raises:
        CheckpointError: The folder is damaged, is no Gemma 4 drafter, or its tensors
            do not agree with its config.
    """
    checkpoint = open_checkpoint(folder)
    source = str(checkpoint.config_path)
    config = DrafterConfig.from_dict(checkpoint.config, source=source)
    num_drafts = checkpoint.generation_config.get("num_assistant_tokens")
    if type(num_drafts) is int:
        config = replace(config, num_assistant_tokens=num_drafts)
    _check_centroid_head(checkpoint, config)
    drafter = Drafter(config)
    with one_line(f"the drafter in {folder}"):
        weights = drafter.sanitize(_read_weights(checkpoint))
        _check_token_ordering(weights, config)
        _quantize_as_stored(drafter, weights)
        drafter.eval()
        drafter.load_weights(list(weights.items()), strict=True)
        mx.eval(drafter.parameters())
    return drafter


def load_pair(
    target_path: str | Path | None = None, drafter_path: str | Path | None = None
) -> Pair:
    """Load a target and a drafter for decoding on token level.

    Args:
        target_path: A folder or a Hub id; None for the embedded pair.
        drafter_path: A folder or a Hub id. Without one the pair has no drafter,
            except for the embedded pair, which comes with its own: nothing is
            searched for here.

    Raises:
        CheckpointError: A checkpoint cannot be found or read.
        PairingError: The drafter does not fit the target.
    """
    if target_path is None:
        target_path = embedded_pair_path()
        if drafter_path is None:
            drafter_path = embedded_pair_path() / "drafter"
    checkpoint = open_checkpoint(fetch(target_path))
    target = _load_target(checkpoint, lazy=False)
    drafter, drafter_source = None, "no drafter: none was named"
    if drafter_path is not None:
        drafter = load_drafter(fetch(drafter_path))
        check_fit(target, drafter)
        _match_type(drafter, target)
        drafter_source = f"drafter {drafter_path}: as named"
    return Pair(
        target,
        drafter,
        eos_token_ids=eos_token_ids(checkpoint),
        target_source=str(target_path),
        drafter_source=drafter_source,
    )


def load(
    path_or_hf_repo: str | Path,
    *,
    speculative_decoding: bool = True,
    draft_model: str | Path | None = None,
    tokenizer_config: dict[str, Any] | None = None,
    adapter_path: str | None = None,
    lazy: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    return_config: bool = False,
) -> tuple[Any, ...]:
    """Load a target with its tokenizer, and its drafter by itself.

    The drafter is looked for inside the target's folder, beside it, and on the Hub
    by the published pairing; which one was taken is logged. Where there is none,
    the model decodes plainly and a warning says why.

    Args:
        path_or_hf_repo: A folder or a Hub id.
        speculative_decoding: Whether to decode with a drafter.
        draft_model: The drafter to take, a folder or a Hub id.
        tokenizer_config: Arguments for the tokenizer, as in ``mlx_lm.load``.
        adapter_path: LoRA adapters for the target.
        lazy: Leave the target's weights in their files until they are used.
        revision: A branch, tag or commit of the target's Hub repository.
        trust_remote_code: Let the tokenizer run code from the checkpoint. The model
            never does.
        return_config: Return the target's config as well.

    Returns:
        ``(model, tokenizer)`` as ``mlx_lm.load`` returns them, or with the config
        ``(model, tokenizer, config)``. ``generate`` finds the drafter by the model.

    Raises:
        CheckpointError: A checkpoint cannot be found or read.
        PairingError: The drafter does not fit the target, also when it was not named.
    """
    folder = fetch(path_or_hf_repo, revision)
    checkpoint = open_checkpoint(folder)
    target = _load_target(checkpoint, lazy=lazy)
    if adapter_path is not None:
        next_step = "Pass a folder with adapter_config.json and adapters.safetensors"
        with one_line(f"the adapters in {adapter_path}", next_step):
            target = mlx_lm.utils.load_adapters(target, adapter_path)
            target.eval()
    eos_ids = eos_token_ids(checkpoint)
    tokenizer = _load_tokenizer(
        folder, tokenizer_config, eos_ids, trust_remote_code=trust_remote_code
    )
    if speculative_decoding:
        drafter, source = _choose_drafter(target, path_or_hf_repo, folder, draft_model)
    else:
        drafter, source = None, "no drafter: speculative decoding is switched off"
    pair = Pair(
        target,
        drafter,
        eos_token_ids=eos_ids,
        target_source=str(path_or_hf_repo),
        drafter_source=source,
    )
    attach(target, pair)
    if return_config:
        return target, tokenizer, mlx_lm.utils.load_config(folder)
    return target, tokenizer


def eos_token_ids(checkpoint: Checkpoint) -> tuple[int, ...]:
    """Return the token ids that end a text.

    Args:
        checkpoint: A target's checkpoint. ``generation_config.json`` counts before
            ``config.json``, which names fewer of them in published checkpoints.

    Raises:
        CheckpointError: They are something else than integers.
    """
    text = checkpoint.config.get("text_config")
    places = [checkpoint.generation_config, checkpoint.config]
    places.append(text if isinstance(text, dict) else {})
    found: Any = None
    for place in places:
        found = place.get("eos_token_id") if found is None else found
    ids = [] if found is None else found if isinstance(found, list) else [found]
    if not all(type(token) is int and token >= 0 for token in ids):
        raise CheckpointError(
            f"eos_token_id in {checkpoint.folder} must be an integer or a list of "
            f"them: got {found!r}. Fetch generation_config.json and config.json again."
        )
    return tuple(ids)


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


def _load_target(checkpoint: Checkpoint, *, lazy: bool) -> nn.Module:
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
    for name, array in named_arrays(model):
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


def _match_type(drafter: Drafter, target: nn.Module) -> None:
    """Give the drafter the target's type.

    Another type would make attention convert the target's whole cache in every step.
    """
    dtype = text_model(target).model.norm.weight.dtype
    if drafter.model.norm.weight.dtype != dtype:
        drafter.set_dtype(dtype)
        mx.eval(drafter.parameters())


def _choose_drafter(
    target: nn.Module,
    path_or_id: str | Path,
    folder: Path,
    draft_model: str | Path | None,
) -> tuple[Drafter | None, str]:
    """Return the drafter, if any, and a sentence about it."""
    if draft_model is not None:
        chosen, reason = str(draft_model), "as named"
        drafter_folder = fetch(draft_model)
    else:
        choice = find_drafter(path_or_id, folder)
        if choice.path_or_id is None:
            return _no_drafter(choice.reason)
        chosen, reason = choice.path_or_id, choice.reason
        try:
            drafter_folder = fetch(chosen)
        except CheckpointError as error:
            # Nobody asked for this one by name, and the target decodes without it.
            return _no_drafter(f"{reason} is out of reach: {error}")
    drafter = load_drafter(drafter_folder)
    try:
        check_fit(target, drafter)
    except PairingError as error:
        raise PairingError(f"{error} {_SWITCH_OFF}") from None
    _match_type(drafter, target)
    source = f"drafter {chosen}: {reason}"
    logger.info("%s", source)
    return drafter, source


def _no_drafter(reason: str) -> tuple[None, str]:
    source = f"decoding without a drafter: {reason}"
    logger.warning("%s", source)
    return None, source


def _load_tokenizer(
    folder: Path,
    tokenizer_config: dict[str, Any] | None,
    eos_ids: tuple[int, ...],
    *,
    trust_remote_code: bool,
) -> Any:
    extra = {"trust_remote_code": True} if trust_remote_code else {}
    next_step = "Copy tokenizer.json and tokenizer_config.json of the same model there"
    with one_line(f"the tokenizer in {folder}", next_step):
        return mlx_lm.utils.load_tokenizer(
            folder, {**extra, **(tokenizer_config or {})}, list(eos_ids) or None
        )


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
