"""One JSON file in the user's cache folder: what was learnt of a pair on a machine.

What cannot be read or written is as if it were not there: nothing depends on it but
how fast things get going. Knows nothing of what is kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger("mlx_gemma_mtp")

# Names another folder; empty for keeping nothing on disk.
FOLDER_VARIABLE = "MLX_GEMMA_MTP_CACHE"
_MAX_BYTES = 1_000_000  # a file of ours has some thousand; a larger one is none


def cache_folder() -> Path | None:
    """The folder for what is kept; None where nothing is to be kept on disk."""
    named = os.environ.get(FOLDER_VARIABLE)
    if named is not None:
        return Path(named).expanduser() if named else None
    try:
        home = Path.home()
    except RuntimeError:  # no home folder is known
        return None
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "mlx_gemma_mtp"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else home / ".cache") / "mlx_gemma_mtp"


class Store:
    """What belongs to one key.

    Args:
        key: What the values hold for (machine, versions, pair), JSON values.
        folder: Where files are kept; None for nowhere.
    """

    def __init__(self, key: Mapping[str, Any], folder: Path | None) -> None:
        self._key = dict(key)
        self._path: Path | None = None
        if folder is not None:
            text = json.dumps(self._key, sort_keys=True)
            name = hashlib.sha256(text.encode()).hexdigest()[:24]
            self._path = folder / f"{name}.json"

    def read(self) -> dict[str, Any]:
        """The values, empty where there are none."""
        if self._path is None:
            return {}
        try:
            if self._path.stat().st_size > _MAX_BYTES:
                return {}
            found = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        if not isinstance(found, dict) or found.get("key") != self._key:
            return {}
        values = found.get("values")
        return values if isinstance(values, dict) else {}

    def write(self, values: Mapping[str, Any]) -> None:
        """Replace the values; readers see the old file or the new one, never a part."""
        if self._path is None:
            return
        text = json.dumps({"key": self._key, "values": dict(values)}, indent=1)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self._path.parent, suffix=".part")
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    file.write(text)
                os.replace(name, self._path)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(name)
                raise
        except OSError as error:
            logger.debug("what was learnt was not kept: %s", error)
