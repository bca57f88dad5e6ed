"""What processes of tests share is what each would find.

Run: python -m pytest tests/test_start.py
"""

import subprocess
import sys
from pathlib import Path

import transformers
from transformers.utils import import_utils

from tests.start.sitecustomize import KEPT, once

MODELS = Path(transformers.__file__).parent / "models"


def test_names_are_those_that_transformers_looks_up():
    kept = import_utils.define_import_structure
    own = kept.__wrapped__
    expected = own(str(MODELS / "__init__.py"))
    assert kept(str(MODELS / "__init__.py")) == expected
    assert kept(MODELS, prefix="models") == {
        needed: {f"models.{module}": names for module, names in modules.items()}
        for needed, modules in expected.items()
    }
    elsewhere = MODELS / "gemma4" / "__init__.py"
    assert kept(str(elsewhere)) == own(str(elsewhere))


def test_they_are_looked_up_once(tmp_path, monkeypatch):
    monkeypatch.setenv(KEPT, str(tmp_path))
    asked = []

    def look_up(path, prefix):
        asked.append((path, prefix))
        return {frozenset({"torch"}): {f"{prefix}.a": {"A", "B"}}}

    for _ in range(2):
        for prefix in (None, "models"):
            found = once(look_up)(MODELS, prefix)
            assert found == {frozenset({"torch"}): {f"{prefix}.a": {"A", "B"}}}
    assert asked == [(MODELS, None), (MODELS, "models")]
    assert len(list(tmp_path.iterdir())) == 2


def test_processes_look_nothing_up():
    """Those that tests start find what this one has found."""
    code = (
        "import transformers.utils.import_utils as found, transformers\n"
        "assert transformers.AutoTokenizer.__name__ == 'AutoTokenizer'\n"
        "print(found.create_import_structure_from_path.cache_info().misses)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert int(ended.stdout) < 9
