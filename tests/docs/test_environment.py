"""docs/environment.md names the variables that are read, and no others.

Run: python -m pytest tests/docs/test_environment.py
"""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

from mlx_gemma_mtp.machine import MLX_SETTINGS
from tests.docs.pages import PAGES, ROOT

PAGE = PAGES["docs/environment.md"]
NAME = re.compile(r"[A-Z]+(_[A-Z0-9]+)+")
FILES = [*(ROOT / "mlx_gemma_mtp").rglob("*.py"), *(ROOT / "convert").rglob("*.py")]


def named(section):
    """The variables in the first column of a section's table."""
    (text,) = re.findall(rf"^## {section}\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
    rows = re.findall(r"^\| (`.*?) \|", text, re.M)
    return {name for row in rows for name in re.findall(r"`([A-Z0-9_]+)`", row)}


def read_in(path):
    """The variables of the environment that a file reads, or sets for others.

    Where a name stands for one it is any that the file's own constants spell.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    constants = {
        node.value
        for statement in tree.body
        if isinstance(statement, (ast.Assign, ast.AnnAssign))
        for node in ast.walk(statement)
        if isinstance(node, ast.Constant) and NAME.fullmatch(str(node.value))
    }
    asked = list(keys(tree))
    literal = {key.value for key in asked if isinstance(key, ast.Constant)}
    return literal | (constants if len(literal) < len(asked) else set())


def keys(tree):
    """What ``os.environ`` is asked for."""
    environment, get = "os.environ", ("os.environ.get", "os.environ.setdefault")
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and ast.unparse(node.value) == environment:
            yield node.slice
        if isinstance(node, ast.Call) and ast.unparse(node.func) in (*get, "os.getenv"):
            yield node.args[0]


def source_of(package):
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    files = Path(spec.origin).parent.rglob("*.py")
    return "\n".join(path.read_text(encoding="utf-8") for path in files)


def test_all_that_the_package_reads_is_named():
    read = set().union(*map(read_in, FILES))
    assert len(read) > 15
    assert read <= named("This package") | named("MLX") | named("The Hub")
    assert named("This package") <= read


def test_all_that_changes_what_is_learnt_is_named():
    elsewhere = {"MLX_PTX_CACHE_DIR", "CUDA_HOME", "CUDA_PATH"}
    assert named("MLX") == {*MLX_SETTINGS, *elsewhere}


def test_the_hubs_client_knows_its_own():
    source = source_of("huggingface_hub")
    names = named("The Hub")
    assert len(names) > 5
    assert {name for name in names if f'"{name}"' not in source} == set()
