"""What transformers looks up whenever it is imported, looked up once for all processes.

It reads the 3,300 files of its models for the names in them, twice: half of what a
command takes to start. Python imports this module by itself where its folder is on
PYTHONPATH, which tests/conftest.py sees to. What was found is kept in the folder that
``KEPT`` names, and all else is as it is without this.
"""

import marshal
import os
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

KEPT = "MLX_GEMMA_MTP_TESTS_KEPT"
READER = "transformers.utils.import_utils"
MODELS = ("transformers", "models")


class _Finder(MetaPathFinder):
    """Finds the module that looks names up, and no other one."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        spec = None
        if fullname == READER:
            spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                execute(module)
                module.define_import_structure = once(module.define_import_structure)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Look names up that way from here on."""
    sys.meta_path.insert(0, _Finder())


def once(look_up: Any) -> Any:
    """``define_import_structure``, which reads all models only where no process has."""

    def define_import_structure(module_path: Any, prefix: str | None = None) -> Any:
        path = Path(module_path)
        folder = path if path.is_dir() else path.parent
        if folder.parts[-2:] != MODELS:
            return look_up(module_path, prefix)
        file = Path(os.environ[KEPT], f"models-{prefix}")
        if file.exists():
            return marshal.loads(file.read_bytes())
        found = look_up(module_path, prefix)
        part = file.with_name(f"{file.name}.{os.getpid()}")
        part.write_bytes(marshal.dumps(found))
        part.replace(file)  # whole or not at all
        return found

    define_import_structure.__wrapped__ = look_up  # type: ignore[attr-defined]
    return define_import_structure


if __name__ == "sitecustomize" and KEPT in os.environ:
    install()
