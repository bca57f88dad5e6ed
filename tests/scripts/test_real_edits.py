"""Tests of the study of real edits, on made-up ones.

Run: python -m pytest tests/scripts/test_real_edits.py
"""

import json
import subprocess
from pathlib import Path

from tokenizers import Tokenizer

from mlx_gemma_mtp.constants import MAX_DRAFT_TOKENS
from mlx_gemma_mtp.engine.lookup import LONGEST
from mlx_gemma_mtp.pair.load import embedded_pair_path
from scripts.studies.real_edits import places, read_edits, run_lengths

KEPT = Path(__file__).parents[1] / "drafting" / "edits.json"


def test_places_of_an_edit():
    old, new = [1, 2, 3, 4, 5, 6], [1, 2, 7, 4, 5, 6]
    found = places(old, new)
    assert found == [(0, 0), (1, 1), (2, 0), (0, 0), (1, 2), (2, 1)]
    assert run_lengths([(0, 1), (0, 1), (2, 1)]) == [(0, 1, 2), (2, 1, 1)]


def test_what_is_kept_are_places():
    edits = json.loads(KEPT.read_text())
    assert len(edits) == 16
    for match, same, count in (run for edit in edits for run in edit):
        assert 0 <= match <= LONGEST
        assert 0 <= same <= MAX_DRAFT_TOKENS
        assert count > 0


def test_edits_of_a_history(tmp_path):
    def git(*command):
        who = ("-c", "user.name=A", "-c", "user.email=a@b")
        subprocess.run(["git", *who, *command], cwd=tmp_path, check=True)

    lines = [f"value_{i} = compute({i}, {i * i})" for i in range(120)]
    git("init", "-q")
    for text in (lines, [*lines[:50], "pass", *lines[52:]], ["x = 1"] * 120):
        (tmp_path / "a.py").write_text("\n".join(text))
        git("add", "a.py")
        git("commit", "-q", "-m", "change")
    tokenizer = Tokenizer.from_file(str(embedded_pair_path() / "tokenizer.json"))
    ((old, new),) = read_edits(str(tmp_path / ".git"), tokenizer)  # one is no edit
    assert old == tokenizer.encode("\n".join(lines)).ids
    assert new != old
