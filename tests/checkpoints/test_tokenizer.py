"""Tokenizers with the chat templates and ends of a checkpoint, wherever they lie.

Run: python -m pytest tests/checkpoints/test_tokenizer.py
"""

import codecs
import json
import logging
import sys
from contextlib import nullcontext
from importlib.machinery import ModuleSpec
from itertools import combinations
from pathlib import Path
from types import ModuleType
from typing import Any

import jinja2
import mlx_lm.utils
import pytest

from convert.tokenizer import check_tokenizer, complete_ends, copy_tokenizer
from mlx_gemma_mtp import load_pair
from mlx_gemma_mtp.checkpoints.checkpoint import Checkpoint, open_checkpoint
from mlx_gemma_mtp.checkpoints.template_files import missing_template_note
from mlx_gemma_mtp.errors import CheckpointError
from mlx_gemma_mtp.generation.encoding import encode_text
from mlx_gemma_mtp.pair.load import eos_token_ids, load, load_tokenizer
from mlx_gemma_mtp.pair.pair import pair_of
from mlx_gemma_mtp.selftest import sections
from mlx_gemma_mtp.selftest.__main__ import main as selftest
from mlx_gemma_mtp.server.arguments import parse
from mlx_gemma_mtp.server.served_model import load_served_model
from mlx_gemma_mtp.tune import pipeline
from mlx_gemma_mtp.tune.__main__ import parse as parse_tune
from tests.tiny import (
    BOS,
    END_OF_TURN,
    EOS,
    PAD,
    TURN,
    UNK,
    model_folder,
    tiny_tokenizer,
)

RESPONSE = 512  # its id in folders made here
TOOLS = "<|tool_call>call:f{}<tool_call|><|tool_response>"
MESSAGES = [{"role": "user", "content": "a"}]
# Places where an empty template was seen.
EMPTY = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")


def text_of(name: str) -> str:
    return f"{name}: {{{{ messages[0].content }}}}"


def write(folder: Path, name: str, contents: Any) -> None:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    if isinstance(contents, bytes):
        path.write_bytes(contents)
    else:
        text = contents if isinstance(contents, str) else json.dumps(contents)
        path.write_text(text, encoding="utf-8")


def configure(folder: Path, **changes: Any) -> None:
    path = folder / "tokenizer_config.json"
    write(folder, path.name, json.loads(path.read_text()) | changes)


def rendered(folder: Path, given: Any = None, **settings: Any) -> str:
    tokenizer = load_tokenizer(folder, given)
    text: str = tokenizer.apply_chat_template(MESSAGES, tokenize=False, **settings)
    return text


def plainly_rendered(folder: Path) -> str:
    """The same by mlx-lm alone."""
    tokenizer = mlx_lm.utils.load_tokenizer(folder)
    return str(tokenizer.apply_chat_template(MESSAGES, tokenize=False))


@pytest.fixture
def folder(tmp_path):
    """A tokenizer that knows tool responses, without a chat template."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|tool_response>"]})
    assert tokenizer.convert_tokens_to_ids("<|tool_response>") == RESPONSE
    tokenizer.save_pretrained(tmp_path / "it")
    write(tmp_path / "it", "config.json", {"model_type": "gemma4"})
    return tmp_path / "it"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A pair without a chat template."""
    return model_folder(tmp_path_factory.mktemp("tokenizer") / "pair")


# In the order in which they count.
PLACES = {
    "jinja": lambda folder: write(folder, "chat_template.jinja", text_of("jinja")),
    "json": lambda folder: write(
        folder, "chat_template.json", {"chat_template": text_of("json")}
    ),
    "config": lambda folder: configure(folder, chat_template=text_of("config")),
}


class TestPlaces:
    @pytest.mark.parametrize(
        "places", [*combinations(PLACES, 1), *combinations(PLACES, 2)]
    )
    def test_loader_and_converter_read_the_same(self, folder, tmp_path, places):
        for place in places:
            PLACES[place](folder)
        assert rendered(folder) == f"{places[0]}: a"
        assert rendered(folder, {"chat_template": text_of("given")}) == "given: a"
        assert not load_tokenizer(folder, {"chat_template": None}).has_chat_template
        check_tokenizer(folder, vocab_size=600)
        (tmp_path / "made").mkdir()
        copy_tokenizer(folder, tmp_path / "made")
        assert rendered(tmp_path / "made") == f"{places[0]}: a"

    @pytest.mark.parametrize("default", PLACES)
    def test_templates_with_names(self, folder, tmp_path, default):
        PLACES[default](folder)
        write(folder, "additional_chat_templates/tool_use.jinja", text_of("tools"))
        (tmp_path / "made").mkdir()
        copy_tokenizer(folder, tmp_path / "made")
        for place in (folder, tmp_path / "made"):
            assert rendered(place) == f"{default}: a"
            assert rendered(place, tools=[{"type": "function"}]) == "tools: a"

    def test_a_list_in_the_config(self, folder, tmp_path):
        names = {"default": text_of("plain"), "tool_use": text_of("tools") + TOOLS}
        value = [{"name": k, "template": v} for k, v in names.items()]
        configure(folder, chat_template=value)
        (tmp_path / "made").mkdir()
        copy_tokenizer(folder, tmp_path / "made")
        for load_one in (load_tokenizer, mlx_lm.utils.load_tokenizer):
            tokenizer = load_one(tmp_path / "made")
            assert tokenizer.tool_call_start == "<|tool_call>"
        assert rendered(folder) == "plain: a"
        assert rendered(folder, tools=[{"type": "function"}]).startswith("tools: a")
        tokenizer = load_tokenizer(folder)
        assert tokenizer.tool_call_start == "<|tool_call>"

    def test_one_that_is_alone_is_the_default(self, folder):
        write(folder, "additional_chat_templates/chat.jinja", text_of("chat"))
        assert rendered(folder) == "chat: a"

    def test_one_with_a_name_is_written_as_the_default(self, folder, tmp_path):
        value = [{"name": "tool_use", "template": text_of("tools")}]
        configure(folder, chat_template=value)
        (tmp_path / "made").mkdir()
        copy_tokenizer(folder, tmp_path / "made")
        assert plainly_rendered(tmp_path / "made") == "tools: a"

    @pytest.mark.parametrize("text", ["jinja", "blank"])
    def test_a_byte_order_mark_is_no_text(self, folder, tmp_path, text):
        template = {"jinja": text_of("jinja"), "blank": "\n"}[text]
        write(folder, "chat_template.jinja", codecs.BOM_UTF8 + template.encode())
        configure(folder, chat_template=text_of("config"))
        (tmp_path / "made").mkdir()
        copy_tokenizer(folder, tmp_path / "made")
        expected = {"jinja": "jinja: a", "blank": "config: a"}[text]
        assert rendered(folder) == rendered(tmp_path / "made") == expected
        assert plainly_rendered(tmp_path / "made") == expected

    @pytest.mark.parametrize("empty", ["", " \n", [], {}, {"default": ""}, None])
    @pytest.mark.parametrize("name", EMPTY)
    def test_an_empty_one_is_none(self, folder, tmp_path, name, empty):
        """The next place counts; where there is none, it is said as of none."""
        if name == "tokenizer_config.json":
            configure(folder, chat_template=empty)
        elif name == "chat_template.json":
            write(folder, name, {"chat_template": empty})
        else:
            write(folder, name, empty if isinstance(empty, str) else "")
        check_tokenizer(folder, vocab_size=600)
        assert not load_tokenizer(folder).has_chat_template
        (tmp_path / "made").mkdir()
        copy_tokenizer(folder, tmp_path / "made")
        assert not mlx_lm.utils.load_tokenizer(tmp_path / "made").has_chat_template
        if name != "tokenizer_config.json":
            configure(folder, chat_template=text_of("config"))
            assert rendered(folder) == "config: a"

    def test_it_is_compiled_when_it_is_loaded(self, folder, monkeypatch):
        source = text_of("compiled once")
        write(folder, "chat_template.jinja", source)
        tokenizer = load_tokenizer(folder)
        monkeypatch.setattr(jinja2.Environment, "from_string", None)
        assert tokenizer.apply_chat_template(MESSAGES, tokenize=False).endswith(": a")

    def test_one_that_refuses_messages_is_one(self, folder):
        refusal = "{{ raise_exception('no') }}" + text_of("refusing")
        write(folder, "chat_template.jinja", refusal)
        assert load_tokenizer(folder).has_chat_template


BROKEN: list[tuple[str, Any, str]] = [
    ("chat_template.jinja", "a\n{% if x %}\nb", "in line 3"),
    ("chat_template.jinja", "a\n\n{{ x | no_filter }}", "in line 3"),
    ("chat_template.jinja", "{% generation %}a", "in line 1"),
    ("chat_template.jinja", b"a\nb \xff", "in line 2"),
    ("chat_template.jinja", "{{" + "(" * 3000 + "1" + ")" * 3000 + "}}", "nested"),
    ("chat_template.json", {"chat_template": 5}, "got 5"),
    ("chat_template.json", {"chat_template": ["x"]}, "a list of"),
    ("chat_template.json", {"chat_template": [{"name": "a"}]}, "a list of"),
    ("chat_template.json", {"chat_template": "\n{{ x"}, "in line 2"),
    ("chat_template.json", "{", "readable JSON"),
    ("additional_chat_templates/default.jinja", "{% x %}", "in line 1"),
    ("tokenizer_config.json", {"chat_template": {"default": 5}}, "got 5"),
    ("tokenizer_config.json", {"chat_template": {"a": "a", "b": "b"}}, "named default"),
    ("tokenizer_config.json", {"chat_template": {"a" * 5000: 5}}, "got 5"),
]


@pytest.mark.parametrize(("name", "contents", "reason"), BROKEN)
def test_a_broken_template_is_one_line(folder, name, contents, reason):
    write(folder, name, contents)
    for call in (load_tokenizer, lambda f: check_tokenizer(f, vocab_size=600)):
        with pytest.raises(CheckpointError) as caught:
            call(folder)
        message = str(caught.value)
        assert str(folder) in message
        assert Path(name).name in message or "named default" in message
        assert reason in message
        assert " must " in message
        assert "\n" not in message
        assert len(message) < 500


@pytest.mark.parametrize("value", ["{{", {"default": "{{"}, [], 5, ""])
def test_a_broken_template_that_is_given(folder, value):
    with pytest.raises(CheckpointError, match="--chat-template"):
        load_tokenizer(folder, {"chat_template": value})


class TestModulesOfAnotherRelease:
    @pytest.mark.parametrize("value", ["gemma9", "a.b", "..x", 5, [1]])
    @pytest.mark.parametrize("key", ["chat_template_type", "tool_parser_type"])
    def test_they_are_left_out_where_a_template_lies_beside(
        self, folder, tmp_path, caplog, key, value
    ):
        write(folder, "chat_template.jinja", text_of("beside") + TOOLS)
        configure(folder, **{key: value})
        (tmp_path / "made").mkdir()
        copy_tokenizer(folder, tmp_path / "made")
        assert key not in json.loads(
            (tmp_path / "made" / "tokenizer_config.json").read_text()
        )
        with caplog.at_level(logging.WARNING, "mlx_gemma_mtp"):
            tokenizer = load_tokenizer(folder)
        assert tokenizer.tool_call_start == "<|tool_call>"
        text = tokenizer.apply_chat_template(MESSAGES, tokenize=False)
        assert text.startswith("beside: a")
        (record,) = caplog.records
        assert f"{key} {value!r}" in record.getMessage()

    def test_what_this_one_has_stays(self, folder, caplog, monkeypatch):
        write(folder, "chat_template.jinja", text_of("beside"))
        configure(folder, tool_parser_type="json_tools")
        assert load_tokenizer(folder).tool_call_start == "<tool_call>"
        configure(folder, tool_parser_type="", chat_template_type="")
        assert rendered(folder) == "beside: a"
        assert not caplog.records
        module: Any = ModuleType("mlx_lm.chat_templates.this_one")
        module.__spec__ = ModuleSpec(module.__name__, None)
        module.apply_chat_template = lambda *messages, **settings: "this one"
        monkeypatch.setitem(sys.modules, module.__name__, module)
        configure(folder, chat_template_type="this_one")
        assert rendered(folder) == "this one"
        assert rendered(folder, {"chat_template": text_of("given")}) == "given: a"
        assert "'this_one'" not in caplog.text

    def test_without_any_template_it_is_one_line(self, folder):
        configure(folder, chat_template_type="gemma9")
        with pytest.raises(
            CheckpointError, match=r"'gemma9'\. Update mlx-lm"
        ) as caught:
            load_tokenizer(folder)
        assert "\n" not in str(caught.value)


def ends(
    folder: Path, *, generation: Any = None, given: Any = None, **config: Any
) -> Any:
    return eos_token_ids(Checkpoint(folder, config, generation or {}, {}), given)


class TestEnds:
    def test_those_of_the_tokenizer_are_added(self, folder):
        assert ends(folder) == (EOS, END_OF_TURN)
        assert ends(folder, eos_token_id=7) == (EOS, 7, END_OF_TURN)
        assert ends(folder, generation={"eos_token_id": [9]}) == (EOS, 9, END_OF_TURN)
        configure(folder, eot_token={"content": "<|turn>"}, eos_token="<pad>")
        assert ends(folder) == (PAD, TURN, END_OF_TURN)
        configure(folder, eot_token="the", eos_token=None)  # a word is no end
        assert ends(folder) == (EOS, END_OF_TURN)
        assert ends(folder, given={"eos_token": "<unk>"}) == (UNK, END_OF_TURN)

    @pytest.mark.parametrize("special", [False, None])
    def test_one_that_is_not_marked_special_counts(self, folder, special):
        path = folder / "tokenizer.json"
        tokenizer = json.loads(path.read_text())
        for token in tokenizer["added_tokens"]:
            if token["content"] in ("<turn|>", "<|tool_response>"):
                token["special"] = special
                if special is None:
                    del token["special"]
        tokenizer["added_tokens"].append({"content": "<x>"})
        write(folder, path.name, tokenizer)
        write(folder, "chat_template.jinja", TOOLS)
        assert ends(folder) == (EOS, END_OF_TURN, RESPONSE)

    @pytest.mark.parametrize("given", [None, {"eos_token": "<pad>"}])
    def test_pair_and_tokenizer_agree(self, tmp_path, given):
        folder = model_folder(tmp_path / "pair", has_drafter=False)
        configure(folder, eos_token=None)
        found: Any = load(folder, speculative_decoding=False, tokenizer_config=given)
        model, tokenizer = found
        assert pair_of(model).eos_token_ids == tokenizer.eos_token_ids
        assert END_OF_TURN in tokenizer.eos_token_ids

    @pytest.mark.parametrize("place", ["jinja", "list", "given"])
    def test_a_response_ends_a_call_where_the_template_has_tools(self, folder, place):
        given = None
        if place == "jinja":
            write(folder, "chat_template.jinja", TOOLS)
        elif place == "list":
            names = {"default": "{{ messages }}", "tool_use": TOOLS}
            value = [{"name": k, "template": v} for k, v in names.items()]
            configure(folder, chat_template=value)
        else:
            given = {"chat_template": TOOLS}
        assert ends(folder, given=given) == (EOS, END_OF_TURN, RESPONSE)

    @pytest.mark.parametrize(
        ("name", "contents"),
        [
            ("tokenizer.json", "{"),
            ("tokenizer.json", '{"added_tokens": [{}]}'),
            ("tokenizer.json", '{"added_tokens": [5'),
            ("tokenizer.json", b"\xff"),
            ("chat_template.jinja", b"\xff"),
        ],
    )
    def test_damage_is_found_where_the_file_is_needed(self, folder, name, contents):
        write(folder, name, contents)
        known = ends(folder, eos_token_id=3)
        assert known == ((EOS, 3, END_OF_TURN) if name[0] == "c" else (3,))
        with pytest.raises(CheckpointError):
            load_tokenizer(folder)

    def test_every_way_to_load_has_them(self, tmp_path):
        folder = model_folder(tmp_path / "pair", has_drafter=False)
        (folder / "generation_config.json").unlink()
        assert load_pair(folder).eos_token_ids == {EOS, END_OF_TURN}
        _, tokenizer = load(folder, speculative_decoding=False)
        assert tokenizer.eos_token_ids == {EOS, END_OF_TURN}

    @pytest.mark.parametrize("named", [None, [], EOS, [EOS, END_OF_TURN]])
    def test_what_is_converted_names_them_all(self, tmp_path, named):
        folder = model_folder(tmp_path / "pair", has_drafter=False)
        write(folder, "generation_config.json", {"eos_token_id": named, "top_k": 5})
        before = (folder / "generation_config.json").read_text()
        complete_ends(folder)
        found = open_checkpoint(folder).generation_config
        assert found == {"eos_token_id": [EOS, END_OF_TURN], "top_k": 5}
        if named == [EOS, END_OF_TURN]:
            assert (folder / "generation_config.json").read_text() == before


class TestBeginOfSequence:
    """Without it -it models answer nonsense; a config need not name it."""

    @pytest.mark.parametrize("config", ["none", "no key", "null"])
    def test_it_is_the_tokenizers_own(self, folder, tmp_path, config):
        write(folder, "chat_template.jinja", "{{ bos_token }}a")
        path = folder / "tokenizer_config.json"
        settings = json.loads(path.read_text())
        del settings["bos_token"]
        write(folder, path.name, settings)
        if config == "null":
            configure(folder, bos_token=None)
        elif config == "none":
            path.unlink()
        tokenizer = load_tokenizer(folder)
        assert (tokenizer.bos_token, tokenizer.bos_token_id) == ("<bos>", BOS)
        assert encode_text(tokenizer, "a")[0] == BOS
        assert rendered(folder) == "<bos>a"
        check_tokenizer(folder, vocab_size=600)
        (tmp_path / "made").mkdir()
        copy_tokenizer(folder, tmp_path / "made")
        assert plainly_rendered(tmp_path / "made") == "<bos>a"
        assert load_tokenizer(folder, {"bos_token": "<pad>"}).bos_token == "<pad>"


class TestNoTemplate:
    def test_the_note_says_where_to_get_one(self, folder):
        note = missing_template_note(load_tokenizer(folder), "so")
        assert note.startswith("This model has no chat template: so. If it was tuned")
        assert "\n" not in note

    def test_the_server_says_it(self, model, caplog):
        load_served_model(parse(["--model", str(model)]))
        (said,) = [r for r in caplog.records if "no chat template" in r.getMessage()]
        assert said.levelno == logging.WARNING
        caplog.clear()
        load_served_model(
            parse(["--model", str(model), "--chat-template", "{{ messages }}"])
        )
        assert "no chat template" not in caplog.text

    def test_a_broken_template_ends_the_servers_start(self, model):
        with pytest.raises(CheckpointError, match="in line 1"):
            load_served_model(
                parse(["--model", str(model), "--chat-template", "{% if %}"])
            )

    def test_tuning_says_it(self, model, tmp_path, monkeypatch):
        lines = [json.dumps({"text": f"{n} the rain " * 40}) for n in range(32)]
        (tmp_path / "a.jsonl").write_text("\n".join(lines))
        said: list[str] = []
        progress: Any = nullcontext
        args = ["--model", str(model), "--data", str(tmp_path / "a.jsonl")]
        held_out = ["--held-out", str(tmp_path / "a.jsonl"), "--max-tokens", "8"]
        output = ["--output", str(tmp_path / "made")]
        monkeypatch.setattr(pipeline, "_Run", None)  # what follows takes long
        with pytest.raises(TypeError):
            pipeline.tune(
                parse_tune([*args, *held_out, *output]),
                tell=said.append,
                progress=progress,
            )
        assert [line[:31] for line in said] == ["This model has no chat template"]

    def test_the_self_test_says_it(self, model, capsys, monkeypatch):
        monkeypatch.setattr(sections, "run", lambda options, note: [])
        assert selftest(["--model", str(model), "--section", "model"]) == 0
        assert capsys.readouterr().err.count("no chat template") == 1
