"""Where converted parts come from, as far as it is known and true.

Run: python -m pytest tests/convert/test_sources.py
"""

from __future__ import annotations

import json
import shutil

import mlx.core as mx
import pytest

from convert import sources
from convert.manifest import MANIFEST_NAME, read_manifest, read_origin
from convert.pipeline import convert, plan_conversion
from convert.request import Request
from mlx_gemma_mtp.errors import CheckpointError, RequestError
from tests.tiny import REFERENCE, model_folder

TARGET_ID, COMMIT = "google/gemma-4-12B-it", "0123abcd"


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    """A target with its drafter, as the Hub's cache holds a repository."""
    name = f"models--{TARGET_ID.replace('/', '--')}"
    return model_folder(
        tmp_path_factory.mktemp("hub") / name / "snapshots" / COMMIT, "12b"
    )


def make(source, place, **settings):
    request = Request(source, place, has_check=False, **settings)
    convert(plan_conversion(request))
    return read_manifest(place)


@pytest.fixture(scope="module")
def converted(cached, tmp_path_factory):
    place = tmp_path_factory.mktemp("converted") / "pair"
    make(cached, place)
    return place


def test_both_parts_of_a_repository_are_named_after_it(converted):
    manifest = read_manifest(converted)
    for part in ("target", "drafter"):
        assert manifest[part]["source"] == TARGET_ID
        assert manifest[part]["revision"] == COMMIT


def test_the_origin_travels_along(converted, tmp_path):
    again = make(converted, tmp_path / "again")
    for part in ("target", "drafter"):
        assert again[part]["source"] == TARGET_ID
        assert again[part]["revision"] == COMMIT


def test_other_weights_have_another_origin(converted, tmp_path):
    """A manifest that was left behind must not speak for what it never saw."""
    folder = tmp_path / "changed"
    shutil.copytree(converted, folder)
    assert read_origin(folder) == (TARGET_ID, COMMIT)
    assert read_origin(folder / "drafter") == (TARGET_ID, COMMIT)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes() + b" ")
    assert read_origin(folder) is None
    assert read_origin(folder / "drafter") == (TARGET_ID, COMMIT)
    (folder / MANIFEST_NAME).write_text('{"target": 1, "files": [], "drafter": {}}')
    assert read_origin(folder) is None
    assert read_origin(folder / "drafter") is None


def test_in_place_the_target_keeps_its_origin(cached, tmp_path):
    place = tmp_path / "alone"
    before = make(cached, place, draft_model="none")
    after = make(place, place, draft_model=cached / "drafter")
    assert after["target"] == before["target"]
    assert after["files"].items() > before["files"].items()
    assert after["drafter"]["source"] == TARGET_ID
    assert "drafter" in (place / "README.md").read_text()


def test_in_place_a_pair_needs_another_drafter(converted):
    with pytest.raises(RequestError, match="another drafter than its own"):
        plan_conversion(Request(converted, converted))


def test_in_place_there_must_be_something_to_do(converted):
    with pytest.raises(RequestError, match="Nothing is to be done"):
        plan_conversion(Request(converted, converted, draft_model="none"))


def test_a_half_download_is_asked_for_again(monkeypatch, tmp_path):
    """Not every version of the Hub's client tells it from a whole one."""
    half = model_folder(tmp_path / "half", "12b")
    (half / "model.safetensors").unlink()
    asked = []
    monkeypatch.setattr(sources, "cached", lambda *args: half)
    monkeypatch.setattr(sources, "_hub_headers", lambda *args: asked.append(args))
    sources.open_source(TARGET_ID, revision=None, headers_only=True)
    assert asked == [(TARGET_ID, None)]


def test_a_head_of_its_own_in_transformers_names(tmp_path):
    source = model_folder(tmp_path / "untied", "12b", has_drafter=False)
    config = json.loads((source / "config.json").read_text())
    config["tie_word_embeddings"] = False
    config["text_config"]["tie_word_embeddings"] = False
    (source / "config.json").write_text(json.dumps(config))
    weights = mx.load(str(REFERENCE / "12b" / "target" / "model.safetensors"))
    assert isinstance(weights, dict)
    table = weights["model.language_model.embed_tokens.weight"]
    weights["lm_head.weight"] = table + 1
    mx.save_safetensors(str(source / "model.safetensors"), weights)
    request = Request(source, tmp_path / "out", draft_model="none")
    found = convert(plan_conversion(request))
    assert not isinstance(found, str), found


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"revision": "main"}, "--revision"),
        ({"draft_revision": "main"}, "--draft-revision"),
        ({"draft_model": "none", "draft_revision": "main"}, "--draft-revision"),
    ],
)
def test_settings_that_would_count_for_nothing(cached, tmp_path, settings, words):
    with pytest.raises(RequestError, match=words):
        Request(cached, tmp_path / "out", **settings)


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError):
        sources.open_source(tmp_path, revision=None, headers_only=True)
