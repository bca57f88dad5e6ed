"""The benchmark runs; what it measures is not judged here.

Run: python -m pytest tests/test_bench.py
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_all_sections_run(tmp_path):
    figures = tmp_path / "figures.json"
    command = [
        sys.executable,
        str(ROOT / "scripts" / "bench.py"),
        *("--prompts", "2", "--places", "2", "--repeats", "1", "--max-tokens", "8"),
        *("--contexts", "32", "--json", str(figures)),
    ]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    found = json.loads(figures.read_text(encoding="utf-8"))
    assert set(found) == {"machine", "speed", "acceptance", "rules", "context"}
    assert "mlx " in found["machine"]
    for figure in found["speed"].values():
        assert figure["tokens_per_second"] > 0
    for figure in found["acceptance"].values():
        assert 1 <= figure["acceptance_length"] <= 5
    for lengths in found["rules"].values():
        assert all(1 <= length <= int(k) + 1 for k, length in lengths.items())
    assert set(found["context"]) == {"32"}
    for name in ("mlx-lm generate_step", "drafting", "random places"):
        assert name in run.stdout
