"""Commands on several ranks: rank 0 speaks for all, and what is refused is so at once.

Run: python -m pytest tests/cli/test_several.py
"""

import json
import sys
from types import SimpleNamespace

import pytest

from mlx_gemma_mtp.cli import command, generate
from mlx_gemma_mtp.cli.command import exit_status
from mlx_gemma_mtp.errors import CheckpointError, RequestError
from mlx_gemma_mtp.selftest.__main__ import main as selftest

REFUSED = {
    "-p": "-",
    "--prompt-cache-file": "cache.safetensors",
    "--adapter-path": "adapters",
    "--logit-bias": '{"5": 1}',
    "--repetition-penalty": "1.1",
    "--presence-penalty": "0.5",
    "--frequency-penalty": "0.5",
    "--schema": "schema.json",
    "--regex": "[0-9]",
    "--max-thinking-tokens": "0",
}


@pytest.fixture(params=[0, 1])
def rank(request, monkeypatch, tmp_path):
    """This process is one of two ranks, and may load nothing."""
    hosts = tmp_path / "hosts.json"
    hosts.write_text(json.dumps([["127.0.0.1:1"], ["127.0.0.1:2"]]))
    monkeypatch.setenv("MLX_RANK", str(request.param))
    monkeypatch.setenv("MLX_HOSTFILE", str(hosts))
    monkeypatch.setattr(generate, "load_model", None)
    return request.param


def check_said(capsys, rank, line):
    """One line of rank 0's, nothing of the other's."""
    output, errors = capsys.readouterr()
    assert output == ""
    if rank:
        assert errors == ""
    else:
        assert errors.startswith(f"error: {line}")
        assert errors.count("\n") == 1


@pytest.mark.parametrize(("flag", "value"), REFUSED.items(), ids=REFUSED)
def test_what_one_machine_alone_has_is_refused_before_loading(
    rank, capsys, flag, value
):
    assert generate.main([flag, value]) == 1
    check_said(capsys, rank, f"{flag} must")


def test_an_empty_bias_is_none(rank, monkeypatch):
    """It comes as far as loading."""
    loaded: list[str] = []

    def load(args, config):
        loaded.append(args.logit_bias)
        raise CheckpointError("no such folder")

    monkeypatch.setattr(generate, "load_model", load)
    assert generate.main(["--logit-bias", "{ }"]) == 1
    assert loaded == ["{ }"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--no-such-flag"], "unrecognized argument: '--no-such-flag'"),
        (["--temp", "warm"], "argument --temp: invalid float value"),
        (["--temp", "-1"], "temp must be"),
        (["--num-draft-tokens", "9"], "num_draft_tokens must be"),
    ],
)
def test_mistakes_are_told_once(rank, capsys, arguments, line):
    assert generate.main(arguments) == 1
    check_said(capsys, rank, line)


def test_the_self_test_refuses_once(rank, capsys):
    assert selftest(["--section", "machine"]) == 1
    check_said(capsys, rank, "the self-test of several ranks must be without")


def test_help_is_printed_once(rank, capsys):
    with pytest.raises(SystemExit, match="0"):
        generate.main(["--help"])
    output, errors = capsys.readouterr()
    assert errors == ""
    assert bool(output) == (rank == 0)


def test_what_one_rank_lacks_it_says_itself(rank, capsys):
    def load():
        raise CheckpointError("no such folder")

    assert exit_status(load, sys.stdout, sys.stderr) == 1
    assert capsys.readouterr().err == "error: no such folder\n"


def test_a_wrong_environment_is_one_line_of_each_rank(rank, monkeypatch, capsys):
    """Which of them is the first is not to be known then."""
    monkeypatch.setenv("MLX_HOSTFILE", "no-such-file.json")
    assert generate.main([]) == 1
    output, errors = capsys.readouterr()
    assert (output, errors.count("\n")) == ("", 1)
    assert errors.startswith("error: MLX_HOSTFILE must name a JSON list")


def test_the_first_rank_writes_files(rank, monkeypatch):
    asked: list[str | None] = []
    monkeypatch.setattr(generate, "_generate", lambda a: asked.append(a.stats_json))
    generate.main(["--stats-json", "figures.json"])
    assert asked == ([None] if rank else ["figures.json"])


def test_one_rank_alone_speaks(monkeypatch, capsys):
    """As in a job of MPI that started one process."""
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "3")
    assert generate.main(["--no-such"]) == 1
    assert capsys.readouterr().err.startswith("error: unrecognized argument")


def test_what_a_rank_finds_when_it_has_met_the_others_it_says(
    rank, monkeypatch, capsys
):
    """Its files may differ from theirs, and they hear of it."""
    told: list[Exception] = []
    met = SimpleNamespace(give_up=told.append)
    monkeypatch.setattr(command, "_ranks", lambda: met)

    def fails():
        raise RequestError("the template must take this prompt")

    assert exit_status(fails, sys.stdout, sys.stderr) == 1
    assert "the template must take" in capsys.readouterr().err
    assert len(told) == 1
