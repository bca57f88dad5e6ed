"""The command of commands: names, versions, flags of mlx-lm's that mean nothing here.

Run: python -m pytest tests/cli/test_command_line.py
"""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import mlx_gemma_mtp
from convert import __main__ as converter
from mlx_gemma_mtp import __main__ as every
from mlx_gemma_mtp.chat import __main__ as chat
from mlx_gemma_mtp.cli import generate as cli
from mlx_gemma_mtp.cli.command_table import COMMANDS
from mlx_gemma_mtp.cli.refused import CONVERSION_FLAGS, TEXT_FLAGS
from mlx_gemma_mtp.server import __main__ as server
from mlx_gemma_mtp.server.refused import REFUSED
from tests.test_layout import HEAVY, ROOT

MAINS: dict[str, Any] = {
    name: import_module(f"mlx_gemma_mtp.{command.module}")
    for name, command in COMMANDS.items()
}
# Of the commands that mlx-lm has too: ours, and what it refuses.
SHARED = {
    "generate": (cli, TEXT_FLAGS),
    "chat": (chat, TEXT_FLAGS),
    "convert": (converter, CONVERSION_FLAGS),
    "server": (server, REFUSED),
}
by_name = pytest.mark.parametrize("name", COMMANDS)


def options(parser):
    return {option for action in parser._actions for option in action.option_strings}


def options_of_mlx_lm(name):
    """The flags that a program of mlx-lm adds to its parser, read from its source."""
    spec = find_spec(f"mlx_lm.{name}")
    assert spec is not None
    assert spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    return {
        argument.value
        for call in ast.walk(tree)
        if isinstance(call, ast.Call)
        and ast.unparse(call.func).endswith("add_argument")
        for argument in call.args
        if isinstance(argument, ast.Constant) and str(argument.value).startswith("-")
    }


def one_line(capsys, main, *arguments):
    assert main(list(arguments)) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err


class TestNames:
    def test_the_scripts_are_the_table(self):
        settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
        assert settings["project"]["scripts"] == {
            "mlx_gemma_mtp": "mlx_gemma_mtp.__main__:main",
            **{
                f"mlx_gemma_mtp.{name}": f"mlx_gemma_mtp.{command.module}:main"
                for name, command in COMMANDS.items()
            },
        }

    @by_name
    def test_each_is_called_with_what_follows(self, name, monkeypatch):
        monkeypatch.setattr(MAINS[name], "main", len)
        assert every.main([name, "--seed", name]) == 2
        monkeypatch.setattr(sys, "argv", ["mlx_gemma_mtp", name])
        assert every.main() == 0

    def test_flags_alone_are_those_of_generate(self, monkeypatch):
        monkeypatch.setattr(cli, "main", len)
        assert every.main(["-p", "chat", "-m"]) == 3

    def test_control_c_before_a_command_is_there(self, monkeypatch):
        def interrupted(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(every, "import_module", interrupted)
        assert every.main(["chat"]) == 130

    @by_name
    def test_help_and_mistakes_have_one_form_of_the_name(self, name, capsys):
        form = f"mlx_gemma_mtp.{name}"
        with pytest.raises(SystemExit) as end:
            every.main([name, "--help"])
        assert end.value.code == 0
        out = capsys.readouterr().out
        assert out.startswith(f"usage: {form} ")
        assert COMMANDS[name].summary in " ".join(out.split())
        err = one_line(capsys, MAINS[name].main, *required(name), "--no-such-flag")
        assert f"'--no-such-flag'. See {form} --help." in err or name == "run"

    @by_name
    def test_a_name_that_is_nearly_right(self, name, capsys):
        err = one_line(capsys, every.main, name[:-1] + "x")
        assert err.endswith(f"got {name[:-1] + 'x'!r}. Is it {name}?\n")

    @given(st.text(max_size=200).filter(lambda s: s not in COMMANDS and s[:1] != "-"))
    def test_no_name_is_more_than_one_line(self, name):
        with pytest.raises(every.RequestError) as error:
            every._run([name])
        assert len(str(error.value)) < 250
        assert str(error.value).isprintable()


def required(name):
    """Arguments without which a command says nothing of others."""
    return {
        "convert": ["--hf-path", "x"],
        "tune": ["--model", "x", "--data", "x", "--output", "x"],
    }.get(name, [])


class TestHelp:
    @pytest.mark.parametrize("arguments", [[], ["--help"]])
    def test_lists_all_and_loads_nothing(self, arguments):
        code = (
            "import sys; from mlx_gemma_mtp.__main__ import main\n"
            f"try: print(main({arguments}))\n"
            "except SystemExit as end: print(end.code or 0)\n"
            f"print(sorted({HEAVY} & set(sys.modules)))"
        )
        result = subprocess.run(
            [sys.executable, "-W", "error", "-c", code],
            capture_output=True,
            text=True,
            cwd=ROOT,
        )
        *page, status, loaded = result.stdout.splitlines()
        assert (status, loaded, result.stderr) == ("0", "[]", "")
        for name, command in COMMANDS.items():
            (line,) = (line for line in page if line.split()[:1] == [name])
            assert line.endswith(command.summary)

    @pytest.mark.parametrize("name", [None, *COMMANDS])
    def test_version(self, name, capsys):
        with pytest.raises(SystemExit) as end:
            every.main(["--version"] if name is None else [name, "--version"])
        assert end.value.code == 0
        out, err = capsys.readouterr()
        assert out.startswith(f"mlx_gemma_mtp {mlx_gemma_mtp.__version__}, mlx ")
        assert (out.count("\n"), err) == (1, "")


class TestFlagsOfMlxLm:
    @pytest.mark.parametrize("name", SHARED)
    def test_each_is_taken_or_refused(self, name):
        command, refused = SHARED[name]
        ours = options(command.configure_parser())
        theirs = options_of_mlx_lm(name)
        assert len(theirs) > 10
        assert theirs - ours <= set(refused)
        assert not ours & set(refused)

    @pytest.mark.parametrize("name", ["generate", "chat", "convert"])
    def test_every_refusal_is_one_line(self, name, capsys):
        command, refused = SHARED[name]
        for flag, reason in refused.items():
            for given_flag in ([flag], [flag, "4"], [f"{flag}=4"]):
                err = one_line(capsys, command.main, *required(name), *given_flag)
                begin = f"error: {flag} has no meaning here: {reason}."
                assert err == f"{begin} Leave it out.\n"
