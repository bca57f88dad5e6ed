"""Which drafter goes with which target: inside its folder, beside it, or published."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..constants import DRAFTER_MODEL_TYPES
from ..errors import cut
from ..models.families import FAMILIES
from .checkpoint import CONFIG_NAME, read_json
from .hub import DRAFTER_FOLDERS, GEMMA_4_ID, hub_id

# mlx-community has no drafter of every size for quantization-aware trained targets, so
# those take Google's.
_QAT_DRAFTER = "google/gemma-4-{size}-it-qat-q4_0-unquantized-assistant"
_COMMUNITY = "mlx-community"
_COMMUNITY_DRAFTER = "mlx-community/gemma-4-{size}-it-assistant-bf16"


@dataclass(frozen=True)
class DrafterChoice:
    """A drafter for a target, or why there is none.

    Attributes:
        path_or_id: A folder or a Hub id; None if no drafter was found.
        reason: A sentence for the user: why this one, or what was looked for and
            what to do.
    """

    path_or_id: str | None
    reason: str


def find_drafter(target_path_or_id: str | Path, folder: Path) -> DrafterChoice:
    """Find the drafter of a target: inside its folder, beside it or on the Hub.

    Nothing is fetched here.

    Args:
        target_path_or_id: The target as the user named it.
        folder: The target's local folder, as from ``fetch()``.

    Raises:
        CheckpointError: A drafter's folder is there and its config is broken.
    """
    looked_for = list(_local_candidates(folder))
    for candidate, reason in looked_for:
        if is_drafter_folder(candidate):
            return DrafterChoice(str(candidate), reason)
    target_id = hub_id(target_path_or_id, folder)
    if target_id is not None:
        return _published_drafter_of(target_id)
    # Those beside it by their paths, those inside it by their names.
    inside = ", ".join(DRAFTER_FOLDERS)
    places = " and ".join(cut(p) for p, _ in looked_for[len(DRAFTER_FOLDERS) :])
    return DrafterChoice(
        None,
        f"no drafter found for {cut(folder)}: looked for {inside} in it and for "
        f"{places}; the folder does not tell a Hub id. Name one with --draft-model "
        "(draft_model=...).",
    )


def is_drafter_folder(folder: Path) -> bool:
    """Tell whether a folder's ``config.json`` is a drafter's.

    Args:
        folder: Any path; one that is not there is no drafter.

    Raises:
        CheckpointError: The file is there and broken.
    """
    config = folder / CONFIG_NAME
    if not config.is_file():
        return False
    return read_json(config).get("model_type") in DRAFTER_MODEL_TYPES


def _local_candidates(folder: Path) -> Iterator[tuple[Path, str]]:
    # abspath, not resolve: what lies beside a symbolic link is meant, not what lies
    # beside the folder it points to. It also gives "." a name.
    folder = Path(os.path.abspath(folder))
    for name in DRAFTER_FOLDERS:
        yield folder / name, "found inside the target's folder"
    yield folder.with_name(f"{folder.name}-assistant"), "found beside the target"
    if folder.name == "target":
        yield folder.with_name("drafter"), "found beside the target"


def _published_drafter_of(target_id: str) -> DrafterChoice:
    """Return the published pairing of a Hub id."""
    name_one = "Name one with --draft-model (draft_model=...)."
    match = GEMMA_4_ID.fullmatch(target_id)
    if not match:
        return DrafterChoice(
            None,
            f"no drafter found for {cut(target_id)}: it is not named after a published "
            f"Gemma 4. {name_one}",
        )
    rest = match["rest"].lower()
    if rest != "-it" and not rest.startswith("-it-"):
        return DrafterChoice(
            None,
            f"no drafter found for {cut(target_id)}: drafters are published for the "
            f"instruction-tuned models (…-it) only, not for base models. {name_one}",
        )
    family = FAMILIES[match["size"].lower()]
    owner, size = match["owner"].lower(), family.size
    if "qat" in rest.split("-"):
        why = f"the published drafter of quantization-aware trained {size} targets"
        return DrafterChoice(_QAT_DRAFTER.format(size=size), why)
    if owner == _COMMUNITY:
        drafter = _COMMUNITY_DRAFTER.format(size=size)
    else:
        drafter = family.drafter_id
    if owner in (_COMMUNITY, "google"):
        return DrafterChoice(drafter, f"the published drafter of {target_id}")
    why = f"the published drafter of the {size}, which {target_id} is named after"
    return DrafterChoice(drafter, why)
