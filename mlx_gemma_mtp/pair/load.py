"""Path or Hub id in, a target and a drafter known to fit out.

Knows nothing of decoding or of text.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils

from ..checkpoints.checkpoint import (
    ADAPTER_CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    Checkpoint,
    open_checkpoint,
    refuse_peft,
)
from ..checkpoints.find_drafter import find_drafter
from ..checkpoints.hub import fetch, local_path
from ..checkpoints.tokenizer import chat_templates, eos_token_ids, load_tokenizer
from ..checkpoints.weights import load_drafter, one_line, read_target
from ..cpu_kernels import compile_header
from ..distributed.patience import LOADING_S
from ..distributed.ranks import Ranks, launched, ranks_of
from ..distributed.work import working
from ..errors import MTPError, PairingError, RequestError, cut
from ..models.compatibility import check_fit
from ..models.drafter import Drafter
from ..models.sharding import shard as cut_for
from ..models.target import text_model
from ..sampling.defaults import SamplingDefaults
from .agreed import check_same
from .pair import Pair, attach

logger = logging.getLogger("mlx_gemma_mtp")

_ADAPTER_WEIGHTS = "adapters.safetensors"  # as mlx-lm calls them
_SWITCH_OFF = "speculative_decoding=False (--no-draft)"


def embedded_pair_path() -> Path:
    """Return the folder of the pair in the package; its drafter is in ``drafter/``."""
    return Path(__file__).parents[1] / "embedded"


def load_pair(
    target_path: str | Path | None = None,
    drafter_path: str | Path | Literal[False] | None = None,
    *,
    shard: bool = True,
    group: mx.distributed.Group | None = None,
) -> Pair:
    """Load a target and its drafter for decoding on token level.

    Args:
        target_path: A folder or a Hub id; None for the embedded pair.
        drafter_path: The drafter to take, a folder or a Hub id; None for the one that
            ``load`` finds, False for none.
        shard: Where several machines were launched: whether each has a part of the
            target, or all of it.
        group: These machines; None for all that were launched.

    Raises:
        CheckpointError: The target, or a drafter that was named, cannot be found or
            read.
        PairingError: A drafter that was named does not fit the target.
        RequestError: The target cannot be split over so many machines.
        RanksError: The others cannot be reached.
    """
    compile_header()
    ranks = _ranks(shard, group)
    if target_path is None:
        target_path = embedded_pair_path()
    folder = fetch(target_path)
    checkpoint = open_checkpoint(folder)
    files = _weight_files(checkpoint)
    target = _read(checkpoint, ranks)
    if drafter_path is False:
        drafter, source = None, "no drafter: drafter_path is False"
    else:
        drafter, source = _choose_drafter(
            target, target_path, folder, drafter_path, switch_off="drafter_path=False"
        )
    pair = _pair(target, checkpoint, target_path, drafter, source, files)
    _meet(ranks, pair)
    return pair


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
    shard: bool = True,
    group: mx.distributed.Group | None = None,
) -> tuple[Any, ...]:
    """Load a target with its tokenizer, and its drafter by itself.

    The drafter is looked for inside the target's folder, beside it, and on the Hub
    by the published pairing; which one was taken is logged. Where there is none, or
    the one that was found cannot be had, be read or does not fit, the model decodes
    plainly and a warning says why.

    Args:
        path_or_hf_repo: A folder or a Hub id.
        speculative_decoding: Whether to decode with a drafter.
        draft_model: The drafter to take, a folder or a Hub id.
        tokenizer_config: Arguments for the tokenizer, as in ``mlx_lm.load``.
        adapter_path: LoRA adapters for the target, as mlx-lm writes them.
        lazy: Leave the target's weights in their files until they are used.
        revision: A branch, tag or commit of the target's Hub repository.
        trust_remote_code: Let the tokenizer run code from the checkpoint. The model
            never does.
        return_config: Return the target's config as well.
        shard: Where several machines were launched (``mlx.launch``): whether each has a
            part of the target and all decode together, or each has all of it.
        group: These machines; None for all that were launched.

    Returns:
        ``(model, tokenizer)`` as ``mlx_lm.load`` returns them, or with the config
        ``(model, tokenizer, config)``. ``generate`` finds the drafter by the model.

    Raises:
        CheckpointError: The target, or a drafter that was named, cannot be found or
            read.
        PairingError: A drafter that was named does not fit the target.
        RequestError: The target cannot be split over so many machines.
        RanksError: The other machines cannot be reached.
    """
    compile_header()
    ranks = _ranks(shard, group)
    if ranks is not None and adapter_path is not None:
        raise RequestError(
            "a target on several machines must be without adapters: got adapter_path. "
            "Fuse them into the weights (mlx_lm.fuse)."
        )
    folder = fetch(path_or_hf_repo, revision)
    checkpoint = open_checkpoint(folder)
    files = _weight_files(checkpoint, adapter_path)
    target = _read(checkpoint, ranks, lazy=lazy)
    if adapter_path is not None:
        target = _with_adapters(target, adapter_path)
    templates = chat_templates(folder, tokenizer_config)
    tokenizer = load_tokenizer(
        folder,
        tokenizer_config,
        eos_token_ids(checkpoint, tokenizer_config, templates),
        trust_remote_code=trust_remote_code,
        templates=templates,
    )
    eos_ids = tuple(sorted(tokenizer.eos_token_ids))
    if speculative_decoding:
        drafter, source = _choose_drafter(target, path_or_hf_repo, folder, draft_model)
    else:
        drafter, source = None, "no drafter: speculative decoding is switched off"
    pair = _pair(target, checkpoint, path_or_hf_repo, drafter, source, files, eos_ids)
    attach(target, pair)
    _meet(ranks, pair)
    if return_config:
        return target, tokenizer, mlx_lm.utils.load_config(folder)
    return target, tokenizer


def attach_drafter(
    target: nn.Module,
    path_or_hf_repo: str | Path,
    *,
    revision: str | None = None,
    draft_model: str | Path | None = None,
) -> None:
    """Let a target that mlx-lm has loaded carry its drafter, found as ``load`` does.

    Args:
        target: What ``mlx_lm.load`` returned for a Gemma 4 checkpoint.
        path_or_hf_repo: The folder or Hub id it came from.
        revision: A branch, tag or commit of the target's Hub repository.
        draft_model: The drafter to take, a folder or a Hub id.

    Raises:
        CheckpointError: The target, or a drafter that was named, cannot be found or
            read.
        PairingError: A drafter that was named does not fit the target, or the target
            is not a Gemma 4 of mlx-lm.
    """
    folder = fetch(path_or_hf_repo, revision)
    checkpoint = open_checkpoint(folder)
    drafter, source = _choose_drafter(target, path_or_hf_repo, folder, draft_model)
    files = _weight_files(checkpoint)
    attach(target, _pair(target, checkpoint, path_or_hf_repo, drafter, source, files))


def _ranks(shard: bool, group: mx.distributed.Group | None) -> Ranks | None:
    """The machines that share a target; None for one that has all of it."""
    if not shard:
        return None
    if group is None:
        return launched()
    return None if group.size() == 1 else ranks_of(group)


def _read(
    checkpoint: Checkpoint, ranks: Ranks | None, *, lazy: bool = False
) -> nn.Module:
    """A target, or this machine's part of it."""
    if ranks is None:
        return read_target(checkpoint, lazy=lazy)
    target = read_target(checkpoint, lazy=True)
    cut_for(text_model(target), ranks)
    mx.eval(target.parameters())
    return target


def _meet(ranks: Ranks | None, pair: Pair) -> None:
    """Wait until all machines have loaded the same.

    Raises:
        RanksError: They have not.
    """
    if ranks is None:
        return
    with working(ranks):
        ranks.barrier(LOADING_S)
        check_same(ranks, pair)


def _pair(
    target: nn.Module,
    checkpoint: Checkpoint,
    path_or_hf_repo: str | Path,
    drafter: Drafter | None,
    drafter_source: str,
    files: Sequence[tuple[str, int, int]],
    eos_ids: tuple[int, ...] | None = None,
) -> Pair:
    """A pair whose target came from a checkpoint."""
    return Pair(
        target,
        drafter,
        eos_token_ids=eos_token_ids(checkpoint) if eos_ids is None else eos_ids,
        sampling_defaults=_sampling_defaults(checkpoint),
        target_source=str(path_or_hf_repo),
        drafter_source=drafter_source,
        weight_files=files,
    )


def _weight_files(
    checkpoint: Checkpoint, adapter_path: str | None = None
) -> list[tuple[str, int, int]]:
    """The state of the files that weights are about to be read from.

    It is taken before they are read: of files that are replaced meanwhile the new
    weights go by the old state, which no later process has.
    """
    paths = sorted({tensor.file for tensor in checkpoint.tensors.values()})
    if adapter_path is not None:
        adapters = _adapter_folder(adapter_path)
        paths += [adapters / ADAPTER_CONFIG_NAME, adapters / _ADAPTER_WEIGHTS]
    found = []
    for path in paths:
        with contextlib.suppress(OSError):  # reading it tells what is wrong
            status = path.stat()
            found.append((path.name, status.st_size, status.st_mtime_ns))
    return found


def _sampling_defaults(checkpoint: Checkpoint) -> SamplingDefaults:
    source = str(checkpoint.folder / GENERATION_CONFIG_NAME)
    return SamplingDefaults(checkpoint.generation_config, source)


def _match_type(drafter: Drafter, target: nn.Module) -> None:
    """Give the drafter the target's type.

    Another type would make attention convert the target's whole cache in every step.
    """
    dtype = text_model(target).model.norm.weight.dtype
    if drafter.model.norm.weight.dtype != dtype:
        drafter.set_dtype(dtype)
        mx.eval(drafter.parameters())


def _with_adapters(target: nn.Module, adapter_path: str) -> nn.Module:
    """Put mlx-lm's adapters on a target."""
    folder = _adapter_folder(adapter_path)
    refuse_peft(folder)
    next_step = f"Pass a folder with {ADAPTER_CONFIG_NAME} and {_ADAPTER_WEIGHTS}."
    with one_line(f"the adapters in {cut(folder)}", next_step):
        target = mlx_lm.utils.load_adapters(target, str(folder))
        target.eval()
    return target


def _adapter_folder(adapter_path: str) -> Path:
    return local_path(adapter_path) or Path(adapter_path)


def _choose_drafter(
    target: nn.Module,
    path_or_id: str | Path,
    folder: Path,
    draft_model: str | Path | None,
    *,
    switch_off: str = _SWITCH_OFF,
) -> tuple[Drafter | None, str]:
    """Return the drafter, if any, and a sentence about it."""
    if draft_model is not None:
        try:
            drafter = _fitting_drafter(target, draft_model)
        except PairingError as error:
            without = f"Or decode without one: {switch_off}."
            raise PairingError(f"{error} {without}") from None
        return drafter, _chosen(draft_model, "as named")
    # Nobody asks for what is found by name, and the target decodes without it.
    try:
        choice = find_drafter(path_or_id, folder)
    except MTPError as error:
        return _no_drafter(str(error))
    if choice.path_or_id is None:
        return _no_drafter(choice.reason)
    try:
        drafter = _fitting_drafter(target, choice.path_or_id)
    except MTPError as error:
        found = f"{cut(choice.path_or_id)}, {choice.reason}"
        return _no_drafter(f"{found}, cannot be used: {error}")
    return drafter, _chosen(choice.path_or_id, choice.reason)


def _fitting_drafter(target: nn.Module, path_or_id: str | Path) -> Drafter:
    """Load a drafter for a target.

    Raises:
        CheckpointError: It cannot be found or read.
        PairingError: It does not fit.
    """
    drafter = load_drafter(fetch(path_or_id))
    check_fit(target, drafter)
    _match_type(drafter, target)
    return drafter


def _chosen(path_or_id: str | Path, reason: str) -> str:
    source = f"drafter {path_or_id}: {reason}"
    logger.info("%s", source)
    return source


def _no_drafter(reason: str) -> tuple[None, str]:
    source = f"decoding without a drafter: {reason}"
    logger.warning("%s", source)
    return None, source
