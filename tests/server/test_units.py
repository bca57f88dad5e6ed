"""The server's parts that need no server.

Run: python -m pytest tests/server/test_units.py
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys

import mlx.core as mx
import mlx_lm.server
import pytest

from mlx_gemma_mtp.cache.kept import KeptCaches
from mlx_gemma_mtp.cache.slabs import LayerKV, SlabLayout
from mlx_gemma_mtp.constants import FULL, MAX_LOGPROBS
from mlx_gemma_mtp.errors import RequestError
from mlx_gemma_mtp.pair.load import load_tokenizer
from mlx_gemma_mtp.sampling.candidates import MAX_CANDIDATES
from mlx_gemma_mtp.server import __main__ as command
from mlx_gemma_mtp.server.answer_parser import Dialogue
from mlx_gemma_mtp.server.arguments import API_KEY_VARIABLE, configure_parser, parse
from mlx_gemma_mtp.server.openai_format import dumps
from mlx_gemma_mtp.server.prompts import MIN_TOKENS, Prompts
from mlx_gemma_mtp.server.refused import REFUSED
from mlx_gemma_mtp.server.served_model import check_memory
from mlx_gemma_mtp.server.vocabulary import Vocabulary
from mlx_gemma_mtp.server.web import listen
from tests.server.serving import ROOT, MarkedTokenizer, ScriptedCache, tokenizer
from tests.tiny import BOS, CHAT_TEMPLATE, tiny_tokenizer


class TestArguments:
    def test_defaults(self):
        settings = parse([])
        assert (settings.host, settings.port, settings.backlog) == (
            "127.0.0.1",
            8080,
            2048,
        )
        assert settings.is_loopback
        assert settings.names == ("embedded",)
        assert settings.num_draft_tokens is None
        assert settings.draft_source == "auto"
        assert parse(["--draft-source", "drafter"]).draft_source == "drafter"
        assert settings.is_drafting
        assert settings.api_key is None
        assert settings.allowed_origins == ()
        assert settings.limits.rows == 32
        assert settings.prompt_cache_bytes == 2 * 10**9
        assert settings.prompt_cache_dir is None
        assert set(settings.given_sampling.values()) == {None}

    def test_vllms_words(self):
        config = '{"method": "mtp", "model": "drafter", "num_speculative_tokens": 3}'
        settings = parse(
            [
                "--model=target",
                f"--speculative-config={config}",
                *("--max-num-seqs", "8", "--max-num-batched-tokens", "512"),
                *("--max-model-len", "4096", "--served-model-name", "a", "b"),
                *("--max-logprobs", "5", "--uvicorn-log-level", "warning"),
            ]
        )
        assert (settings.model, settings.draft_model) == ("target", "drafter")
        assert settings.num_draft_tokens == 3
        assert (settings.limits.rows, settings.prefill_step_size) == (8, 512)
        assert (settings.limits.model_len, settings.limits.logprobs) == (4096, 5)
        assert settings.names == ("a", "b")
        assert settings.log_level == "WARNING"

    def test_vllms_command(self):
        """As people paste it."""
        command = "target --speculative-model drafter --speculative-method mtp"
        settings = parse([*command.split(), "--num-speculative-tokens", "4"])
        assert (settings.model, settings.names) == ("target", ("target",))
        assert (settings.draft_model, settings.num_draft_tokens) == ("drafter", 4)
        settings = parse("target --spec-model d --spec-method mtp".split())
        assert (settings.draft_model, settings.num_draft_tokens) == ("d", None)
        settings = parse("--model target --spec-tokens 0".split())
        assert (settings.draft_model, settings.num_draft_tokens) == (None, 0)

    @pytest.mark.parametrize(
        "arguments",
        [
            ["target", "--speculative-model", "target"],
            ["--model", "target", "--draft-model", "target"],
            ["target", "--speculative-config", '{"model": "target"}'],
        ],
    )
    def test_a_target_that_drafts_for_itself_has_its_own_drafter(self, arguments):
        settings = parse(arguments)
        assert (settings.draft_model, settings.is_drafting) == (None, True)

    def test_numbers_of_drafts(self):
        assert parse(["--num-draft-tokens", "0"]).num_draft_tokens == 0
        assert parse(["--num-draft-tokens", "auto"]).num_draft_tokens is None
        assert parse(["--speculative-config", "{}"]).num_draft_tokens is None
        assert not parse(["--no-draft"]).is_drafting

    @pytest.mark.parametrize(
        ("text", "size"),
        [
            ("1000000", 10**6),
            ("8GB", 8 * 10**9),
            ("8g", 8 * 10**9),
            ("1.5 MiB", 3 * 2**19),
            ("512KB", 512_000),
            ("7B", 7),
        ],
    )
    def test_sizes(self, text, size):
        assert parse(["--max-kv-bytes", text]).limits.kv_bytes == size

    def test_keys(self, monkeypatch):
        monkeypatch.setenv(API_KEY_VARIABLE, "from the environment")
        assert parse([]).api_key == "from the environment"
        assert parse(["--api-key", "k"]).api_key == "k"

    def test_templates(self, tmp_path):
        file = tmp_path / "template.jinja"
        file.write_text("{{ messages }} ö", encoding="utf-8")
        assert parse(["--chat-template", str(file)]).chat_template == "{{ messages }} ö"
        assert parse(["--chat-template", "{{ x }}"]).chat_template == "{{ x }}"
        args = parse(["--chat-template-args", '{"a": 1}']).chat_template_args
        assert args == {"a": 1}

    @pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
    def test_this_machine_only(self, host):
        assert parse(["--host", host]).is_loopback

    @pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "mac.local"])
    def test_other_machines_too(self, host):
        assert not parse(["--host", host]).is_loopback

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--port", "65536"], "--port must be from 0 to 65535: got 65536"),
            (["--max-rows", "0"], "--max-rows must be 1 or more: got 0"),
            (["--max-logprobs", "65"], "--max-logprobs must be from 0 to 64"),
            (["--shutdown-timeout", "nan"], "must be 0 or more: got nan"),
            (["--max-kv-bytes", "much"], "must be a size such as 8GB: got 'much'"),
            (["--num-draft-tokens", "9"], "from 0 to 8, or auto: got 9"),
            (["--num-draft-tokens", "few"], "a whole number or auto: got 'few'"),
            (["--no-draft", "--draft-model", "x"], "--no-draft must stand alone"),
            (["--speculative-config", "[]"], "must be a JSON object: got '[]'"),
            (["--speculative-config", '{"method": "eagle"}'], 'method "mtp": got'),
            (["--speculative-config", '{"ngram": 1}'], "only: got 'ngram'"),
            (
                ["--speculative-config", '{"num_speculative_tokens": "3"}'],
                "must be a whole number: got '3'",
            ),
            (["--speculative-config", '{"model": 1}'], "a folder or a Hub id: got 1"),
            (
                ["--speculative-config", "{}", "--num-draft-tokens", "2"],
                "must stand alone",
            ),
            (["--temp", "-1"], "temp must be"),
            (["--api-key", ""], "--api-key must hold printable ASCII"),
            (["--api-key", " k"], "no spaces around them"),
            (["--backlog", "3000000000"], "from 1 to 2147483647: got 3000000000"),
            (["--max-model-len", "5"], "--max-model-len must be 16 or more: got 5"),
            (["--max-request-bytes", "1"], "must be 64 or more: got 1"),
            (["--max-tokens", "9" * 4000], "from 1 to 2147483647: got 9999"),
            (["--max-kv-bytes", "9" * 400], "must be a size such as 8GB"),
            (["--max-kv-bytes", "0.0001KB"], "--max-kv-bytes must be 1 or more: got 0"),
            (["--model", ""], "--model must not be empty: got ''"),
            (["--draft-model", " "], "--draft-model must not be empty"),
            (["--host="], "--host must not be empty"),
            (["--chat-template", ""], "--chat-template must not be empty"),
            (["--served-model-name", "a", ""], "--served-model-name 2 must not be"),
            (["--speculative-config", '{"model": ""}'], "folder or a Hub id: got ''"),
            (["--chat-template", "/nowhere"], "a file that can be read"),
            (["--chat-template-args", "1"], "must be a JSON object: got '1'"),
            (["--chat-template-args", '{"tokenize": true}'], "got tokenize, which is"),
            (["--log-level", "loud"], "invalid choice"),
            (["--made-up"], "unrecognized argument: '--made-up'"),
            (["one", "two"], "one model is served"),
            (["one", "--model", "two"], "--model must stand alone: got 'one'"),
            ([" "], "--model must not be empty"),
            (["--speculative-method", "ngram"], "--speculative-method must have the"),
            (["--speculative-model", " "], "--speculative-model must be a folder"),
            (["--num-speculative-tokens", "9"], "from 0 to 8, or auto: got 9"),
            (["--speculative-model", "x", "--draft-model", "y"], "must stand alone"),
            (
                ["--speculative-config", "{}", "--speculative-method", "mtp"],
                "--speculative-config must stand alone: got --speculative-method",
            ),
            (["--no-draft", "--speculative-model", "x"], "--no-draft must stand alone"),
            (["--gpu-memory-utilization=0.9"], "--max-kv-bytes states the memory"),
            (["--kv-bits", "8"], "no quantized cache for Gemma 4"),
            (["--kv_cache_dtype=fp8"], "no quantized cache for Gemma 4"),
            (["--no-async-scheduling"], "rounds always overlap"),
            (["--disable-prefix-caching"], "--prompt-cache-size says how many"),
            (["--compilation-config.mode", "3"], "rounds are always compiled"),
            (["-O3"], "rounds are always compiled"),
            (["--max-num"], "unrecognized argument"),  # never the start of a flag
        ],
    )
    def test_mistakes(self, arguments, message):
        with pytest.raises(RequestError) as error:
            parse(arguments)
        assert message in str(error.value)

    def test_an_empty_key_in_the_environment(self, monkeypatch):
        monkeypatch.setenv(API_KEY_VARIABLE, "")
        with pytest.raises(RequestError, match=f"^{API_KEY_VARIABLE} must hold"):
            parse([])
        assert parse(["--api-key", "k"]).api_key == "k"

    @pytest.mark.parametrize(
        ("given", "compared"),
        [
            (["https://a.b"], ("https://a.b",)),
            (["HTTP://A.b:8080"], ("http://a.b:8080",)),
            (["https://a.b:443", "http://a:80"], ("https://a.b", "http://a")),
            (["http://a,http://b"], ("http://a", "http://b")),  # mlx-lm's way
            (['["http://a", "*"]'], ("http://a", "*")),  # vLLM's way
            (["*"], ("*",)),
            (["null", "http://[::1]:3000"], ("null", "http://[::1]:3000")),
            (["vscode-webview://0a1b", "tauri://localhost"],) * 2,
        ],
    )
    def test_origins(self, given, compared):
        found = parse(["--allowed-origins", *given]).allowed_origins
        assert found == tuple(compared)

    @pytest.mark.parametrize(
        "given",
        [
            *("foo", "", "a.b", "http://", "http://x/path", "http://x/", "http://x?q"),
            *("http://a b", "http://u@x", "http://x:0", "http://x:65536", "http://x:"),
            *(
                "//x",
                "http://*",
                "http://ä.b",
                "http://a,",
                "[",
                "[1]",
                '["http://x/"]',
            ),
        ],
    )
    def test_what_is_no_origin(self, given):
        with pytest.raises(RequestError, match=r"^--allowed-origins must be origins"):
            parse(["--allowed-origins", "http://a", given])

    @pytest.mark.parametrize("host", ["a..b", "x" * 70, "ä" * 70])
    def test_what_cannot_be_listened_at(self, host):
        with pytest.raises(RequestError, match=r"^--host and --port must be") as error:
            listen(parse(["--host", host]))
        assert len(str(error.value)) < 240

    def test_names_of_hosts(self):
        given = ["Mac.local", "example.org.", "my_box", "10.0.0.1", "::1"]
        found = parse(["--allowed-hosts", *given]).allowed_hosts
        assert found == ("mac.local", "example.org", "my_box", "10.0.0.1", "::1")

    @pytest.mark.parametrize(
        "given", ["", "*", "a:80", "http://a", "a/b", "a b", "ä.b", ".", "a..b"]
    )
    def test_what_is_no_name_of_a_host(self, given):
        with pytest.raises(RequestError, match=r"^--allowed-hosts must be names"):
            parse(["--allowed-hosts", "a", given])

    def test_every_flag_of_mlx_lm_is_known(self, monkeypatch):
        def walk(parser):
            raise InterruptedError(parser.format_help())

        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", walk)
        with pytest.raises(InterruptedError) as found:
            mlx_lm.server.main()
        flags = set(re.findall(r"(?<![\w-])--[a-z-]+", str(found.value)))
        ours = set(re.findall(r"--[a-z-]+", configure_parser().format_help()))
        assert len(flags) > 20
        assert flags <= ours | set(REFUSED)

    def test_nothing_is_both_ours_and_refused(self):
        ours = set(
            re.findall(r"(?<![\w-])-{1,2}[a-z-]+", configure_parser().format_usage())
        )
        assert not ours & set(REFUSED)

    def test_every_refusal_is_one_line(self, capsys):
        for flag in REFUSED:
            assert command.main([flag]) == 1
            (line,) = capsys.readouterr().err.splitlines()
            assert line.startswith(f"error: {flag} has no meaning here: ")

    @pytest.mark.parametrize(
        ("flag", "least"),
        # Of one layer: keys and values, two heads of four numbers, two bytes each.
        [("--max-kv-bytes", 256 * 32), ("--prompt-cache-bytes", MIN_TOKENS * 32)],
    )
    def test_memory_that_holds_nothing(self, flag, least):
        layout = SlabLayout((LayerKV(FULL, 2, 4),), window=512, dtype=mx.bfloat16)
        check_memory(parse([flag, str(least)]), layout)
        check_memory(parse(["--prompt-cache-bytes", "0"]), layout)
        with pytest.raises(
            RequestError, match=f"^{flag} must hold .*: got {least - 1}"
        ):
            check_memory(parse([flag, str(least - 1)]), layout)

    def test_the_engines_limit(self):
        assert MAX_LOGPROBS == MAX_CANDIDATES  # of a list that kernels make


class TestPromptFolder:
    @pytest.mark.parametrize("flag", ["--prompt-cache-size", "--prompt-cache-bytes"])
    def test_nothing_is_there_to_write(self, flag):
        with pytest.raises(RequestError, match=r"^--prompt-cache-dir must have caches"):
            parse(["--prompt-cache-dir", "x", flag, "0"])

    @pytest.mark.parametrize(
        ("given", "reason"),
        [
            (["--prompt-cache-dir", " "], "--prompt-cache-dir must not be empty"),
            (["--prompt-cache-disk-bytes", "0"], "--prompt-cache-disk-bytes must be"),
        ],
    )
    def test_what_is_refused(self, given, reason):
        with pytest.raises(RequestError, match=f"^{reason}"):
            parse(given)

    def test_what_is_given(self):
        given = ["--prompt-cache-dir", "~/x", "--prompt-cache-disk-bytes", "1.5GB"]
        settings = parse(given)
        assert settings.prompt_cache_dir == "~/x"
        assert settings.prompt_cache_disk_bytes == 1_500_000_000


class TestCommand:
    def test_a_folder_that_cannot_be(self, capsys, tmp_path):
        (tmp_path / "file").touch()
        path = str(tmp_path / "file")
        assert command.main(["--port", "0", "--prompt-cache-dir", path]) == 1
        *_, line = capsys.readouterr().err.splitlines()
        assert line.startswith("error: the folder for prompts must be")

    def test_a_cache_of_a_byte(self, capsys):
        assert command.main(["--port", "0", "--prompt-cache-bytes", "1"]) == 1
        *_, line = capsys.readouterr().err.splitlines()
        assert line.startswith("error: --prompt-cache-bytes must hold 64 tokens")

    def test_help_needs_no_extra(self):
        code = (
            "import sys\n"
            "for name in ('fastapi', 'uvicorn', 'prometheus_client', 'mlx'):\n"
            "    sys.modules[name] = None\n"
            "from mlx_gemma_mtp.server.__main__ import main\n"
            "main(['--help'])\n"
        )
        result = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT
        )
        assert (result.returncode, result.stderr) == (0, "")
        assert "--max-rows" in result.stdout

    def test_what_is_missing_is_named(self, monkeypatch, capsys):
        monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
        assert command.main([]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert "pip install 'mlx_gemma_mtp[server]'" in line

    def test_a_port_that_is_taken(self, capsys):
        import socket

        with socket.socket() as other:
            other.bind(("127.0.0.1", 0))
            other.listen()
            port = other.getsockname()[1]
            assert command.main(["--port", str(port)]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert f"127.0.0.1:{port}: " in line


TOOLS = [{"type": "function", "function": {"name": "weather"}}]
CALL = '<|tool_call>call:weather{city:<|"|>Rome<|"|>}<tool_call|>'


class TestDialogue:
    def read(self, text, *, size, tools=TOOLS, is_reasoning=False, has_numbers=False):
        reader = Dialogue(MarkedTokenizer()).reader(
            tools, is_reasoning=is_reasoning, has_numbers=has_numbers
        )
        pieces = [text[i : i + size] for i in range(0, len(text), size)]
        whole = reader.read("", is_last=False)
        for piece in pieces:
            whole.add(reader.read(piece, is_last=False))
        whole.add(reader.read("", is_last=True))
        return whole, reader

    @pytest.mark.parametrize("size", [1, 3, 1000])
    def test_reasoning_and_a_call(self, size):
        text = f"<|channel>thought\nhm<channel|>Let me see.{CALL}"
        delta, reader = self.read(text, size=size)
        assert delta.reasoning == "hm"
        assert delta.content == "Let me see."
        (call,) = delta.tool_calls
        assert call["type"] == "function"
        assert call["function"]["name"] == "weather"
        assert json.loads(call["function"]["arguments"]) == {"city": "Rome"}
        assert "index" not in call
        assert reader.has_calls

    def test_calls_in_a_stream_are_numbered(self):
        delta, _ = self.read(CALL + CALL, size=5, has_numbers=True)
        assert [call["index"] for call in delta.tool_calls] == [0, 1]
        assert len({call["id"] for call in delta.tool_calls}) == 2

    def test_an_answer_that_begins_inside_its_reasoning(self):
        delta, _ = self.read("hm<channel|>Yes", size=4, is_reasoning=True)
        assert (delta.reasoning, delta.content) == ("hm", "Yes")

    @pytest.mark.parametrize("size", [1, 7, 1000])
    @pytest.mark.parametrize(
        ("text", "content", "reason"),
        [
            ("a<|tool_call>nonsense<tool_call|>b", "anonsenseb", "cannot be read"),
            ("a<|tool_call>call:weather{c:", "acall:weather{c:", "has no end"),
            (
                '<|tool_call>call:weather{c:<|"|>Ro',
                'call:weather{c:"Ro',
                "has no end",
            ),
            ("x < y <|tool", "x < y <|tool", None),
            ("a<|chan", "a<|chan", None),
        ],
    )
    def test_nothing_is_lost_of_a_call_that_is_none(
        self, caplog, text, content, reason, size
    ):
        delta, reader = self.read(text, size=size)
        assert delta.content == content
        assert not reader.has_calls
        assert caplog.messages == (
            [f"a tool call {reason}; its text is content"] if reason else []
        )

    def test_without_tools_a_call_is_text(self):
        delta, _ = self.read(f"a{CALL}b", size=3, tools=None)
        assert delta.content == 'acall:weather{city:"Rome"}b'

    def test_no_more_calls_than_asked_for(self):
        reader = Dialogue(MarkedTokenizer()).readers(TOOLS, 1, max_calls=1)[0]
        delta = reader.read(f"a{CALL}b{CALL}c{CALL[:-20]}", is_last=True)
        assert (len(delta.tool_calls), delta.content) == (1, "abc")

    def test_numbers_that_json_has_not(self):
        """They would make the client's JSON parser fail."""
        reader = Dialogue(MarkedTokenizer()).reader(TOOLS)
        call = "<|tool_call>call:weather{a:nan,b:[-inf,1e999],c:1e3}<tool_call|>"
        (found,) = reader.read(call, is_last=True).tool_calls
        assert json.loads(found["function"]["arguments"]) == {
            "a": "nan",
            "b": ["-inf", "1e999"],
            "c": 1000.0,
        }

    def test_a_tokenizer_without_marks(self):
        reader = Dialogue(tokenizer()).reader(
            None, is_reasoning=False, has_numbers=True
        )
        delta = reader.read(f"<|channel>thought {CALL}", is_last=True)
        assert delta.content == f"<|channel>thought {CALL}"


class TestPrompts:
    def test_a_begin_of_sequence_token_is_there_once(self):
        prompts = Prompts(tokenizer(), {})
        for text in ("a b", "<bos>a b"):
            tokens = prompts.of_text(text).tokens
            assert tokens[0] == 2
            assert tokens.count(2) == 1

    def test_places(self):
        prompts = Prompts(tokenizer(), {})
        assert prompts.of_tokens([5] * MIN_TOKENS).places == ()
        (place,) = prompts.of_tokens([5] * (MIN_TOKENS + 1)).places
        assert (place.num_tokens, place.kind) == (MIN_TOKENS, "user")

    def test_a_template_that_refuses(self):
        from mlx_lm.tokenizer_utils import TokenizerWrapper

        from mlx_gemma_mtp.server.errors import AnswerError

        wrapped = TokenizerWrapper(tiny_tokenizer(chat_template=CHAT_TEMPLATE))
        prompts = Prompts(wrapped, {"has_system": True, "opening": ""})
        messages = [
            {"role": "system", "content": "x"},
            {"role": "user", "content": "y"},
        ]
        assert prompts.of_messages(messages).tokens[0] == BOS
        with pytest.raises(AnswerError, match="no system prompt here") as error:
            prompts.of_messages(messages, template_args={"has_system": False})
        assert error.value.status == 400
        without = Prompts(TokenizerWrapper(tiny_tokenizer()), {})
        with pytest.raises(AnswerError, match="has none"):
            without.of_messages(messages)

    def test_templates_that_drop_or_refuse_arguments_of_text(self):
        from mlx_lm.tokenizer_utils import TokenizerWrapper

        written = (
            "{% for name, value in call.function.arguments.items() %}"
            "{{ name }}={{ value }};{% endfor %}"
        )
        is_object = "{% if call.function.arguments is mapping %}"
        for before, behind in (("", ""), (is_object, "{% endif %}")):
            source = (
                "{% for message in messages %}{% for call in message.tool_calls %}"
                f"{before}{written}{behind}{{% endfor %}}{{% endfor %}}"
            )
            wrapped = TokenizerWrapper(tiny_tokenizer(chat_template=source))
            call = {"function": {"name": "f", "arguments": "a b"}}
            messages = [{"role": "assistant", "content": "", "tool_calls": [call]}]
            prompt = Prompts(wrapped, {}).of_messages(messages)
            assert "arguments=a b;" in wrapped.decode(prompt.tokens)


def test_names_of_tokens():
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    vocabulary = Vocabulary(TokenizerWrapper(tiny_tokenizer()))
    names = vocabulary._tokenizer.get_vocab()
    byte = names["<0xE2>"]
    assert vocabulary.bytes_of(byte) == b"\xe2"
    assert vocabulary.text_of(byte) == "bytes:\\xe2"
    space = names["▁a"]
    assert vocabulary.text_of(space) == " a"
    assert vocabulary.bytes_of(space) == b" a"


def test_kept_caches_are_worth_keeping():
    kept = KeptCaches(max_size=2, max_bytes=10**6, min_tokens=MIN_TOKENS)
    tokens = list(range(MIN_TOKENS))
    assert kept.is_worth(MIN_TOKENS)
    assert not kept.is_worth(MIN_TOKENS - 1)
    kept.keep(tokens, [ScriptedCache(tokens)], kind="user")
    assert kept.find([*tokens, 7])[1] == MIN_TOKENS
    assert kept.find(tokens) == (None, 0)  # the last token must be read
    assert kept.find([7, *tokens]) == (None, 0)
    for first in range(5):
        own = [first, *tokens]
        kept.keep(own, [ScriptedCache(own)], kind="assistant")
    assert len(kept) == 2


def test_text_of_any_kind_is_json():
    assert json.loads(dumps({"ä": "\u2028 \U0001f600"})) == {"ä": "\u2028 \U0001f600"}
    assert b"\n" not in dumps("a\nb\u2028")
    assert dumps("\ud800") == b'"?"'


@pytest.mark.parametrize(
    ("template", "has_tools"),
    [
        ("{{ bos_token }}<|tool_call><tool_call|>", True),
        ("{{ bos_token }}<tool_call> {# tool_call.name #}", False),  # another format
        ("{{ bos_token }}", False),
    ],
)
def test_tools_that_are_called_in_gemmas_way(tmp_path, template, has_tools):
    folder = tmp_path / "tokenizer"
    tiny_tokenizer(chat_template=template).save_pretrained(folder)
    assert Prompts(load_tokenizer(folder), {}).has_tools is has_tools
