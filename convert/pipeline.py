"""The conversion from start to end: plan, write, verify, compare, publish.

``plan_conversion()`` finds every mistake that can be found before the first byte is
written; ``convert()`` does the work. Nothing is printed here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from mlx_gemma_mtp.checkpoints.checkpoint import (
    CONFIG_NAME,
    INDEX_NAME,
    open_checkpoint,
)
from mlx_gemma_mtp.checkpoints.find_drafter import find_drafter
from mlx_gemma_mtp.checkpoints.hub import DRAFTER_FOLDERS
from mlx_gemma_mtp.checkpoints.quantization import Format
from mlx_gemma_mtp.checkpoints.staging import (
    check_free_space,
    check_place,
    forget_replaced,
    staged,
)
from mlx_gemma_mtp.checkpoints.tokenizer import eos_token_ids
from mlx_gemma_mtp.checkpoints.weights import drafter_skeleton, target_skeleton
from mlx_gemma_mtp.errors import (
    CheckpointError,
    OutputError,
    PairingError,
    RequestError,
)
from mlx_gemma_mtp.models.compatibility import check_fit

from . import safetensors
from .card import is_card, write_card
from .divergence import Divergence, compare
from .manifest import (
    manifest,
    part_entry,
    read_manifest,
    read_origin,
    read_training,
    written_manifest,
)
from .plan import PartPlan
from .planner import (
    check_not_stored,
    plan_drafter,
    plan_target,
)
from .progress import Progress, silent
from .quantize import default_format
from .request import AUTO, NONE, PartRequest, Request
from .sources import Source, open_source
from .stream import verify, write_part
from .tokenizer import check_tokenizer, complete_ends, copy_files, copy_tokenizer

DRAFTER_FOLDER = DRAFTER_FOLDERS[0]
_ALONE = "Or convert the target alone: --draft-model none."


@dataclass(frozen=True)
class Part:
    """One checkpoint of a conversion.

    Attributes:
        source: Where it comes from.
        plan: What happens to it.
        folder: Where it goes inside the pair's folder, ``"."`` or ``"drafter"``.
        training: How it was trained, None where nothing says.
    """

    source: Source
    plan: PartPlan
    folder: str
    training: dict[str, Any] | None = None


@dataclass(frozen=True)
class Conversion:
    """A checked plan of the whole.

    Attributes:
        request: What was asked for.
        target: The target's part.
        drafter: The drafter's, None without one.
        pairing: Why this drafter, or why none.
        is_in_place: Whether only the drafter is added to the target's folder.
    """

    request: Request
    target: Part
    drafter: Part | None
    pairing: str
    is_in_place: bool

    @property
    def parts(self) -> tuple[Part, ...]:
        """The target, and the drafter if there is one."""
        return (self.target,) if self.drafter is None else (self.target, self.drafter)

    @property
    def written(self) -> tuple[Part, ...]:
        """The parts that are written."""
        return self.parts[1:] if self.is_in_place else self.parts

    @property
    def place(self) -> Path:
        """The folder that appears at the end."""
        place = self.request.mlx_path.absolute()
        return place / DRAFTER_FOLDER if self.is_in_place else place

    @property
    def num_bytes(self) -> int:
        """Bytes of weights that are written."""
        return sum(part.plan.num_bytes for part in self.written)


def plan_conversion(request: Request, *, headers_only: bool = False) -> Conversion:
    """Look at everything before anything is written.

    What has to come from the Hub is planned from its headers first, so that most
    mistakes are told before the weights are fetched.

    Args:
        request: What is asked for.
        headers_only: Be content with the headers of the weights, for a plan alone.

    Raises:
        CheckpointError: A checkpoint cannot be found or its tensors are not right.
        PairingError: The drafter does not fit the target.
        RequestError: Settings that do not go with these checkpoints.
        OutputError: The place is taken or too small.
    """
    conversion = _plan(request, headers_only=True)
    if headers_only:
        return conversion
    _check_output(conversion)
    conversion = _plan(request, headers_only=False)
    _check_sources_stay(conversion)
    if not conversion.is_in_place:
        plan = conversion.target.plan
        vocab_size = plan.config["vocab_size"]
        check_tokenizer(conversion.target.source.folder, vocab_size=vocab_size)
    return conversion


def convert(conversion: Conversion, *, progress: Progress = silent) -> Divergence | str:
    """Carry a plan out.

    Args:
        conversion: The plan, made with all weights at hand.
        progress: Told what is done.

    Returns:
        How far the result is from the source, or why that was not measured.

    Raises:
        CheckpointError: A tensor cannot be read or is not finite.
        OutputError: The result cannot be written or does not read back.
    """
    place, is_in_place = conversion.place, conversion.is_in_place
    with (
        ExitStack() as published,
        staged(place, force=conversion.request.is_forced) as folder,
    ):
        # 1) write
        digests: dict[str, Any] = {}
        for part in conversion.written:
            inside = folder if is_in_place else folder / part.folder
            written = _write(part, inside, progress)
            digests.update({_join(part.folder, k): v for k, v in written.items()})
        # 2) compare
        divergence = _compare(conversion, folder, progress)
        # 3) describe
        contents = _manifest(conversion, digests)
        if is_in_place:  # its manifest is replaced once the drafter stands there
            published.enter_context(written_manifest(place.parent, contents))
        else:
            _describe(conversion, folder)
            with written_manifest(folder, contents):
                pass
    forget_replaced(place)
    if is_in_place and is_card(place.parent):
        _describe(conversion, place.parent)
    return divergence


def _plan(request: Request, *, headers_only: bool) -> Conversion:
    target, is_in_place = _plan_target(request, headers_only=headers_only)
    try:
        drafter, pairing = _plan_drafter(request, target, headers_only=headers_only)
        if drafter is not None:
            model = target_skeleton(target.source.checkpoint)
            check_fit(model, drafter_skeleton(drafter.source.checkpoint))
    except (CheckpointError, PairingError) as error:
        if request.draft_model != AUTO:
            raise
        # Whoever named none can go on without the one that was found.
        raise type(error)(f"{error} {_ALONE}") from error
    if is_in_place and drafter is None:
        raise RequestError(
            f"--mlx-path must be another folder than --hf-path to convert a target "
            f"alone: got {request.mlx_path} for both. Nothing is to be done there."
        )
    if is_in_place and drafter is not None:
        standing = request.mlx_path / DRAFTER_FOLDER
        if _is_same(standing, drafter.source.folder):
            raise RequestError(
                f"{request.mlx_path} must get another drafter than its own: got "
                f"{standing}. Name one with --draft-model."
            )
    eos_token_ids(target.source.checkpoint)  # a wrong one could not be loaded
    return Conversion(request, target, drafter, pairing, is_in_place)


def _plan_target(request: Request, *, headers_only: bool) -> tuple[Part, bool]:
    """Return the target's part, and whether it stays where it is."""
    source = open_source(
        request.hf_path, revision=request.revision, headers_only=headers_only
    )
    if _is_same(request.mlx_path, source.folder):
        plan = plan_target(source.checkpoint, None, dtype=None)
        is_renamed = any(p.name != p.tensor for p in plan.parameters)
        is_changed = request.target != PartRequest() or request.is_dequantized
        if is_renamed or is_changed or request.dtype is not None:
            _fail_in_place(request)
        return Part(source, plan, "."), True
    plan = plan_target(
        source.checkpoint,
        _base(request, request.target, source),
        dtype=request.dtype,
        is_dequantized=request.is_dequantized,
    )
    if request.target.is_explicit:
        check_not_stored(plan, "-q, --no-quantize and the --q flags")
    return Part(source, plan, "."), False


def _plan_drafter(
    request: Request, target: Part, *, headers_only: bool
) -> tuple[Part | None, str]:
    """Return the drafter's part, if any, and how it was chosen."""
    if request.draft_model == NONE:
        return None, "no drafter, as asked for"
    chosen, pairing = request.draft_model, "as named"
    if chosen == AUTO:
        choice = find_drafter(request.hf_path, target.source.folder)
        if choice.path_or_id is None:
            raise CheckpointError(choice.reason)
        chosen, pairing = choice.path_or_id, choice.reason
    source = open_source(
        chosen, revision=request.draft_revision, headers_only=headers_only
    )
    plan = plan_drafter(
        source.checkpoint,
        _base(request, request.drafter, source),
        dtype=request.dtype,
        is_dequantized=request.is_dequantized,
    )
    if request.drafter.is_explicit:
        check_not_stored(plan, "the --draft-q flags and --no-draft-quantize")
    training = read_training(source.folder)
    return Part(source, plan, DRAFTER_FOLDER, training), pairing


def _base(request: Request, part: PartRequest, source: Source) -> Format | None:
    if part.is_quantized is False or request.is_dequantized:
        return None
    return part.format or default_format(source.checkpoint.config)


def _check_output(conversion: Conversion) -> None:
    check_place(conversion.place, force=conversion.request.is_forced)
    check_free_space(conversion.place, conversion.num_bytes)


def _write(part: Part, folder: Path, progress: Progress) -> dict[str, Any]:
    """Write one part and read it back; return size and SHA-256 of its files."""
    folder.mkdir(exist_ok=True)
    plan = part.plan
    files = safetensors.lay_out(plan.arrays)
    with progress(f"converting the {plan.part}", plan.num_source_bytes) as advance:
        regions = write_part(plan, files, folder, progress=advance)
    _write_json(folder / CONFIG_NAME, dict(sorted(plan.config.items())))
    index = safetensors.index(files, num_weights=plan.num_weights)
    _write_json(folder / INDEX_NAME, index)
    if part.folder == ".":
        copy_tokenizer(part.source.folder, folder)
        complete_ends(folder)
    else:
        copy_files(part.source.folder, folder, ("generation_config.json",))
    num_bytes = sum(file.num_bytes for file in files)
    with progress(f"verifying the {plan.part}", num_bytes) as advance:
        _check_headers(plan, folder)
        digests = verify(regions, files, folder, progress=advance)
    sizes = {file.name: file.num_bytes for file in files}
    return {name: {"bytes": sizes[name], "sha256": digests[name]} for name in sizes}


def _check_headers(plan: PartPlan, folder: Path) -> None:
    """Open what was written as a checkpoint and hold it against the plan."""
    found = open_checkpoint(folder).tensors
    expected = {array.name: (array.dtype, array.shape) for array in plan.arrays}
    if {name: (info.dtype, info.shape) for name, info in found.items()} != expected:
        raise OutputError(
            f"{folder} must read back as it was planned: got other tensors. Check the "
            "disk, then run again."
        )


def _compare(
    conversion: Conversion, folder: Path, progress: Progress
) -> Divergence | str:
    """Compare source and result on a short text, where that is wanted."""
    if not conversion.request.has_check:
        return "not compared, as asked for (--no-check)"
    source = [part.source.folder for part in conversion.parts]
    if conversion.is_in_place:
        return compare(source, [source[0], folder], progress=progress)
    result = [folder / part.folder for part in conversion.parts]
    return compare(source, result, progress=progress)


def _manifest(conversion: Conversion, digests: Mapping[str, Any]) -> dict[str, Any]:
    """Return the manifest; in place, what an older one says of the target stays."""
    entries = [
        part_entry(
            part.plan,
            source=part.source.name,
            revision=part.source.revision,
            path=part.folder,
            training=part.training,
        )
        for part in conversion.parts
    ]
    files: dict[str, Any] = {}
    place = conversion.target.source.folder
    if conversion.is_in_place and read_origin(place) is not None:
        older = read_manifest(place)
        known = older.get("files")
        files = {
            name: entry
            for name, entry in (known if isinstance(known, dict) else {}).items()
            if not name.startswith(f"{DRAFTER_FOLDER}/")
        }
        entries[0] = older["target"]
    return manifest(
        entries[0],
        entries[1] if len(entries) > 1 else None,
        pairing=conversion.pairing,
        files={**files, **digests},
    )


def _describe(conversion: Conversion, folder: Path) -> None:
    parts = [(part.source, part.plan) for part in conversion.parts]
    write_card(
        folder,
        parts[0],
        parts[1] if len(parts) > 1 else None,
        name=conversion.request.name or conversion.request.mlx_path.absolute().name,
    )


def _check_sources_stay(conversion: Conversion) -> None:
    """Refuse to replace a folder that is being read, by whatever path."""
    for part in conversion.written:
        files = {tensor.file for tensor in part.source.checkpoint.tensors.values()}
        for path in (part.source.folder, *files):
            resolved = path.resolve()
            if any(
                _is_same(conversion.place, p) for p in (resolved, *resolved.parents)
            ):
                raise OutputError(
                    f"{conversion.place} must not hold what is converted: got {path} "
                    "inside it. Take another --mlx-path."
                )


def _fail_in_place(request: Request) -> NoReturn:
    raise RequestError(
        f"--mlx-path must be another folder than --hf-path: got {request.mlx_path} for "
        "both. Only a drafter can be added to a folder, and only if its target is in "
        "MLX's format already and stays as it is (no --q flags, no --dtype, no "
        "--dequantize)."
    )


def _is_same(place: Path, folder: Path) -> bool:
    return all(map(os.path.exists, (place, folder))) and place.samefile(folder)


def _join(folder: str, name: str) -> str:
    return name if folder == "." else f"{folder}/{name}"


def _write_json(path: Path, contents: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(contents, indent=4) + "\n", encoding="utf-8")
