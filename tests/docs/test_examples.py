"""The commands and snippets of the README and of docs/ work.

Run: python -m pytest tests/docs/test_examples.py
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
import shlex
import shutil
import sys
from dataclasses import replace
from importlib import import_module

import mlx_lm.utils
import pytest

from convert import __main__ as converter
from mlx_gemma_mtp.chat import __main__ as chat
from mlx_gemma_mtp.cli import generate as cli
from mlx_gemma_mtp.engine.request import Request
from mlx_gemma_mtp.generation import requests
from mlx_gemma_mtp.hook import install as hook
from mlx_gemma_mtp.hook import run
from mlx_gemma_mtp.pair import planning
from mlx_gemma_mtp.selftest import __main__ as selftest
from mlx_gemma_mtp.server.arguments import parse as parse_server_arguments
from mlx_gemma_mtp.tune import __main__ as tuner
from tests.docs.pages import ROOT, blocks, lines
from tests.tiny import CHAT_TEMPLATE, VOCAB_SIZE, model_folder, uncompiled

SHELL = lines("bash")
# What stands in for a Hub id here: nothing is downloaded.
HUB_ID = "google/gemma-4-E2B-it"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("docs") / "pair"
    model_folder(place, chat_template=CHAT_TEMPLATE)
    path = place / "config.json"
    # mlx-lm's own loader takes Gemma's where the outer config does not say.
    config = json.loads(path.read_text()) | {"vocab_size": VOCAB_SIZE}
    path.write_text(json.dumps(config))
    return place


@pytest.fixture(scope="module")
def converted(folder, tmp_path_factory):
    """A place with the folders that the commands make or take."""
    place = tmp_path_factory.mktemp("converted")
    settings = ["--hf-path", str(folder), "--no-check", "--mlx-path"]
    assert converter.main([*settings, str(place / "gemma-4-E2B")]) == 0
    alone = [*settings, str(place / "gemma-4-E2B-4bit"), "--draft-model", "none"]
    assert converter.main(alone) == 0
    return place


@pytest.fixture(autouse=True)
def _local(monkeypatch, folder):
    """Let the Hub's ids mean a folder here."""
    stand_ins = {HUB_ID: folder, f"{HUB_ID}-assistant": folder / "drafter"}
    # The converter as a checkout has it, and as it is installed: two modules.
    converters = ("convert.sources", "mlx_gemma_mtp.convert.sources")
    for name in ("mlx_gemma_mtp.pair.load", *converters):
        module = import_module(name)
        fetch = module.fetch

        def local_fetch(path_or_id, revision=None, fetch=fetch):
            return fetch(stand_ins.get(path_or_id, path_or_id), revision)

        monkeypatch.setattr(module, "fetch", local_fetch)
    download = mlx_lm.utils._download
    monkeypatch.setattr(
        mlx_lm.utils,
        "_download",
        lambda path_or_id, **rest: download(
            str(stand_ins.get(path_or_id, path_or_id)), **rest
        ),
    )
    for name in converters:
        module = import_module(name)

        def local_headers(repo, revision, module=module):
            return module.open_source(
                stand_ins[repo], revision=revision, headers_only=True
            )

        monkeypatch.setattr(module, "_hub_headers", local_headers)
    monkeypatch.setattr(planning, "_PROBE_BUDGET_S", 0)  # others test what it finds
    with uncompiled():
        yield


def run_piped(line, monkeypatch):
    """Run a generate or chat command, with its standard input."""
    *before, command = line.split(" | ")
    if before or "chat" in command:
        text = shlex.split(before[0])[1] + "\n" if before else "hello\n/quit\n"
        text = text.replace("\\n", "\n")  # printf's
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    program, *arguments = shlex.split(command)
    main = {"mlx_gemma_mtp.generate": cli.main, "mlx_gemma_mtp.chat": chat.main}
    return main[program](arguments)


@pytest.mark.parametrize("line", [s for s in SHELL if "mlx_gemma_mtp.generate" in s])
def test_generate_commands(line, monkeypatch, capsys, converted):
    monkeypatch.chdir(converted)
    assert run_piped(f"{line} -m 8", monkeypatch) == 0
    out, err = capsys.readouterr()
    assert out.strip()
    assert all(f"{word}: " in err for word in ("Speed", "Drafts", "Text"))


@pytest.mark.parametrize("line", [s for s in SHELL if "mlx_gemma_mtp.chat" in s])
def test_chat_commands(line, monkeypatch, capsys):
    assert run_piped(f"{line} -m 8", monkeypatch) == 0
    out, err = capsys.readouterr()
    assert out.strip()
    assert ("tokens per second" in err) == ("stats" in line)


@pytest.mark.parametrize("line", [s for s in SHELL if "mlx_gemma_mtp.convert" in s])
def test_convert_commands(line, monkeypatch, capsys, converted, tmp_path):
    for name in ("gemma-4-E2B-4bit",):
        shutil.copytree(converted / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    program, *arguments = shlex.split(line)
    assert program == "mlx_gemma_mtp.convert"
    assert converter.main(arguments) == 0
    assert "bits per weight" in capsys.readouterr().out


@pytest.mark.parametrize("line", [s for s in SHELL if "mlx_gemma_mtp.selftest" in s])
def test_selftest_commands(line):
    program, *arguments = shlex.split(line)
    assert program == "mlx_gemma_mtp.selftest"
    selftest._check(selftest.configure_parser().parse_args(arguments))


@pytest.mark.parametrize("line", [s for s in SHELL if "mlx_gemma_mtp.server" in s])
def test_server_commands(line):
    """Their arguments are good; tests/server/test_live.py runs the command."""
    program, *arguments = shlex.split(line)
    assert program == "mlx_gemma_mtp.server"
    parse_server_arguments(arguments)


@pytest.mark.parametrize("line", [s for s in SHELL if "mlx_gemma_mtp.tune" in s])
def test_tune_commands(line):
    """Their arguments are good; tests/tune/test_tune.py runs the command."""
    program, *arguments = shlex.split(line)
    assert program == "mlx_gemma_mtp.tune"
    tuner.parse(arguments)


@pytest.fixture
def unhooked(monkeypatch):
    """What the hook and its command change in this process is undone."""
    package = logging.getLogger("mlx_gemma_mtp")
    monkeypatch.setattr(package, "handlers", [])
    monkeypatch.setattr(package, "propagate", True)
    monkeypatch.setattr(sys, "argv", ["pytest"])
    yield
    hook.uninstall()


@pytest.mark.parametrize("line", [s for s in SHELL if "mlx_gemma_mtp.run" in s])
def test_run_commands(line, monkeypatch, capsys, unhooked):
    command, *arguments = shlex.split(line)
    assert command == "mlx_gemma_mtp.run"
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\nq\n"))
    served = []
    server = import_module("mlx_lm.server")
    monkeypatch.setattr(server, "run", lambda *args, **kwargs: served.append(args))
    limit = [] if "mlx_lm.server" in arguments else ["-m", "8"]
    assert run.main([*arguments, *limit]) == 0
    out, err = capsys.readouterr()
    if "mlx_lm.server" in arguments:
        ((host, _, provider),) = served
        assert host == "127.0.0.1"
        assert provider.cli_args.model == HUB_ID
    else:
        figures = "tok/s" if "mlx_lm.chat" in arguments else "Generation: 8 tokens"
        assert figures in out
        assert "found inside the target's folder" in err


@pytest.fixture
def short_texts(monkeypatch):
    """Texts that nothing ends by themselves are of few tokens."""

    def short(**fields):
        request = Request(**fields)
        if request.constraint or request.logits_processors:
            return request
        return replace(request, max_tokens=min(request.max_tokens or 6, 6))

    monkeypatch.setattr(requests, "Request", short)


@pytest.mark.parametrize("code", blocks("python"))
def test_python_examples(code, monkeypatch, tmp_path, unhooked, short_texts):
    monkeypatch.chdir(tmp_path)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "docs", "exec"), {})
    assert printed.getvalue().strip()


def test_ci_runs_what_the_readme_tells():
    named = {s.split()[1] for s in lines("bash", "README.md") if s.startswith("make ")}
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    # check is a part of lint and test.
    assert named - {"check"} <= set(re.findall(r"[a-z-]+", ci))


def test_every_other_command_is_known():
    for line in SHELL:
        commands = "generate run chat server convert selftest tune".split()
        programs = [f"mlx_gemma_mtp.{command}" for command in commands]
        assert line.startswith(("make ", "pip install .", "bash .ci/run")) or any(
            program in line for program in programs
        )
