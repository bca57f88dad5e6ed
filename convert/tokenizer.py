"""The files beside the weights that a text needs: tokenizer, chat template, settings.

They are copied as they are, but for what this mlx-lm could not load and for ends that
``generation_config.json`` lacks. A checkpoint with nothing but ``tokenizer.model`` gets
the ``tokenizer.json`` that mlx-lm reads, made by transformers and compared with
sentencepiece itself. Knows nothing of weights.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from mlx_gemma_mtp.checkpoints.checkpoint import (
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    open_checkpoint,
    read_json,
)
from mlx_gemma_mtp.checkpoints.template_files import (
    CHAT_TEMPLATE,
    DEFAULT,
    KEY,
    MORE_CHAT_TEMPLATES,
    OLD_CHAT_TEMPLATE,
    TOKENIZER_CONFIG,
    Templates,
    read_chat_templates,
)
from mlx_gemma_mtp.checkpoints.tokenizer import (
    PARSER_TYPE,
    TOKENIZER_JSON,
    eos_token_ids,
    load_tokenizer,
    missing_roles,
    tool_parser,
    unknown_modules,
)
from mlx_gemma_mtp.checkpoints.weights import one_line
from mlx_gemma_mtp.cli.command import NO_ROOM
from mlx_gemma_mtp.errors import CheckpointError, cut

TOKENIZER_MODEL = "tokenizer.model"
_COPIED = (
    TOKENIZER_JSON,
    TOKENIZER_MODEL,
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    CHAT_TEMPLATE,
    OLD_CHAT_TEMPLATE,
    GENERATION_CONFIG_NAME,
)
# What the two tokenizers are compared on: letters, runs of spaces, bytes, scripts.
_SAMPLES = (
    "The quick brown fox jumps over the lazy dog. 0123456789",
    "def area(radius):\n\treturn  3.14 * radius ** 2   # m²\n\n",
    "Ångström, naïve, 東京, Привет, €5, 🙂 \u200b\u00a0x",
    " leading and trailing ",
)


def check_tokenizer(folder: Path, *, vocab_size: int) -> None:
    """Check that a checkpoint has a tokenizer that will work where it is copied to.

    Args:
        folder: The target's folder.
        vocab_size: How many tokens the target has.

    Raises:
        CheckpointError: There is none, or one of its files is damaged.
    """
    if not any((folder / name).is_file() for name in (TOKENIZER_JSON, TOKENIZER_MODEL)):
        raise CheckpointError(
            f"{cut(folder)} must hold {TOKENIZER_JSON} or {TOKENIZER_MODEL}: got "
            "neither. Copy them there from the same model."
        )
    for small in (GENERATION_CONFIG_NAME, TOKENIZER_CONFIG, OLD_CHAT_TEMPLATE):
        if (folder / small).is_file():
            read_json(folder / small)
    templates = read_chat_templates(folder)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            copy_tokenizer(folder, Path(scratch))
            shutil.copyfile(folder / CONFIG_NAME, Path(scratch) / CONFIG_NAME)
            tokenizer = load_tokenizer(Path(scratch), name=folder, templates=templates)
        with one_line(f"the tokenizer in {cut(folder)}"):
            token_ids = tokenizer.encode(_SAMPLES[0])
    except OSError as error:
        if error.errno in NO_ROOM:  # not the checkpoint's: the command tells it
            raise
        raise CheckpointError(
            f"{error.filename or folder} must be readable: got "
            f"{error.strerror or error}. Check the path and its permissions."
        ) from error
    if max(token_ids, default=0) >= vocab_size:
        raise CheckpointError(
            f"the tokenizer in {cut(folder)} must be the target's, with {vocab_size} "
            f"tokens: got token {max(token_ids)}. Copy the files from the same model."
        )


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy tokenizer, chat template and generation settings.

    Args:
        source: The target's folder.
        folder: Where they go.

    Raises:
        CheckpointError: ``tokenizer.model`` is all there is and cannot be read.
    """
    named = (source / MORE_CHAT_TEMPLATES).glob("*.jinja")
    more = tuple(str(path.relative_to(source)) for path in named)
    if more:
        (folder / MORE_CHAT_TEMPLATES).mkdir(exist_ok=True)
    copy_files(source, folder, (*_COPIED, *more))
    if not (source / TOKENIZER_JSON).is_file():
        _make_tokenizer_json(source / TOKENIZER_MODEL, folder)
    templates = read_chat_templates(source)
    _complete_config(folder, templates)
    texts = {name: template.text for name, template in templates.items()}
    if _as_transformers_reads(folder) != texts:
        _write_templates(folder, texts)


def copy_files(source: Path, folder: Path, names: tuple[str, ...]) -> None:
    """Copy those of some files that are there.

    Args:
        source: Where they are.
        folder: Where they go.
        names: Their names.
    """
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def complete_ends(folder: Path) -> None:
    """Let ``generation_config.json`` name all that ends a text, as mlx-lm reads it.

    Args:
        folder: A converted target.
    """
    checkpoint = open_checkpoint(folder)
    ids = eos_token_ids(checkpoint)
    settings = checkpoint.generation_config
    named = settings.get("eos_token_id") or checkpoint.config.get("eos_token_id")
    if not set(ids) <= set(named if isinstance(named, list) else [named]):
        _write_json(folder / GENERATION_CONFIG_NAME, {**settings, "eos_token_id": ids})


def _complete_config(folder: Path, templates: Templates) -> None:
    """Let a tokenizer's config say what mlx-lm needs, and nothing it could not load."""
    path = folder / TOKENIZER_CONFIG
    settings = read_json(path) if path.is_file() else {}
    dropped = {"auto_map", *unknown_modules(settings)}
    if not templates:
        dropped.add(KEY)  # an empty one
    kept = {key: value for key, value in settings.items() if key not in dropped}
    kept |= missing_roles(folder)
    parser = tool_parser(templates) if len(templates) > 1 else None
    if parser is not None and kept.get(PARSER_TYPE) in (None, ""):
        kept[PARSER_TYPE] = parser
    if kept != settings:
        _write_json(path, kept)


def _as_transformers_reads(folder: Path) -> dict[str, Any]:
    """The chat templates that transformers finds by itself, by their names."""
    files = {DEFAULT: folder / CHAT_TEMPLATE}
    files |= {p.stem: p for p in (folder / MORE_CHAT_TEMPLATES).glob("*.jinja")}
    found = {
        name: path.read_text(encoding="utf-8")
        for name, path in files.items()
        if path.is_file()
    }
    config = folder / TOKENIZER_CONFIG
    value = read_json(config).get(KEY) if config.is_file() else None
    if found or value is None:
        return found
    if isinstance(value, list):
        return {item["name"]: item["template"] for item in value}
    return value if isinstance(value, dict) else {DEFAULT: value}


def _write_templates(folder: Path, texts: Mapping[str, str]) -> None:
    """Put chat templates where transformers reads them, in place of what lies there."""
    (folder / CHAT_TEMPLATE).unlink(missing_ok=True)
    shutil.rmtree(folder / MORE_CHAT_TEMPLATES, ignore_errors=True)
    config = folder / TOKENIZER_CONFIG
    settings = read_json(config) if config.is_file() else {}
    if KEY in settings:
        _write_json(config, {k: v for k, v in settings.items() if k != KEY})
    for name, text in texts.items():
        path = folder / MORE_CHAT_TEMPLATES / f"{name}.jinja"
        if name == DEFAULT:
            path = folder / CHAT_TEMPLATE
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _make_tokenizer_json(model: Path, folder: Path) -> None:
    """Write ``tokenizer.json`` and its config from a sentencepiece model."""
    import sentencepiece
    from transformers import AutoTokenizer

    try:
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))
        settings = _tokenizer_config(pieces, folder)
        with tempfile.TemporaryDirectory() as scratch:
            shutil.copyfile(model, Path(scratch) / TOKENIZER_MODEL)
            gemma = {**settings, "tokenizer_class": "GemmaTokenizer"}
            if pieces.piece_to_id("<mask>") == pieces.unk_id():
                # Its default would become a token beyond the vocabulary.
                gemma["mask_token"] = pieces.id_to_piece(pieces.unk_id())
            (Path(scratch) / TOKENIZER_CONFIG).write_text(json.dumps(gemma))
            tokenizer = AutoTokenizer.from_pretrained(scratch).backend_tokenizer
        _keep_whole(tokenizer, model)
    except Exception as error:  # noqa: BLE001  # of two libraries, on damaged files
        _fail_conversion(model, f"{type(error).__name__}: {error}")
    num_tokens, num_pieces = tokenizer.get_vocab_size(), pieces.vocab_size()
    if num_tokens != num_pieces:
        _fail_conversion(model, f"{num_tokens} tokens instead of {num_pieces}")
    for text in _SAMPLES:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        if ids != pieces.encode(text):
            _fail_conversion(model, f"other tokens for {text!r}")
    (folder / TOKENIZER_JSON).write_text(tokenizer.to_str(), encoding="utf-8")
    _write_json(folder / TOKENIZER_CONFIG, settings)


def _fail_conversion(model: Path, reason: str) -> NoReturn:
    raise CheckpointError(
        f"{model} must be a sentencepiece model that transformers can turn into a "
        f"{TOKENIZER_JSON}: got {' '.join(reason.split())[:200]}. Copy "
        f"{TOKENIZER_JSON} of the same model there."
    )


def _tokenizer_config(pieces: Any, folder: Path) -> dict[str, Any]:
    """The tokenizer's settings: what the checkpoint says, else what its model says."""
    settings: dict[str, Any] = {
        "add_bos_token": True,
        "clean_up_tokenization_spaces": False,
    }
    for name in ("bos", "eos", "pad", "unk"):
        token = getattr(pieces, f"{name}_id")()
        if token >= 0:
            settings[f"{name}_token"] = pieces.id_to_piece(token)
    if (folder / TOKENIZER_CONFIG).is_file():
        settings.update(read_json(folder / TOKENIZER_CONFIG))
    # What reads a tokenizer.json as it is, and runs no code of a checkpoint.
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    return settings


def _keep_whole(tokenizer: Any, model: Path) -> None:
    """Let pieces that are never split or merged be found before any merging."""
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import AddedToken

    proto: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(model.read_bytes())
    for piece in proto.pieces:
        if piece.type in (piece.CONTROL, piece.UNKNOWN):
            token = AddedToken(piece.piece, special=True, normalized=False)
            tokenizer.add_special_tokens([token])
        elif piece.type == piece.USER_DEFINED:
            token = AddedToken(piece.piece, special=False, normalized=False)
            tokenizer.add_tokens([token])
