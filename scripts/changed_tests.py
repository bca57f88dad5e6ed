"""The tests of what changed since main: files for pytest, one a line.

    python -m scripts.changed_tests

What counts is what git sees: commits that main has not, the work tree, new files. A
changed test is itself one. Of a changed module these are, in the folder of tests that
mirrors its own: the tests named after it, and those that import it; where there are
none, the tests of the modules beside it that import it. Tests of the layout and of the
tools always are.
"""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = "mlx_gemma_mtp"
ALWAYS = ("tests/test_layout.py", "tests/test_tooling.py")
DOCS = "tests/docs/test_pages.py"


def main() -> None:
    """Print them."""
    print(*chosen(changed_files(ROOT), ROOT), sep="\n")


def changed_files(root: Path) -> list[str]:
    """Paths, from the root, of what a checkout changes; of files that are gone too."""
    base = _git(root, "merge-base", "HEAD", "main") or ["HEAD"]
    changed = _git(root, "diff", "--name-only", "--no-renames", base[0])
    return changed + _git(root, "ls-files", "--others", "--exclude-standard")


def _git(root: Path, *arguments: str) -> list[str]:
    command = ["git", "-C", str(root), *arguments]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    return run.stdout.splitlines()


def chosen(changed: Iterable[str], root: Path) -> list[str]:
    """Files of tests, from the root, without repetition."""
    found = {root / path for path in ALWAYS}
    for name in changed:
        path = Path(name)
        if path.suffix == ".py":
            found.update(_of_module(path, root))
        elif path.suffix == ".md":
            found.add(root / DOCS)
    return sorted(str(test.relative_to(root)) for test in found if test.is_file())


def _of_module(path: Path, root: Path) -> list[Path]:
    """The tests of a module, or of the modules beside it that use it."""
    is_test = path.parts[0] == "tests"
    if is_test and path.name.startswith("test_"):
        return [root / path]
    inside = path.parent.parts[1:] if is_test else _mirror(path)
    tests = sorted((root / "tests").joinpath(*inside).glob("test_*.py"))
    beside = {
        _dotted(p.relative_to(root)): p for p in (root / path.parent).glob("*.py")
    }
    wanted, seen = {_dotted(path)}, {_dotted(path)}
    while wanted:
        names = {f"test_{name.rpartition('.')[2]}" for name in wanted}
        found = [t for t in tests if t.stem in names or wanted & _imports(t, root)]
        if found:
            return found
        users = {n for n, p in beside.items() if wanted & _imports(p, root)}
        wanted, seen = users - seen, seen | users
    return tests


def _mirror(path: Path) -> tuple[str, ...]:
    """The folder under tests/ for a module's folder: that of the package is tests/."""
    folders = path.parent.parts
    return folders[1:2] if folders[:1] == (PACKAGE,) else folders[:1]


def _dotted(path: Path) -> str:
    """A module's name, of its path from the root."""
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def _imports(path: Path, root: Path) -> set[str]:
    """What a file imports, as dotted names: modules, and names in modules."""
    found, parts = set(), path.relative_to(root).parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = parts[: len(parts) - node.level] if node.level else ()
            module = ".".join([*base, *filter(None, [node.module])])
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return found


if __name__ == "__main__":
    main()
