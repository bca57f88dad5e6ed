"""The study of what tuning is for, from end to end, with a few steps.

Run: python -m pytest -m slow tests/scripts/test_studies.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_gemma_mtp.checkpoints.weights import load_drafter
from mlx_gemma_mtp.pair.load import embedded_pair_path, load_pair
from mlx_gemma_mtp.tune.settings import TrainingSettings
from scripts import openblas, train_drafter
from scripts.studies import finetune_target, tune_proof
from tests.scripts.training import TEXTS, TRAINING, small_corpus
from tests.tiny import uncompiled

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _plain_graphs():
    with uncompiled():
        yield


def test_prose_is_split_by_topic():
    kept, held_out = finetune_target.split_topics()
    assert not set(kept) & set(held_out)
    assert 0.1 < len(held_out) / (len(kept) + len(held_out)) < 0.35


def test_the_proof_runs(tmp_path, monkeypatch, capsys):
    """What it measures after so few steps is not judged here."""
    steps = {"steps": 2, "judge_every": 1}
    for module in (tune_proof, train_drafter):
        monkeypatch.setattr(module, "TEXTS", TEXTS)
        settings = TrainingSettings(**{**TRAINING.to_dict(), **steps})
        monkeypatch.setattr(module, "TRAINING", settings)
    monkeypatch.setattr(train_drafter, "make_corpus", lambda folder: small_corpus())
    monkeypatch.setattr(finetune_target, "_WINDOW", 16)
    monkeypatch.setattr(finetune_target, "_BATCH_SIZE", 2)
    monkeypatch.setattr(finetune_target, "_NUM_JUDGED", 1)
    figures, place = tmp_path / "figures.json", tmp_path / "work"
    monkeypatch.setattr(openblas, "prefer", lambda tell: None)
    status = tune_proof.main(
        [
            *("retuned", "scratch", "centroids", "--finetune-steps", "2"),
            *("--prompts", "3", "--prompt-tokens", "16"),
            *("--max-tokens", "8", "--num-texts", "4", "--work", str(place)),
            *("--json", str(figures)),
        ]
    )
    found = json.loads(figures.read_text("utf-8"))
    assert len(found["claims"]) == 6
    assert status == (0 if all(claim["holds"] for claim in found["claims"]) else 1)
    for part in (*tune_proof.CLAIMED, "centroids"):
        assert found[part]["same_texts"] == found[part]["texts"] == 3
    assert found["retuned"]["tuning"]["drafter"] is not None
    assert found["scratch"]["training"]["drafter"] is None
    assert found["centroids"]["training"]["drafter"] == "fresh"
    drafter = load_drafter(place / "centroids/drafter")
    assert drafter.masked_embedding is not None
    embedded, tuned = map(weights, (embedded_pair_path(), place / "retuned/target"))
    assert set(embedded) == set(tuned)
    assert any(not mx.array_equal(embedded[name], tuned[name]) for name in embedded)
    assert found["machine"] in capsys.readouterr().out


def weights(folder: Path) -> dict[str, mx.array]:
    """A target's, by name."""
    parameters = load_pair(folder, False).target.parameters()
    return dict(cast(list[tuple[str, mx.array]], tree_flatten(parameters)))


@pytest.mark.parametrize(
    ("original", "before", "after", "holds"),
    [
        (3.0, 2.0, 2.9, True),
        (3.0, 2.0, 2.7, False),
        (2.0, 3.0, 3.5, False),  # nothing was lost: nothing is shown
    ],
)
def test_what_counts_as_won_back(original, before, after, holds):
    assert tune_proof._won_back(original, before, after).holds == holds


def test_the_proof_keeps_what_is_there(tmp_path, capsys):
    with pytest.raises(SystemExit):
        tune_proof.main(["--work", str(tmp_path)])
    assert "must not be there yet" in capsys.readouterr().err


def test_figures_are_for_parts_that_there_are(capsys):
    with pytest.raises(SystemExit):
        tune_proof.main(["nothing"])
    assert "retuned, scratch, centroids: got nothing" in capsys.readouterr().err


def test_defaults_stay_within_what_is_claimed():
    args = tune_proof.configure_parser().parse_args([])
    assert args.retuned_minutes < tune_proof.MOST_MINUTES
