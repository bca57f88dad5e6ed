"""Which drafter goes with which target, and where a checkpoint comes from.

Local folders are taken as they are and never touch the network; everything else
is a Hub id. Reads no weights and knows nothing of models.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from huggingface_hub import errors as hub_errors

from .checkpoint import CONFIG_NAME, WEIGHTS_PATTERN, read_json
from .config import DRAFTER_MODEL_TYPES, PUBLISHED_DRAFTERS, PUBLISHED_TARGETS
from .errors import CheckpointError

# Folders inside a target's folder that may hold its drafter, in this order.
DRAFTER_FOLDERS = ("drafter", "assistant", "mtp")
# The sizes Gemma 4 is published in, and the hidden size of each target.
_HIDDEN_SIZES = {"E2B": 1536, "E4B": 2560, "12B": 3840, "26B-A4B": 2816, "31B": 5376}
_QAT_DRAFTER = "google/gemma-4-{size}-it-qat-q4_0-unquantized-assistant"
# owner: its drafter for instruction-tuned targets. mlx-community has no drafter of
# every size for quantization-aware trained targets, so those take Google's.
_DRAFTERS = {
    "google": "google/gemma-4-{size}-it-assistant",
    "mlx-community": "mlx-community/gemma-4-{size}-it-assistant-bf16",
}
_GEMMA_4_ID = re.compile(
    r"(?P<owner>[^/]+)/gemma-4-(?P<size>E2B|E4B|12B|26B-A4B|31B)(?P<rest>(-.*)?)",
    re.IGNORECASE,
)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_CACHE_FOLDER = re.compile(r"models--(?P<owner>[^/]+?)--(?P<name>[^/]+)")
# What mlx-lm fetches, and a drafter that lies in a folder of its target's repository.
_ALLOW_PATTERNS = [
    "*.json",
    WEIGHTS_PATTERN,
    "*.py",
    "tokenizer.model",
    "*.tiktoken",
    "tiktoken.model",
    "*.txt",
    "*.jsonl",
    "*.jinja",
    "README.md",  # its licence travels along where it is converted
    *(f"{folder}/{WEIGHTS_PATTERN}" for folder in DRAFTER_FOLDERS),
]


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


def fetch(path_or_id: str | Path, revision: str | None = None) -> Path:
    """Return the local folder of a checkpoint, from the Hub if it is not local.

    Args:
        path_or_id: A folder, which is returned as it is, or a Hub id. What the
            Hub's cache on this machine holds already is not fetched again.
        revision: A branch, tag or commit of the Hub repository.

    Raises:
        CheckpointError: It is neither a folder nor a Hub id, or the Hub does not
            give it: unknown, gated, not cached while offline, no network.
    """
    local = Path(path_or_id).expanduser()
    if local.exists():
        return local
    repo = checked_hub_id(path_or_id)
    try:
        return Path(
            huggingface_hub.snapshot_download(
                repo, revision=revision, allow_patterns=_ALLOW_PATTERNS
            )
        )
    except Exception as error:  # of the Hub's client or whatever HTTP library it has
        raise CheckpointError(explain_hub_error(repo, revision, error)) from error


def cached(repo: str, revision: str | None) -> Path | None:
    """Return a repository's folder if the Hub's cache here holds all of it.

    Args:
        repo: Its id.
        revision: A branch, tag or commit.
    """
    try:
        return Path(
            huggingface_hub.snapshot_download(
                repo,
                revision=revision,
                allow_patterns=_ALLOW_PATTERNS,
                local_files_only=True,
            )
        )
    except Exception:  # noqa: BLE001  # whatever is missing of it
        return None


def is_hub_id(name: str) -> bool:
    """Tell whether a name can be a Hub id; whether there is such a one is not asked.

    Args:
        name: Any text.
    """
    return bool(_HUB_ID.fullmatch(name)) and not name.startswith(".")


def checked_hub_id(path_or_id: str | Path) -> str:
    """Return what is no folder here as a Hub id, if it can be one.

    Args:
        path_or_id: What the user named.

    Raises:
        CheckpointError: It cannot be a Hub id, or is one of GGUF files.
    """
    repo = str(path_or_id)
    if not is_hub_id(repo):
        raise CheckpointError(
            f"the model must be a folder or a Hub id: got {repo!r}, which is no folder "
            f"here. Check the path, or pass an id such as {PUBLISHED_TARGETS[0]}."
        )
    if repo.lower().endswith("gguf"):
        raise CheckpointError(
            f"{repo} must be a safetensors repository: got one of GGUF files. Take the "
            f"same model's repository without GGUF, such as {PUBLISHED_TARGETS[0]}."
        )
    return repo


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
    places = ", ".join(str(candidate) for candidate, _ in looked_for)
    return DrafterChoice(
        None,
        f"no drafter found for {folder}: looked for {places}; the folder does not tell "
        "a Hub id. Name one with --draft-model (draft_model=...).",
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


def published_drafter(hidden_size: int) -> str | None:
    """Return the published drafter of the target with this hidden size, if any.

    Args:
        hidden_size: The target's H.
    """
    for size, published_hidden_size in _HIDDEN_SIZES.items():
        if hidden_size == published_hidden_size:
            return _DRAFTERS["google"].format(size=size)
    return None


def _local_candidates(folder: Path) -> Iterator[tuple[Path, str]]:
    # abspath, not resolve: what lies beside a symbolic link is meant, not what lies
    # beside the folder it points to. It also gives "." a name.
    folder = Path(os.path.abspath(folder))
    for name in DRAFTER_FOLDERS:
        yield folder / name, "found inside the target's folder"
    yield folder.with_name(f"{folder.name}-assistant"), "found beside the target"
    if folder.name == "target":
        yield folder.with_name("drafter"), "found beside the target"


def hub_id(path_or_id: str | Path, folder: Path) -> str | None:
    """Return the Hub id behind a checkpoint, None for a folder that tells none.

    Args:
        path_or_id: The checkpoint as the user named it.
        folder: Its local folder, as from ``fetch()``.
    """
    if not Path(path_or_id).expanduser().exists():
        return str(path_or_id)
    for place in (Path(os.path.abspath(folder)), folder.resolve()):
        match = _CACHE_FOLDER.fullmatch(place.parent.parent.name)
        if match and place.parent.name == "snapshots":
            return f"{match['owner']}/{match['name']}"
    return None


def _published_drafter_of(target_id: str) -> DrafterChoice:
    """Return the published pairing of a Hub id."""
    name_one = "Name one with --draft-model (draft_model=...)."
    match = _GEMMA_4_ID.fullmatch(target_id)
    if not match:
        return DrafterChoice(
            None,
            f"no drafter found for {target_id}: it is not named after a published "
            f"Gemma 4. {name_one}",
        )
    rest = match["rest"].lower()
    if rest != "-it" and not rest.startswith("-it-"):
        return DrafterChoice(
            None,
            f"no drafter found for {target_id}: drafters are published for the "
            f"instruction-tuned models (…-it) only, not for base models. {name_one}",
        )
    size = next(s for s in _HIDDEN_SIZES if s.lower() == match["size"].lower())
    owner = match["owner"].lower()
    if "qat" in rest.split("-"):
        why = f"the published drafter of quantization-aware trained {size} targets"
        return DrafterChoice(_QAT_DRAFTER.format(size=size), why)
    drafter = _DRAFTERS.get(owner, _DRAFTERS["google"]).format(size=size)
    if owner in _DRAFTERS:
        return DrafterChoice(drafter, f"the published drafter of {target_id}")
    why = f"the published drafter of the {size}, which {target_id} is named after"
    return DrafterChoice(drafter, why)


def explain_hub_error(repo: str, revision: str | None, error: Exception) -> str:
    """Say in one line why the Hub did not give a repository.

    Args:
        repo: Its id.
        revision: What was asked for of it.
        error: What the Hub's client raised.
    """
    again = "Check the connection and try again, or pass a local folder."
    if isinstance(error, hub_errors.GatedRepoError):
        found = "a gated repository"
        page = f"https://huggingface.co/{repo}"
        again = f"Accept its terms at {page}, then run hf auth login."
    elif isinstance(error, hub_errors.RevisionNotFoundError):
        found = f"no revision {revision!r} there"
        again = "Check the revision, or leave it out."
    elif isinstance(error, hub_errors.RepositoryNotFoundError):
        found = "no such repository (or a private one)"
        again = "Check the name, or run hf auth login if it is private."
    elif isinstance(
        error, (hub_errors.LocalEntryNotFoundError, hub_errors.OfflineModeIsEnabled)
    ):
        # The Hub's client raises this for every way of not reaching the network.
        found = "no complete copy in the Hub's cache and no connection"
        again = (
            "Connect (or unset HF_HUB_OFFLINE) and try again, or pass a local folder."
        )
    else:
        found = " ".join(f"{type(error).__name__}: {error}".split())[:200].rstrip(".")
        if isinstance(error, ValueError):  # the client refuses the name itself
            again = "Check the name."
    message = f"{repo} must be a repository the Hub gives: got {found}. {again}"
    return message + _published_hint(repo)


def _published_hint(repo: str) -> str:
    """Name the published ids if the id looks like Gemma but is none of them."""
    if "gemma" not in repo.lower() or _GEMMA_4_ID.fullmatch(repo):
        return ""
    ids = PUBLISHED_DRAFTERS if "assistant" in repo.lower() else PUBLISHED_TARGETS
    return f" Gemma 4 is published as {', '.join(ids)}."
