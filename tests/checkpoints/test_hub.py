"""Which drafter goes with which target; where checkpoints come from.

Run: python -m pytest tests/checkpoints/test_hub.py
"""

import errno
import importlib
import json
import os
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import hf_raise_for_status

from mlx_gemma_mtp.checkpoints.find_drafter import find_drafter, is_drafter_folder
from mlx_gemma_mtp.checkpoints.hub import DRAFTER_FOLDERS, fetch
from mlx_gemma_mtp.errors import CheckpointError
from mlx_gemma_mtp.models.families import published_drafter


@pytest.fixture
def hub(monkeypatch):
    """The Hub's client, replaced: what it was asked for, and what it answers."""

    class Hub:
        def __init__(self):
            self.requests = []
            self.answer = "/cache/snapshot"

        def snapshot_download(self, repo, **options):
            self.requests.append((repo, options))
            if isinstance(self.answer, Exception):
                raise self.answer
            return self.answer

    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    return hub


@pytest.fixture
def target(tmp_path):
    folder = tmp_path / "target"
    write_config(folder, "gemma4")
    return folder


def write_config(folder, model_type):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))


# The client's HTTP library, another one in each of its versions.
http: Any = importlib.import_module(hub_errors.Response.__module__.split(".")[0])


def answered(status, **headers):
    """What the client raises when the Hub answers with a status and headers."""
    url = "https://huggingface.co/api/models/me/mine/revision/v9"
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    response = http.Response(
        status,
        headers=headers,
        json={"error": "some\nserver words"},
        request=http.Request("GET", url),
    )
    with pytest.raises(hub_errors.HfHubHTTPError) as caught:
        hf_raise_for_status(response)
    return caught.value


def not_cached(cause=None):
    """What the client raises where it found no copy either."""
    error = hub_errors.LocalEntryNotFoundError("Got: something\nand no copy")
    error.__cause__ = cause
    return error


def of_disk(number):
    return OSError(number, os.strerror(number), "/cache/blob")


def fetch_fails(name, *words, revision=None):
    with pytest.raises(CheckpointError) as caught:
        fetch(name, revision)
    message = str(caught.value)
    assert "\n" not in message
    for word in (name, *words):
        assert word in message
    return message


def test_a_folder_is_taken_as_it_is(hub, target):
    assert fetch(target) == target
    assert fetch(str(target), "main") == target
    assert hub.requests == []


def test_a_relative_folder_that_looks_like_an_id_is_a_folder(
    hub, tmp_path, monkeypatch
):
    (tmp_path / "google" / "gemma-4-E2B-it").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert fetch("google/gemma-4-E2B-it") == Path("google/gemma-4-E2B-it")
    assert hub.requests == []


def test_an_id_goes_to_the_hub_once(hub):
    assert fetch("google/gemma-4-E2B-it", "abc") == Path("/cache/snapshot")
    ((repo, options),) = hub.requests
    assert (repo, options["revision"]) == ("google/gemma-4-E2B-it", "abc")
    patterns = options["allow_patterns"]
    assert {"*.json", "model*.safetensors", "tokenizer.model"} <= set(patterns)
    assert "drafter/model*.safetensors" in patterns


@pytest.mark.parametrize("name", ["./none", "/none/here", "none", "a/b/c", "../a"])
def test_a_path_that_is_not_there_is_not_sought_on_the_hub(hub, name):
    fetch_fails(name, "no folder here", "google/gemma-4-E2B-it")
    assert hub.requests == []


def test_gguf_repositories_are_refused_before_a_download(hub):
    fetch_fails("google/gemma-4-E2B-it-qat-q4_0-gguf", "safetensors", "GGUF")
    assert hub.requests == []


CONNECT = "no connection"
TIMEOUT = "no answer in time"


@pytest.mark.parametrize("is_local", [False, True])
@pytest.mark.parametrize(
    ("error", "words"),
    [
        (answered(404, X_Error_Code="RepoNotFound"), ["no such repository", "name"]),
        (answered(401), ["no such repository", "hf auth login"]),
        (
            answered(403, X_Error_Code="GatedRepo"),
            ["gated", "https://huggingface.co/me/mine", "hf auth login"],
        ),
        (
            answered(401, X_Error_Code="GatedRepo"),
            ["gated", "https://huggingface.co/me/mine", "hf auth login"],
        ),
        (
            answered(403, X_Error_Message="Access to this resource is disabled."),
            ["disabled", "another repository"],
        ),
        (answered(403), ["no permission (403)", "a token that may"]),
        (
            answered(
                401, X_Error_Message="Invalid credentials in Authorization header"
            ),
            ["token", "not valid (401)", "hf auth login"],
        ),
        (
            answered(404, X_Error_Code="RevisionNotFound"),
            ["no revision 'v9'", "Check the revision"],
        ),
        (answered(404, X_Error_Code="EntryNotFound"), ["no such file", "revision"]),
        (answered(429), ["too many requests (429)", "some minutes", "hf auth login"]),
        (answered(429, Retry_After="17"), ["too many requests", "Wait 17 seconds"]),
        (answered(429, RateLimit='"api";r=0;t=55'), ["too many", "Wait 55 seconds"]),
        (answered(408), [TIMEOUT, "408", "again"]),
        (answered(500), ["failure of the Hub itself (500)", "later"]),
        (answered(503), ["failure of the Hub itself (503)", "status.huggingface.co"]),
        (answered(418), ["answer 418", "some server words", "again"]),
        (
            json.JSONDecodeError("Expecting value", "<html>", 0),
            ["not the Hub's", "Log in"],
        ),
        (KeyError("id"), ["not the Hub's", "login page"]),
        (http.ConnectError("refused"), [CONNECT, "refused", "connection"]),
        (http.ProxyError("503"), [CONNECT, "ProxyError"]),
        (http.ReadTimeout("slow"), [TIMEOUT, "ReadTimeout", "again"]),
        (TimeoutError("slow"), [TIMEOUT]),
        (ConnectionResetError("gone"), [CONNECT, "gone"]),
        (hub_errors.OfflineModeIsEnabled("off"), ["cache", CONNECT, "HF_HUB_OFFLINE"]),
        (not_cached(), ["no complete copy", CONNECT, "Connect", "HF_HUB_OFFLINE"]),
        (of_disk(errno.ENOSPC), ["a full disk", "HF_HOME"]),
        (of_disk(errno.EDQUOT), ["a full disk", "HF_HOME"]),
        (RuntimeError("IO: No space left on device (28)"), ["a full disk"]),
        (of_disk(errno.EACCES), ["cannot be written", "/cache/blob", "HF_HOME"]),
        (of_disk(errno.EROFS), ["cannot be written", "HF_HOME"]),
        (hub_errors.HFValidationError("no\nname"), ["no name", "Check the name"]),
        (RuntimeError("some\nwords " * 1000), ["RuntimeError: some words", "folder"]),
    ],
)
def test_every_failure_of_the_hub_is_one_line(hub, error, words, is_local):
    """The client looks for a copy here first, and wraps what kept it from the Hub."""
    hub.answer = not_cached(error) if is_local else error
    message = fetch_fails("me/mine", *words, revision="v9")
    assert "published" not in message
    assert len(message) < 260


def test_a_repository_without_a_branch(hub):
    hub.answer = answered(404, X_Error_Code="RevisionNotFound")
    message = fetch_fails("me/mine", "no branch main", "Name a revision")
    assert "nothing" not in message


@pytest.mark.parametrize(
    "name", ["google/gemma-4-9b-it", "google/gemma-4-27b-it", "google/gemma4-E2B"]
)
def test_an_unknown_gemma_names_the_published_ids(hub, name):
    hub.answer = answered(404, X_Error_Code="RepoNotFound")
    fetch_fails(
        name,
        "google/gemma-4-E2B-it,",
        "google/gemma-4-E4B-it,",
        "google/gemma-4-12B-it,",
        "google/gemma-4-26B-A4B-it,",
        "google/gemma-4-31B-it.",
    )


def test_an_unknown_drafter_names_the_published_drafters(hub):
    hub.answer = answered(404, X_Error_Code="RepoNotFound")
    fetch_fails("google/gemma-4-9b-it-assistant", "google/gemma-4-31B-it-assistant.")


def test_offline_is_one_line_with_the_real_client():
    fetch_fails("google/gemma-4-E2B-it-none", "no connection", "HF_HUB_OFFLINE")


@pytest.mark.parametrize("name", DRAFTER_FOLDERS)
def test_a_drafter_inside_the_folder(hub, target, name):
    write_config(target / name, "gemma4_assistant")
    choice = find_drafter(target, target)
    assert choice.path_or_id == str(target / name)
    assert "inside" in choice.reason
    assert hub.requests == []


def test_a_drafter_beside_the_folder(hub, tmp_path, target):
    write_config(tmp_path / "drafter", "gemma4_unified_assistant")
    assert find_drafter(target, target).path_or_id == str(tmp_path / "drafter")
    write_config(tmp_path / "target-assistant", "gemma4_assistant")
    choice = find_drafter(target, target)
    assert choice.path_or_id == str(tmp_path / "target-assistant")
    assert "beside" in choice.reason
    assert hub.requests == []


def test_a_drafter_beside_the_current_folder(tmp_path, target, monkeypatch):
    write_config(tmp_path / "drafter", "gemma4_assistant")
    monkeypatch.chdir(target)
    assert find_drafter(".", Path(".")).path_or_id == str(tmp_path / "drafter")


def test_a_folder_named_drafter_counts_only_beside_a_target(tmp_path):
    write_config(tmp_path / "model", "gemma4")
    write_config(tmp_path / "drafter", "gemma4_assistant")
    assert find_drafter(tmp_path / "model", tmp_path / "model").path_or_id is None


def test_only_a_drafters_config_makes_a_drafter(target):
    write_config(target / "drafter", "gemma4")
    write_config(target / "mtp", "gemma4_assistant")
    assert not is_drafter_folder(target / "drafter")
    assert find_drafter(target, target).path_or_id == str(target / "mtp")


def test_a_broken_config_of_a_drafter_is_told(target):
    write_config(target / "drafter", "gemma4_assistant")
    (target / "drafter" / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"drafter/config\.json must be .*JSON"):
        find_drafter(target, target)


def test_a_folder_without_a_drafter_says_what_was_looked_for(hub, target):
    choice = find_drafter(target, target)
    assert choice.path_or_id is None
    for word in (
        str(target),
        "assistant",
        f"{target}-assistant",
        str(target.parent / "drafter"),
        "--draft-model",
    ):
        assert word in choice.reason
    assert "\n" not in choice.reason
    assert hub.requests == []


QAT = "-it-qat-q4_0-unquantized-assistant"


@pytest.mark.parametrize(
    ("target_id", "drafter_id"),
    [
        ("google/gemma-4-E2B-it", "google/gemma-4-E2B-it-assistant"),
        ("google/gemma-4-E4B-it", "google/gemma-4-E4B-it-assistant"),
        ("google/gemma-4-12B-it", "google/gemma-4-12B-it-assistant"),
        ("google/gemma-4-26B-A4B-it", "google/gemma-4-26B-A4B-it-assistant"),
        ("google/gemma-4-31b-it", "google/gemma-4-31B-it-assistant"),
        ("google/gemma-4-31B-it-qat-q4_0-unquantized", f"google/gemma-4-31B{QAT}"),
        ("google/gemma-4-12B-it-qat-w4a16-ct", f"google/gemma-4-12B{QAT}"),
        ("google/gemma-4-E2B-it-qat-mobile-transformers", f"google/gemma-4-E2B{QAT}"),
        (
            "mlx-community/gemma-4-e2b-it-4bit",
            "mlx-community/gemma-4-E2B-it-assistant-bf16",
        ),
        (
            "mlx-community/gemma-4-26b-a4b-it-4bit",
            "mlx-community/gemma-4-26B-A4B-it-assistant-bf16",
        ),
        (
            "MLX-Community/Gemma-4-12B-it-mxfp8",
            "mlx-community/gemma-4-12B-it-assistant-bf16",
        ),
        ("mlx-community/gemma-4-31B-it-qat-mxfp8", f"google/gemma-4-31B{QAT}"),
        ("someone/gemma-4-E4B-it-tuned", "google/gemma-4-E4B-it-assistant"),
    ],
)
def test_the_published_pairing(hub, target, target_id, drafter_id):
    choice = find_drafter(target_id, target)
    assert choice.path_or_id == drafter_id
    assert "published drafter" in choice.reason
    assert hub.requests == []  # chosen, not fetched


@pytest.mark.parametrize(
    ("target_id", "word"),
    [
        ("google/gemma-4-E2B", "base models"),
        ("mlx-community/gemma-4-31B-bf16", "base models"),
        ("google/gemma-4-9b-it", "not named after"),
        ("google/gemma-4-E2B-items", "base models"),
        ("google/gemma-3-4b-it", "not named after"),
    ],
)
def test_ids_without_a_drafter(target, target_id, word):
    choice = find_drafter(target_id, target)
    assert choice.path_or_id is None
    assert target_id in choice.reason
    assert word in choice.reason
    assert "--draft-model" in choice.reason


def test_a_local_drafter_comes_before_the_published_one(target):
    write_config(target / "mtp", "gemma4_assistant")
    assert find_drafter("google/gemma-4-E2B-it", target).path_or_id == str(
        target / "mtp"
    )


def test_a_folder_of_the_hubs_cache_tells_its_id(hub, tmp_path):
    snapshot = tmp_path / "models--google--gemma-4-E4B-it" / "snapshots" / "0abc"
    write_config(snapshot, "gemma4")
    drafter_id = "google/gemma-4-E4B-it-assistant"
    assert find_drafter(snapshot, snapshot).path_or_id == drafter_id
    link = tmp_path / "link"
    link.symlink_to(snapshot)
    assert find_drafter(link, link).path_or_id == drafter_id
    assert hub.requests == []


def test_published_drafters_by_hidden_size():
    assert published_drafter(2816) == "google/gemma-4-26B-A4B-it-assistant"
    assert published_drafter(64) is None
