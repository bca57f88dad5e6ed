"""Which drafter goes with which target, and where a checkpoint comes from.

Local folders are taken as they are and never touch the network; everything else
is a Hub id. Reads no weights and knows nothing of models.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import huggingface_hub
from huggingface_hub import errors as hub_errors

from ..errors import CheckpointError, cut, shorten
from ..models.families import FAMILIES, PUBLISHED_DRAFTERS, PUBLISHED_TARGETS
from .checkpoint import CONFIG_NAME, WEIGHTS_PATTERN

_AGAIN = "Check the connection and try again, or pass a local folder."
# Folders inside a target's folder that may hold its drafter, in this order.
DRAFTER_FOLDERS = ("drafter", "assistant", "mtp")
GEMMA_4_ID = re.compile(
    rf"(?P<owner>[^/]+)/gemma-4-(?P<size>{'|'.join(FAMILIES)})(?P<rest>(-.*)?)",
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
    local = local_path(path_or_id)
    if local is not None:
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


def fetch_config(path_or_id: str | Path, revision: str | None = None) -> Path:
    """Return the path of a checkpoint's ``config.json``; only that is fetched.

    Args:
        path_or_id: A folder or a Hub id.
        revision: A branch, tag or commit of the Hub repository.

    Raises:
        CheckpointError: It cannot be had.
    """
    local = local_path(path_or_id)
    if local is not None:
        return local / CONFIG_NAME
    repo = checked_hub_id(path_or_id)
    try:
        return Path(
            huggingface_hub.hf_hub_download(repo, CONFIG_NAME, revision=revision)
        )
    except Exception as error:  # of the Hub's client or whatever HTTP library it has
        raise CheckpointError(explain_hub_error(repo, revision, error)) from error


def local_path(path_or_id: str | Path) -> Path | None:
    """Return the path of what is here by that name, None if nothing is.

    Args:
        path_or_id: What the user named.
    """
    try:
        path = Path(path_or_id).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError):  # a name no disk can have, no such user's home
        return None


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
            f"the model must be a folder or a Hub id: got {cut(repr(repo))}, which is "
            "no folder here. Check the path, or pass an id such as "
            f"{PUBLISHED_TARGETS[0]}."
        )
    if repo.lower().endswith("gguf"):
        raise CheckpointError(
            f"{cut(repo)} must be a safetensors repository: got one of GGUF files. "
            "Take the same model's repository without GGUF, such as "
            f"{PUBLISHED_TARGETS[0]}."
        )
    return repo


def hub_id(path_or_id: str | Path, folder: Path) -> str | None:
    """Return the Hub id behind a checkpoint, None for a folder that tells none.

    Args:
        path_or_id: The checkpoint as the user named it.
        folder: Its local folder, as from ``fetch()``.
    """
    if local_path(path_or_id) is None:
        return str(path_or_id)
    for place in (Path(os.path.abspath(folder)), folder.resolve()):
        match = _CACHE_FOLDER.fullmatch(place.parent.parent.name)
        if match and place.parent.name == "snapshots":
            return f"{match['owner']}/{match['name']}"
    return None


def explain_hub_error(repo: str, revision: str | None, error: Exception) -> str:
    """Say in one line why the Hub did not give a repository.

    Args:
        repo: Its id.
        revision: What was asked for of it.
        error: What the Hub's client raised.
    """
    if isinstance(error, hub_errors.LocalEntryNotFoundError) and error.__cause__:
        # What the client says where it found no copy here either; why it asked for
        # one stands behind it.
        error = error.__cause__ if isinstance(error.__cause__, Exception) else error
    found, next_step = (
        _of_repository(repo, revision, error)
        or _of_answer(error)
        or _of_machine(error)
        or _of_connection(error)
        or _of_anything(error)
    )
    message = f"{cut(repo)} must be a repository the Hub gives: got {found}."
    return f"{message} {next_step}{_published_hint(repo)}"


def _of_repository(
    repo: str, revision: str | None, error: Exception
) -> tuple[str, str] | None:
    """What the Hub says of a repository, and what to do; None if it says nothing."""
    if isinstance(error, hub_errors.GatedRepoError):
        page = f"https://huggingface.co/{cut(repo)}"
        next_step = f"Accept its terms at {page}, then run hf auth login."
        return "a gated repository", next_step
    if isinstance(error, hub_errors.DisabledRepoError):
        return "one that the Hub has disabled", "Take another repository."
    if isinstance(error, hub_errors.RevisionNotFoundError):
        if revision is None:
            return (
                "no branch main there",
                "Name a revision, or take another repository.",
            )
        next_step = "Check the revision, or leave it out."
        return f"no revision {shorten(revision)} there", next_step
    if isinstance(error, hub_errors.RepositoryNotFoundError):
        next_step = "Check the name, or run hf auth login if it is private."
        return "no such repository (or a private one)", next_step
    return None


def _of_answer(error: Exception) -> tuple[str, str] | None:
    """What another answer of the Hub means, told by its status."""
    response = getattr(error, "response", None)  # of any version of the client
    if not isinstance(error, hub_errors.HfHubHTTPError) or response is None:
        return None
    status = response.status_code
    if status == 429:
        when = _wait(response.headers)
        next_step = f"Wait {when} and try again; hf auth login raises the limit."
        return "too many requests (429)", next_step
    if status == 408:
        return "no answer in time (408)", _AGAIN
    if status >= 500:
        next_step = "Try again later; status.huggingface.co says how it is."
        return f"a failure of the Hub itself ({status})", next_step
    if status == 401:
        return "a token that is not valid (401)", "Run hf auth login."
    if status == 403:
        next_step = "Run hf auth login with a token that may read this repository."
        return "no permission (403)", next_step
    if status == 404:
        return "no such file there (404)", "Check the name and the revision."
    said = f" ({_brief(error.server_message)})" if error.server_message else ""
    return f"the Hub's answer {status}{said}", _AGAIN


def _wait(headers: Mapping[str, str]) -> str:
    """How long the Hub asks to wait, by either of the headers that say it."""
    wait = headers.get("Retry-After") or ""
    if not wait.isdecimal():
        said = re.search(r"\bt=(\d+)", headers.get("RateLimit") or "")
        wait = said[1] if said else ""
    return f"{wait} seconds" if wait and len(wait) < 7 else "some minutes"


def _of_machine(error: Exception) -> tuple[str, str] | None:
    """What the disk here says, or the client of a full one in its own words."""
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
        return "a full disk", "Make room, or name another cache with HF_HOME."
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        found = f"a cache that cannot be written ({_words(error)})"
        return found, "Mend its permissions, or name another one with HF_HOME."
    return None


def _of_connection(error: Exception) -> tuple[str, str] | None:
    """What keeps the client from the Hub."""
    if isinstance(
        error, (hub_errors.LocalEntryNotFoundError, hub_errors.OfflineModeIsEnabled)
    ):
        return (
            "no complete copy in the Hub's cache and no connection",
            "Connect (or unset HF_HUB_OFFLINE) and try again, or pass a local folder.",
        )
    if isinstance(error, (json.JSONDecodeError, KeyError)):
        found = "an answer that is not the Hub's (a network's login page?)"
        return found, "Log in to the network with a browser and try again."
    # The HTTP library is another one in each of the client's versions.
    names = {kind.__name__ for kind in type(error).__mro__}
    if names & {"TimeoutException", "Timeout", "TimeoutError"}:
        return f"no answer in time ({type(error).__name__})", _AGAIN
    if names & {"ConnectError", "ConnectionError", "ProxyError", "NetworkError"}:
        return f"no connection ({_words(error)})", _AGAIN
    return None


def _of_anything(error: Exception) -> tuple[str, str]:
    # The client refuses the name itself with a ValueError.
    is_name = isinstance(error, ValueError)
    return _words(error), "Check the name." if is_name else _AGAIN


def _words(error: Exception) -> str:
    return _brief(f"{type(error).__name__}: {error}")


def _brief(words: str) -> str:
    text = " ".join(words.split()).rstrip(".")
    return text if len(text) <= 120 else f"{text[:117]}..."


def _published_hint(repo: str) -> str:
    """Name the published ids if the id looks like Gemma but is none of them."""
    if "gemma" not in repo.lower() or GEMMA_4_ID.fullmatch(repo):
        return ""
    ids = PUBLISHED_DRAFTERS if "assistant" in repo.lower() else PUBLISHED_TARGETS
    return f" Gemma 4 is published as {', '.join(ids)}."
