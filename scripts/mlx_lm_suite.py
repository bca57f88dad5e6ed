"""Runs mlx-lm's own tests of generation, caches, batches and server with the hook.

    python scripts/mlx_lm_suite.py [--plain] [arguments of pytest]

The tests come with the source distribution of the mlx-lm that is installed; it is
downloaded, and so is what they import. The model that they would download is the
embedded pair: a Hub cache is made that has it under that name. With --plain the hook is
left out, which tells what of mlx-lm itself does not do for this model.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import mlx_lm

from mlx_gemma_mtp.pair.load import embedded_pair_path

ROOT = Path(__file__).parents[1]
PLACE = ROOT / "build" / f"mlx-lm-suite-{mlx_lm.__version__}"
FILES = ("test_chat.py", "test_generate.py", "test_prompt_cache.py", "test_server.py")
MODEL = "mlx-community/Qwen1.5-0.5B-Chat-4bit"
COMMIT = "0" * 40
# The embedded pair's own does not say who speaks.
TEMPLATE = "{% for m in messages %}# {{ m.role }}: {{ m.content }}\n{% endfor %}"


def main() -> int:
    """Download what is missing, then run the tests."""
    arguments = sys.argv[1:]
    is_plain = "--plain" in arguments
    tests, packages = _tests(), _packages()
    shutil.rmtree(PLACE / "hub", ignore_errors=True)
    _make_hub(PLACE / "hub")
    environment = {
        **os.environ,
        "HF_HUB_CACHE": str(PLACE / "hub"),
        "HF_HUB_OFFLINE": "1",
        "MLX_GEMMA_MTP_CACHE": str(PLACE / "learnt"),
        "MLX_LM_SUITE_PLAIN": "1" if is_plain else "",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(packages)]),
    }
    command = [sys.executable, "-m", "pytest", "-p", "tests.mlx_lm_suite"]
    command += ["-c", os.devnull, "--rootdir", str(tests), "--import-mode=importlib"]
    command += ["-p", "no:cacheprovider", "-rx"]
    command += [argument for argument in arguments if argument != "--plain"]
    command += [str(tests / name) for name in FILES]
    return subprocess.run(command, cwd=PLACE, env=environment, check=False).returncode


def _tests() -> Path:
    """The folder of mlx-lm's tests, without its sources beside them."""
    folder = PLACE / "tests"
    if not folder.is_dir():
        named = f"mlx-lm=={mlx_lm.__version__}"
        _pip("download", "--no-deps", "--no-binary", "mlx-lm", "-d", str(PLACE), named)
        (archive,) = PLACE.glob("mlx_lm-*.tar.gz")
        with tarfile.open(archive) as file:
            members = [m for m in file.getmembers() if "/tests/" in m.name]
            for member in members:
                member.name = member.name.partition("/")[2]
            file.extractall(PLACE, members, filter="data")
    return folder


def _packages() -> Path:
    """A folder with what the server's tests import, apart from everybody else's."""
    folder = PLACE / "packages"
    if not folder.is_dir():
        _pip("install", "--target", str(folder), "requests")
    return folder


def _pip(*arguments: str) -> None:
    quiet = ["-q", "--disable-pip-version-check"]
    subprocess.run([sys.executable, "-m", "pip", *arguments, *quiet], check=True)


def _make_hub(hub: Path) -> None:
    """Make a Hub cache in which the tests' model is the embedded pair."""
    repository = hub / f"models--{MODEL.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    folder = repository / "snapshots" / COMMIT
    shutil.copytree(embedded_pair_path(), folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    _change(folder / "tokenizer_config.json", _drop_bos)
    _change(folder / "tokenizer.json", _like_theirs)
    weights: Any = {"metadata": {}, "weight_map": _weight_map(folder)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(weights))


def _change(path: Path, change: Any) -> None:
    found = json.loads(path.read_text(encoding="utf-8"))
    change(found)
    path.write_text(json.dumps(found), encoding="utf-8")


def _drop_bos(config: dict[str, Any]) -> None:
    config["add_bos_token"] = False


def _like_theirs(tokenizer: dict[str, Any]) -> None:
    """Let token 0 be ``!`` and put no token in front, as in the tests' model."""
    tokenizer["post_processor"] = None
    vocabulary = tokenizer["model"]["vocab"]
    other = vocabulary["!"]
    vocabulary["!"], vocabulary["<pad>"] = 0, other
    for token in tokenizer["added_tokens"]:
        if token["content"] == "<pad>":
            token["id"] = other


def _weight_map(folder: Path) -> dict[str, str]:
    """The index that a published checkpoint has, of its one file."""
    file = "model.safetensors"
    with open(folder / file, "rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    return {name: file for name in header if name != "__metadata__"}


if __name__ == "__main__":
    raise SystemExit(main())
