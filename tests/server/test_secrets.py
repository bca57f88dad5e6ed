"""The server's key is nowhere but in the requests that bring it.

Run: python -m pytest tests/server/test_secrets.py
"""

from __future__ import annotations

import io
import re
import sys
import tempfile

import pytest

from mlx_gemma_mtp.chat import __main__ as chat
from mlx_gemma_mtp.cli import generate as cli
from mlx_gemma_mtp.errors import MTPError
from mlx_gemma_mtp.server.arguments import API_KEY_VARIABLE, configure_parser, parse
from mlx_gemma_mtp.store import FOLDER_VARIABLE
from tests.server.served import LOG, server_process
from tests.server.serving import Client
from tests.tiny import uncompiled

BY_FLAG, BY_VARIABLE = "sesame-of-the-flag", "sesame-of-the-environment"
PAGES = ["/", "/health", "/metrics", "/stats", "/v1/models", "/openapi.json", "/docs"]


def is_told(text):
    return BY_FLAG.encode() in text or BY_VARIABLE.encode() in text


def files_with_a_key(folder):
    """Files that tell one; there must be some that could."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    assert any(path.suffix == ".json" for path in (folder / "learnt").iterdir())
    return [path for path in paths if is_told(path.read_bytes())]


@pytest.fixture
def places(monkeypatch, tmp_path):
    """Every place where a program may leave something, in one folder."""
    variables = {
        FOLDER_VARIABLE: "learnt",
        "HOME": "home",
        "TMPDIR": "temporary",
        "XDG_CACHE_HOME": "caches",
    }
    for variable, name in variables.items():
        (tmp_path / name).mkdir()
        monkeypatch.setenv(variable, str(tmp_path / name))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv(API_KEY_VARIABLE, BY_VARIABLE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_server_keeps_its_key_to_itself(places):
    """Neither that of the flag, which counts, nor that of the environment."""
    arguments = ["--api-key", BY_FLAG, "--log-level", "debug"]
    running = server_process(places, *arguments, MLX_DISABLE_COMPILE="1")
    with running as (address, _):
        client = Client(int(address.rsplit(":", 1)[1]))
        for given in (None, "another", BY_FLAG):
            client.key = given
            found = [client.get(page) for page in PAGES]
            found += [client.complete("a b", max_tokens=8), client.complete(3)]
            assert (found[-2].status == 200) == (given == BY_FLAG)
            for response in found:
                assert not is_told(response.body + str(response.headers).encode())
    said = (places / LOG).read_text()
    named = r"^\S+ \S+ INFO 127\.0\.0\.1:\d+ [0-9a-f]{24} /v1/completions 200 in"
    assert re.search(named, said, flags=re.MULTILINE)
    assert not files_with_a_key(places)


def test_commands_keep_the_servers_key_to_themselves(places, monkeypatch, capsys):
    """Which is in the environment of whoever starts all of them."""
    prompt = ["--prompt", "a b", "--max-tokens", "8", "--exactness", "fast"]
    stats = ["--stats-json", str(places / "stats.json")]
    typed = io.TextIOWrapper(io.BytesIO(b"hello\n/save talk.json\n/quit\n"))
    monkeypatch.setattr(sys, "stdin", typed)
    with uncompiled():
        assert cli.main([*prompt, *stats]) == 0
        assert chat.main(["-m", "8", "--exactness", "fast"]) == 0
    assert (places / "talk.json").exists()
    assert not files_with_a_key(places)
    said = capsys.readouterr()
    assert not is_told((said.out + said.err).encode())


@pytest.mark.parametrize(
    "arguments",
    [
        [f"--api-kye={BY_FLAG}"],
        ["--api-kye", BY_FLAG],
        [f"--api-key={BY_FLAG}é"],
        ["--api-key", f"{BY_FLAG}\n"],
    ],
)
def test_mistakes_do_not_repeat_a_key(arguments):
    with pytest.raises(MTPError) as error:
        parse(arguments)
    assert not is_told(str(error.value).encode())


def test_settings_and_help_do_not_show_a_key(monkeypatch):
    monkeypatch.setenv(API_KEY_VARIABLE, BY_VARIABLE)
    assert not is_told(configure_parser().format_help().encode())
    for arguments in ([], ["--api-key", BY_FLAG]):
        settings = parse(arguments)
        assert settings.api_key
        assert not is_told(repr(settings).encode())
