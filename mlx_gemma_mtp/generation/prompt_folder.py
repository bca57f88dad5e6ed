"""The folder in which the prompts of a pair are kept, for commands that keep them.

It is what a process with the same target, package, settings and machine finds again.
Which target it is, its files tell, its config and a sample of its weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..cache.prompt_folder import PromptFolder
from ..constants import PROMPT_FOLDER_BYTES
from ..errors import RequestError
from ..models.target import text_model
from ..pair.fingerprint import learnt_key, module_values
from ..pair.pair import Pair, named_arrays


def prompt_folder(
    pair: Pair,
    path: str | None,
    *,
    max_pending: int,
    max_bytes: int = PROMPT_FOLDER_BYTES,
) -> PromptFolder | None:
    """The prompts in a folder.

    Args:
        pair: Whose keys and values they are; of its drafter nothing is kept.
        path: The folder; None for none.
        max_pending: Most bytes that wait to be written.
        max_bytes: Most bytes of all files.

    Raises:
        RequestError: The folder cannot be used.
    """
    if path is None:
        return None
    if not path.strip():
        raise RequestError(
            f"--prompt-cache-dir must not be empty: got {path!r:.20}. Leave it out to "
            "keep prompts in memory only."
        )
    return PromptFolder(
        Path(path).expanduser(),
        pair.rounds.target.layout,
        target_identity(pair),
        max_bytes=max_bytes,
        max_pending=max_pending,
    )


def target_identity(pair: Pair) -> dict[str, Any]:
    """What must be equal for keys and values of a target to serve, JSON values.

    Config and modules are those in memory: rope, norms, quantization, the scale of
    adapters. Of weights 64 elements an array are looked at, and their files' names,
    sizes and times of change. A model that was made in memory has no files: of two
    whose weights differ in few elements the sample may see no difference.

    Args:
        pair: With the target; the drafter is no matter.
    """
    return {
        **learnt_key(named_arrays([pair.target])),
        "config": vars(text_model(pair.target).args),
        "modules": module_values(pair.target),
        "files": pair.weight_files,
    }
