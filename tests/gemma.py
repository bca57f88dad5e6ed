"""A checkpoint's text side in Gemma 4's own manner: tokenizer and chat templates.

The tokenizer has Gemma's control tokens, white space, bytes and size at their published
ids, its rules, and few pieces else: what fills its places is never text. The small one
has the same pieces without most of what fills, so those behind words come earlier: for
what stands above ids and their number. The templates have the structure of each
published form and are written for these tests from one source. Nothing here is
downloaded; of decoding it knows nothing.
"""

from __future__ import annotations

import copy
import json
import os
import string
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import mlx_lm.utils
from jinja2 import Environment
from tokenizers import Tokenizer, models, trainers
from transformers import AutoTokenizer

DATA = Path(__file__).parent / "data" / "gemma"
VOCAB_SIZE = 262144
# Of the small one; that of another place is never small.
SMALL_SIZE = VOCAB_SIZE if os.environ.get("GEMMA_TOKENIZER") else 1536
PAD, EOS, BOS, UNK, MASK = range(5)
# What an answer is made of, by the names of tokenizer_config.json.
START_OF_TURN, END_OF_TURN = 105, 106
START_OF_CHANNEL, END_OF_CHANNEL = 100, 101
START_OF_CALL, END_OF_CALL, START_OF_RESULT, END_OF_RESULT = 48, 49, 50, 51
EOS_IDS = (EOS, END_OF_TURN, START_OF_RESULT)  # of generation_config.json
SPECIAL = {
    PAD: "<pad>",
    EOS: "<eos>",
    BOS: "<bos>",
    UNK: "<unk>",
    MASK: "<mask>",
    46: "<|tool>",
    47: "<tool|>",
    START_OF_CALL: "<|tool_call>",
    END_OF_CALL: "<tool_call|>",
    START_OF_RESULT: "<|tool_response>",
    END_OF_RESULT: "<tool_response|>",
    52: '<|"|>',
    98: "<|think|>",
    START_OF_CHANNEL: "<|channel>",
    END_OF_CHANNEL: "<channel|>",
    START_OF_TURN: "<|turn>",
    END_OF_TURN: "<turn|>",
    255999: "<|image>",
    256000: "<|audio>",
    258880: "<|image|>",
    258881: "<|audio|>",
    258882: "<image|>",
    258883: "<audio|>",
    258884: "<|video|>",
}
# First places: of runs of white space, bytes, longer pieces and single characters.
_LINE_ENDS, _SPACES, _BYTES, _TABS = 107, 138, 238, 255968
_LONGEST_RUN = 31
_WORDS, _CHARACTERS = 494, 236743
_ASCII = string.ascii_letters + string.digits + string.punctuation
_ROLES = {
    "audio_token": "<|audio|>",
    "boa_token": "<|audio>",
    "boi_token": "<|image>",
    "bos_token": "<bos>",
    "eoa_token": "<audio|>",
    "eoc_token": "<channel|>",
    "eoi_token": "<image|>",
    "eos_token": "<eos>",
    "eot_token": "<turn|>",
    "escape_token": '<|"|>',
    "etc_token": "<tool_call|>",
    "etd_token": "<tool|>",
    "etr_token": "<tool_response|>",
    "image_token": "<|image|>",
    "mask_token": "<mask>",
    "pad_token": "<pad>",
    "soc_token": "<|channel>",
    "sot_token": "<|turn>",
    "stc_token": "<|tool_call>",
    "std_token": "<|tool>",
    "str_token": "<|tool_response>",
    "think_token": "<|think|>",
    "unk_token": "<unk>",
}
TOKENIZER_CONFIG: dict[str, Any] = {
    "backend": "tokenizers",
    "extra_special_tokens": ["<|video|>"],
    "padding_side": "left",
    "processor_class": "Gemma4Processor",
    "tokenizer_class": "GemmaTokenizer",
    **_ROLES,
}
GENERATION_CONFIG: dict[str, Any] = {
    "bos_token_id": BOS,
    "do_sample": True,
    "eos_token_id": list(EOS_IDS),
    "pad_token_id": PAD,
    "temperature": 1.0,
    "top_k": 64,
    "top_p": 0.95,
}


@dataclass(frozen=True)
class Form:
    """A published form of the chat template, by what differs from the others.

    Attributes:
        name: Its month and the checkpoints that have it.
        is_first: Whether it is the form of the first days: one system text, no results
            from messages of the role tool, images between empty lines.
        null_word: What it writes for null in the arguments of a call.
        opens_empty_thought: When an answer without thinking begins behind an empty
            thought: where a turn is opened, or also behind the result of a call.
        opens_thought_behind_result: Whether it opens a thought behind the result of a
            call when thinking is on.
        replays_reasoning: Whether a thought of the turn that has not ended is written
            again: never, before calls only, or always (then ``preserve_thinking``
            keeps those before calls of earlier turns too).
        joins_answers: Whether messages of the assistant that follow each other are one
            turn to the end; otherwise each of them ends it.
        refuses_text_arguments: Whether arguments of a call that are text are an error.
        reads_openai_media: Whether it knows the names of OpenAI's parts, and images in
            the results of calls.
    """

    name: str
    is_first: bool = False
    null_word: str = "None"
    opens_empty_thought: Literal["never", "turn", "always"] = "never"
    opens_thought_behind_result: bool = False
    replays_reasoning: Literal["never", "calls", "turn"] = "calls"
    joins_answers: bool = False
    refuses_text_arguments: bool = False
    reads_openai_media: bool = False

    @property
    def reads_tool_messages(self) -> bool:
        """Whether messages of the role tool are results of the calls before them."""
        return not self.is_first

    @property
    def template(self) -> str:
        """The text of chat_template.jinja.

        A folder in the environment's GEMMA_TEMPLATES may have others of that form in
        files of these names.
        """
        if folder := os.environ.get("GEMMA_TEMPLATES"):
            own = Path(folder) / f"{self.name}.jinja"
            if own.exists():
                return own.read_text(encoding="utf-8")
        return _template(self)

    def write_template(self, folder: Path) -> None:
        """Write chat_template.jinja to a folder."""
        (folder / "chat_template.jinja").write_text(self.template, encoding="utf-8")


_APRIL = Form("april-e2b", is_first=True, replays_reasoning="never")
_MAY = Form("may-e2b")
_JULY = Form(
    "july-e2b",
    null_word="null",
    opens_thought_behind_result=True,
    replays_reasoning="turn",
    joins_answers=True,
    refuses_text_arguments=True,
    reads_openai_media=True,
)
FORMS = {
    form.name: form
    for form in (
        _APRIL,
        replace(_APRIL, name="april-31b", opens_empty_thought="always"),
        _MAY,
        replace(_MAY, name="may-12b", opens_empty_thought="turn"),
        _JULY,
        replace(_JULY, name="july-12b", opens_empty_thought="turn"),
    )
}


@cache
def _template(form: Form) -> str:
    choices = Environment(
        block_start_string="<%",
        block_end_string="%>",
        variable_start_string="[[",
        variable_end_string="]]",
        comment_start_string="<#",
        comment_end_string="#>",
        line_statement_prefix="%%",
        line_comment_prefix="%#",
    )
    source = (DATA / "chat_template.jinja").read_text(encoding="utf-8")
    return choices.from_string(source).render(form=form)


def write_tokenizer(
    folder: Path,
    form: Form | None = None,
    *,
    size: int = VOCAB_SIZE,
    adds_bos: bool = False,
) -> Path:
    """Write tokenizer.json, tokenizer_config.json and, of a form, chat_template.jinja.

    Args:
        folder: Where to; made if it is not there.
        form: Whose chat template; None for none.
        size: Number of ids: ``VOCAB_SIZE`` or ``SMALL_SIZE``.
        adds_bos: Put ``<bos>`` in front of a text, as pre-trained checkpoints do and
            the -it ones do not.

    Returns:
        The folder. tokenizer.json in it is that of the folder in the environment's
        GEMMA_TOKENIZER, if there is one, and must not be written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    given = os.environ.get("GEMMA_TOKENIZER")
    file = folder / "tokenizer.json"
    if given and not adds_bos:
        file.symlink_to(Path(given).resolve() / file.name)
    else:
        content = _read(Path(given) / file.name) if given else tokenizer_json(size)
        content = {**content, "post_processor": _post_processor(adds_bos=adds_bos)}
        file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG))
    if form is not None:
        form.write_template(folder)
    return folder


@contextmanager
def read_once(folder: Path) -> Iterator[None]:
    """Let mlx-lm load a folder's tokenizer once for the same settings.

    To read 262144 pieces takes a second and more. Who loads them again, also by a link
    to tokenizer.json, gets a copy of what was loaded.

    Args:
        folder: The folder.
    """
    file = (folder / "tokenizer.json").resolve()
    load = mlx_lm.utils.load_tokenizer
    loaded: dict[str, Any] = {}
    read: dict[str, Any] = {}
    from_pretrained = AutoTokenizer.from_pretrained

    def read_pieces(path: Path, chat_template: Any = None, **settings: Any) -> Any:
        """Transformers' tokenizer; whatever its template, its pieces are the same."""
        key = str(sorted(settings.items()))
        if key not in read:
            read[key] = from_pretrained(path, **settings)
        found = copy.copy(read[key])
        found.init_kwargs = {**found.init_kwargs, "chat_template": chat_template}
        found.chat_template = chat_template
        return found

    def load_once(
        model_path: Path, tokenizer_config_extra: Any = None, eos_token_ids: Any = None
    ) -> Any:
        settings, ids = tokenizer_config_extra or {}, eos_token_ids
        is_it = (Path(model_path) / file.name).resolve() == file
        if not is_it or "chat_template" not in settings:  # which may lie there
            return load(model_path, tokenizer_config_extra, ids)
        # A type that is None is as good as none.
        said = sorted(item for item in settings.items() if item[1] is not None)
        key = str((said, sorted(ids or ())))
        if key not in loaded:
            with mock.patch.object(AutoTokenizer, "from_pretrained", read_pieces):
                loaded[key] = load(model_path, settings, ids)
        found = copy.copy(loaded[key])
        found._tokenizer = copy.copy(found._tokenizer)
        found.eos_token_ids = loaded[key].eos_token_ids
        return found

    mlx_lm.utils.load_tokenizer = load_once
    try:
        yield
    finally:
        mlx_lm.utils.load_tokenizer = load


def _read(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content


@cache
def tokenizer_json(size: int) -> dict[str, Any]:
    """The content of a tokenizer.json of so many ids."""
    vocabulary, merges = _vocabulary(size)
    space = {"pattern": {"String": " "}}
    marks = {"single_word": False, "lstrip": False, "rstrip": False}
    return {
        "version": "1.0",
        "added_tokens": [
            {
                "id": vocabulary[name],
                "content": name,
                **marks,
                "normalized": False,
                "special": True,
            }
            for name in SPECIAL.values()
        ],
        "normalizer": {"type": "Replace", **space, "content": "▁"},
        "pre_tokenizer": {
            "type": "Split",
            **space,
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "post_processor": _post_processor(adds_bos=False),
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocabulary,
            "merges": merges,
        },
    }


def _post_processor(*, adds_bos: bool) -> dict[str, Any]:
    """What stands around one text, and around two."""
    bos = [{"SpecialToken": {"id": "<bos>", "type_id": 0}}] if adds_bos else []
    first, second = (
        {"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB")
    )
    own = {"<bos>": {"id": "<bos>", "ids": [BOS], "tokens": ["<bos>"]}}
    return {
        "type": "TemplateProcessing",
        "single": [*bos, first],
        "pair": [*bos, first, second],
        "special_tokens": own if adds_bos else {},
    }


def _vocabulary(size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Pieces and their ids, in order of the ids, and merges, first ones first."""
    word_merges = _word_merges()
    places = {
        _LINE_ENDS: ["\n" * count for count in range(1, _LONGEST_RUN + 1)],
        _SPACES: ["▁" * count for count in range(2, _LONGEST_RUN + 1)],
        _BYTES: [f"<0x{byte:02X}>" for byte in range(256)],
        _WORDS: ["".join(merge) for merge in word_merges],
        _CHARACTERS: ["▁", *_characters()],
        _TABS: ["\t" * count for count in range(1, _LONGEST_RUN + 1)],
    }
    pieces = [f"<unused{i}>" for i in range(VOCAB_SIZE)]
    for first, some in places.items():
        pieces[first : first + len(some)] = some
    for i, name in SPECIAL.items():
        pieces[i] = name
    if size < VOCAB_SIZE:
        fill = pieces[_WORDS + len(word_merges) : _CHARACTERS]
        others = [p for p in pieces[_WORDS:] if not p.startswith("<unused")]
        pieces = [*pieces[:_WORDS], *others, *fill][:size]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    assert len(vocabulary) == size
    assert vocabulary.keys() >= set(SPECIAL.values())
    return vocabulary, [*_run_merges(), *word_merges]


def _run_merges() -> list[tuple[str, str]]:
    """The merges of white space: any two runs, those of the longest first."""
    return [
        (character * first, character * (total - first))
        for total in range(_LONGEST_RUN, 1, -1)
        for first in range(total - 1, 0, -1)
        for character in "\n▁\t"
    ]


def _word_merges() -> list[tuple[str, str]]:
    """The merges that make each word of words.txt one piece, also behind a space."""
    words = (DATA / "words.txt").read_text(encoding="utf-8").split()
    tokenizer = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, min_frequency=1, show_progress=False
    )
    behind_space = ["▁" + word for word in words if word[0].isalpha()]
    tokenizer.train_from_iterator([*words, *behind_space], trainer)
    return [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]


def _characters() -> str:
    """Characters with a piece of their own; others are bytes."""
    ranges = (range(0xA1, 0xAD), range(0xAE, 0x180), range(0x2010, 0x2027))
    letters = "".join(chr(code) for codes in ranges for code in codes)
    joined = "\u200d\ufe0f"  # what emoji of several are joined by
    return f"{_ASCII}{letters}€→中文日本語😀🌈👩👧🎉{joined}"
