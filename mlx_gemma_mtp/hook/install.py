"""mlx-lm's own functions with drafters: ``install()`` and ``uninstall()``.

Before anything is replaced the tables are held against the mlx-lm that is installed;
where one does not fit, nothing is touched. Knows nothing of decoding.
"""

from __future__ import annotations

import inspect
import re
import sys
import threading
from importlib import import_module
from pathlib import Path
from typing import Any

from mlx_lm import __version__

from ..constants import AUTO
from ..engine.stats import DraftTally
from ..errors import HookError
from .replacements import Hook, Own, Settings
from .table import OLDEST_VERSION, REPLACED, SIGNATURES

_WITHOUT = "mlx_gemma_mtp.load and mlx_gemma_mtp.generate work without the hook."
_PLAIN_VALUES = (bool, int, float, str, type(None))

_lock = threading.RLock()
_hook: Hook | None = None  # the last one made; it may be off


def install(
    *,
    speculative_decoding: bool = True,
    draft_model: str | Path | None = None,
    num_draft_tokens: int | str | None = None,
    draft_source: str = AUTO,
) -> None:
    """Let mlx-lm's own functions decode Gemma 4 with its drafter.

    Afterwards ``mlx_lm.load`` takes ``speculative_decoding`` and ``draft_model``, and
    ``mlx_lm.generate``, ``mlx_lm.stream_generate``, ``mlx_lm.batch_generate`` and
    mlx-lm's programs draft where the model brings a drafter. Every other model passes
    through. Names taken from mlx-lm before (``from mlx_lm import load``) stay as they
    were, unless a module of mlx-lm holds them. A second call only changes the settings.

    Args:
        speculative_decoding: Whether ``load`` looks for a drafter where its caller
            says nothing.
        draft_model: The drafter for every Gemma 4 that is loaded, a folder or a Hub id;
            None for the one that is found.
        num_draft_tokens: Drafts per round, 0 to 8; ``"auto"`` or None for as many as
            are expected to be fastest.
        draft_source: Where drafts come from, for models that bring a drafter:
            ``"drafter"``, ``"lookup"`` or ``"auto"``, see ``GenerationSettings``.

    Raises:
        HookError: This mlx-lm is older than 0.32, or one of the names that the hook
            relies on is called in another way; nothing is changed then.
        RequestError: ``num_draft_tokens`` or ``draft_source`` is outside its range.
    """
    global _hook
    settings = Settings(
        speculative_decoding, draft_model, num_draft_tokens, draft_source
    )
    with _lock:
        _check_version()
        if _hook is None or not _hook.is_on:
            _check_signatures()
            _hook = _hook_for(_hook)
        _hook.settings = settings
        if not _hook.is_on:
            _hook.switch_on()
            _exchange(vars(_hook.own), _hook.replacements)


def tally() -> DraftTally:
    """What drafts have given since ``install``."""
    return DraftTally() if _hook is None else _hook.tally


def uninstall() -> None:
    """Give mlx-lm its own functions back; also where they were copied since."""
    with _lock:
        if _hook is not None and _hook.is_on:
            _hook.is_on = False
            _exchange(_hook.replacements, vars(_hook.own))


def _hook_for(last: Hook | None) -> Hook:
    """A hook on mlx-lm's functions as they are; the last one where it fits.

    Copies that were taken of its replacements are then in force again.
    """
    own = Own(
        **{row.name: getattr(import_module(row.module), row.name) for row in REPLACED}
    )
    return last if last is not None and last.own == own else Hook(own)


def _exchange(old: dict[str, Any], new: dict[str, Any]) -> None:
    """Put new functions where the old ones stand, in modules that are imported."""
    for row in REPLACED:
        for name in row.modules:
            module = sys.modules.get(name)
            # Somebody else's function in its place stays.
            if module is not None and vars(module).get(row.name) is old[row.name]:
                setattr(module, row.name, new[row.name])


def _check_version() -> None:
    """Check that mlx-lm is new enough.

    Raises:
        HookError: It is not.
    """
    found = tuple(int(part) for part in re.findall(r"\d+", __version__)[:2])
    if found < OLDEST_VERSION:
        oldest = ".".join(map(str, OLDEST_VERSION))
        raise HookError(
            f"the hook needs mlx-lm {oldest} or newer: got {__version__}. Update it "
            f"(pip install -U mlx-lm). {_WITHOUT}"
        )


def _check_signatures() -> None:
    """Hold the table of signatures against mlx-lm.

    Raises:
        HookError: One differs.
    """
    for path, expected in SIGNATURES.items():
        found = _signature(path)
        if found != expected:
            raise HookError(
                f"{path} must be called as {expected}: got {found} in mlx-lm "
                f"{__version__}. Install one that the hook knows (pip install "
                f"'mlx-lm>=0.32,<=0.32.2'). {_WITHOUT}"
            )


def _signature(path: str) -> str:
    """How the function or class at a dotted path is called, or that it is not there."""
    names = path.split(".")
    # mlx_lm.generate, the attribute, is a function that hides the module.
    found: Any = import_module(".".join(names[:2]))
    for name in names[2:]:
        found = vars(found).get(name)
        if found is None:
            return "no such name"
    parameters = [
        parameter.replace(annotation=parameter.empty, default=_shown(parameter))
        for parameter in inspect.signature(found).parameters.values()
    ]
    return str(inspect.Signature(parameters)).replace("Ellipsis", "...")


def _shown(parameter: inspect.Parameter) -> Any:
    """A default that is a plain value, or ... for any other."""
    default = parameter.default
    is_plain = default is parameter.empty or isinstance(default, _PLAIN_VALUES)
    return default if is_plain else ...
