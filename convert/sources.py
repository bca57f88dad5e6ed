"""Where a checkpoint comes from: a folder, or a Hub id with its commit.

For a plan the headers are enough: of a Hub repository only they are fetched, by range
requests. Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import huggingface_hub

from mlx_gemma_mtp.checkpoints.checkpoint import (
    ADAPTER_CONFIG_NAME,
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    MERGE,
    WEIGHTS_PATTERN,
    Checkpoint,
    TensorInfo,
    open_checkpoint,
    read_json,
)
from mlx_gemma_mtp.checkpoints.hub import (
    DRAFTER_FOLDERS,
    cached,
    checked_hub_id,
    explain_hub_error,
    fetch,
    hub_id,
    local_path,
)
from mlx_gemma_mtp.errors import CheckpointError, cut

from .manifest import read_origin


@dataclass(frozen=True)
class Source:
    """A checkpoint and its origin.

    Attributes:
        checkpoint: Its configs and its tensors.
        name: The Hub id it came from, or the name of its folder where that is unknown.
        revision: The commit, None where it is unknown.
    """

    checkpoint: Checkpoint
    name: str
    revision: str | None

    @property
    def folder(self) -> Path:
        """The folder its files lie in."""
        return self.checkpoint.folder

    @property
    def is_hub_id(self) -> bool:
        """Whether the name is a Hub id; a folder's name has no slash."""
        return "/" in self.name


def open_source(
    path_or_id: str | Path, *, revision: str | None, headers_only: bool
) -> Source:
    """Open a checkpoint, from the Hub if it is not local.

    Args:
        path_or_id: A folder or a Hub id.
        revision: A branch, tag or commit of the Hub repository.
        headers_only: Fetch and ask for no more than configs and headers.

    Raises:
        CheckpointError: It cannot be found or is damaged.
    """
    local = local_path(path_or_id)
    if not headers_only:
        fetched = fetch(path_or_id, revision)
        return _local(path_or_id, fetched, revision, headers_only=False)
    if local is not None:
        repo = _repository(local)
        if repo is None or any(local.glob(WEIGHTS_PATTERN)):
            return _local(path_or_id, local, revision, headers_only=True)
        # A drafter's folder of a repository of which only headers are here.
        return _hub_headers(repo, local.parent.name, folder=local.name)
    repo = checked_hub_id(path_or_id)
    folder = cached(repo, revision)
    if folder is not None:
        # Not every version of the Hub's client tells a half download from a whole one.
        with suppress(CheckpointError):
            return _local(repo, folder, revision, headers_only=False)
    return _hub_headers(repo, revision)


def _local(
    path_or_id: str | Path, folder: Path, revision: str | None, *, headers_only: bool
) -> Source:
    checkpoint = open_checkpoint(folder, headers_only=headers_only)
    origin = read_origin(folder)
    if origin is not None:
        return Source(checkpoint, *origin)
    # The Hub's cache names folders by commit; a drafter can lie in its target's.
    for place in (folder, folder.parent):
        name = hub_id(path_or_id if place is folder else place, place)
        if name is not None:
            commit = place.resolve().name
            is_cached = place.resolve().parent.name == "snapshots"
            return Source(checkpoint, name, commit if is_cached else revision)
    return Source(checkpoint, folder.resolve().name, None)


def _repository(folder: Path) -> str | None:
    """Return the Hub id of the repository that a drafter's folder is in, if any."""
    return hub_id(folder.parent, folder.parent)


def _hub_headers(repo: str, revision: str | None, *, folder: str = "") -> Source:
    """Read a repository's configs and the headers of its weights, by range requests.

    Args:
        repo: Its id.
        revision: A branch, tag or commit.
        folder: The folder inside it that holds the checkpoint.
    """
    prefix = f"{folder}/" if folder else ""
    try:
        api = huggingface_hub.HfApi()
        commit = api.model_info(repo, revision=revision).sha
        files = api.list_repo_files(repo, revision=commit)
        config = _fetch(repo, commit, files, f"{prefix}{CONFIG_NAME}")
        settings = _fetch(repo, commit, files, f"{prefix}{GENERATION_CONFIG_NAME}")
        for name in () if folder else DRAFTER_FOLDERS:  # so that it is found there
            _fetch(repo, commit, files, f"{name}/{CONFIG_NAME}")
        shards = [name for name in files if _is_weights(name, prefix)]
        headers = {
            name: api.parse_safetensors_file_metadata(repo, name, revision=commit)
            for name in shards
        }
    except Exception as error:  # of the Hub's client or whatever HTTP library it has
        raise CheckpointError(explain_hub_error(repo, revision, error)) from error
    if not shards and f"{prefix}{ADAPTER_CONFIG_NAME}" in files:
        raise CheckpointError(
            f"{cut(repo)} must hold a model: got adapters alone. {MERGE}"
        )
    if config is None or not shards:
        missing = f"{prefix}{WEIGHTS_PATTERN}" if config else f"{prefix}{CONFIG_NAME}"
        raise CheckpointError(
            f"{cut(repo)} must hold a safetensors checkpoint: got no {missing} there. "
            "Take another repository or revision."
        )
    tensors = {
        name: TensorInfo(
            config.parent / shard,
            info.dtype,
            tuple(info.shape),
            (info.data_offsets[0], info.data_offsets[1]),
        )
        for shard, header in headers.items()
        for name, info in header.tensors.items()
    }
    generation_config = {} if settings is None else read_json(settings)
    checkpoint = Checkpoint(
        config.parent, read_json(config), generation_config, tensors
    )
    return Source(checkpoint, repo, commit)


def _fetch(
    repo: str, commit: str | None, files: Sequence[str], name: str
) -> Path | None:
    """Fetch one small file, if it is there."""
    if name not in files:
        return None
    return Path(huggingface_hub.hf_hub_download(repo, name, revision=commit))


def _is_weights(name: str, prefix: str) -> bool:
    path = PurePosixPath(name)
    return name == f"{prefix}{path.name}" and path.match(WEIGHTS_PATTERN)
