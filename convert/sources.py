"""Where a checkpoint comes from: a folder, or a Hub id with its commit.

For a plan the headers are enough: of a Hub repository only they are fetched. Knows
nothing of models.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import huggingface_hub

from mlx_gemma_mtp.checkpoint import (
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    Checkpoint,
    TensorInfo,
    open_checkpoint,
    read_json,
)
from mlx_gemma_mtp.errors import CheckpointError
from mlx_gemma_mtp.pairing import checked_hub_id, explain_hub_error, fetch, hub_id


@dataclass(frozen=True)
class Source:
    """A checkpoint and its origin.

    Attributes:
        checkpoint: Its configs and its tensors.
        name: Its Hub id, or the name of its folder where that tells none.
        is_hub_id: Whether the name is a Hub id.
        revision: The commit, None for a folder that tells none.
    """

    checkpoint: Checkpoint
    name: str
    is_hub_id: bool
    revision: str | None

    @property
    def folder(self) -> Path:
        """The folder its files lie in."""
        return self.checkpoint.folder


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
    if headers_only and not Path(path_or_id).expanduser().exists():
        return _hub_headers(checked_hub_id(path_or_id), revision)
    folder = fetch(path_or_id, revision)
    checkpoint = open_checkpoint(folder, headers_only=headers_only)
    name = hub_id(path_or_id, folder)
    commit = None
    if name is not None:  # the Hub's cache names folders by commit
        resolved = folder.resolve()
        commit = resolved.name if resolved.parent.name == "snapshots" else revision
    return Source(checkpoint, name or folder.resolve().name, name is not None, commit)


def _hub_headers(repo: str, revision: str | None) -> Source:
    """Read a repository's configs and the headers of its weights, by range requests."""
    try:
        commit = huggingface_hub.HfApi().model_info(repo, revision=revision).sha
        config = Path(
            huggingface_hub.hf_hub_download(repo, CONFIG_NAME, revision=commit)
        )
        metadata = huggingface_hub.get_safetensors_metadata(repo, revision=commit)
        generation_config = _optional(repo, GENERATION_CONFIG_NAME, commit)
    except Exception as error:  # of the Hub's client or whatever HTTP library it has
        raise CheckpointError(explain_hub_error(repo, revision, error)) from error
    folder = config.parent
    tensors = {
        name: TensorInfo(
            folder / file,
            info.dtype,
            tuple(info.shape),
            (info.data_offsets[0], info.data_offsets[1]),
        )
        for file, header in metadata.files_metadata.items()
        for name, info in header.tensors.items()
    }
    settings = {} if generation_config is None else read_json(generation_config)
    checkpoint = Checkpoint(folder, read_json(config), settings, tensors)
    return Source(checkpoint, repo, True, commit)


def _optional(repo: str, file: str, revision: str | None) -> Path | None:
    if not huggingface_hub.file_exists(repo, file, revision=revision):
        return None
    return Path(huggingface_hub.hf_hub_download(repo, file, revision=revision))
