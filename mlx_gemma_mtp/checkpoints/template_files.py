"""Which chat template a checkpoint brings: the places where it may lie, in order.

The order is transformers', whose processors alone read ``chat_template.json``.
Knows nothing of tokenizers and of what a template makes of messages.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ..errors import CheckpointError, cut, shorten
from .checkpoint import read_json

CHAT_TEMPLATE = "chat_template.jinja"
OLD_CHAT_TEMPLATE = "chat_template.json"
MORE_CHAT_TEMPLATES = "additional_chat_templates"  # a folder, one file for each name
TOKENIZER_CONFIG = "tokenizer_config.json"
KEY = "chat_template"
DEFAULT, WITH_TOOLS = "default", "tool_use"  # transformers' names for what it takes
_GIVEN = "the chat template given (--chat-template)"
_AGAIN = f"Copy {CHAT_TEMPLATE} of the same model there."
_TURN = "<|turn>"


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template.

    Attributes:
        text: Its source.
        origin: Where it came from, for messages.
    """

    text: str
    origin: str


Templates = dict[str, ChatTemplate]


def read_chat_templates(folder: Path, name: Path | None = None) -> Templates:
    """Return the chat templates in a checkpoint's folder, by their names.

    ``chat_template.jinja`` is the default one, and the files in
    ``additional_chat_templates/`` stand beside it. Where there is no such default,
    ``chat_template.json`` counts, then ``tokenizer_config.json``. An empty one counts
    nowhere.

    Args:
        folder: The folder.
        name: What it is called in messages; None for its path.

    Returns:
        ``default``, and others if there are any; nothing where there is none.

    Raises:
        CheckpointError: One is no text or not UTF-8, or several have names and none
            is the default.
    """
    shown = name or folder
    files = {DEFAULT: Path(CHAT_TEMPLATE)}
    for path in sorted((folder / MORE_CHAT_TEMPLATES).glob("*.jinja")):
        files[path.stem] = path.relative_to(folder)
    found: Templates = {}
    for key, file in files.items():
        if (folder / file).is_file():
            origin = cut(shown / file)
            found |= _template(key, _read_text(folder / file, origin), origin)
    for older in (OLD_CHAT_TEMPLATE, TOKENIZER_CONFIG):
        if DEFAULT not in found and (folder / older).is_file():
            value = read_json(folder / older).get(KEY)
            named = named_templates(value, f"{KEY} in {cut(shown / older)}")
            found = {**named, **found}
    return _with_default(found, cut(shown))


def given_templates(value: Any) -> Templates:
    """Return the chat templates that a caller gives in place of a checkpoint's.

    Args:
        value: A template, or several by name; None for none at all.

    Raises:
        CheckpointError: It is something else, or empty.
    """
    found = named_templates(value, _GIVEN)
    if value is not None and not found:
        raise CheckpointError(
            f"{_GIVEN} must be a template: got an empty one. {_AGAIN}"
        )
    return _with_default(found, _GIVEN)


def named_templates(value: Any, origin: str) -> Templates:
    """Return what a JSON file says of chat templates.

    Args:
        value: A template, a list of ``{"name": ..., "template": ...}``, an object of
            names and templates, or None. What is empty is no template.
        origin: Where it came from, for messages.

    Raises:
        CheckpointError: It is something else.
    """
    if isinstance(value, list | tuple):
        try:
            value = {item["name"]: item["template"] for item in value}
        except (KeyError, TypeError):
            _fail_form(value, origin)
    if not isinstance(value, dict):
        return _template(DEFAULT, value, origin)
    if not all(isinstance(name, str) for name in value):
        _fail_form(value, origin)
    found: Templates = {}
    for name, text in value.items():
        found |= _template(name, text, f"{shorten(name)} of {origin}")
    return found


def for_tools(templates: Templates) -> ChatTemplate | None:
    """The template that transformers takes where tools are given."""
    return templates.get(WITH_TOOLS, templates.get(DEFAULT))


def missing_template_note(tokenizer: Any, consequence: str) -> str:
    """Say that a model has no chat template, in one line.

    Args:
        tokenizer: mlx-lm's.
        consequence: What comes of it, without an end.
    """
    note = f"This model has no chat template: {consequence}."
    if _TURN in tokenizer.get_added_vocab():
        note += (
            f" If it was tuned to chat (-it), copy {CHAT_TEMPLATE} of the original"
            " repository into its folder."
        )
    return note


def _with_default(found: Templates, origin: str) -> Templates:
    """Let a template that is alone be the default one."""
    if len(found) == 1:
        return {DEFAULT: next(iter(found.values()))}
    if found and DEFAULT not in found:
        raise CheckpointError(
            f"one of the chat templates in {origin} must be named {DEFAULT}: got "
            f"{shorten(', '.join(sorted(found)))}. Rename the one to take."
        )
    return found


def _read_text(path: Path, shown: str) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # editors put a mark in front
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise CheckpointError(
            f"{shown} must be UTF-8 text: got other bytes in line {line}. {_AGAIN}"
        ) from error
    except OSError as error:
        raise CheckpointError(
            f"{shown} must be readable: got {error.strerror}. Check its permissions."
        ) from error


def _template(name: str, text: Any, origin: str) -> Templates:
    """A template by its name, nothing if it is empty."""
    if text is None:
        return {}
    if not isinstance(text, str):
        what = f"{origin} must be a template"
        raise CheckpointError(f"{what}: got {shorten(text)}. {_AGAIN}")
    return {name: ChatTemplate(text, origin)} if text.strip() else {}


def _fail_form(value: Any, origin: str) -> NoReturn:
    form = '{"name": ..., "template": ...}'
    raise CheckpointError(
        f"{origin} must be a template or a list of {form}: got {shorten(value)}. "
        f"{_AGAIN}"
    )
