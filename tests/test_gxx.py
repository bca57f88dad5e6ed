"""That MLX's kernels of the CPU are compiled behind a header that is compiled once."""

import os
import subprocess
import sys

import mlx.core as mx
import pytest

from tests import gxx

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="MLX calls no g++")

FLAGS = ["-std=c++17", "-O3", "-shared", "-fPIC"]


def test_mlx_compiles_behind_the_header(monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    weight = int.from_bytes(os.urandom(3)) / 7  # a kernel that nothing has compiled

    @mx.compile
    def function(x):
        return mx.exp(x) * weight + x

    mx.eval(function(mx.ones(4)))
    assert list(tmp_path.rglob("*.so"))
    assert list(gxx.PLACE.glob(f"*/{gxx.HEADER}.gch"))


def test_other_calls_are_those_of_the_compiler_itself(tmp_path):
    source, made = tmp_path / "a.cpp", tmp_path / "a.so"
    source.write_text('extern "C" int one() { return 1; }')
    subprocess.run(["g++", *FLAGS, str(source), "-o", str(made)], check=True)
    assert made.exists()
    source.write_text("this is no C++")
    assert subprocess.run(["g++", *FLAGS, str(source), "-o", str(made)]).returncode
