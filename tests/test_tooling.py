"""What builds and checks the project says the same everywhere.

Run: python -m pytest tests/test_tooling.py
"""

import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest

import mlx_gemma_mtp
from scripts.changed_tests import ALWAYS, changed_files, chosen

ROOT = Path(__file__).parents[1]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
CI_RUN = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
WORKFLOW = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
TARGETS = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
STEPS = re.findall(r"\|\| set -- (.*)$", CI_RUN, re.MULTILINE)[0].split()


def test_every_target_is_in_the_help_and_is_phony():
    described = set(re.findall(r"^# make (\S+) +\w", MAKEFILE, re.MULTILINE))
    phony = re.findall(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)[0].split()
    assert set(phony) == TARGETS
    assert TARGETS - described == {"all", "install", "lint", "format", "type", "clean"}
    assert described <= TARGETS


def test_paths_in_the_makefile_exist():
    for path in set(re.findall(r"(?:tests|scripts)/[\w./]+", MAKEFILE)):
        assert (ROOT / path).exists(), path
    for module in set(re.findall(r"-m (scripts\.[\w.]+)", MAKEFILE)):
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), module


def test_the_workflow_runs_the_steps_of_ci():
    runs = re.findall(r"- run: (.*)$", WORKFLOW, re.MULTILINE)
    commands = [shlex.split(run) for run in runs]
    assert {tuple(command[:2]) for command in commands} == {("bash", ".ci/run")}
    assert sorted(step for command in commands for step in command[2:]) == sorted(STEPS)
    assert set(STEPS) <= TARGETS
    assert STEPS[-1] == "test"


def test_versions_of_python_are_the_same_everywhere():
    lower, upper = re.findall(r"3\.(\d+)", PROJECT["project"]["requires-python"])
    oldest, newest = int(lower), int(upper) - 1
    words = re.findall(r"Python(?: must be)? 3\.(\d+) to 3\.(\d+)", MAKEFILE)
    assert words == [(str(oldest), str(newest))] * 2
    assert f"not (3, {oldest}) <= sys.version_info[:2] <= (3, {newest})" in MAKEFILE
    matrix = re.findall(r"python: \[(.*)\]", WORKFLOW)[0]
    assert {f'"3.{oldest}"', f'"3.{newest}"'} < set(matrix.split(", "))
    assert PROJECT["tool"]["ruff"]["target-version"] == f"py3{oldest}"


def test_the_changelog_begins_with_this_version():
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    first = re.findall(r"^## (\S+)", changes, re.MULTILINE)[0]
    assert first == mlx_gemma_mtp.__version__


class TestChangedTests:
    @pytest.fixture
    def root(self, tmp_path):
        files = {
            "tests/engine/test_decoder.py": "",
            "tests/engine/test_joining.py": "from mlx_gemma_mtp.engine import decoder",
            "tests/engine/test_rounds.py": "",
            "tests/tune/test_fresh.py": "import mlx_gemma_mtp.tune.data.lines",
            "tests/server/test_http.py": "from tests.server.serving import start",
            "tests/test_store.py": "from mlx_gemma_mtp import store",
            "tests/convert/test_plan.py": "from convert.plan import plan",
            "tests/docs/test_pages.py": "",
            "mlx_gemma_mtp/engine/decoder.py": "from .queue import RequestQueue",
            "mlx_gemma_mtp/engine/queue.py": "from . import results",
            "mlx_gemma_mtp/engine/results.py": "",
            "tests/pair/test_load.py": "",
        }
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        return tmp_path

    @pytest.mark.parametrize(
        ("changed", "expected"),
        [
            (
                "mlx_gemma_mtp/engine/decoder.py",
                ["tests/engine/test_decoder.py", "tests/engine/test_joining.py"],
            ),
            (
                "mlx_gemma_mtp/engine/results.py",
                ["tests/engine/test_decoder.py", "tests/engine/test_joining.py"],
            ),
            ("mlx_gemma_mtp/pair/planning.py", ["tests/pair/test_load.py"]),
            ("mlx_gemma_mtp/tune/data/lines.py", ["tests/tune/test_fresh.py"]),
            ("mlx_gemma_mtp/store.py", ["tests/test_store.py"]),
            ("convert/plan.py", ["tests/convert/test_plan.py"]),
            ("tests/engine/test_rounds.py", ["tests/engine/test_rounds.py"]),
            ("tests/engine/test_gone.py", []),
            ("tests/server/serving.py", ["tests/server/test_http.py"]),
            ("docs/chat.md", ["tests/docs/test_pages.py"]),
            ("mlx_gemma_mtp/py.typed", []),
        ],
    )
    def test_tests_of_a_file(self, root, changed, expected):
        assert chosen([changed], root) == expected

    def test_those_of_the_layout_always_run(self):
        assert chosen([], ROOT) == sorted(ALWAYS)

    def test_what_git_sees(self, tmp_path):
        def git(*arguments):
            who = ["-c", "user.name=a", "-c", "user.email=a@b"]
            command = ["git", "-C", str(tmp_path), *who, *arguments]
            subprocess.run(command, check=True, capture_output=True)

        def write(name, text):
            (tmp_path / name).write_text(text, encoding="utf-8")

        git("init", "-b", "main")
        for name in ("old.py", "gone.py", "same.py"):
            write(name, name)
        git("add", ".")
        git("commit", "-m", "first")
        assert changed_files(tmp_path) == []
        write("old.py", "changed")
        assert changed_files(tmp_path) == ["old.py"]
        git("checkout", "-b", "branch")
        git("commit", "-am", "second")
        (tmp_path / "gone.py").unlink()
        write("new.py", "new")
        assert changed_files(tmp_path) == ["gone.py", "old.py", "new.py"]
