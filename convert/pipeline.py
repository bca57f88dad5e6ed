"""The conversion from start to end: plan, write, verify, compare, publish.

``plan_conversion()`` reads headers only and finds every mistake that headers can tell;
``convert()`` does the work. Nothing is printed here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_gemma_mtp.checkpoint import CONFIG_NAME, INDEX_NAME, open_checkpoint
from mlx_gemma_mtp.errors import CheckpointError, OutputError
from mlx_gemma_mtp.fit import check_fit
from mlx_gemma_mtp.pairing import DRAFTER_FOLDERS, find_drafter
from mlx_gemma_mtp.quantization import Format
from mlx_gemma_mtp.weights import target_skeleton

from . import safetensors
from .card import write_card
from .divergence import Divergence, compare
from .manifest import manifest, part_entry, write_manifest
from .plan import PartPlan
from .planner import (
    check_not_stored,
    drafter_skeleton,
    plan_drafter,
    plan_target,
)
from .progress import Progress
from .quantize import default_format
from .sources import Source, open_source
from .staging import check_free_space, check_place, staged
from .stream import verify, write_part
from .tokenizer import check_tokenizer, copy_files, copy_tokenizer

AUTO, NONE = "auto", "none"
DRAFTER_FOLDER = DRAFTER_FOLDERS[0]


@dataclass(frozen=True)
class PartRequest:
    """What is asked for of one part.

    Attributes:
        is_quantized: Whether its matrices are quantized.
        format: Their format; None for the part's default.
    """

    is_quantized: bool = True
    format: Format | None = None

    @property
    def is_explicit(self) -> bool:
        """Whether a checkpoint that is quantized already is not what was asked."""
        return self.format is not None or not self.is_quantized


@dataclass(frozen=True)
class Request:
    """What is asked for.

    Attributes:
        hf_path: The target, a folder or a Hub id.
        mlx_path: Where the pair goes. The target's own folder, if it is in MLX's
            format already, gets the drafter inside and is left as it is otherwise.
        draft_model: The drafter, a folder or a Hub id; ``"auto"`` to find it,
            ``"none"`` for the target alone.
        target: The target's format.
        drafter: The drafter's format.
        dtype: Type of what is not quantized, None for the checkpoint's own.
        revision: A branch, tag or commit of the target on the Hub.
        draft_revision: The same of the drafter.
        is_forced: Whether a checkpoint at ``mlx_path`` may be replaced.
        has_check: Whether texts of source and result are compared at the end.
        name: What the pair will be called in its README; None for its folder's name.
    """

    hf_path: str | Path
    mlx_path: Path
    draft_model: str | Path = AUTO
    target: PartRequest = PartRequest()
    drafter: PartRequest = PartRequest()
    dtype: str | None = None
    revision: str | None = None
    draft_revision: str | None = None
    is_forced: bool = False
    has_check: bool = True
    name: str | None = None


@dataclass(frozen=True)
class Part:
    """One checkpoint of a conversion.

    Attributes:
        source: Where it comes from.
        plan: What happens to it.
        folder: Where it goes inside the pair's folder, ``"."`` or ``"drafter"``.
    """

    source: Source
    plan: PartPlan
    folder: str


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
        place = self.request.mlx_path
        return place / DRAFTER_FOLDER if self.is_in_place else place

    @property
    def num_bytes(self) -> int:
        """Bytes of weights that are written."""
        return sum(part.plan.num_bytes for part in self.written)


def plan_conversion(request: Request, *, headers_only: bool = False) -> Conversion:
    """Look at everything before anything is written.

    Args:
        request: What is asked for.
        headers_only: Be content with the headers of the weights, for a plan alone.

    Raises:
        CheckpointError: A checkpoint cannot be found or its tensors are not right.
        PairingError: The drafter does not fit the target.
        RequestError: Settings that do not go with these checkpoints.
        OutputError: The place is taken or too small.
    """
    target = _plan_target(request, headers_only=headers_only)
    drafter, pairing = _plan_drafter(request, target, headers_only=headers_only)
    if drafter is not None:
        model = target_skeleton(target.source.checkpoint)
        check_fit(model, drafter_skeleton(drafter.source.checkpoint))
    is_in_place = _is_same(request.mlx_path, target.source.folder)
    conversion = Conversion(request, target, drafter, pairing, is_in_place)
    if is_in_place:
        _check_in_place(conversion)
    if not headers_only:
        check_place(conversion.place, force=request.is_forced)
        _check_sources_stay(conversion)
        check_free_space(conversion.place, conversion.num_bytes)
        if not is_in_place:
            check_tokenizer(target.source.folder)
    return conversion


def convert(conversion: Conversion, *, progress: Progress) -> Divergence | str:
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
    request = conversion.request
    with staged(conversion.place, force=request.is_forced) as folder:
        # 1) write
        digests: dict[str, Any] = {}
        for part in conversion.written:
            inside = "." if conversion.is_in_place else part.folder
            written = _write(part, folder / inside, progress)
            digests.update({_join(part.folder, k): v for k, v in written.items()})
        # 2) compare
        divergence = _compare(conversion, folder, progress)
        # 3) describe
        entries = [part_entry(p.source, p.plan, p.folder) for p in conversion.parts]
        contents = manifest(
            entries[0],
            entries[1] if len(entries) > 1 else None,
            pairing=conversion.pairing,
            files=digests,
        )
        if not conversion.is_in_place:
            _describe(conversion, folder)
            write_manifest(folder, contents)
    if conversion.is_in_place:
        write_manifest(request.mlx_path, contents)
    return divergence


def _plan_target(request: Request, *, headers_only: bool) -> Part:
    source = open_source(
        request.hf_path, revision=request.revision, headers_only=headers_only
    )
    base = _base(request.target, source)
    plan = plan_target(source.checkpoint, base, dtype=request.dtype)
    if request.target.is_explicit:
        check_not_stored(plan, "the --q flags or --no-quantize")
    return Part(source, plan, ".")


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
            raise CheckpointError(
                f"{choice.reason} Or convert the target alone: --draft-model none."
            )
        chosen, pairing = choice.path_or_id, choice.reason
    source = open_source(
        chosen, revision=request.draft_revision, headers_only=headers_only
    )
    base = _base(request.drafter, source)
    plan = plan_drafter(source.checkpoint, base, dtype=request.dtype)
    if request.drafter.is_explicit:
        check_not_stored(plan, "the --draft-q flags or --no-draft-quantize")
    return Part(source, plan, DRAFTER_FOLDER), pairing


def _base(request: PartRequest, source: Source) -> Format | None:
    if not request.is_quantized:
        return None
    return request.format or default_format(source.checkpoint.config)


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
    """Compare source and result on a short text, where that is wanted and possible."""
    if not conversion.request.has_check:
        return "not compared, as asked for (--no-check)"
    target_folder = conversion.target.source.folder
    drafter_folder = folder
    if not conversion.is_in_place:
        target_folder, drafter_folder = folder, folder / DRAFTER_FOLDER
    has_drafter = conversion.drafter is not None
    return compare(
        [part.source.folder for part in conversion.parts],
        [target_folder, *([drafter_folder] if has_drafter else [])],
        progress=progress,
    )


def _describe(conversion: Conversion, folder: Path) -> None:
    parts = [(part.source, part.plan) for part in conversion.parts]
    write_card(
        folder,
        parts[0],
        parts[1] if len(parts) > 1 else None,
        name=conversion.request.name or conversion.place.name,
    )


def _check_in_place(conversion: Conversion) -> None:
    """Refuse to convert a folder into itself, unless a drafter is all it needs."""
    plan = conversion.target.plan
    is_unchanged = not plan.unused and all(
        parameter.format is None
        and parameter.name == parameter.tensor
        and parameter.arrays[0].dtype == parameter.source.dtype
        for parameter in plan.parameters
    )
    if not is_unchanged or conversion.drafter is None:
        raise OutputError(
            f"--mlx-path must be another folder than --hf-path: got "
            f"{conversion.request.mlx_path} for both. Only a drafter can be added to a "
            "folder, and only if its target is in MLX's format already and stays as it "
            "is."
        )


def _check_sources_stay(conversion: Conversion) -> None:
    """Refuse to replace a folder that is being read."""
    place = conversion.place.resolve()
    for part in conversion.written:
        source = part.source.folder.resolve()
        if source == place or place in source.parents:
            raise OutputError(
                f"{conversion.place} must not hold what is converted: got "
                f"{part.source.folder} inside it. Take another --mlx-path."
            )


def _is_same(place: Path, folder: Path) -> bool:
    return place.exists() and folder.exists() and place.samefile(folder)


def _join(folder: str, name: str) -> str:
    return name if folder == "." else f"{folder}/{name}"


def _write_json(path: Path, contents: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(contents, indent=4) + "\n", encoding="utf-8")
