"""The converter's benchmark runs on a small checkpoint; speed is not judged here.

Run: python -m pytest -m slow tests/scripts/test_convert_bench.py
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KINDS = {"bare", "converter", "converter, with check"}


@pytest.mark.slow
def test_it_measures_and_cleans_up(tmp_path):
    figures, folder = tmp_path / "figures.json", tmp_path / "work"
    command = [
        sys.executable,
        str(ROOT / "scripts" / "studies" / "convert_bench.py"),
        *("--gigabytes", "0.01", "--repeats", "1"),
        *("--folder", str(folder), "--json", str(figures)),
    ]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert figures.is_file(), run.stdout + run.stderr
    found = json.loads(figures.read_text(encoding="utf-8"))
    is_too_slow = found["ratio"]["converter"] < 0.5  # starting up is all it does here
    assert run.returncode == int(is_too_slow), run.stdout + run.stderr
    assert "mlx " in found["machine"]
    checkpoint, work = found["checkpoint"], found["bare_work"]
    assert 0.05e9 < checkpoint["bytes"] < 0.3e9
    assert 0 < work["written"] < work["read"] < checkpoint["bytes"]
    # Packed into 4 bits with a scale and a bias per 64: 4.5 of 16.
    assert 0.25 < work["written"] / work["read"] < 0.35
    for name in ("wall_s", "cpu_s", "peak_gb", "ratio"):
        assert set(found[name]) == KINDS
        assert all(figure > 0 for figure in found[name].values())
    assert all(peak < 1.5 for peak in found["peak_gb"].values())
    for kind in KINDS:
        assert f"| {kind} |" in run.stdout
    assert not folder.exists()
