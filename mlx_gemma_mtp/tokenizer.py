"""A checkpoint's tokenizer as mlx-lm loads it, with the chat template that lies there.

Knows nothing of weights: what a text needs is read from the files beside them.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx_lm
import mlx_lm.utils
from jinja2 import TemplateSyntaxError

from .checkpoint import Checkpoint, read_json
from .config import shorten
from .errors import CheckpointError
from .template_files import (
    CHAT_TEMPLATE,
    KEY,
    TOKENIZER_CONFIG,
    Templates,
    for_tools,
    given_templates,
    read_chat_templates,
)
from .weights import one_line

TOKENIZER_JSON = "tokenizer.json"
TEMPLATE_TYPE, PARSER_TYPE = "chat_template_type", "tool_parser_type"
# What mlx-lm imports by name, and where.
_MODULES = {TEMPLATE_TYPE: "mlx_lm.chat_templates", PARSER_TYPE: "mlx_lm.tool_parsers"}
_CALL_MARKS = ("<|tool_call>", "<tool_call|>")
_TURN_END, _RESPONSE = "<turn|>", "<|tool_response>"
_ADDED_TOKENS = re.compile(r'"added_tokens"\s*:\s*(?=\[)')

logger = logging.getLogger("mlx_gemma_mtp")


def load_tokenizer(
    folder: Path,
    tokenizer_config: dict[str, Any] | None = None,
    eos_ids: tuple[int, ...] = (),
    *,
    trust_remote_code: bool = False,
    name: Path | None = None,
) -> Any:
    """Load a tokenizer as mlx-lm does.

    Args:
        folder: The checkpoint's folder.
        tokenizer_config: Arguments for the tokenizer, as in ``mlx_lm.load``; its
            ``chat_template`` stands in for the checkpoint's.
        eos_ids: The tokens that end a text; none for the tokenizer's own.
        trust_remote_code: Let it run code from the checkpoint.
        name: What the folder is called in messages; None for its path.

    Raises:
        CheckpointError: It cannot be loaded, or a chat template is none.
    """
    given = tokenizer_config or {}
    templates = _templates(folder, given, name)
    # trust_remote_code is named either way: where it is not, transformers asks on
    # standard input.
    settings = {
        "trust_remote_code": trust_remote_code,
        **given,
        KEY: _as_argument(templates),
        **_module_settings(folder, given, templates, name or folder),
    }
    next_step = f"Copy {TOKENIZER_JSON} and {TOKENIZER_CONFIG} of the same model there."
    with one_line(f"the tokenizer in {name or folder}", next_step):
        tokenizer = mlx_lm.utils.load_tokenizer(folder, settings, list(eos_ids) or None)
    check_templates(tokenizer, templates)
    return tokenizer


def check_templates(tokenizer: Any, templates: Templates) -> None:
    """Compile chat templates, which transformers keeps for the first prompt.

    Args:
        tokenizer: mlx-lm's.
        templates: The templates.

    Raises:
        CheckpointError: One is no Jinja template.
    """
    for template in templates.values():
        try:
            tokenizer.apply_chat_template(
                [{"role": "user", "content": ""}],
                chat_template=template.text,
                tokenize=False,
            )
        except TemplateSyntaxError as error:
            raise CheckpointError(
                f"{template.origin} must be a Jinja template: got "
                f"{shorten(error.message)} in line {error.lineno}. Mend that line, or "
                f"copy {CHAT_TEMPLATE} of the same model there."
            ) from error
        except Exception:  # noqa: BLE001  # of this message; real ones may pass
            logger.debug("%s refuses a message without text", template.origin)


def eos_token_ids(
    checkpoint: Checkpoint, tokenizer_config: dict[str, Any] | None = None
) -> tuple[int, ...]:
    """Return the token ids that end a text.

    They are those that ``generation_config.json`` and ``config.json`` name, each of
    which may lack some, the tokenizer's own end and that of a turn, and where the chat
    template has tools what opens their response.

    Args:
        checkpoint: A target's checkpoint.
        tokenizer_config: Arguments for the tokenizer, as for ``load_tokenizer``.

    Raises:
        CheckpointError: They are something else than integers.
    """
    text = checkpoint.config.get("text_config")
    places = [checkpoint.generation_config, checkpoint.config]
    places.append(text if isinstance(text, dict) else {})
    ids: set[int] = set()
    for place in places:
        found = place.get("eos_token_id")
        named = [] if found is None else found if isinstance(found, list) else [found]
        if not all(type(token) is int and token >= 0 for token in named):
            raise CheckpointError(
                f"eos_token_id in {checkpoint.folder} must be an integer or a list of "
                f"them: got {found!r}. Fetch generation_config.json and config.json "
                "again."
            )
        ids.update(named)
    special = _special_tokens(checkpoint.folder)
    ends = _ends(checkpoint.folder, tokenizer_config or {}) if special else ()
    ids.update(special[end] for end in ends if end in special)
    return tuple(sorted(ids))


def unknown_modules(config: dict[str, Any]) -> list[str]:
    """Return the keys of a tokenizer's config that name what this mlx-lm has not.

    Args:
        config: The parsed ``tokenizer_config.json``.
    """
    return [
        key
        for key, package in _MODULES.items()
        if config.get(key) is not None and not _has_module(package, config[key])
    ]


def _has_module(package: str, name: Any) -> bool:
    is_name = isinstance(name, str) and name.isidentifier()
    return is_name and importlib.util.find_spec(f"{package}.{name}") is not None


def _templates(folder: Path, given: dict[str, Any], name: Path | None) -> Templates:
    if KEY in given:
        return given_templates(given[KEY])
    return read_chat_templates(folder, name)


def _as_argument(templates: Templates) -> str | dict[str, str] | None:
    """Chat templates as transformers takes them."""
    texts = {name: template.text for name, template in templates.items()}
    return texts if len(texts) > 1 else next(iter(texts.values()), None)


def _module_settings(
    folder: Path, given: dict[str, Any], templates: Templates, shown: Path
) -> dict[str, Any]:
    """Settings in place of those that would make mlx-lm import a module it has not.

    Raises:
        CheckpointError: It should take the place of a chat template, and there is none.
    """
    config = {**_tokenizer_config(folder), **given}
    unknown = unknown_modules(config)
    version = mlx_lm.__version__
    if config.get(TEMPLATE_TYPE) and TEMPLATE_TYPE in unknown and not templates:
        raise CheckpointError(
            f"{TEMPLATE_TYPE} in {shown / TOKENIZER_CONFIG} must be one that mlx-lm "
            f"{version} has: got {shorten(config[TEMPLATE_TYPE])}. Update mlx-lm, or "
            f"copy {CHAT_TEMPLATE} of the same model there."
        )
    if unknown:
        named = ", ".join(f"{key} {shorten(config[key])}" for key in unknown)
        place = shown / TOKENIZER_CONFIG
        logger.warning("left out of %s: %s, not in mlx-lm %s", place, named, version)
    settings: dict[str, Any] = dict.fromkeys(unknown)
    if given.get(KEY) is not None:
        settings[TEMPLATE_TYPE] = None  # it would win over what the caller gives
    chosen = for_tools(templates)
    # mlx-lm tells the parser by a single template's text, if nothing names one.
    if PARSER_TYPE in unknown or config.get(PARSER_TYPE) is None:
        if chosen is not None and all(mark in chosen.text for mark in _CALL_MARKS):
            settings[PARSER_TYPE] = "gemma4"
    return settings


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    path = folder / TOKENIZER_CONFIG
    return read_json(path) if path.is_file() else {}


def _ends(folder: Path, given: dict[str, Any]) -> Iterator[str]:
    """The tokens that end an answer, as text; this tokenizer need not have them."""
    config = _tokenizer_config(folder)
    for key in ("eos_token", "eot_token"):
        token = config.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            yield token
    yield _TURN_END
    try:
        templates = _templates(folder, given, None)
    except CheckpointError:  # who decodes tokens needs none
        return
    if any(_RESPONSE in template.text for template in templates.values()):
        yield _RESPONSE


def _special_tokens(folder: Path) -> dict[str, int]:
    """The special tokens in ``tokenizer.json``, without reading its vocabulary."""
    path = folder / TOKENIZER_JSON
    try:
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        start = _ADDED_TOKENS.search(text)
        tokens = json.JSONDecoder().raw_decode(text, start.end())[0] if start else []
        return {token["content"]: token["id"] for token in tokens if token["special"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # damaged, which is found where the tokenizer is loaded
