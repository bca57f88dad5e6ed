"""MLX's kernels for the CPU: their header compiled ahead, and what they take.

Run: python -m pytest tests/test_cpu_kernels.py
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlx_gemma_mtp import cpu_kernels
from mlx_gemma_mtp.cpu_kernels import Builds

# Computes what no other process has: a kernel with a constant of its own.
_PROGRAM = """
import sys, mlx.core as mx
from mlx_gemma_mtp import cpu_kernels
mx.set_default_device(mx.cpu)
start, before = cpu_kernels.clock(), cpu_kernels.num_compiled()
number = float(sys.argv[1])
mx.eval(mx.compile(lambda x: mx.exp(x * number) + number)(mx.ones((8,))))
assert (before, cpu_kernels.num_compiled()) == (0, 1)
assert cpu_kernels.compile_seconds() > 0
print(cpu_kernels.clock() - start, cpu_kernels.compile_seconds())
"""


@pytest.fixture
def compiler(tmp_path):
    """A g++ of its own, first in PATH, that tells which headers it reads."""
    told = tmp_path / "headers"
    shim = tmp_path / "bin" / "g++"
    shim.parent.mkdir()
    real = subprocess.run(
        ["which", "g++"], capture_output=True, text=True, check=True
    ).stdout.strip()
    shim.write_text(f'#!/bin/sh\nexec {real} -H "$@" 2>>{told}\n')
    shim.chmod(0o755)
    return told, {**os.environ, "PATH": f"{shim.parent}:{os.environ['PATH']}"}


def test_mlx_takes_the_header_that_was_compiled_ahead(compiler):
    job = cpu_kernels.compile_header()
    assert job is None or job.wait() == 0
    assert cpu_kernels.compile_header() is None  # it is there
    told, environment = compiler
    number = str(time.time_ns() % 10**9 / 1e9)
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", _PROGRAM, number],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    first = told.read_text().splitlines()[0]
    assert first.startswith("! ")  # g++'s sign for one that it takes
    assert first.endswith("compiled_preamble.h.gch")
    assert str(cpu_kernels.folder()) in first


@pytest.mark.parametrize("name", ["TMPDIR", "TMP", "TEMP", "TEMPDIR"])
def test_folder_is_where_mlx_looks(name, monkeypatch):
    for other in ("TMPDIR", "TMP", "TEMP", "TEMPDIR"):
        monkeypatch.delenv(other, raising=False)
    assert cpu_kernels.folder().parts[:3] == ("/", "tmp", "mlx")
    monkeypatch.setenv(name, "/somewhere")
    assert cpu_kernels.folder().parts[:3] == ("/", "somewhere", "mlx")


class TestHeader:
    def test_nothing_is_left_where_it_cannot_be_compiled(self, tmp_path, monkeypatch):
        monkeypatch.setenv("TMPDIR", str(tmp_path))
        monkeypatch.setattr(cpu_kernels, "_FLAGS", ("--no-such-flag",))
        job = cpu_kernels.compile_header()
        assert job is not None
        job.wait()
        assert [path for path in tmp_path.rglob("*") if path.is_file()] == []

    def test_a_folder_that_cannot_be_made_is_no_matter(self, tmp_path, monkeypatch):
        file = tmp_path / "file"
        file.touch()
        monkeypatch.setenv("TMPDIR", str(file))
        assert cpu_kernels.compile_header() is None

    def test_a_folder_of_somebody_else_is_no_matter(self, tmp_path, monkeypatch):
        def refused(path):
            raise PermissionError(path)

        monkeypatch.setenv("TMPDIR", str(tmp_path))
        monkeypatch.setattr(Path, "exists", refused)
        monkeypatch.setattr(cpu_kernels, "_include_folder", lambda: tmp_path)
        assert cpu_kernels.compile_header() is None

    def test_one_that_fails_is_not_tried_again(self, tmp_path, monkeypatch):
        monkeypatch.setenv("TMPDIR", str(tmp_path))
        monkeypatch.setattr(cpu_kernels, "_FLAGS", ("--no-such-flag",))
        job = cpu_kernels.compile_header()
        assert job is not None
        assert cpu_kernels.compile_header() in (job, None)  # no second one beside it
        job.wait()
        assert cpu_kernels.compile_header() is None

    def test_not_where_nothing_is_compiled(self, tmp_path, monkeypatch):
        monkeypatch.setenv("TMPDIR", str(tmp_path))
        monkeypatch.setenv("MLX_DISABLE_COMPILE", "1")
        assert cpu_kernels.compile_header() is None
        monkeypatch.delenv("MLX_DISABLE_COMPILE")
        monkeypatch.setattr(cpu_kernels, "_is_installed", lambda name: True)
        assert cpu_kernels.compile_header() is None  # MLX for NVIDIA's GPUs
        assert not list(tmp_path.iterdir())


class TestBuilds:
    """What was compiled, by the ages of files."""

    @pytest.fixture
    def children(self, monkeypatch):
        used = [1.0]
        monkeypatch.setattr(cpu_kernels, "_children_s", lambda: used[0])
        return used

    @pytest.fixture
    def add(self, tmp_path, children):
        """Let a kernel be compiled, from some seconds after now to some more."""
        origin = time.time()

        def add(name, start, end, *, is_ours=True):
            for file, at in ((f"{name}.cpp", start), (f"lib{name}.so", end)):
                (tmp_path / file).touch()
                os.utime(tmp_path / file, (origin + at, origin + at))
            children[0] += is_ours

        return add

    def test_kernels_are_counted_once(self, tmp_path, add, children):
        add("old", -9, -8)
        builds = Builds(tmp_path)
        add("a", 1, 1.5)
        add("b", 2, 4)
        for _ in range(2):
            builds.look()
            children[0] += 1
            assert builds.number == 2
            assert builds.seconds == pytest.approx(2.5, abs=1e-4)
        add("c", 5, 6)
        builds.look()
        assert builds.number == 3
        assert builds.seconds == pytest.approx(3.5, abs=1e-4)

    def test_no_second_counts_twice(self, tmp_path, add):
        """Two processes compile side by side."""
        builds = Builds(tmp_path)
        add("a", 1, 3)
        add("b", 2, 4)
        builds.look()
        assert builds.seconds == pytest.approx(3, abs=1e-4)

    def test_what_others_compile_is_not_ours(self, tmp_path, add):
        builds = Builds(tmp_path)
        add("theirs", 1, 3, is_ours=False)
        builds.look()
        assert builds.number == builds.seconds == 0

    def test_what_is_no_kernel_does_not_count(self, tmp_path, add, children):
        builds = Builds(tmp_path)
        (tmp_path / "liblonely.so").touch()
        (tmp_path / "tmp_1.so").touch()
        (tmp_path / "mlx").mkdir()
        children[0] += 1
        builds.look()
        assert builds.number == 0

    def test_a_folder_that_cannot_be_read_is_no_matter(self, tmp_path, children):
        builds = Builds(tmp_path / "none")
        children[0] += 1
        builds.look()
        assert builds.number == builds.seconds == 0

    def test_the_clock_stands_still_meanwhile(self, tmp_path, add, monkeypatch):
        now = [100.0]
        monkeypatch.setattr("time.perf_counter", lambda: now[0])
        builds = Builds(tmp_path)
        start = builds.clock()
        now[0] += 10
        assert builds.clock() - start == pytest.approx(10)
        add("a", 1, 5)
        now[0] += 1  # another thread looks while the clock owes more than has passed
        assert builds.clock() - start == pytest.approx(10)
        now[0] += 7
        assert builds.clock() - start == pytest.approx(14, abs=1e-4)
