"""The folder in which the prompts of a pair are kept, for commands that keep them.

It is what a process with the same target, package, settings and machine finds again.
"""

from __future__ import annotations

from pathlib import Path

from ..cache.prompt_folder import PromptFolder
from ..errors import RequestError
from ..pair.fingerprint import learnt_key
from ..pair.pair import Pair, named_arrays

DEFAULT_BYTES = 20 * 10**9


def prompt_folder(
    pair: Pair, path: str | None, *, max_pending: int, max_bytes: int = DEFAULT_BYTES
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
        learnt_key(named_arrays([pair.target])),
        max_bytes=max_bytes,
        max_pending=max_pending,
    )
