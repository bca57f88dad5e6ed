"""Tokenizers of converted pairs: copied, or made from a sentencepiece model.

Run: python -m pytest tests/convert/test_tokenizer.py
"""

from __future__ import annotations

import errno
import json
import shutil
from typing import Any

import mlx_lm
import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

import mlx_gemma_mtp
from convert.__main__ import main
from convert.tokenizer import check_tokenizer, copy_tokenizer
from mlx_gemma_mtp.errors import CheckpointError
from tests.tiny import model_folder

EMBEDDED = mlx_gemma_mtp.embedded_pair_path()
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
)
OTHER_TEMPLATE = "another{{ bos_token }}"


def pair_folder(folder, *files):
    """The embedded pair with only some of its tokenizer's files, and no template."""
    shutil.copytree(EMBEDDED, folder)
    (folder / "chat_template.jinja").unlink()
    for name in TOKENIZER_FILES:
        if name not in files:
            (folder / name).unlink()
    return folder


def opened(folder) -> Any:
    """Model and tokenizer, by mlx-lm's own loader."""
    return mlx_lm.load(str(folder))


def load(folder) -> Any:
    return mlx_gemma_mtp.load(folder)


def run(source, place):
    """Convert without quantizing, which is quick."""
    argv = ["--hf-path", source, "--mlx-path", place, "--no-check"]
    flags = ["--no-quantize", "--no-draft-quantize"]
    return main([str(argument) for argument in [*argv, *flags]])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A pair whose tokenizer was made from ``tokenizer.model`` alone."""
    root = tmp_path_factory.mktemp("tokenizer")
    source = pair_folder(root / "source", "tokenizer.model")
    assert run(source, root / "made") == 0
    return root / "made"


@pytest.fixture(scope="module")
def tokenizers(made):
    pieces = sentencepiece.SentencePieceProcessor(
        model_file=str(EMBEDDED / "tokenizer.model")
    )
    return (
        Tokenizer.from_file(str(made / "tokenizer.json")),
        Tokenizer.from_file(str(EMBEDDED / "tokenizer.json")),
        pieces,
    )


# Made from a sentencepiece model

texts = st.text() | st.text(alphabet=" \n\t▁ab1é€🙂<>|", max_size=40)


@given(texts)
@example("def mean(values):\n    return sum(values) / len(values)\n")
@example("  two  spaces   and\ttabs\r\n")
@example("▁ the piece for a space ▁▁")
@example("<bos>special<eos><pad><unk><0x41>")
@example("Ångström 東京 Привет \u200b\u00a0 e\u0301 \U0001f469\u200d\U0001f4bb")
@settings(max_examples=200)
def test_ids_are_those_of_the_shipped_tokenizer(tokenizers, text):
    ours, shipped, _ = tokenizers
    for has_special in (False, True):
        expected = shipped.encode(text, add_special_tokens=has_special).ids
        assert ours.encode(text, add_special_tokens=has_special).ids == expected


def is_plain(text):
    """Whether sentencepiece, which never parses control pieces, reads the same."""
    specials = ("<bos>", "<eos>", "<pad>", "<unk>", "\0")
    return not any(special in text for special in specials)


@given(texts.filter(is_plain))
@example("Ångström, naïve, 東京, Привет, €5, 🙂")
@settings(max_examples=200)
def test_ids_are_those_of_sentencepiece(tokenizers, text):
    ours, _, pieces = tokenizers
    ids = ours.encode(text, add_special_tokens=False).ids
    assert ids == pieces.encode(text)
    assert ours.decode(ids, skip_special_tokens=False) == pieces.decode(ids)


def test_the_vocabulary_is_the_models(tokenizers):
    ours, shipped, pieces = tokenizers
    assert ours.get_vocab_size() == pieces.vocab_size()
    assert ours.get_vocab() == shipped.get_vocab()
    for i in range(pieces.vocab_size()):
        assert ours.id_to_token(i) == pieces.id_to_piece(i)


def test_both_loaders_use_it(made):
    _, ours = load(made)
    _, theirs = opened(made)
    _, shipped = load(EMBEDDED)
    for tokenizer in (ours, theirs):
        assert tokenizer.encode("import ") == shipped.encode("import ")
        assert tokenizer.encode("import ")[0] == tokenizer.bos_token_id
        assert tokenizer.eos_token_ids == shipped.eos_token_ids
        for name in ("bos", "eos", "pad", "unk"):
            key = f"{name}_token_id"
            assert getattr(tokenizer, key) == getattr(shipped, key)
        assert tokenizer.decode(tokenizer.encode("a  b\n")) == "<bos>a  b\n"


def test_the_model_stays_beside_it(made):
    expected = (EMBEDDED / "tokenizer.model").read_bytes()
    assert (made / "tokenizer.model").read_bytes() == expected


def test_settings_of_the_checkpoint_count(tmp_path):
    source = pair_folder(tmp_path / "source", "tokenizer.model")
    config = {
        "model_max_length": 77,
        "chat_template": TEMPLATE,
        "tokenizer_class": "GemmaTokenizer",
        "auto_map": {"AutoTokenizer": ["code.py", None]},
    }
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    place = tmp_path / "made"
    assert run(source, place) == 0
    found = json.loads((place / "tokenizer_config.json").read_text())
    assert found["model_max_length"] == 77
    assert "auto_map" not in found
    _, tokenizer = opened(place)
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.encode("x")[0] == tokenizer.bos_token_id


# Copied


def test_all_files_stay_byte_for_byte(tmp_path):
    source = pair_folder(tmp_path / "source", *TOKENIZER_FILES)
    (source / "special_tokens_map.json").write_text('{"bos_token": "<bos>"}')
    (source / "added_tokens.json").write_text("{}")
    (source / "chat_template.jinja").write_text(TEMPLATE)
    (source / "generation_config.json").write_bytes(b'{"eos_token_id": [1],\n\t"x":0}')
    (source / "tokenizer_code.py").write_text("raise SystemExit")
    (source / "notes.txt").write_text("private")
    place = tmp_path / "made"
    assert run(source, place) == 0
    for name in (
        *TOKENIZER_FILES,
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template.jinja",
        "generation_config.json",
        "drafter/generation_config.json",
    ):
        assert (place / name).read_bytes() == (source / name).read_bytes(), name
    assert not (place / "tokenizer_code.py").exists()
    assert not (place / "notes.txt").exists()


def chat(folder):
    _, tokenizer = opened(folder)
    messages = [{"role": "user", "content": "hello"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    return tokenizer.chat_template, text


def test_a_chat_template(tmp_path):
    source = pair_folder(tmp_path / "source", *TOKENIZER_FILES)
    (source / "chat_template.jinja").write_text(TEMPLATE)
    assert run(source, tmp_path / "made") == 0
    assert chat(tmp_path / "made") == (TEMPLATE, "<bos><user>hello")


@pytest.mark.parametrize("files", [TOKENIZER_FILES, ("tokenizer.model",)])
def test_a_chat_template_in_the_old_file(tmp_path, files):
    source = pair_folder(tmp_path / "source", *files)
    old = json.dumps({"chat_template": TEMPLATE})
    (source / "chat_template.json").write_text(old)
    assert run(source, tmp_path / "made") == 0
    assert (tmp_path / "made" / "chat_template.json").read_text() == old
    assert chat(tmp_path / "made") == (TEMPLATE, "<bos><user>hello")


def test_the_newer_file_counts(tmp_path):
    source = pair_folder(tmp_path / "source", *TOKENIZER_FILES)
    (source / "chat_template.jinja").write_text(TEMPLATE)
    (source / "chat_template.json").write_text(
        json.dumps({"chat_template": OTHER_TEMPLATE})
    )
    assert run(source, tmp_path / "made") == 0
    assert chat(tmp_path / "made")[0] == TEMPLATE


def test_a_checkpoint_without_a_template(made):
    _, tokenizer = opened(made)
    assert tokenizer.chat_template is None


# Missing and damaged


def refused(source, place, capsys, *words):
    capsys.readouterr()
    assert run(source, place) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert " must " in line
    for word in words:
        assert str(word) in line
    assert [path.name for path in place.parent.iterdir()] == [source.name]
    return err


def test_no_tokenizer_is_found_before_anything_is_written(tmp_path, capsys):
    source = pair_folder(tmp_path / "source")
    err = refused(source, tmp_path / "made", capsys, source, "tokenizer.model")
    assert len(err.splitlines()) == 1  # no weights were read


@pytest.mark.parametrize(
    "damage",
    [lambda raw: raw[: len(raw) // 2], lambda raw: b"", lambda raw: b"{}" * 999],
    ids=["half", "empty", "other"],
)
def test_a_damaged_model(tmp_path, capsys, damage):
    source = pair_folder(tmp_path / "source", "tokenizer.model")
    path = source / "tokenizer.model"
    path.write_bytes(damage(path.read_bytes()))
    refused(source, tmp_path / "made", capsys, path)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("contents", ["{", "[]", ""])
def test_a_damaged_setting_is_found_before_anything_is_written(
    tmp_path, capsys, name, contents
):
    source = pair_folder(tmp_path / "source", *TOKENIZER_FILES)
    (source / name).write_text(contents)
    err = refused(source, tmp_path / "made", capsys, source / name)
    assert len(err.splitlines()) == 1


def test_a_damaged_chat_template_in_the_old_file(tmp_path, capsys):
    source = pair_folder(tmp_path / "source", *TOKENIZER_FILES)
    (source / "chat_template.json").write_text("{")
    refused(source, tmp_path / "made", capsys, source / "chat_template.json")


def test_another_model_that_gemma_does_not_read_like(tmp_path):
    """A model of another kind makes no wrong tokenizer: it is refused."""
    (tmp_path / "text.txt").write_text("the quick brown fox\n" * 200 + "a b c d e f\n")
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"),
        model_prefix=str(tmp_path / "tokenizer"),
        model_type="unigram",
        vocab_size=40,
        minloglevel=9,
        hard_vocab_limit=False,
    )
    (tmp_path / "config.json").write_text('{"model_type": "gemma4"}')
    place = tmp_path / "made"
    place.mkdir()
    for call in (
        lambda: copy_tokenizer(tmp_path, place),
        lambda: check_tokenizer(tmp_path, vocab_size=512),
    ):
        with pytest.raises(CheckpointError) as caught:
            call()
        assert "\n" not in str(caught.value)
        assert "tokenizer.model" in str(caught.value)
    assert not (place / "tokenizer.json").exists()


def test_a_tokenizer_of_another_target(tmp_path, capsys):
    """One with more tokens than the target has would read foreign rows."""
    source = model_folder(tmp_path / "source", "12b")
    for name in TOKENIZER_FILES:
        shutil.copyfile(EMBEDDED / name, source / name)
    err = refused(source, tmp_path / "made", capsys, source, "512 tokens", "got token")
    assert len(err.splitlines()) == 1


def test_a_full_disk_is_not_the_checkpoints_fault(tmp_path, monkeypatch, capsys):
    def full(source, place):
        raise OSError(errno.ENOSPC, "No space left on device", source, None, place)

    monkeypatch.setattr(shutil, "copyfile", full)
    status = main(["--model", str(EMBEDDED), "--mlx-path", str(tmp_path / "made")])
    error = capsys.readouterr().err.splitlines()[-1]
    assert status == 1
    assert error.startswith("error: what is written must find room at ")
    assert str(EMBEDDED) not in error
