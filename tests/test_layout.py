"""The package's shape: who may import whom, who may print, what an import costs.

Run: python -m pytest tests/test_layout.py
"""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mlx_gemma_mtp"
CONVERT = ROOT / "convert"

# Modules beside the packages: the standard library alone, and each other.
PLAIN = {"_version", "constants", "cpu_kernels", "errors", "machine", "store"}
# Which packages each package imports. All may import the modules above; nothing else.
BELOW: dict[str, set[str]] = {
    "distributed": set(),
    "kernels": set(),
    "matmuls": {"kernels", "models"},
    "markup": set(),
    "cache": {"kernels"},
    "sampling": {"kernels"},
    "models": {"cache", "kernels", "distributed"},
    "drafting": {"models"},
    "checkpoints": {"models", "markup"},
    "engine": {
        "cache",
        "models",
        "sampling",
        "drafting",
        "matmuls",
        "distributed",
    },
    "exactness": {"engine", "cache", "drafting"},
    "pair": set(
        "exactness engine checkpoints drafting models sampling matmuls kernels "
        "distributed".split()
    ),
    "structure": {"sampling", "markup"},
    "generation": set(
        "structure pair engine sampling models cache checkpoints markup "
        "distributed".split()
    ),
    "cli": set(
        "generation structure pair engine sampling models checkpoints markup "
        "distributed".split()
    ),
}
# The commands import all of these, and never each other.
COMMANDS = ("hook", "chat", "server", "tune", "selftest")
BELOW |= {command: set(BELOW) for command in COMMANDS}
# What programs import and start: the face of the packages.
FACES = {
    "__main__": {"cli"},
    "generate": {"cli"},
    "run": {"hook"},
    "weights": {"checkpoints"},
}
# The converter, which a checkout has beside the package.
CONVERTER = {"checkpoints", "models", "cli", "generation", "cache", "markup"}
# generate(verbose=True), when asked; --version; the last line of a rank that is left.
PRINTING = {
    PACKAGE / path
    for path in (
        "__main__.py",
        "cli/command_table.py",
        "cli/generate.py",
        "distributed/watchdog.py",
        "generation/text.py",
        "hook/run.py",
        *(f"{command}/__main__.py" for command in COMMANDS if command != "hook"),
    )
}
HEAVY = {"mlx", "mlx_lm", "transformers", "numpy", "huggingface_hub", "sentencepiece"}
HEAVY |= {"llguidance"}


def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def absolute_imports(path):
    """Each import in a file, also inside functions, as absolute dotted names."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(parts[: len(parts) - node.level]) if node.level else []
            base += node.module.split(".") if node.module else []
            yield from (".".join([*base, alias.name]) for alias in node.names)


def parts_imported(path):
    """Which modules and packages right under the package a file imports."""
    for name in absolute_imports(path):
        top, _, rest = name.partition(".")
        if top == "mlx_gemma_mtp" and rest:
            yield rest.split(".")[0]


def modules():
    """Every module of the package by its dotted name, with what it imports of it."""
    files = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path
        for path in PACKAGE.rglob("*.py")
    }
    return {
        name: {found for n in absolute_imports(path) if (found := module_of(n, files))}
        for name, path in files.items()
    }


def module_of(name, files):
    """The module that an imported name is, or stands in; None: of another package."""
    for candidate in (name, name.rpartition(".")[0]):
        if candidate in files:
            return candidate
        if f"{candidate}.__init__" in files:
            return f"{candidate}.__init__"
    return None


def printing_lines(path):
    """Where a file prints, or touches what is printed to."""
    forbidden = {"print", "sys.stdout", "sys.stderr"}
    return [
        f"{path}:{node.lineno}"
        for node in ast.walk(parse(path))
        if isinstance(node, (ast.Name, ast.Attribute))
        and ast.unparse(node) in forbidden
    ]


def run_python(code):
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT
    )


def test_tree_is_the_table():
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    beside = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert packages == set(BELOW)
    assert beside == PLAIN | set(FACES)
    assert len([path for path in PACKAGE.iterdir() if path.is_file()]) <= 12


@pytest.mark.parametrize("package", sorted(BELOW))
def test_packages_import_what_the_table_says(package):
    for path in (PACKAGE / package).rglob("*.py"):
        wrong = set(parts_imported(path)) - {package} - BELOW[package] - PLAIN
        assert not wrong, f"{path} imports {wrong}"


def test_what_stands_beside_the_packages_imports_little():
    for name, allowed in {**FACES, **{key: set() for key in PLAIN}}.items():
        wrong = set(parts_imported(PACKAGE / f"{name}.py")) - allowed - PLAIN
        assert not wrong, f"{name} imports {wrong}"


def test_no_imports_go_round():
    imports = modules()
    done: set[str] = set()

    def visit(name, above):
        assert name not in above, f"{' -> '.join([*above, name])}"
        if name not in done:
            for imported in imports[name] - {name}:
                visit(imported, [*above, name])
            done.add(name)

    for name in imports:
        visit(name, [])


def test_the_converter_imports_little():
    for path in CONVERT.glob("*.py"):
        wrong = set(parts_imported(path)) - CONVERTER - PLAIN
        assert not wrong, f"{path} imports {wrong}"


def test_the_package_does_not_need_the_converter():
    for path in PACKAGE.rglob("*.py"):
        assert not any("convert" in n.split(".") for n in absolute_imports(path)), path


def test_the_bottom_knows_no_library():
    plain = [PACKAGE / f"{name}.py" for name in PLAIN]
    drafting = set((PACKAGE / "drafting").glob("*.py"))
    more = [PACKAGE / "models" / f"{name}.py" for name in ("families", "splits")]
    more += [PACKAGE / "engine" / "stats.py"]
    for path in (*plain, *drafting, *more):
        tops = {name.split(".")[0] for name in absolute_imports(path)}
        assert tops <= sys.stdlib_module_names | {"mlx_gemma_mtp"}, path


def test_nothing_else_prints():
    converter = set(CONVERT.glob("*.py")) - {CONVERT / "__main__.py"}
    for path in {*PACKAGE.rglob("*.py"), *converter} - PRINTING:
        assert printing_lines(path) == []


def test_package_list_is_the_tree():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    setuptools = settings["tool"]["setuptools"]
    folders = {path.parent.relative_to(ROOT) for path in PACKAGE.rglob("__init__.py")}
    names = {".".join(folder.parts) for folder in folders}
    assert set(setuptools["packages"]) == names | {"mlx_gemma_mtp.convert"}
    assert setuptools["package-dir"] == {"mlx_gemma_mtp.convert": "convert"}


def test_what_is_no_code_is_package_data():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = settings["tool"]["setuptools"]["package-data"]["mlx_gemma_mtp"]
    listed = {path for pattern in patterns for path in PACKAGE.glob(pattern)}
    files = {p for p in PACKAGE.rglob("*") if p.is_file()}
    data = {p for p in files if p.suffix not in (".py", ".pyc")}
    assert {PACKAGE / "py.typed", PACKAGE / "server" / "page.html"} <= data
    assert data <= listed


def test_package_import_is_free():
    result = run_python(
        f"import sys, mlx_gemma_mtp; print(sorted({HEAVY} & set(sys.modules)))"
    )
    assert (result.stdout.strip(), result.stderr) == ("[]", "")


def test_exports_are_defined_where_the_package_looks():
    init = parse(PACKAGE / "__init__.py")
    table = next(
        ast.literal_eval(node.value)
        for node in init.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_MODULE_OF"
    )
    import mlx_gemma_mtp

    assert set(mlx_gemma_mtp.__all__) == {*table, "__version__"}
    assert set(dir(mlx_gemma_mtp)) >= set(mlx_gemma_mtp.__all__)
    for name, module in table.items():
        path = PACKAGE / f"{module.replace('.', '/')}.py"
        assert name in {getattr(node, "name", None) for node in parse(path).body}


def test_unknown_name_is_an_attribute_error():
    import mlx_gemma_mtp

    with pytest.raises(AttributeError, match="no attribute 'generat'"):
        getattr(mlx_gemma_mtp, "generat")  # noqa: B009


def test_an_export_stays_itself_beside_a_submodule_of_its_name():
    package = """
import sys, types, mlx_gemma_mtp as package
module = types.ModuleType("mlx_gemma_mtp.generation.text")
module.generate = function = lambda: None
sys.modules["mlx_gemma_mtp.generation.text"] = module
package.generate = types.ModuleType("mlx_gemma_mtp.generate")
from mlx_gemma_mtp import generate
assert generate is function
package.generate = types.ModuleType("mlx_gemma_mtp.generate")
assert package.generate is function
"""
    assert run_python(package).stderr == ""


LIMIT_LINES, LIMIT_FUNCTION, LIMIT_METHODS = 450, 60, 20
CODE = sorted([*PACKAGE.rglob("*.py"), *CONVERT.glob("*.py")])


def code_lines(node):
    """Lines of a function, its docstring apart."""
    first = node.body[0]
    is_text = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    docstring = first.end_lineno - first.lineno + 1 if is_text else 0
    return node.end_lineno - node.lineno + 1 - docstring


def test_modules_functions_and_classes_are_small():
    found = []
    for path in CODE:
        name = path.relative_to(ROOT)
        num_lines = len(path.read_text(encoding="utf-8").splitlines())
        if num_lines > LIMIT_LINES:
            found.append(f"{name}: {num_lines} lines")
        for node in ast.walk(parse(path)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                if code_lines(node) > LIMIT_FUNCTION:
                    found.append(f"{name}: {node.name} has {code_lines(node)} lines")
            elif isinstance(node, ast.ClassDef) and path.parent.name == "engine":
                methods = [n for n in node.body if isinstance(n, ast.FunctionDef)]
                if len(methods) > LIMIT_METHODS:
                    found.append(f"{name}: {node.name} has {len(methods)} methods")
    assert found == []


def test_tests_mirror_the_folders():
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir()}
    folders -= {"data", "docs", "metal", "start", "__pycache__"}
    assert folders == {*BELOW, "convert", "scripts"}
