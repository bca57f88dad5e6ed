"""The command: what goes to which stream, exit statuses, mistakes, Control-C.

Run: python -m pytest tests/cli/test_generate.py
"""

import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import mlx_gemma_mtp
from mlx_gemma_mtp import store
from mlx_gemma_mtp.cli import generate as cli
from mlx_gemma_mtp.errors import RequestError
from tests.tiny import (
    CHAT_TEMPLATE,
    END_OF_TURN,
    EOS,
    PAD,
    endless_folder,
    model_folder,
    tiny_tokenizer,
)

pytestmark = pytest.mark.usefixtures("plain_graphs")

# By name: the package's attribute ``load`` is the function.
LOAD = import_module("mlx_gemma_mtp.pair.load")
TEXT = import_module("mlx_gemma_mtp.generation.text")
ROOT = Path(__file__).parents[2]
PROMPT = "the rain"
NUM_TOKENS = 16
SAMPLED = ("--temp", "2", "--seed", "5")
SUMMARY = (
    r"Speed: (?:[0-9.]+ tokens per second(?:, [0-9]+\.[0-9] times plain decoding)?"
    r"|one token tells none) \([0-9]+ tokens after a prompt of [0-9]+\)\n"
    r"Drafts: [^\n]+\nText: [^\n]+\n(?:Compiled: [^\n]+\n)?"
)
PROBED = "checking, once on this machine, which rounds give plain decoding's bytes\n"
FIGURES = re.compile(SUMMARY)
DETAILS = re.compile(
    r"Prompt: 6 tokens, [0-9]+\.[0-9]{3} tokens-per-sec\n"
    r"Generation: ([0-9]+) tokens, [0-9]+\.[0-9]{3} tokens-per-sec\n"
    r"Rounds: ([0-9]+), acceptance length ([0-9]\.[0-9]{2}) tokens per round, "
    r"acceptance rate [0-9.]+% of ([0-9]+) drafted, rule: [a-z ():,-]+\n"
    r"Drafts: [^\n]+\nExactness: [^\n]+\n"
    r"Time: prefill [0-9.]+ s, rounds [0-9.]+ s, host [0-9.]+ s\n"
    r"Peak memory: [0-9]+\.[0-9]{3} GB, the drafter's weights [0-9]\.[0-9]{3} GB\n"
    + SUMMARY
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("cli") / "pair")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A pair, and its text, which a tokenizer cuts as it was written."""
    folder = model_folder(tmp_path_factory.mktemp("cli") / "whole", "12b")
    return folder, plain_text(folder)


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "chat"
    return model_folder(folder, has_drafter=False, chat_template=CHAT_TEMPLATE)


@pytest.fixture(scope="module")
def endless(tmp_path_factory):
    return endless_folder(tmp_path_factory.mktemp("cli") / "endless")


@pytest.fixture(scope="module")
def expected(folder):
    return plain_text(folder)


def plain_text(folder):
    """The greedy text by plain decoding, from the Python API."""
    model, tokenizer = mlx_gemma_mtp.load(folder, speculative_decoding=False)
    return mlx_gemma_mtp.generate(model, tokenizer, PROMPT, max_tokens=NUM_TOKENS)


@pytest.fixture
def run(folder, capsys):
    """Runs the command: exit status, standard output, standard error."""

    def command(*args, model=folder, is_plain=True):
        if is_plain and model == folder:  # which has no template
            args = ("--ignore-chat-template", *args)
        if "--model" not in args and model is not None:
            args = ("--model", model, *args)
        if "-p" not in args and "--prompt" not in args:
            args = ("-p", PROMPT, *args)
        if "-m" not in args:
            args = ("-m", NUM_TOKENS, *args)
        status = cli.main([str(arg) for arg in args])
        return status, *capsys.readouterr()

    return command


@pytest.fixture
def prompts(monkeypatch):
    """The prompts that reach ``stream_generate``."""
    seen = []
    stream = TEXT.stream_generate

    def recorded(model, tokenizer, prompt, **settings):
        seen.append(prompt)
        return stream(model, tokenizer, prompt, **settings)

    monkeypatch.setattr(TEXT, "stream_generate", recorded)
    return seen


def test_a_cache_folder_that_cannot_be_is_said_and_no_more(
    run, expected, monkeypatch, tmp_path, caplog
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(store.FOLDER_VARIABLE, str(tmp_path / "file"))
    monkeypatch.setattr(store, "_once", threading.Lock())
    for _ in range(2):
        status, out, _ = run("--exactness", "fast")
        assert (status, out) == (0, f"{expected}\n")
    assert ["cache folder" in line for line in caplog.messages].count(True) == 1


def start(*args):
    """Start the real command in a process of its own."""
    # A shell that starts tests in the background may have switched Control-C off.
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from mlx_gemma_mtp.cli.generate import main; raise SystemExit(main())"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        # Its rounds are not what is tested.
        env=os.environ | {"PYTHONIOENCODING": "utf-8", "MLX_DISABLE_COMPILE": "1"},
    )


def figures(err):
    """Tokens, rounds, acceptance length and drafted tokens of all closing figures."""
    match = DETAILS.fullmatch(err)
    assert match, err
    return match.groups()


class TestOutput:
    def test_text_and_figures(self, run, expected):
        status, out, err = run("--num-draft-tokens", "3", "--verbose")
        assert (status, out) == (0, expected + "\n")
        tokens, rounds, length, drafted = figures(err)
        assert (int(tokens), int(drafted)) == (NUM_TOKENS, 3 * int(rounds))
        assert 1 <= float(length) <= 5

    def test_the_header_of_kernels_comes_first(self, run, monkeypatch):
        """It is compiled while everything else is loaded."""
        calls = []
        monkeypatch.setattr(cli, "compile_header", lambda: calls.append("header"))

        def load(*args, **settings):
            calls.append("model")
            raise KeyboardInterrupt

        monkeypatch.setattr(LOAD, "load", load)
        assert run()[0] == 130
        assert calls == ["header", "model"]

    def test_not_verbose(self, run, expected):
        assert run("--verbose", "False") == (0, expected + "\n", "")

    @pytest.mark.parametrize("drafts", [("--no-draft",), ("--num-draft-tokens", "0")])
    def test_the_same_text_without_drafts(self, run, expected, drafts):
        status, out, err = run(*drafts, "--verbose")
        assert (status, out) == (0, expected + "\n")
        assert figures(err)[3] == "0"

    def test_number_of_drafts(self, run, expected):
        status, out, err = run("--num-draft-tokens", "1", "--verbose", "True")
        assert (status, out) == (0, expected + "\n")
        _, rounds, _, drafted = figures(err)
        assert drafted == rounds

    def test_no_reproducible(self, run):
        """The same seed, another rule."""
        settings = (*SAMPLED, "--num-draft-tokens", "3")
        texts = {run(*settings, *flag)[1] for flag in ((), ("--no-reproducible",))}
        assert len(texts) == 2

    def test_says_how_it_samples(self, run):
        err = run(*SAMPLED, "--top-k", "9", "--xtc-probability", "0.5")[2]
        line = "Sampling: temperature 2.0, top-k 9, XTC 0.5 above 0.1.\n"
        assert err.startswith(line)
        assert FIGURES.fullmatch(err[len(line) :])

    def test_stats_as_json(self, run, tmp_path):
        path = tmp_path / "stats.json"
        args = ("--num-draft-tokens", "3", "--verbose", "False")
        status, _, err = run(*args, "--stats-json", path)
        assert (status, err) == (0, "")
        found = json.loads(path.read_text(encoding="utf-8"))
        assert found["generation_tokens"] == NUM_TOKENS
        assert list(found["rounds_by_num_draft_tokens"]) == ["3"]
        status, _, err = run(*args, "--stats-json", "-")
        assert json.loads(err).keys() == found.keys()

    @pytest.mark.parametrize("name", ["none/stats.json", ".", "file/stats.json"])
    def test_stats_that_cannot_be_written(self, run, tmp_path, monkeypatch, name):
        """That is said before there is any text."""
        monkeypatch.chdir(tmp_path)
        (tmp_path / "file").touch()
        found = run("--stats-json", name)
        assert_one_line(found, "--stats-json must be a file that can be written")

    @pytest.mark.usefixtures("probes")
    @pytest.mark.parametrize("exactness", ["auto", "exact", "fast"])
    def test_exactness(self, run, expected, exactness):
        args = ("--exactness", exactness, "--num-draft-tokens", "3")
        status, out, err = run(*args)
        assert (status, out) == (0, expected + "\n")
        is_proved = exactness != "fast"
        how = "the same as by plain decoding; logits proved byte-equal for K"
        assert f"Text: {how if is_proved else 'may differ from plain'}" in err
        assert FIGURES.fullmatch(err)

    def test_seed(self, run):
        texts = [run(*SAMPLED)[1], run(*SAMPLED, "--no-draft")[1]]
        assert texts[0] == texts[1]
        assert run("--temp", "2", "--seed", "6")[1] not in texts

    def test_drafter_by_name(self, run, folder, expected):
        named = ("--draft-model", folder / "drafter")
        status, out, err = run(*named, "--num-draft-tokens", "3", "--verbose")
        assert (status, out) == (0, expected + "\n")
        assert figures(err)[3] != "0"

    def test_stop(self, run, expected):
        first, second = expected[5:8], expected[9:12]
        for args in (("--stop", first), ("--stop", second, "--stop", first)):
            status, out, _ = run(*args)
            assert (status, out) == (0, expected[: expected.index(first)] + "\n")

    @pytest.mark.parametrize("as_id", [True, False])
    def test_extra_eos_token(self, run, whole, as_id):
        folder, expected = whole
        ids = tiny_tokenizer().encode(expected, add_special_tokens=False)
        piece = next(p for p in tiny_tokenizer().convert_ids_to_tokens(ids[3:]))
        name = str(tiny_tokenizer().convert_tokens_to_ids(piece)) if as_id else piece
        flags = ("--ignore-chat-template", "--extra-eos-token", "<unk>", name)
        status, out, _ = run(*flags, model=folder)
        assert status == 0
        assert expected.startswith(out[:-1])
        assert len(out) < len(expected)

    def test_characters_that_the_terminal_lacks(self, run, monkeypatch):
        raw = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
        monkeypatch.setattr(TEXT, "stream_generate", one_response("a €"))
        assert run("--verbose", "False")[0] == 0
        assert raw.getvalue().rstrip() == b"a ?"

    def test_without_a_model(self, run, folder, expected, monkeypatch):
        monkeypatch.setattr(LOAD, "embedded_pair_path", lambda: folder)
        status, out, err = run("--ignore-chat-template", model=None)
        assert (status, out) == (0, expected + "\n")
        first, rest = err.split("\n", 1)
        assert first.startswith("No --model: using the embedded pair")
        assert FIGURES.fullmatch(rest)

    def test_help_and_its_status(self, capsys):
        with pytest.raises(SystemExit) as caught:
            cli.main(["--help"])
        out, err = capsys.readouterr()
        assert (caught.value.code, err) == (0, "")
        assert out.startswith("usage: mlx_gemma_mtp.generate")

    def test_flags_are_mlx_lms(self):
        from mlx_lm.generate import setup_arg_parser

        theirs = {
            option
            for action in setup_arg_parser()._actions
            for option in action.option_strings
        }
        own = {
            option
            for action in cli.configure_parser()._actions
            for option in action.option_strings
        }
        theirs.add("--prefill-step-size")  # older ones leave it to the API
        # The names of the last ones are those of mlx-lm's server.
        assert own - theirs == {
            "--no-draft",
            "--no-reproducible",
            "--draft-source",
            "--exactness",
            "--regex",
            "--max-thinking-tokens",
            "--schema",
            "--stats-json",
            "--stop",
            "--revision",
            "--logit-bias",
            "--repetition-penalty",
            "--repetition-context-size",
            "--presence-penalty",
            "--frequency-penalty",
            "--thinking",
            "--show-thoughts",
            "--version",
        }


def one_response(text):
    """A stand-in for ``stream_generate`` that says one thing."""

    def stream(*args, **settings):
        yield type("Response", (), {"marked_text": text, "finish_reason": "stop"})()

    return stream


class TestPrompt:
    def test_standard_input(self, run, expected, prompts, monkeypatch):
        monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPT))
        assert run("-p", "-")[1] == expected + "\n"
        assert prompts == [PROMPT]

    def test_standard_input_is_taken_as_it_is(self, run, prompts, monkeypatch):
        monkeypatch.setattr(sys, "stdin", io.StringIO("two\nlines\n"))
        assert run("-p", "-", "-m", "1")[0] == 0
        assert prompts == ["two\nlines\n"]

    def test_defaults(self, folder, prompts, monkeypatch, capsys):
        monkeypatch.setattr(LOAD, "embedded_pair_path", lambda: folder)
        assert cli.main(["-m", "1"]) == 0
        assert cli.main(["-m", "1", "--model", str(folder)]) == 0
        assert prompts == [cli.EMBEDDED_PROMPT, cli.DEFAULT_PROMPT]

    def test_text_without_a_template_stays_text_and_that_is_said(self, run, prompts):
        for is_plain in (False, True):
            status, _, err = run("-m", "1", is_plain=is_plain)
            assert status == 0
            notes = [line for line in err.splitlines() if "chat template" in line]
            assert [note[:34] for note in notes] == (
                [] if is_plain else ["This model has no chat template: t"]
            )
            assert all("copy chat_template.jinja" in note for note in notes)
        assert prompts == [PROMPT, PROMPT]

    def test_quiet_is_quiet(self, run):
        assert run("--verbose", "False", "-m", "1", is_plain=False)[2] == ""


class TestChatTemplate:
    @pytest.mark.parametrize(
        ("args", "text"),
        [
            ((), "<bos><|turn>user\nthe rain<turn|>\n<|turn>model\n"),
            (
                ("--chat-template-config", '{"opening": "So:"}'),
                "<bos><|turn>user\nthe rain<turn|>\n<|turn>model\nSo:",
            ),
            (
                ("--prefill-response", "Well"),
                "<bos><|turn>user\nthe rain<turn|>\n<|turn>model\nWell",
            ),
            (
                (
                    *("--system-prompt", "be short"),
                    *("--chat-template-config", '{"has_system": true}'),
                ),
                "<bos><|turn>system\nbe short<turn|>\n<|turn>user\nthe rain<turn|>\n"
                "<|turn>model\n",
            ),
        ],
    )
    def test_is_applied(self, run, chat_folder, prompts, args, text):
        status, _, err = run(*args, "-m", "1", model=chat_folder)
        ids = tiny_tokenizer().encode(text, add_special_tokens=False)
        assert (status, prompts) == (0, [ids])
        assert f"after a prompt of {len(ids)})\n" in err

    def test_is_ignored(self, run, chat_folder, expected, prompts):
        found = run("--ignore-chat-template", "--system-prompt", "x", model=chat_folder)
        assert found[:2] == (0, expected + "\n")
        assert prompts == [PROMPT]

    @pytest.mark.parametrize(
        ("args", "words"),
        [
            (("--system-prompt", "be short"), "got no system prompt here. Change"),
            (("--chat-template-config", '{"tokenize": true}'), "keyword argument"),
        ],
    )
    def test_refuses(self, run, chat_folder, args, words):
        assert_one_line(run(*args, model=chat_folder), words)


def assert_one_line(found, *words):
    status, out, err = found
    assert (status, out) == (1, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert "Traceback" not in err
    for word in words:
        assert word in err


class TestMistakes:
    @pytest.mark.parametrize(
        ("args", "words"),
        [
            (
                ("--num-draft-tokens", "9"),
                "num_draft_tokens must be from 0 to 8, or auto: got 9",
            ),
            (("--num-draft-tokens", "-1"), "from 0 to 8, or auto: got -1"),
            (("--num-draft-tokens", "four"), "whole number or auto: got 'four'"),
            (("--exactness", "maybe"), "invalid choice: 'maybe'"),
            (("--no-draft", "--draft-model", "x"), "exclude each other"),
            (("--no-draft", "--num-draft-tokens", "2"), "must be 0 with --no-draft"),
            (("-m", "0"), "max_tokens must be 1 or more"),
            (("--temp", "-1"), "temp must be 0 or more"),
            (("--temp", "nan"), "temp must be 0 or more"),
            (("--top-p", "1.5"), "top_p must be from 0 to 1"),
            (("--top-k", "-1"), "top_k must be"),
            (("--min-p", "2"), "min_p must be from 0 to 1"),
            (("--seed", "-1"), "seed must be"),
            (("--xtc-probability", "1.5"), "xtc_probability must be from 0 to 1"),
            (("--xtc-threshold", "0.6"), "xtc_threshold must be from 0 to 0.5"),
            (("--logit-bias", "{"), "--logit-bias must be a JSON object: got '{'"),
            (("--logit-bias", "[1]"), "--logit-bias must be a JSON object"),
            (("--logit-bias", '{"the": 1}'), "tokens by their ids: got 'the'"),
            (("--logit-bias", '{"-1": 1}'), "tokens by their ids: got '-1'"),
            (("--logit-bias", f'{{"{9**99}": 1}}'), "tokens by their ids"),
            (("--logit-bias", '{"5": "1"}'), "from -1000 to 1000: got '1'"),
            (("--logit-bias", '{"5": null}'), "from -1000 to 1000: got null"),
            (("--logit-bias", '{"5": true}'), "from -1000 to 1000: got True"),
            (("--logit-bias", '{"5": NaN}'), "from -1000 to 1000: got nan"),
            (("--logit-bias", '{"5": -1e9}'), "from -1000 to 1000: got -1000000000.0"),
            (("--repetition-penalty", "-1"), "--repetition-penalty must be from 0"),
            (("--repetition-penalty", "nan"), "--repetition-penalty must be from 0"),
            (("--repetition-context-size", "-1"), "must be 0 or more: got -1"),
            (("--presence-penalty", "inf"), "--presence-penalty must be from -1000"),
            (("--frequency-penalty", "1001"), "--frequency-penalty must be from -1000"),
            (("--prefill-step-size", "0"), "prefill_step_size must be 1 or more"),
            (("--chat-template-config", "{"), "must be a JSON object: got '{'"),
            (("--chat-template-config", "[1]"), "must be a JSON object: got '[1]'"),
            (("--what",), "unrecognized argument: '--what'. See"),
            *(
                ((flag, "caf\udce9"), f"{flag} must be UTF-8 text")
                for flag in (
                    *("--system-prompt", "--prefill-response", "--stop"),
                    *("--extra-eos-token", "--logit-bias", "--chat-template-config"),
                )
            ),
            (("-p", "caf\udce9"), "the prompt must be UTF-8 text"),
        ],
    )
    def test_found_before_anything_is_loaded(self, run, monkeypatch, args, words):
        monkeypatch.setattr(LOAD, "load", None)
        assert_one_line(run(*args), words)

    @pytest.mark.parametrize(
        ("args", "words"),
        [
            (("--stop", ""), "a stop string must hold at least one character"),
            (("--extra-eos-token", "nonsense"), "a token of the model: got 'nonsense'"),
            (("--extra-eos-token", "512"), "a token of the model: got '512'"),
            (("--extra-eos-token", "<eos>", "-1"), "a token of the model: got '-1'"),
            (("--logit-bias", '{"512": 1}'), "tokens from 0 to 511: got 512"),
        ],
    )
    def test_found_later(self, run, args, words):
        assert_one_line(run(*args), words)

    def test_empty_prompt(self, run, tmp_path):
        plain = model_folder(tmp_path / "no_bos", has_bos=False, has_drafter=False)
        found = run("-p", "", "--ignore-chat-template", model=plain)
        assert_one_line(found, "prompt must hold at least one token")

    def test_standard_input_in_another_encoding(self, run, monkeypatch):
        raw = io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8")
        monkeypatch.setattr(sys, "stdin", raw)
        assert_one_line(run("-p", "-"), "the prompt must be UTF-8 text")

    def test_no_such_folder(self, run, tmp_path):
        assert_one_line(run(model=tmp_path / "nowhere"), str(tmp_path / "nowhere"))

    def test_an_empty_name(self, run):
        assert_one_line(run(model=""))

    def test_an_id_that_never_was(self, run):
        found = run(model="google/gemma-4-9b-it")
        assert_one_line(found, "google/gemma-4-9b-it", "google/gemma-4-E2B-it")

    def test_a_file(self, run, folder):
        file = folder / "model.safetensors"
        assert_one_line(run(model=file), str(file))

    def test_a_folder_without_a_checkpoint(self, run, tmp_path):
        assert_one_line(run(model=tmp_path), "config.json")

    def test_a_drafter_as_the_target(self, run, folder):
        assert_one_line(run(model=folder / "drafter"), "model_type")

    def test_a_drafter_of_another_family(self, run, tmp_path):
        other = model_folder(tmp_path / "e2b", "e2b")
        found = run("--draft-model", other / "drafter")
        assert_one_line(found, "the drafter's hidden size must be the target's")

    def test_drafts_without_a_drafter(self, run, chat_folder):
        found = run("--num-draft-tokens", "4", model=chat_folder)
        assert_one_line(found, "num_draft_tokens must be 0 without a drafter: got 4")

    def test_no_tokenizer(self, run, tmp_path):
        folder = model_folder(tmp_path / "pair", has_drafter=False)
        (folder / "tokenizer.json").write_text("{")
        assert_one_line(run(model=folder), "tokenizer")

    def test_the_parser_raises_what_main_shows(self):
        with pytest.raises(RequestError, match=r"See mlx_gemma_mtp\.generate --help"):
            cli.configure_parser().parse_args(["-m", "many"])


@pytest.fixture
def settings(monkeypatch):
    """The settings that reach ``stream_generate``, which is not run."""
    seen: dict[str, Any] = {}

    def recorded(model, tokenizer, prompt, **given):
        seen.clear()
        seen.update(given)
        yield type("Response", (), {"marked_text": "", "finish_reason": "stop"})()

    monkeypatch.setattr(TEXT, "stream_generate", recorded)
    return seen


class TestXTC:
    def test_is_passed_on(self, run, settings):
        args = ("--xtc-probability", "0.5", "--xtc-threshold", "0.2", "--verbose", "F")
        assert run("--temp", "1", *args, "--extra-eos-token", "<pad>")[0] == 0
        assert (settings["xtc_probability"], settings["xtc_threshold"]) == (0.5, 0.2)
        newline = tiny_tokenizer().convert_tokens_to_ids("\n")
        assert {newline, PAD, EOS, END_OF_TURN} <= set(settings["xtc_special_tokens"])

    def test_off(self, run, settings):
        assert run("--verbose", "F")[0] == 0
        assert not any(name.startswith("xtc") for name in settings)

    def test_changes_the_text(self, run):
        plain = run(*SAMPLED)[1]
        strikes = ("--xtc-probability", "1", "--xtc-threshold", "0")
        assert run(*SAMPLED, *strikes)[1] != plain


class TestLogitsProcessors:
    @pytest.mark.parametrize(
        "args",
        [
            (),
            ("--repetition-penalty", "1"),
            ("--repetition-penalty", "0", "--presence-penalty", "0"),
            ("--repetition-context-size", "5"),
            ("--logit-bias", "{}"),
        ],
    )
    def test_none(self, run, settings, args):
        assert run(*args, "--verbose", "F")[0] == 0
        assert settings["logits_processors"] is None

    @pytest.mark.parametrize(
        ("args", "expected"),
        [
            (("--logit-bias", '{"1": 3, "2": -0.5}'), [1, 5, -1.5, 8]),
            (("--repetition-penalty", "2"), [0.5, 2, -2, 8]),
            (
                ("--repetition-penalty", "2", "--repetition-context-size", "1"),
                [1, 2, -2, 8],
            ),
            (
                ("--repetition-penalty", "2", "--repetition-context-size", "0"),
                [0.5, 2, -2, 4],
            ),
            (("--presence-penalty", "0.5"), [0.5, 2, -1.5, 8]),
            (("--frequency-penalty", "0.5"), [-8.5, 2, -1.5, 8]),
            (
                ("--logit-bias", '{"3": 1}', "--presence-penalty", "-1"),
                [2, 2, 0, 9],
            ),
        ],
    )
    def test_what_they_do(self, run, settings, args, expected):
        """After 3, 0, ..., 0, 2, of which the last 20 count."""
        assert run(*args, "--verbose", "F")[0] == 0
        logits = mx.array([[1.0, 2.0, -1.0, 8.0]])
        tokens = mx.array([3, *[0] * 19, 2])
        for processor in settings["logits_processors"]:
            logits = processor(tokens, logits)
        assert logits.tolist() == [expected]


class TestPenalties:
    """The whole way: flags, processors, text."""

    def test_a_bias_forces_a_token(self, run, folder):
        name = tiny_tokenizer().convert_ids_to_tokens([300])[0]
        for drafts in ((), ("--no-draft",)):
            status, out, err = run("--logit-bias", '{"300": 1000}', *drafts)
            assert (status, out) == (0, name.replace("▁", " ") * NUM_TOKENS + "\n")
            assert f"({NUM_TOKENS} tokens after" in err

    def test_a_bias_bans_a_token(self, run, whole):
        folder, expected = whole
        ids = tiny_tokenizer().encode(expected, add_special_tokens=False)
        bias = json.dumps({str(token): -1000 for token in ids})
        out = run("--ignore-chat-template", "--logit-bias", bias, model=folder)[1]
        found = tiny_tokenizer().encode(out[:-1], add_special_tokens=False)
        assert not set(found) & set(ids)

    @pytest.mark.parametrize(
        "flags",
        [
            ("--repetition-penalty", "5"),
            ("--presence-penalty", "20"),
            ("--frequency-penalty", "20"),
            ("--repetition-penalty", "5", "--repetition-context-size", "0"),
        ],
    )
    def test_greedy_text_changes_and_not_by_drafts(self, run, expected, flags):
        texts = [run(*flags, *more)[1] for more in ((), ("--no-draft",))]
        assert texts[0] == texts[1] != expected + "\n"

    def test_sampled_text_of_a_seed_changes_and_not_by_drafts(self, run):
        flags = (*SAMPLED, "--presence-penalty", "-20")  # for repetition, then
        texts = [run(*flags, *more)[1] for more in ((), ("--no-draft",))]
        assert texts[0] == texts[1] != run(*SAMPLED)[1]


FILE = "(generation_config.json)"
RECOMMENDED = {"do_sample": True, "temperature": 0.75, "top_k": 64, "top_p": 0.875}


@pytest.fixture
def configured(tmp_path):
    """Makes a folder whose generation_config.json has more keys."""

    def make(**keys):
        folder = model_folder(tmp_path / "configured", has_drafter=False)
        path = folder / "generation_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | keys))
        return folder

    return make


class TestCheckpointDefaults:
    @pytest.mark.parametrize(
        ("args", "expected", "line"),
        [
            (
                (),
                (0.75, 0.875, 64, 0.0),
                f"temperature 0.75, top-k 64, top-p 0.875 {FILE}; --temp 0 for greedy",
            ),
            (
                ("--temp", "1"),
                (1.0, 0.875, 64, 0.0),
                f"temperature 1.0; top-k 64, top-p 0.875 {FILE}",
            ),
            (
                ("--top-k", "0", "--min-p", "0.1"),
                (0.75, 0.875, 0, 0.1),
                f"min-p 0.1; temperature 0.75, top-p 0.875 {FILE}; --temp 0 for greedy",
            ),
            (
                ("--temp", "1", "--top-k", "0", "--top-p", "1"),
                (1.0, 1.0, 0, 0.0),
                "temperature 1.0",
            ),
        ],
    )
    def test_count_where_a_flag_does_not(
        self, run, monkeypatch, configured, args, expected, line
    ):
        seen = {}
        stream = TEXT.stream_generate

        def recorded(*positional, **given):
            seen.update(given)
            return stream(*positional, **given)

        monkeypatch.setattr(TEXT, "stream_generate", recorded)
        status, _, err = run(*args, model=configured(**RECOMMENDED))
        assert status == 0
        assert f"\nSampling: {line}.\nSpeed: " in f"\n{err}"
        names = ("temp", "top_p", "top_k", "min_p")
        assert tuple(seen[name] for name in names) == expected
        assert seen["seed"] is None

    def test_are_the_same_as_flags(self, run, configured):
        model = configured(**RECOMMENDED)
        flags = ("--temp", "0.75", "--top-k", "64", "--top-p", "0.875")
        texts = {run("--seed", "5", *f, model=model)[1] for f in ((), flags)}
        assert len(texts) == 1

    def test_greedy_all_the_same(self, run, configured, expected):
        status, out, err = run("--temp", "0", model=configured(**RECOMMENDED))
        assert (status, out) == (0, expected + "\n")
        assert "Sampling" not in err

    def test_greedy_by_the_file(self, run, configured, expected):
        model = configured(do_sample=False, temperature=1.0)
        assert run(model=model)[:2] == (0, expected + "\n")

    @pytest.mark.parametrize(
        ("key", "value", "flag"),
        [
            ("temperature", "hot", "--temp"),
            ("temperature", float("nan"), "--temp"),
            ("temperature", 10**400, "--temp"),
            ("do_sample", 1, "--temp"),
            ("top_k", 64.0, "--top-k"),
            ("top_k", -1, "--top-k"),
            ("top_p", 1.5, "--top-p"),
            ("min_p", [0.1], "--min-p"),
        ],
    )
    def test_bad_values(self, run, configured, expected, key, value, flag):
        model = configured(**{**RECOMMENDED, key: value})
        path = model / "generation_config.json"
        found = run("--ignore-chat-template", model=model)
        assert_one_line(found, f"{key} in {path} must be", flag)
        assert run("--temp", "0", model=model)[:2] == (0, expected + "\n")
        assert run(flag, "1", model=model)[0] == 0

    def test_a_penalty_is_named(self, run, configured, expected):
        model = configured(repetition_penalty=1.1)
        status, out, err = run(model=model)
        assert (status, out) == (0, expected + "\n")
        assert "repetition_penalty in generation_config.json is not applied" in err


class TestInterrupt:
    def test_keeps_the_text_and_the_figures(self, run, expected, monkeypatch):
        stream = TEXT.stream_generate
        closed = []

        def interrupted(*args, **settings):
            responses = stream(*args, **settings)
            try:
                yield from islice(responses, 5)
                raise KeyboardInterrupt
            finally:
                responses.close()
                closed.append(True)

        monkeypatch.setattr(TEXT, "stream_generate", interrupted)
        status, out, err = run()
        assert (status, closed) == (130, [True])
        assert expected.startswith(out[:-1])
        assert out.endswith("\n")
        assert FIGURES.fullmatch(err)
        assert "(5 tokens after" in err

    def test_while_loading(self, run, monkeypatch):
        def interrupted(*args, **settings):
            raise KeyboardInterrupt

        monkeypatch.setattr(LOAD, "load", interrupted)
        assert run() == (130, "", "")

    @pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")
    def test_for_real(self, endless):
        args = ("--model", endless, "-p", PROMPT, "-m", "-1")
        with start(*args) as process:
            assert process.stdout.read(1)  # it is in the middle of it
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=300)
        assert process.returncode == 130, err
        assert out.endswith("\n")
        assert FIGURES.search(err)
        assert "Traceback" not in err


class TestProcess:
    def test_the_command(self, folder):
        command = [sys.executable, "-m", "mlx_gemma_mtp.generate"]
        args = ["--model", folder, "-p", "-", "-m", "8", "--ignore-chat-template"]
        result = subprocess.run(
            [*command, *map(str, args)],
            input=PROMPT,
            capture_output=True,
            text=True,
            check=False,
            cwd=ROOT,
        )
        assert result.returncode == 0, result.stderr
        assert len(result.stdout) > 5
        first, rest = result.stderr.split("\n", 1)
        assert first.startswith("drafter ")  # what was chosen is said, nothing else
        assert str(folder / "drafter") in first
        rest = rest.removeprefix(PROBED)  # by the first of a worker's processes
        assert FIGURES.fullmatch(rest)

    def test_a_mistake(self, tmp_path):
        with start("--model", tmp_path) as process:
            out, err = process.communicate(timeout=300)
        assert_one_line((process.returncode, out, err), "config.json")

    @pytest.mark.skipif(os.name != "posix", reason="pipes as POSIX has them")
    def test_a_reader_that_leaves(self, endless):
        args = ("--model", endless, "-p", PROMPT, "-m", "-1")
        with start(*args, "--ignore-chat-template") as process:
            assert process.stdout.read(1)
            process.stdout.close()
            err = process.stderr.read()
        assert process.returncode == 141, err
        err = err.removesuffix(PROBED)
        assert len(err.splitlines()) == 1  # which drafter was chosen
        assert err.startswith("drafter ")


class TestForms:
    """--schema and --regex."""

    def test_schema_comes_from_a_file(self, run, tmp_path):
        file = tmp_path / "schema.json"
        file.write_text('{"enum": ["in", "on"]}', encoding="utf-8")
        status, out, _ = run("--schema", file, *SAMPLED)
        assert status == 0
        assert out in ('"in"\n', '"on"\n')

    def test_regex(self, run):
        status, out, _ = run("--regex", "(rain|sun)!", *SAMPLED)
        assert status == 0
        assert out in ("rain!\n", "sun!\n")

    @pytest.mark.parametrize(
        ("args", "said"),
        [
            (("--regex", "("), "regex must be one that can be compiled: got '('"),
            (("--schema", "/no/file"), "--schema must be a file that can be read"),
            (("--schema", ROOT), "--schema must be a file that can be read"),
            (("--schema", __file__), "schema must be a JSON schema, an object: got"),
            (("--schema", ROOT / "tests/gemma.py", "--regex", "a"), "one given form"),
        ],
    )
    def test_mistakes_are_said_before_a_model_is_loaded(
        self, run, args, said, monkeypatch
    ):
        monkeypatch.setattr(LOAD, "load", None)
        status, out, err = run(*args)
        assert (status, out) == (1, "")
        assert said in err
        assert err.count("\n") == 1
