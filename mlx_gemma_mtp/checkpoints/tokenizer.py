"""A checkpoint's tokenizer as mlx-lm loads it, with the chat template that lies there.

Knows nothing of weights: what a text needs is read from the files beside them.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlx_lm
import mlx_lm.utils
from jinja2 import TemplateSyntaxError
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from ..errors import CheckpointError, cut, shorten
from ..markup.answer import CALL_END, CALL_START, TURN_END
from .checkpoint import CONFIG_NAME, Checkpoint, read_json
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
_RESPONSE = "<|tool_response>"
# What Gemma's tokenizers call these, where tokenizer_config.json does not say.
_ROLES = {"bos_token": "<bos>", "eos_token": "<eos>"}
_ADDED_TOKENS = re.compile(r'"added_tokens"\s*:\s*(?=\[)')

logger = logging.getLogger("mlx_gemma_mtp")


def load_tokenizer(
    folder: Path,
    tokenizer_config: dict[str, Any] | None = None,
    eos_ids: tuple[int, ...] = (),
    *,
    trust_remote_code: bool = False,
    name: Path | None = None,
    templates: Templates | None = None,
) -> Any:
    """Load a tokenizer as mlx-lm does.

    Args:
        folder: The checkpoint's folder.
        tokenizer_config: Arguments for the tokenizer, as in ``mlx_lm.load``; its
            ``chat_template`` stands in for the checkpoint's.
        eos_ids: The tokens that end a text; none for the tokenizer's own.
        trust_remote_code: Let it run code from the checkpoint.
        name: What the folder is called in messages; None for its path.
        templates: Its chat templates, where they are read already.

    Raises:
        CheckpointError: It cannot be loaded, or a chat template is none.
    """
    given = tokenizer_config or {}
    if templates is None:
        templates = chat_templates(folder, given, name)
    shown = name or folder
    # trust_remote_code is named either way: where it is not, transformers asks on
    # standard input.
    settings = {
        "trust_remote_code": trust_remote_code,
        **model_kind(folder),
        **missing_roles(folder),
        **given,
        KEY: _as_argument(templates),
        **_module_settings(folder, given, templates, shown),
    }
    next_step = f"Copy {TOKENIZER_JSON} and {TOKENIZER_CONFIG} of the same model there."
    with one_line(f"the tokenizer in {cut(shown)}", next_step):
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
        except RecursionError as error:
            raise CheckpointError(
                f"{template.origin} must be a Jinja template: got one nested too "
                f"deeply. Copy {CHAT_TEMPLATE} of the same model there."
            ) from error
        except Exception:  # noqa: BLE001  # of this message; real ones may pass
            logger.debug("%s refuses a message without text", template.origin)


def chat_templates(
    folder: Path,
    tokenizer_config: dict[str, Any] | None = None,
    name: Path | None = None,
) -> Templates:
    """Return the chat templates that a tokenizer is loaded with.

    Args:
        folder: The checkpoint's folder.
        tokenizer_config: Arguments for the tokenizer, as for ``load_tokenizer``.
        name: What the folder is called in messages; None for its path.

    Raises:
        CheckpointError: One is none.
    """
    given = tokenizer_config or {}
    if KEY in given:
        return given_templates(given[KEY])
    return read_chat_templates(folder, name)


def eos_token_ids(
    checkpoint: Checkpoint,
    tokenizer_config: dict[str, Any] | None = None,
    templates: Templates | None = None,
) -> tuple[int, ...]:
    """Return the token ids that end a text.

    They are those that ``generation_config.json`` and ``config.json`` name, each of
    which may lack some, the tokenizer's own end and that of a turn, and where the chat
    template has tools what opens their response.

    Args:
        checkpoint: A target's checkpoint.
        tokenizer_config: Arguments for the tokenizer, as for ``load_tokenizer``.
        templates: Its chat templates, where they are read already. Those that cannot
            be read count for none: who decodes tokens needs none.

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
                f"eos_token_id in {cut(checkpoint.folder)} must be an integer or a "
                f"list of them: got {shorten(found)}. Fetch generation_config.json and "
                "config.json again."
            )
        ids.update(named)
    added = _added_tokens(checkpoint.folder)
    if added and templates is None:
        with suppress(CheckpointError):
            templates = chat_templates(checkpoint.folder, tokenizer_config)
    ends = _ends(checkpoint.folder, tokenizer_config or {}, templates or {})
    ids.update(added[end] for end in ends if end in added)
    return tuple(sorted(ids))


def missing_roles(folder: Path) -> dict[str, str]:
    """Return the tokens with a role that a tokenizer has and its config does not name.

    Args:
        folder: The checkpoint's folder.
    """
    config = {**_settings(folder / "special_tokens_map.json"), **_config(folder)}
    missing = [key for key in _ROLES if config.get(key) is None]
    added = _added_tokens(folder) if missing else {}
    return {key: _ROLES[key] for key in missing if _ROLES[key] in added}


def model_kind(folder: Path) -> dict[str, Any]:
    """Return the model's kind as an argument for transformers, which else asks for it.

    Of ``config.json`` tokenizers need nothing else, and what transformers makes of the
    rest ends in an error where a quantization is no object.

    Args:
        folder: The checkpoint's folder.
    """
    kind = _settings(folder / CONFIG_NAME).get("model_type")
    if isinstance(kind, str) and kind in CONFIG_MAPPING:
        return {"config": AutoConfig.for_model(kind)}
    return {"config": PreTrainedConfig()}


def tool_parser(templates: Templates) -> str | None:
    """Return the parser that a checkpoint's chat template needs, None for none.

    mlx-lm tells it by the text of a single template, if nothing names one.

    Args:
        templates: The chat templates.
    """
    chosen = for_tools(templates)
    has_calls = chosen is not None and all(
        m in chosen.text for m in (CALL_START, CALL_END)
    )
    return "gemma4" if has_calls else None


def unknown_modules(config: Mapping[str, Any]) -> list[str]:
    """Return the keys of a tokenizer's config that name what this mlx-lm has not.

    Args:
        config: The parsed ``tokenizer_config.json``.
    """
    return [
        key
        for key, package in _MODULES.items()
        if config.get(key) not in (None, "") and not _has_module(package, config[key])
    ]


def _has_module(package: str, name: Any) -> bool:
    is_name = isinstance(name, str) and name.isidentifier()
    return is_name and importlib.util.find_spec(f"{package}.{name}") is not None


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
    config = {**_config(folder), **given}
    unknown = unknown_modules(config)
    version = mlx_lm.__version__
    if config.get(TEMPLATE_TYPE) and TEMPLATE_TYPE in unknown and not templates:
        raise CheckpointError(
            f"{TEMPLATE_TYPE} in {cut(shown / TOKENIZER_CONFIG)} must be one that "
            f"mlx-lm {version} has: got {shorten(config[TEMPLATE_TYPE])}. Update "
            f"mlx-lm, or copy {CHAT_TEMPLATE} of the same model there."
        )
    if unknown:
        named = ", ".join(f"{key} {shorten(config[key])}" for key in unknown)
        place = cut(shown / TOKENIZER_CONFIG)
        logger.warning("left out of %s: %s, not in mlx-lm %s", place, named, version)
    settings: dict[str, Any] = dict.fromkeys(unknown)
    if given.get(KEY) is not None:
        settings[TEMPLATE_TYPE] = None  # it would win over what the caller gives
    if PARSER_TYPE in unknown or config.get(PARSER_TYPE) in (None, ""):
        settings[PARSER_TYPE] = tool_parser(templates)
    return settings


def _config(folder: Path) -> dict[str, Any]:
    return _settings(folder / TOKENIZER_CONFIG)


def _settings(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _ends(folder: Path, given: dict[str, Any], templates: Templates) -> Iterator[str]:
    """The tokens that end an answer, as text; this tokenizer need not have them."""
    config = {**_config(folder), **missing_roles(folder), **given}
    for key in ("eos_token", "eot_token"):
        token = config.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            yield token
    yield TURN_END
    if any(_RESPONSE in template.text for template in templates.values()):
        yield _RESPONSE


def _added_tokens(folder: Path) -> dict[str, int]:
    """The added tokens in ``tokenizer.json``, without reading its vocabulary."""
    path = folder / TOKENIZER_JSON
    try:
        text = path.read_text(encoding="utf-8-sig") if path.is_file() else ""
        start = _ADDED_TOKENS.search(text)
        tokens = json.JSONDecoder().raw_decode(text, start.end())[0] if start else []
    except (OSError, ValueError, RecursionError):
        return {}  # damaged, which is found where the tokenizer is loaded
    return {
        token["content"]: token["id"]
        for token in tokens
        if isinstance(token, dict)
        and isinstance(token.get("content"), str)
        and type(token.get("id")) is int
    }
