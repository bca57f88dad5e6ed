"""mlx-lm's programs with drafters: the same output, and mistakes as one line.

Run: python -m pytest tests/hook/test_run.py
"""

from __future__ import annotations

import ast
import importlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_gemma_mtp.hook import install as hook
from mlx_gemma_mtp.hook import run
from mlx_gemma_mtp.hook.table import DECODING_PROGRAMS
from tests.embedded import PROMPTS, float32_pair

pytestmark = pytest.mark.usefixtures("plain_graphs")

mlx_lm: Any = importlib.import_module("mlx_lm")
ROOT = Path(__file__).parents[2]
DRAFTS = r"Drafts: (\d+) of (\d+) tokens came from drafts \(\d+%\)\."
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture(autouse=True)
def _as_before(monkeypatch):
    """Undo what a command does to its process."""
    monkeypatch.setattr(sys, "argv", ["pytest"])
    package = logging.getLogger("mlx_gemma_mtp")
    monkeypatch.setattr(package, "handlers", [])
    monkeypatch.setattr(package, "propagate", True)
    yield
    hook.uninstall()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = float32_pair(tmp_path_factory.mktemp("run") / "pair")
    path = place / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"chat_template": TEMPLATE}
    path.write_text(json.dumps(config))
    return str(place)


def settings():
    assert hook._hook is not None
    return hook._hook.settings


def text_of(out):
    """The text that mlx_lm.generate frames."""
    return out.split("==========\n")[1]


def own_generate(arguments, capsys, monkeypatch):
    """The text of mlx-lm's own program."""
    program: Any = sys.modules["mlx_lm.generate"]
    monkeypatch.setattr(sys, "argv", ["mlx_lm.generate", *arguments])
    program.main()
    return text_of(capsys.readouterr().out)


def run_python(*arguments, **settings):
    environment = {**os.environ, "MLX_DISABLE_COMPILE": "1", "COLUMNS": "80"}
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        check=False,
        **settings,
    )


class TestPrograms:
    @pytest.mark.parametrize("name", ["mlx_lm.generate", "generate"])
    def test_generate(self, folder, capsys, monkeypatch, name):
        arguments = ["--model", folder, "-p", PROMPTS[0], "-m", "8"]
        expected = own_generate(arguments, capsys, monkeypatch)
        assert run.main(["--num-draft-tokens", "3", name, *arguments]) == 0
        out, err = capsys.readouterr()
        assert text_of(out) == expected
        source = f"drafter {folder}/drafter: found inside the target's folder"
        assert err.splitlines()[0] == source
        counts = re.fullmatch(DRAFTS, err.splitlines()[-1])
        assert counts is not None
        assert 0 < int(counts[1]) < int(counts[2]) == 8
        assert sys.argv == ["mlx_lm.generate", *arguments]

    def test_settings(self, folder, tmp_path, capsys, monkeypatch):
        drafter = str(tmp_path / "drafter")
        shutil.copytree(Path(folder) / "drafter", drafter)
        arguments = ["--model", folder, "-p", PROMPTS[0], "-m", "4"]
        expected = own_generate(arguments, capsys, monkeypatch)
        own = ["--draft-model", drafter, "--num-draft-tokens", "2"]
        assert run.main([*own, "generate", *arguments]) == 0
        out, err = capsys.readouterr()
        assert text_of(out) == expected
        assert err.splitlines()[0] == f"drafter {drafter}: as named"
        assert settings().num_draft_tokens == 2

    def test_why_there_were_no_drafts(self, folder, tmp_path, capsys):
        arguments = ["--model", folder, "-p", PROMPTS[0], "-m", "4"]
        assert run.main(["--num-draft-tokens", "0", "generate", *arguments]) == 0
        *_, last = capsys.readouterr().err.splitlines()
        assert re.fullmatch(r"Drafts: no token came from one: .+\.", last)
        alone = tmp_path / "alone"
        shutil.copytree(folder, alone, ignore=lambda *_: ["drafter"])
        assert run.main(["generate", "--model", str(alone), *arguments[2:]]) == 0
        *_, last = capsys.readouterr().err.splitlines()
        assert last.startswith("Drafts: no token came from one: decoding without a ")

    def test_of_texts_that_are_written_together(self, folder, capsys):
        """By way of mlx-lm's BatchGenerator."""
        count = ["-p", "4", "-g", "6", "-n", "1", "-b", "2"]
        fixed = ["--num-draft-tokens", "3", "benchmark", "--model", folder]
        assert run.main([*fixed, *count]) == 0
        *_, last = capsys.readouterr().err.splitlines()
        counts = re.fullmatch(DRAFTS, last)
        assert counts is not None
        assert int(counts[2]) == 24  # a warm-up, and one trial

    def test_without_a_drafter(self, folder, capsys, monkeypatch):
        arguments = ["--model", folder, "-p", PROMPTS[0], "-m", "4"]
        expected = own_generate(arguments, capsys, monkeypatch)
        assert run.main(["--no-draft", "generate", *arguments]) == 0
        out, err = capsys.readouterr()
        assert (text_of(out), err) == (expected, "")
        assert not settings().speculative_decoding

    def test_files_of_cache_prompt(self, folder, tmp_path, capsys, monkeypatch):
        """Made by mlx-lm, which needs no drafter for it; read while drafting."""
        file = str(tmp_path / "prompt.safetensors")
        arguments = ["--model", folder, "--prompt-cache-file", file]
        assert run.main(["cache_prompt", *arguments, "--prompt", PROMPTS[0]]) == 0
        out, err = capsys.readouterr()
        assert "Saving..." in out
        assert err == ""
        arguments += ["-p", "    r", "-m", "6", "--ignore-chat-template"]
        expected = own_generate(arguments, capsys, monkeypatch)
        assert run.main(["generate", *arguments]) == 0
        out, err = capsys.readouterr()
        assert text_of(out) == expected
        assert "found inside the target's folder" in err

    def test_chat(self, folder):
        """Two turns over a pipe, in a process of its own, beside mlx-lm's own."""
        arguments = ["--model", folder, "-m", "7"]
        turns = "import \nfrom \nq\n"
        plain = run_python("mlx_lm", "chat", *arguments, input=turns)
        command = ("mlx_gemma_mtp.run", "mlx_lm.chat")
        found = run_python(*command, *arguments, input=turns)
        assert (plain.returncode, found.returncode) == (0, 0), found.stderr
        assert told(found.stdout) == told(plain.stdout)
        assert len(told(plain.stdout)) > 200
        assert "found inside the target's folder" in found.stderr
        assert "Traceback" not in found.stderr

    def test_programs_that_decode_are_known(self):
        """They, and no others, import what decodes."""
        names = {"stream_generate", "batch_generate", "BatchGenerator"}
        package = Path(mlx_lm.__file__).parent
        found = set()
        for script in distribution("mlx-lm").entry_points:
            path = package.joinpath(*script.module.split(".")[1:]).with_suffix(".py")
            tree = ast.parse(path.read_text(encoding="utf-8"))
            imported = {
                alias.name
                for node in tree.body
                if isinstance(node, ast.ImportFrom)
                for alias in node.names
            }
            defined = {getattr(node, "name", None) for node in tree.body}
            if names & (imported | defined):
                found.add(script.name.removeprefix("mlx_lm."))
        assert found == set(DECODING_PROGRAMS)


def told(out):
    """What a chat shows, but for colours and speed."""
    plain = re.sub(r"\x1b\[[0-9;]*[A-Za-z]|[\x01\x02]", "", out)
    return re.sub(r"[0-9.]+ (tok/s|GB|s\b)", r"# \1", plain)


class TestMistakes:
    @pytest.fixture(autouse=True)
    def _nothing_is_replaced(self):
        yield
        assert mlx_lm.load is sys.modules["mlx_lm.utils"].load
        assert mlx_lm.load.__module__ == "mlx_lm.utils"
        assert not hasattr(mlx_lm.load, "__wrapped__")

    def one_line(self, capsys, *arguments):
        assert run.main(list(arguments)) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        return err

    @pytest.mark.parametrize("program", ["generate", "mlx_lm.chat"])
    def test_no_model(self, capsys, program):
        """What they would load is no Gemma 4."""
        err = self.one_line(capsys, program, "--max-tokens", "4")
        assert "must be given a --model here: got none" in err

    def test_models_that_cannot_be_loaded(self, folder, tmp_path, capsys):
        cut, wordless = tmp_path / "cut", tmp_path / "wordless"
        shutil.copytree(folder, cut, ignore=lambda *_: ["drafter"])
        os.truncate(cut / "model.safetensors", 99_999)
        without = shutil.ignore_patterns("drafter", "tokenizer*")
        shutil.copytree(folder, wordless, ignore=without)
        for model, words in (
            ("/nowhere/at/all", "must be a folder or a Hub id"),
            ("nobody/nothing", "must be a repository the Hub gives"),
            (str(tmp_path), "must be a folder with config.json"),
            (str(cut), "so it is cut off"),
            (str(wordless), "Name another one by --model"),
        ):
            err = self.one_line(capsys, "generate", "--model", model)
            hook.uninstall()
            assert words in err

    def test_what_is_raised_elsewhere_is_the_programs_own(self, folder, monkeypatch):
        def fail(*args, **settings):
            raise ValueError("of the program's")

        monkeypatch.setattr(sys.modules["mlx_lm.generate"], "make_sampler", fail)
        with pytest.raises(ValueError, match="of the program's"):
            run.main(["generate", "--model", folder])
        hook.uninstall()

    def test_an_unknown_program(self, capsys):
        err = self.one_line(capsys, "mlx_lm.warp", "--speed", "9")
        assert "must be one of mlx_lm.awq, mlx_lm.benchmark" in err
        assert "mlx_lm.server" in err
        assert "got mlx_lm.warp" in err

    def test_no_program(self, capsys):
        assert "required: program" in self.one_line(capsys)

    def test_a_number_of_drafts(self, capsys):
        err = self.one_line(capsys, "--num-draft-tokens", "9", "server")
        assert "from 0 to 8, or auto: got 9" in err

    def test_a_drafter_that_is_none(self, folder, capsys):
        err = self.one_line(capsys, "--draft-model", folder, "server")
        assert "a Gemma 4 target, which is no drafter" in err
        err = self.one_line(capsys, "--draft-model", "/nowhere/at/all", "server")
        assert "/nowhere/at/all" in err

    @pytest.mark.parametrize("program", ["generate", "server"])
    @pytest.mark.parametrize("flag", [["--kv-bits", "4"], ["--kv-bits=4"]])
    def test_quantized_caches(self, folder, capsys, program, flag):
        err = self.one_line(capsys, program, "--model", folder, *flag, "-m", "4")
        assert "must not be given for Gemma 4: got 4" in err

    def test_quantized_caches_of_other_models(self, tmp_path, capsys):
        """Those are the program's business: it is called, and finds no weights."""
        (tmp_path / "config.json").write_text('{"model_type": "llama"}')
        arguments = ["--model", str(tmp_path), "--kv-bits", "4"]
        run._check_cache(run._read("mlx_lm.generate", arguments))

    def test_a_program_that_lacks_something(self, capsys, monkeypatch):
        monkeypatch.setitem(sys.modules, "lm_eval", None)
        monkeypatch.delitem(sys.modules, "mlx_lm.evaluate", raising=False)
        assert run.main(["evaluate", "--model", "x"]) == 1
        hook.uninstall()
        err = capsys.readouterr().err
        assert "error: mlx_lm.evaluate must be complete: got" in err
        assert "pip install 'mlx-lm[evaluate]'" in err

    @pytest.mark.parametrize(
        ("raised", "status"), [(KeyboardInterrupt, 130), (BrokenPipeError, 141)]
    )
    def test_ends(self, monkeypatch, raised, status):
        def end(*args, **kwargs):
            raise raised

        monkeypatch.setattr("mlx_gemma_mtp.cli.command.drop_output", lambda _: None)
        monkeypatch.setattr("mlx_gemma_mtp.hook.install.install", end)
        assert run.main(["generate", "--model", "x"]) == status

    def test_the_programs_own_mistakes_are_its_own(self, capsys):
        with pytest.raises(SystemExit) as caught:
            run.main(["generate", "--model", "x", "--warp", "9"])
        hook.uninstall()
        assert caught.value.code == 2
        assert "mlx_lm.generate: error: unrecognized" in capsys.readouterr().err
        assert mx.default_device() == mx.cpu
