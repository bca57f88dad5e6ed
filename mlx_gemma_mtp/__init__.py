"""Gemma 4 with its MTP drafters on MLX: faster text, the same text.

Importing the package imports nothing else. Each name below is fetched from its module
at its first use, so that ``import mlx_gemma_mtp`` costs no MLX start-up.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoints.weights import load_drafter
    from .errors import MTPError
    from .generation.response import GenerationResponse
    from .generation.text import generate, stream_generate
    from .generation.tokens import draft_block, generate_tokens
    from .hook.batch_generator import BatchGenerator
    from .hook.install import install, uninstall
    from .pair.load import embedded_pair_path, load, load_pair
    from .pair.pair import Pair, pair_of
    from .sampling.params import SamplingParams

from ._version import __version__

__all__ = [
    "BatchGenerator",
    "GenerationResponse",
    "MTPError",
    "Pair",
    "SamplingParams",
    "__version__",
    "draft_block",
    "embedded_pair_path",
    "generate",
    "generate_tokens",
    "install",
    "load",
    "load_drafter",
    "load_pair",
    "pair_of",
    "stream_generate",
    "uninstall",
]

_MODULE_OF = {
    "BatchGenerator": "hook.batch_generator",
    "GenerationResponse": "generation.response",
    "MTPError": "errors",
    "Pair": "pair.pair",
    "SamplingParams": "sampling.params",
    "draft_block": "generation.tokens",
    "embedded_pair_path": "pair.load",
    "generate": "generation.text",
    "generate_tokens": "generation.tokens",
    "install": "hook.install",
    "load": "pair.load",
    "load_drafter": "checkpoints.weights",
    "load_pair": "pair.load",
    "pair_of": "pair.pair",
    "stream_generate": "generation.text",
    "uninstall": "hook.install",
}


class _Package(ModuleType):
    """Keeps the function ``generate`` beside the submodule of that name.

    Importing a submodule binds it in its package, which would hide the function.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _MODULE_OF and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


if not TYPE_CHECKING:  # a type checker must see the names above, not Any

    def __getattr__(name: str) -> Any:
        """Fetch one exported name from its module and keep it."""
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    """List the exported names too, fetched or not."""
    return sorted({*globals(), *__all__})
