"""What tests share: the tiny random pairs, a tokenizer for them, folders of both.

Nothing here is downloaded or trained.
"""

from __future__ import annotations

import atexit
import json
import re
import shutil
import string
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from mlx_gemma_mtp.engine.decoder import Decoder
from mlx_gemma_mtp.pair.load import load_pair
from mlx_gemma_mtp.pair.pair import Pair

REFERENCE = Path(__file__).parent / "data" / "reference"
FAMILIES = ("e2b", "e4b", "12b", "26b-a4b", "31b")
SHORT = "short"  # 12b's with one layer of each kind: for what stands above the models
VOCAB_SIZE = 512
PAD, EOS, BOS, UNK, TURN, END_OF_TURN = 0, 1, 2, 3, 105, 106

# As much of Gemma's as matters: roles, turns, a prompt for the answer, a refusal.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'system' and not has_system %}"
    "{{ raise_exception('no system\nprompt here') }}{% endif %}"
    "<|turn>{{ message.role }}\n{{ message.content }}"
    "{% if not loop.last or add_generation_prompt %}<turn|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|turn>model\n{{ opening }}{% endif %}"
)


@contextmanager
def uncompiled() -> Iterator[None]:
    """Rounds as plain graphs, for tests of what stands above them.

    On the CPU MLX compiles every fused kernel with g++: a minute, once per machine.
    """
    mx.disable_compile()
    try:
        yield
    finally:
        mx.enable_compile()


@cache
def family_folder(family: str) -> Path:
    """The folder of a family's pair, target/ and drafter/, not to be written to."""
    if family != SHORT:
        return REFERENCE / family
    place = Path(tempfile.mkdtemp(prefix="mlx_gemma_mtp-short-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    for part in ("target", "drafter"):
        ignore = shutil.ignore_patterns("config.resaved.json")
        shutil.copytree(REFERENCE / "12b" / part, place / part, ignore=ignore)
        _shorten(place / part)
    return place


def _shorten(folder: Path) -> None:
    """Leave a checkpoint the last layer of each kind."""
    config = json.loads((folder / "config.json").read_text())
    text = config["text_config"]
    kinds = text["layer_types"]
    kept = sorted({kind: i for i, kind in enumerate(kinds)}.values())
    text |= {"layer_types": [kinds[i] for i in kept], "num_hidden_layers": len(kept)}
    if text["num_kv_shared_layers"]:
        text["num_kv_shared_layers"] = len(kept)
    (folder / "config.json").write_text(json.dumps(config))
    file = str(folder / "model.safetensors")
    weights: dict[str, mx.array] = {}
    for name, array in cast(dict[str, mx.array], mx.load(file)).items():
        number = re.search(r"(?<=layers\.)\d+", name)
        if number is None:
            weights[name] = array
        elif (old := int(number[0])) in kept:
            new = f"{name[: number.start()]}{kept.index(old)}{name[number.end() :]}"
            weights[new] = array
    mx.eval(weights)
    mx.save_safetensors(file, weights, metadata={"format": "pt"})


def new_pair(family: str = SHORT, *, has_drafter: bool = True) -> Pair:
    """A random pair, read anew: a test may change it."""
    folder = family_folder(family)
    return load_pair(folder / "target", has_drafter and folder / "drafter")


def families(*fast: str) -> list[Any]:
    """All of them, for parameters of a test: those not named are tried by test-slow."""
    return [
        family if family in fast else pytest.param(family, marks=pytest.mark.slow)
        for family in FAMILIES
    ]


@cache
def reference_pair(family: str = SHORT, *, has_drafter: bool = True) -> Pair:
    """A random pair, the same object for every test: compiled rounds are kept."""
    return new_pair(family, has_drafter=has_drafter)


def _vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """512 pieces in Gemma's manner, ids by their place, and the merges they need."""
    characters = ["▁", "\n", *string.digits, *string.ascii_letters, *string.punctuation]
    letters, few = "etaoinshrdlucmfw", "etaoi"
    pairs = list(product(letters, letters))
    triples = [(a + b, c) for a, b, c in product(few, few, few)]
    words = [("▁", letter) for letter in string.ascii_lowercase]
    merges = [*pairs, *triples, *words]
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>"]
    pieces += [f"<0x{byte:02X}>" for byte in "€".encode()]
    pieces += [*characters, *("".join(merge) for merge in merges)]
    for special, place in (("<|turn>", TURN), ("<turn|>", END_OF_TURN)):
        pieces.insert(place, special)
    assert len(set(pieces)) == len(pieces) == VOCAB_SIZE
    return {piece: i for i, piece in enumerate(pieces)}, merges


def tiny_tokenizer(
    *, has_bos: bool = True, has_eos: bool = True, chat_template: str | None = None
) -> PreTrainedTokenizerFast:
    """A tokenizer for the random pairs: every id is a piece of text.

    It is built like Gemma's: byte-pair encoding over ▁ for the space, bytes for what
    has no piece (of three bytes only: those of €), a begin-of-sequence token in front.
    """
    vocabulary, merges = _vocabulary()
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    names = ["<pad>", "<unk>", "<|turn>"]
    names += ["<bos>"] if has_bos else []
    names += ["<eos>", "<turn|>"] if has_eos else []
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in names])
    if has_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", BOS)]
        )
    special: dict[str, Any] = {"pad_token": "<pad>", "unk_token": "<unk>"}
    special |= {"bos_token": "<bos>"} if has_bos else {}
    special |= {"eos_token": "<eos>"} if has_eos else {}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    wrapped.chat_template = chat_template
    return wrapped


def record_decoders(monkeypatch: Any, module: Any) -> list[Decoder]:
    """Let a module keep every decoder it makes from here on in the list returned."""
    made: list[Decoder] = []

    class Recorded(Decoder):
        def __init__(self, *args: Any, **settings: Any) -> None:
            super().__init__(*args, **settings)
            made.append(self)

    monkeypatch.setattr(module, "Decoder", Recorded)
    return made


def model_folder(
    folder: Path, family: str = SHORT, *, has_drafter: bool = True, **tokenizer: Any
) -> Path:
    """Make a checkpoint's folder: target, tokenizer, and the drafter in drafter/."""
    parts = {"target": folder, "drafter": folder / "drafter"}
    for part, place in parts.items():
        if part == "target" or has_drafter:
            place.mkdir(parents=True)
            for path in (family_folder(family) / part).iterdir():
                (place / path.name).write_bytes(path.read_bytes())
    tiny_tokenizer(**tokenizer).save_pretrained(folder)
    return folder


def endless_folder(folder: Path) -> Path:
    """Make the folder of a pair whose text no token ends."""
    model_folder(folder, has_eos=False)
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    for place in (config, config["text_config"]):
        place.pop("eos_token_id", None)
    (folder / "config.json").write_text(json.dumps(config))
    return folder
