"""What the server is told to do, checked."""

from __future__ import annotations

import argparse
import ipaddress
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..cli.checks import check_sampling, json_object, with_thinking
from ..constants import AUTO, LOOKUP, MAX_DRAFT_TOKENS, MAX_INTEGER, MAX_LOGPROBS
from ..errors import RequestError, shorten
from .addresses import api_key, host_names, origins

LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
DEFAULT_MODEL = "default_model"  # mlx-lm's word for whatever is served
EMBEDDED_MODEL = "embedded"
_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,15})?)\s*([KMGT]?)(i?)B?", re.IGNORECASE)
# Fewer tokens hold no chat template's turns, or no JSON object that asks for anything.
MIN_MODEL_LEN = 16
_MIN_REQUEST_BYTES = 64
_RANGES: dict[str, tuple[int, float]] = {
    "port": (0, 65535),
    "backlog": (1, MAX_INTEGER),
    "max_rows": (1, MAX_INTEGER),
    "max_waiting": (0, MAX_INTEGER),
    "max_connections": (1, MAX_INTEGER),
    "max_request_bytes": (_MIN_REQUEST_BYTES, MAX_INTEGER),
    "max_tokens": (1, MAX_INTEGER),
    "max_logprobs": (0, MAX_LOGPROBS),
    "prefill_step_size": (1, MAX_INTEGER),
    "prompt_cache_size": (0, MAX_INTEGER),
    "shutdown_timeout": (0, math.inf),
    "max_model_len": (MIN_MODEL_LEN, MAX_INTEGER),
    "max_kv_bytes": (1, math.inf),
    "prompt_cache_bytes": (0, math.inf),
    "prompt_cache_disk_bytes": (1, math.inf),
}
# Arguments of a tokenizer's apply_chat_template that are no variables of a template.
RESERVED = frozenset(
    {
        "add_generation_prompt",
        "chat_template",  # a template of the client's could run for ever
        "continue_final_message",
        "conversation",
        "documents",
        "max_length",
        "messages",
        "padding",
        "self",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "tokenize",
        "tokenizer_kwargs",
        "tools",
        "truncation",
    }
)
# What names something; nothing is named by an empty text, such as an unset variable.
_TEXTS = (
    "model",
    "draft_model",
    "adapter_path",
    "revision",
    "host",
    "chat_template",
    "prompt_cache_dir",
)


@dataclass(frozen=True)
class Limits:
    """What the server takes on at most.

    Attributes:
        rows: Requests that decode together.
        waiting: Requests that wait beside them.
        connections: Open connections.
        request_bytes: Size of a request's body.
        kv_bytes: Memory of the running requests' caches; None for what suits the
            machine.
        model_len: Tokens of prompt and answer together; None for the model's.
        logprobs: Most likely tokens to report for one.
        tokens: Tokens of an answer where the request does not say.
    """

    rows: int
    waiting: int
    connections: int
    request_bytes: int
    kv_bytes: int | None
    model_len: int | None
    logprobs: int
    tokens: int


@dataclass(frozen=True)
class Settings:
    """What the arguments mean, checked.

    Attributes:
        model: Folder or Hub id; None for the embedded pair.
        names: What the model is called in requests, the first one in answers.
        draft_model: Folder or Hub id of the drafter; None to find it.
        is_drafting: Whether a drafter is loaded.
        num_draft_tokens: K; None for the controller's choice.
        draft_source: Where drafts may come from.
        api_key: What requests must bring; None for nothing.
        given_sampling: ``temp``, ``top_p``, ``top_k``, ``min_p``; None where the
            checkpoint's counts.
        chat_template: A template in place of the checkpoint's.
        chat_template_args: More arguments for it.
        prompt_cache_size: Prompts kept for later requests; 0 for none.
        prompt_cache_bytes: Memory of these.
        prompt_cache_dir: Folder that they are also kept in; None for none.
        prompt_cache_disk_bytes: Most bytes of the files there.
        shutdown_timeout: Seconds that running requests have to finish.
    """

    model: str | None
    names: tuple[str, ...]
    draft_model: str | None
    is_drafting: bool
    adapter_path: str | None
    revision: str | None
    trust_remote_code: bool
    num_draft_tokens: int | None
    draft_source: str
    host: str
    port: int
    backlog: int
    api_key: str | None = field(repr=False)
    allowed_origins: tuple[str, ...]
    allowed_hosts: tuple[str, ...]
    given_sampling: dict[str, Any]
    chat_template: str | None
    chat_template_args: dict[str, Any]
    prefill_step_size: int
    prompt_cache_size: int
    prompt_cache_bytes: int
    prompt_cache_dir: str | None
    prompt_cache_disk_bytes: int
    log_level: str
    shutdown_timeout: float
    limits: Limits

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can connect."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def check(args: argparse.Namespace) -> Settings:
    """Find the mistakes that can be found before anything is loaded.

    Args:
        args: What the parser returned.

    Raises:
        RequestError: Two arguments exclude each other, or one is outside its range.
    """
    model = _model(args)
    drafts = _Drafts.of(args, model)
    _check_ranges(args)
    _check_texts(args)
    _check_folder(args)
    given = check_sampling(args)
    return Settings(
        model=model,
        names=tuple(args.served_model_name or [model or EMBEDDED_MODEL]),
        draft_model=drafts.model,
        is_drafting=not args.no_draft,
        adapter_path=args.adapter_path,
        revision=args.revision,
        trust_remote_code=args.trust_remote_code,
        num_draft_tokens=drafts.count,
        draft_source=args.draft_source,
        host=args.host,
        port=args.port,
        backlog=args.backlog,
        api_key=api_key(args.api_key),
        allowed_origins=origins(args.allowed_origins),
        allowed_hosts=host_names(args.allowed_hosts),
        given_sampling=given,
        chat_template=_template(args.chat_template),
        chat_template_args=_template_args(args.chat_template_args, args.thinking),
        prefill_step_size=args.prefill_step_size,
        prompt_cache_size=args.prompt_cache_size,
        prompt_cache_bytes=args.prompt_cache_bytes,
        prompt_cache_dir=args.prompt_cache_dir,
        prompt_cache_disk_bytes=args.prompt_cache_disk_bytes,
        log_level=args.log_level,
        shutdown_timeout=args.shutdown_timeout,
        limits=Limits(
            rows=args.max_rows,
            waiting=args.max_waiting,
            connections=args.max_connections,
            request_bytes=args.max_request_bytes,
            kv_bytes=args.max_kv_bytes,
            model_len=args.max_model_len,
            logprobs=args.max_logprobs,
            tokens=args.max_tokens,
        ),
    )


def _check_ranges(args: argparse.Namespace) -> None:
    """Check the numbers."""
    for name, (minimum, maximum) in _RANGES.items():
        value = getattr(args, name)
        if value is not None and not minimum <= value <= maximum:  # NaN fails too
            is_narrow = maximum < MAX_INTEGER or value > maximum
            expected = (
                f"from {minimum} to {maximum}" if is_narrow else f"{minimum} or more"
            )
            raise RequestError(
                f"--{name.replace('_', '-')} must be {expected}: got {shorten(value)}. "
                "Leave it out for the default."
            )


def _check_texts(args: argparse.Namespace) -> None:
    """Check that what is named has a name."""
    given = {name: getattr(args, name) for name in _TEXTS}
    if args.target is not None:
        given["model"] = args.target
    for number, name in enumerate(args.served_model_name or ()):
        given[f"served_model_name {number + 1}"] = name
    for name, value in given.items():
        if value is not None and not value.strip():
            raise RequestError(
                f"--{name.replace('_', '-')} must not be empty: got {value!r:.20}. "
                "Leave it out for the default."
            )


def _check_folder(args: argparse.Namespace) -> None:
    """Check that what a folder keeps is kept in memory at first."""
    keeps_none = not (args.prompt_cache_size and args.prompt_cache_bytes)
    if args.prompt_cache_dir is not None and keeps_none:
        raise RequestError(
            "--prompt-cache-dir must have caches in memory to write: got none. State "
            "--prompt-cache-size and --prompt-cache-bytes, or leave it out."
        )


@dataclass(frozen=True)
class _Drafts:
    """Which drafter, and how many drafts."""

    model: str | None
    count: int | None

    @classmethod
    def of(cls, args: argparse.Namespace, target: str | None) -> _Drafts:
        """What the flags say, the package's or vLLM's."""
        model, count = args.draft_model, args.num_draft_tokens
        given, flag = _vllms(args)
        if given is not None:
            if model or count != AUTO:
                raise RequestError(
                    f"{flag} must stand alone: got --draft-model or --num-draft-tokens "
                    "beside it. Leave one out."
                )
            model, count = _speculative(given, flag)
        is_counted = args.draft_source != LOOKUP and count not in (0, AUTO)
        if args.no_draft and (model or is_counted):
            raise RequestError(
                "--no-draft must stand alone: got a drafter or a number of drafts "
                "beside it. Leave one out."
            )
        if count != AUTO and not 0 <= count <= MAX_DRAFT_TOKENS:
            raise RequestError(
                f"--num-draft-tokens must be from 0 to {MAX_DRAFT_TOKENS}, or auto: "
                f"got {count}. auto suits most pairs."
            )
        # A target that is its own drafter has one inside, or beside it.
        own = None if model == target else model
        return cls(own, None if count == AUTO else count)


def _vllms(args: argparse.Namespace) -> tuple[dict[str, Any] | None, str]:
    """What vLLM's flags say of drafts, and one of them; None where there are none."""
    flags = {
        "method": ("--speculative-method", args.speculative_method),
        "model": ("--speculative-model", args.speculative_model),
        "num_speculative_tokens": (
            "--num-speculative-tokens",
            args.num_speculative_tokens,
        ),
    }
    given = {key: value for key, (_, value) in flags.items() if value is not None}
    flag = next((flags[key][0] for key in given), "--speculative-config")
    if args.speculative_config is None:
        return given or None, flag
    if given:
        raise RequestError(
            f"--speculative-config must stand alone: got {flag} beside it. Leave one "
            "out."
        )
    return _object(flag, args.speculative_config), flag


def _speculative(given: dict[str, Any], flag: str) -> tuple[str | None, int | str]:
    """The drafter and K in vLLM's words.

    Args:
        given: As its JSON object has them.
        flag: The one that says so.
    """
    method = given.pop("method", "mtp")
    if method != "mtp":
        raise RequestError(
            f'{flag} must have the method "mtp": got {shorten(method)}. Gemma 4\'s '
            "drafters have no other."
        )
    model = given.pop("model", None)
    count = given.pop("num_speculative_tokens", AUTO)
    if given:
        raise RequestError(
            f"{flag} must hold method, model and num_speculative_tokens only: got "
            f"{shorten(', '.join(given))}. Leave the rest out."
        )
    if model is not None and not (isinstance(model, str) and model.strip()):
        raise RequestError(
            f"model in {flag} must be a folder or a Hub id: got {shorten(model)}. "
            "Leave it out to let it be found."
        )
    if count != AUTO and (isinstance(count, bool) or not isinstance(count, int)):
        raise RequestError(
            f"num_speculative_tokens in {flag} must be a whole number: got "
            f"{shorten(count)}. Leave it out for as many as are fastest."
        )
    return model, count


def _model(args: argparse.Namespace) -> str | None:
    """The target, named in one way or the other."""
    if args.target is not None and args.model not in (None, args.target):
        raise RequestError(
            f"--model must stand alone: got {shorten(args.target)} beside it. Leave "
            "one out."
        )
    return args.model or args.target


def _template(given: str | None) -> str | None:
    """A template given as a file's name or as itself."""
    if given is None or "{" in given or "\n" in given:
        return given
    try:
        return Path(given).read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise RequestError(
            f"--chat-template must be a file that can be read, or a Jinja template: "
            f"got {shorten(given)}: {error}. Name another one."
        ) from error


def _template_args(given: str | None, thinking: str | None) -> dict[str, Any]:
    """More variables for the template."""
    flag = "--chat-template-args"
    found = with_thinking(_object(flag, given), thinking, flag)
    reserved = sorted(RESERVED & set(found))
    if reserved:
        raise RequestError(
            f"{flag} must hold variables of the template: got {reserved[0]}, which is "
            "none. Leave it out."
        )
    return found


def _object(flag: str, text: str | None) -> dict[str, Any]:
    """A JSON object that a flag gives."""
    if text is None:
        return {}
    value = json_object(text)
    if value is None:
        raise RequestError(
            f"{flag} must be a JSON object: got {shorten(text)}. Quote it in '...'."
        )
    return value


def size_in_bytes(text: str) -> int:
    """Bytes of a text such as ``8GB``, ``512MiB`` or ``1000000``."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        found = shorten(text)
        raise argparse.ArgumentTypeError(f"must be a size such as 8GB: got {found}")
    number, unit, binary = match.groups()
    base = 1024 if binary else 1000
    return int(float(number) * base ** " KMGT".index(unit.upper() or " "))
