"""What is wrong with arguments: every mistake that shows without a model.

Knows nothing of MLX.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..constants import AUTO, LOOKUP
from ..errors import RequestError, shorten
from ..generation.chat_template import THINKING
from ..sampling.defaults import GIVEN
from ..sampling.params import SamplingParams
from ..structure.constraint import asked
from .command import check_utf8

# Largest bias or penalty: far beyond any logit (Gemma 4 caps them at 30), and finite in
# float16 also after 20 times a frequency penalty.
MAX_BIAS = 1000
# What is text, where other arguments may be names of files.
_TEXTS = (
    *("system_prompt", "prefill_response", "chat_template_config", "stop"),
    *("extra_eos_token", "logit_bias"),
)
# What one machine alone has, beside penalties and --logit-bias.
_ALONE = (
    *("prompt_cache_file", "adapter_path"),
    *("schema", "regex", "max_thinking_tokens"),
)
_MAX_DIGITS = 12  # of a token id; no vocabulary has one as long


@dataclass(frozen=True)
class Checked:
    """What arguments mean that are more than a number or a text.

    Attributes:
        template_config: More arguments for the chat template.
        logit_bias: What to add to logits, by token id.
    """

    template_config: dict[str, Any]
    logit_bias: dict[int, float]


def check(args: argparse.Namespace) -> Checked:
    """Find the mistakes that can be found before anything is loaded.

    Args:
        args: What the parser returned.

    Raises:
        RequestError: Two arguments exclude each other, or one is outside its range.
    """
    _check_texts(args)
    if args.no_draft and args.draft_model:
        raise RequestError(
            "--no-draft and --draft-model exclude each other: got both. Leave one out."
        )
    is_plain = args.no_draft and args.draft_source != LOOKUP
    if is_plain and args.num_draft_tokens not in (0, AUTO):
        raise RequestError(
            "--num-draft-tokens must be 0 with --no-draft: got "
            f"{args.num_draft_tokens}. Leave one out."
        )
    check_sampling(args, **xtc_settings(args), seed=args.seed)
    _check_penalties(args)
    return Checked(
        _template_config(args.chat_template_config, args.thinking),
        _logit_bias(args.logit_bias),
    )


def check_several(args: argparse.Namespace) -> None:
    """Refuse what one machine alone has, before a model is loaded.

    Raises:
        RequestError: A flag asks for it.
    """
    if args.prompt == "-":
        raise RequestError(
            "-p must give the text where several machines were launched: got - for "
            "standard input. Write it behind -p."
        )
    given = [name for name in _ALONE if getattr(args, name) is not None]
    given += ["logit_bias"] if _logit_bias(args.logit_bias) else []  # {} is none
    for name in [*given, *penalties(args)]:
        flag = name.replace("_", "-")
        raise RequestError(
            f"--{flag} must be left out where several machines were launched: got "
            f"{shorten(getattr(args, name))}. Launch one for it."
        )


def given_form(args: argparse.Namespace) -> dict[str, Any]:
    """What the text must be, as --schema or --regex says.

    Returns:
        A keyword for ``stream_generate``, or none.

    Raises:
        RequestError: Both are given, the file cannot be read, or what is given cannot
            be compiled.
    """
    found = {}
    if args.schema is not None:
        found["schema"] = _file_text("--schema", args.schema)
    if args.regex is not None:
        check_utf8("--regex", args.regex)
        found["regex"] = args.regex
    asked(**found)
    return found


def _file_text(flag: str, path: str) -> str:
    """The text of a file that a flag names.

    Raises:
        RequestError: It cannot be read.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise RequestError(
            f"{flag} must be a file that can be read: got {shorten(path)}: {error}. "
            "Name another one."
        ) from error


def _check_texts(args: argparse.Namespace) -> None:
    """Check that what goes to the tokenizer is text."""
    given = vars(args)
    for name in _TEXTS:
        value = given.get(name) or ""
        text = value if isinstance(value, str) else "".join(value)
        check_utf8(f"--{name.replace('_', '-')}", text)


def given_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The sampling settings that a checkpoint may have too; None where not given."""
    return {name: getattr(args, name) for name in GIVEN}


def check_sampling(args: argparse.Namespace, **others: Any) -> dict[str, Any]:
    """Check the sampling settings that were given, and others beside them.

    Returns:
        As ``given_settings``.

    Raises:
        RequestError: One of them is outside its range.
    """
    given = given_settings(args)
    SamplingParams(**{k: v for k, v in given.items() if v is not None}, **others)
    return given


def xtc_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings of XTC but the special tokens, which take a tokenizer."""
    return {
        "xtc_probability": args.xtc_probability,
        "xtc_threshold": args.xtc_threshold,
    }


def penalties(args: argparse.Namespace) -> dict[str, Any]:
    """The penalties that are on, as ``make_logits_processors`` of mlx-lm takes them."""
    found: dict[str, Any] = {}
    if args.repetition_penalty not in (0, 1):
        found["repetition_penalty"] = args.repetition_penalty
        found["repetition_context_size"] = args.repetition_context_size
    for name in ("presence_penalty", "frequency_penalty"):
        if getattr(args, name):
            found[name] = getattr(args, name)
    return found


def _check_penalties(args: argparse.Namespace) -> None:
    """Check the ranges of the penalties' numbers."""
    lowest = {
        "repetition_penalty": 0,
        "presence_penalty": -MAX_BIAS,
        "frequency_penalty": -MAX_BIAS,
    }
    for name, minimum in lowest.items():
        value = getattr(args, name)
        if not minimum <= value <= MAX_BIAS:  # NaN fails too
            flag = name.replace("_", "-")
            raise RequestError(
                f"--{flag} must be from {minimum} to {MAX_BIAS}: got {value}. Leave "
                "it out for none."
            )
    if args.repetition_context_size < 0:
        raise RequestError(
            "--repetition-context-size must be 0 or more: got "
            f"{args.repetition_context_size}. 0 counts all tokens."
        )


def _logit_bias(text: str | None) -> dict[int, float]:
    """The JSON object of --logit-bias."""
    if text is None:
        return {}
    bias = _json_object("--logit-bias", text, '{"106": -100}')
    for token, value in bias.items():
        if not (token.isascii() and token.isdecimal() and len(token) < _MAX_DIGITS):
            raise RequestError(
                f"--logit-bias must name tokens by their ids: got {shorten(token)}. "
                "For example '{\"106\": -100}'."
            )
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not -MAX_BIAS <= value <= MAX_BIAS:
            raise RequestError(
                f"--logit-bias of token {token} must be a number from -{MAX_BIAS} to "
                f"{MAX_BIAS}: got {shorten(value, nothing='null')}. -100 bans a token."
            )
    return {int(token): float(value) for token, value in bias.items()}


def _template_config(text: str | None, thinking: str | None) -> dict[str, Any]:
    """The JSON object of --chat-template-config, and --thinking."""
    flag = "--chat-template-config"
    given = (
        {} if text is None else _json_object(flag, text, '{"preserve_thinking": true}')
    )
    return with_thinking(given, thinking, flag)


def with_thinking(
    given: dict[str, Any], thinking: str | None, flag: str
) -> dict[str, Any]:
    """Arguments for a chat template with what --thinking says.

    Args:
        given: The arguments.
        thinking: ``"on"``, ``"off"``, or None where it was not given.
        flag: Where the arguments come from.

    Raises:
        RequestError: Both say something.
    """
    if thinking is None:
        return given
    if THINKING in given:
        raise RequestError(
            f"--thinking and {THINKING} in {flag} exclude each other: got both. Leave "
            "one out."
        )
    return {**given, THINKING: thinking == "on"}


def json_object(text: str) -> dict[str, Any] | None:
    """A JSON object; None where the text is something else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _json_object(flag: str, text: str, example: str) -> dict[str, Any]:
    value = json_object(text)
    if value is None:
        raise RequestError(
            f"{flag} must be a JSON object: got {text!r}. For example '{example}'."
        )
    return value
