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

# A module imports only modules of lower layers; `errors` stands below them all.
LAYERS = {
    "errors": -1,
    "chips": 0,
    "command": 1,
    "command_table": 2,
    "config": 0,
    "early_start": 0,
    "families": 0,
    "hook_table": 0,
    "machine": 0,
    "noise": 0,
    "refused": 0,
    "stats": 0,
    "store": 0,
    "tool_calls": 0,
    "tables": 0,
    "tensor_names": 1,
    "kernels": -1,
    "candidates": 0,
    "learnt": 0,
    "acceptance_model": 1,
    "answer": 1,
    "cost_model": 1,
    "cache": 1,
    "checkpoint": 1,
    "encoding": 1,
    "fingerprint": 1,
    "generation_defaults": 1,
    "masked_embedding": 1,
    "quantization": 1,
    "route": 1,
    "samplers": 1,
    "sampling": 1,
    "staging": 2,
    "stop": 1,
    "timing": 1,
    "traces": 0,
    "wired": 1,
    "acceptance": 2,
    "arguments": 3,
    "chat_template": 2,
    "compared": 2,
    "control": 3,
    "drafter": 2,
    "logprobs": 2,
    "pairing": 2,
    "prompt_cache": 4,
    "cache_file": 5,
    "processing": 2,
    "target": 2,
    "template_files": 2,
    "text_pieces": 2,
    "display": 2,
    "draft_length": 4,
    "prefill": 3,
    "fused": 3,
    "roofline": 4,
    "calibration": 4,
    "model_arrays": 3,
    "decision": 4,
    "fit": 4,
    "row": 4,
    "state": 4,
    "weights": 4,
    "room": 5,
    "tokenizer": 5,
    "emission": 5,
    "outcome": 6,
    "packing": 2,
    "rounds": 5,
    "seats": 6,
    "shadows": 5,
    "trials": 2,
    "waiting": 7,
    "decoder": 8,
    "pair": 6,
    "probe": 6,
    "load": 7,
    "planning": 7,
    "random_pair": 7,
    "tokens": 9,
    "batch": 10,
    "flags": 10,
    "text": 10,
    "chat": 11,
    "cli": 11,
    "selftest": 11,
    "server": 11,
    "tune": 11,
    "generate": 12,
    "__main__": 12,
    "hooked": 13,
    "hook": 14,
    "run": 15,
}
# The same inside convert/, which may import any module of the package but these two.
CONVERT = ROOT / "convert"
CONVERT_LAYERS = {
    "request": 0,
    "quantize": 0,
    "plan": 0,
    "progress": 0,
    "tokenizer": 0,
    "output_config": 0,
    "safetensors": 1,
    "reader": 1,
    "planner": 1,
    "manifest": 1,
    "sources": 2,
    "unpack": 2,
    "stream": 3,
    "streamed_target": 2,
    "card": 3,
    "divergence": 3,
    "pipeline": 4,
    "report": 5,
    "__main__": 6,
}
# text: generate(verbose=True), when asked; command_table: --version.
PRINTING = {"__main__", "cli", "command_table", "run", "text"}
# The rest of their sub-packages does not print.
COMMANDS = {
    PACKAGE / part / "__main__.py" for part in ("chat", "selftest", "server", "tune")
}
HEAVY = {"mlx", "mlx_lm", "transformers", "numpy", "huggingface_hub", "sentencepiece"}


def present_modules():
    """Names of the package's modules and sub-packages, ``__init__`` left out."""
    files = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    return files | {path.parent.name for path in PACKAGE.glob("*/__init__.py")}


def sources(module):
    """The files of a module, or of a sub-package."""
    folder = PACKAGE / module
    return (
        sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]
    )


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


def modules_imported(module):
    """The package's own modules that ``module`` imports."""
    for path in sources(module):
        for name in absolute_imports(path):
            top, _, rest = name.partition(".")
            first = rest.split(".")[0]
            if top == "mlx_gemma_mtp" and first not in (module, "__version__"):
                yield first


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


def test_tree_is_the_layer_table():
    assert present_modules() == set(LAYERS)


@pytest.mark.parametrize("module", sorted(present_modules() & set(LAYERS)))
def test_imports_point_down(module):
    for imported in modules_imported(module):
        assert imported in LAYERS, f"{module} must import modules, not {imported!r}"
        assert LAYERS[imported] < LAYERS[module], f"{module} imports {imported}"


def test_converter_is_its_layer_table():
    present = {path.stem for path in CONVERT.glob("*.py")} - {"__init__"}
    assert present == set(CONVERT_LAYERS)


@pytest.mark.parametrize("module", sorted(CONVERT_LAYERS))
def test_converter_imports_point_down(module):
    for name in absolute_imports(CONVERT / f"{module}.py"):
        top, _, rest = name.partition(".")
        first = rest.split(".")[0]
        if top == "convert":
            assert CONVERT_LAYERS[first] < CONVERT_LAYERS[module], name
        if top == "mlx_gemma_mtp" and first:
            assert first in LAYERS, f"{module} must import modules, not {name}"
            assert first not in {"cli", "text"}, name


@pytest.mark.parametrize("module", sorted(set(CONVERT_LAYERS) - {"__main__"}))
def test_nothing_else_in_the_converter_prints(module):
    assert printing_lines(CONVERT / f"{module}.py") == []


def test_the_package_does_not_need_the_converter():
    for path in PACKAGE.rglob("*.py"):
        assert not any("convert" in n.split(".") for n in absolute_imports(path)), path


def test_the_bottom_layer_knows_no_library():
    models = ("learnt", "acceptance_model", "cost_model", "control")
    speed = ("chips", "families", "roofline")
    for module in ("errors", "config", "stats", *models, *speed):
        (path,) = sources(module)
        tops = {name.split(".")[0] for name in absolute_imports(path)}
        assert tops <= sys.stdlib_module_names | {"mlx_gemma_mtp"}, module


@pytest.mark.parametrize("module", sorted(present_modules() - PRINTING))
def test_nothing_else_prints(module):
    for path in set(sources(module)) - COMMANDS:
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
        assert module in LAYERS
        if module in present_modules():
            (path,) = sources(module)
            assert name in {getattr(node, "name", None) for node in parse(path).body}


def test_unknown_name_is_an_attribute_error():
    import mlx_gemma_mtp

    with pytest.raises(AttributeError, match="no attribute 'generat'"):
        getattr(mlx_gemma_mtp, "generat")  # noqa: B009


def test_an_export_stays_itself_beside_a_submodule_of_its_name():
    package = """
import sys, types, mlx_gemma_mtp as package
module = types.ModuleType("mlx_gemma_mtp.text")
module.generate = function = lambda: None
sys.modules["mlx_gemma_mtp.text"] = module
package.generate = types.ModuleType("mlx_gemma_mtp.generate")
from mlx_gemma_mtp import generate
assert generate is function
package.generate = types.ModuleType("mlx_gemma_mtp.generate")
assert package.generate is function
"""
    assert run_python(package).stderr == ""
