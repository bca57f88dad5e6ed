"""--prompt-cache-file: what mlx_lm.cache_prompt wrote in a process of its own is read.

Run: python -m pytest tests/test_cache_file.py
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.models.cache import KVCache, load_prompt_cache, save_prompt_cache

from mlx_gemma_mtp.cli import generate as cli
from mlx_gemma_mtp.errors import MTPError, RequestError
from mlx_gemma_mtp.generation.cache_file import read_cache_file
from mlx_gemma_mtp.pair.load import embedded_pair_path, load
from tests.embedded import float32_pair
from tests.hook.test_run import own_generate

pytestmark = pytest.mark.usefixtures("plain_graphs")

PROMPT = 'def area(radius):\n    """Area'
QUERY = ' of a circle."""\n'
SETTINGS = ["-m", "12", "--temp", "0", "--exactness", "fast"]
# As Gemma's: messages trimmed, an answer that is opened.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '# ' + m.role + '\n' }}"
    "{{ m.content | trim }}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '# assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = float32_pair(tmp_path_factory.mktemp("cache") / "pair")
    (place / "chat_template.jinja").write_text(TEMPLATE)
    return str(place)


@pytest.fixture(scope="module")
def file(folder, tmp_path_factory):
    """Under the name that was asked for, to which MLX gives a suffix."""
    place = tmp_path_factory.mktemp("cache") / "prompt"
    arguments = ["--prompt-cache-file", str(place), "--prompt", PROMPT]
    command = ["-m", "mlx_lm", "cache_prompt", "--model", folder, *arguments]
    subprocess.run([sys.executable, *command], check=True, capture_output=True)
    return f"{place}.safetensors"


@pytest.fixture
def run(file, capsys):
    def command(*arguments):
        status = cli.main([*SETTINGS, "--prompt-cache-file", file, *arguments])
        return status, *capsys.readouterr()

    return command


def one_line(result, words):
    status, out, err = result
    assert (status, out, err.count("\n")) == (1, "", 1), result
    assert err.startswith("error: ")
    assert words in err


class TestText:
    @pytest.mark.parametrize(
        "arguments", [["-p", QUERY], ["-p", QUERY, "--extra-eos-token", "return"]]
    )
    def test_is_that_of_mlx_lm(self, run, file, arguments, capsys, monkeypatch):
        own = ["--prompt-cache-file", file, "-m", "12", *arguments]
        expected = own_generate(own, capsys, monkeypatch)
        assert expected.strip()
        before = Path(file).read_bytes()
        status, out, err = run(*arguments, "--verbose")
        assert (status, out) == (0, expected)
        assert "drafted, rule: greedy" in err
        assert Path(file).read_bytes() == before

    def test_is_that_of_the_whole_prompt(self, run, folder, capsys):
        """mlx-lm would put a begin-of-sequence token between the two."""
        arguments = ["-p", QUERY, "--ignore-chat-template"]
        _, expected, _ = run("--model", folder, *arguments)
        whole = ["--model", folder, *SETTINGS, *arguments]
        whole[-2] = f"# user\n{PROMPT}{QUERY}"
        assert cli.main(whole) == 0
        out, err = capsys.readouterr()
        assert out == expected
        assert int(re.findall(r"after a prompt of (\d+)", err)[0]) > 15

    def test_is_not_that_of_the_query_alone(self, run, folder, capsys):
        assert cli.main(["--model", folder, "-p", QUERY, *SETTINGS]) == 0
        assert capsys.readouterr().out != run("-p", QUERY)[1]

    def test_the_prompt_is_what_follows_in_its_message(self, run, monkeypatch):
        """mlx-lm would drop it where the answer's beginning is given."""
        seen = []

        def stream(model, tokenizer, prompt, **settings):
            seen.append(tokenizer.decode(prompt))
            raise RequestError("enough")

        monkeypatch.setattr("mlx_gemma_mtp.generation.text.stream_generate", stream)
        assert run("-p", QUERY)[0] == 1
        begun = ["--prefill-response", "ab", "--thinking", "off"]
        assert run("-p", f" {QUERY}", *begun)[0] == 1
        asked = QUERY.strip()
        assert seen == [f"{asked}\n# assistant\n", f"{asked}\n# assistant\nab"]

    def test_a_name_is_taken_as_mlx_takes_it(self, file):
        found = read_cache_file(file.removesuffix(".safetensors"))
        assert str(found.path) == file

    def test_ends_of_text_are_those_of_the_file(self, run, file, tmp_path):
        """cache_prompt --eos-token leaves the token in the file."""
        changed = changed_file(file, tmp_path, tokenizer_config={"eos_token": "<pad>"})
        saved = read_cache_file(changed)
        assert saved.tokenizer_config == {"eos_token": "<pad>"}
        _, tokenizer = load(saved.model, tokenizer_config=saved.tokenizer_config)
        assert tokenizer.eos_token_ids >= {tokenizer.convert_tokens_to_ids("<pad>")}


def changed_file(file, place, caches=None, **metadata):
    """The file with other caches or metadata; None takes an entry away."""
    found, before = load_prompt_cache(file, return_metadata=True)
    if "tokenizer_config" in metadata and not isinstance(
        metadata["tokenizer_config"], str
    ):
        metadata["tokenizer_config"] = json.dumps(metadata["tokenizer_config"])
    after = {k: v for k, v in {**before, **metadata}.items() if v is not None}
    path = str(place / "changed.safetensors")
    save_prompt_cache(path, found if caches is None else caches, after)
    return path


class TestModel:
    def test_another_one(self, run, file, tmp_path):
        one_line(run("--model", str(tmp_path)), f"got {tmp_path}. Leave it out.")

    def test_the_same_by_another_name(self, file, folder):
        read_cache_file(file).check_model(f"{folder}/../pair/")

    def test_one_that_is_gone(self, file, tmp_path, capsys):
        path = changed_file(file, tmp_path, model="/nowhere/at/all")
        status = cli.main(["--prompt-cache-file", path])
        one_line((status, *capsys.readouterr()), "/nowhere/at/all")

    def test_caches_of_others(self, file, tmp_path, capsys):
        copies: list[list[Any]] = [[*load_prompt_cache(file)] for _ in range(4)]
        fewer, short, damaged, wrong = copies
        fewer.pop()
        short[0].trim(1)
        full: Any = next(c for c in damaged if isinstance(c, KVCache))
        full.keys = full.keys[:, :, : full.offset - 1]
        wrong[0].keys = wrong[0].values = mx.zeros((1, 7, 64, 4))
        for others in copies:
            path = changed_file(file, tmp_path, others)
            status = cli.main(["--prompt-cache-file", path])
            one_line((status, *capsys.readouterr()), "must hold a prompt cache of")

    def test_a_template_that_hides_where_a_message_begins(self, run, monkeypatch):
        for template in ("{{ messages[0].content | length }}", "{{ 'none' }}"):
            config = json.dumps({"chat_template": template})
            one_line(run("--chat-template-config", config), "must begin alike")

    def test_a_system_prompt_beside_it(self, run):
        one_line(run("--system-prompt", "x"), "The prompt begins in the file.")


class TestDamage:
    def test_no_file(self, tmp_path, capsys):
        status = cli.main(["--prompt-cache-file", str(tmp_path / "x.safetensors")])
        one_line((status, *capsys.readouterr()), "No such file")

    def test_weights(self, capsys):
        path = str(embedded_pair_path() / "model.safetensors")
        status = cli.main(["--prompt-cache-file", path])
        one_line(
            (status, *capsys.readouterr()), "must be a file of mlx_lm.cache_prompt"
        )

    @pytest.mark.parametrize(
        "metadata",
        [
            {"model": None},
            {"tokenizer_config": None},
            {"tokenizer_config": "{"},
            {"tokenizer_config": [1]},
        ],
    )
    def test_metadata(self, file, tmp_path, metadata):
        with pytest.raises(MTPError, match="must be a file of mlx_lm"):
            read_cache_file(changed_file(file, tmp_path, **metadata))

    @given(st.data())
    def test_any_place(self, file, data):
        """A cut file never passes; bytes of the header that differ are read or told."""
        whole = Path(file).read_bytes()
        header = 8 + int.from_bytes(whole[:8], "little")
        is_cut = data.draw(st.booleans())
        place = data.draw(st.integers(0, (len(whole) if is_cut else header) - 1))
        changed = bytes([whole[place] ^ data.draw(st.integers(1, 255))])
        damaged = whole[:place] + (b"" if is_cut else changed + whole[place + 1 :])
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "damaged.safetensors"
            path.write_bytes(damaged)
            said = ""
            try:
                read_cache_file(str(path))
            except MTPError as error:
                said = str(error)
        assert said or not is_cut
        assert "\n" not in said
        assert len(said) < 600
