"""The arguments of ``mlx_gemma_mtp.generate``, and what is wrong with them.

Other commands take groups of them. Every mistake that shows without a model is found
here. Knows nothing of MLX.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from typing import Any

from ..constants import AUTO, MODES
from ..errors import RequestError, shorten
from ..generation.chat_template import DEFAULT_THINKING, THINKING
from ..sampling.params import SamplingParams
from .command import check_utf8
from .command_table import make_parser
from .refused import TEXT_FLAGS

DEFAULT_MAX_TOKENS = 100
EMBEDDED_PROMPT = "def fibonacci(n):\n"  # a sample of what the embedded pair completes
# Largest bias or penalty: far beyond any logit (Gemma 4 caps them at 30), and finite in
# float16 also after 20 times a frequency penalty.
MAX_BIAS = 1000
# What is text, where other arguments may be names of files.
_TEXTS = (
    *("system_prompt", "prefill_response", "chat_template_config", "stop"),
    *("extra_eos_token", "logit_bias"),
)
_MAX_DIGITS = 12  # of a token id; no vocabulary has one as long


def configure_parser() -> argparse.ArgumentParser:
    """The command's arguments; names and defaults are mlx-lm's where it has them."""
    parser = make_parser("generate", reason_against=TEXT_FLAGS.get)
    add_model_arguments(parser)
    _add_prompt_arguments(parser)
    _add_generation_arguments(parser)
    add_sampling_arguments(parser)
    return parser


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what is loaded, and how many drafts its rounds have."""
    group = parser.add_argument_group("model")
    add_target(group)
    add_draft_arguments(group)
    group.add_argument(
        "--exactness",
        choices=MODES,
        default=AUTO,
        help="exact: only what was proved to give the bytes of plain decoding on this "
        "machine, fast: nothing is proved, auto: what was proved where something was "
        "(default: auto)",
    )
    add_checkpoint_arguments(group)


def add_target(group: argparse._ArgumentGroup) -> None:
    """Add --model."""
    group.add_argument(
        "--model",
        help="folder or Hub id of the target (default: the embedded pair, a tiny model "
        "that completes Python code)",
    )


def add_checkpoint_arguments(group: argparse._ArgumentGroup) -> None:
    """Add how the target is loaded."""
    group.add_argument("--adapter-path", help="LoRA adapters for the target")
    group.add_argument(
        "--revision", help="branch, tag or commit of the target on the Hub"
    )
    group.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="let the tokenizer run code from the checkpoint",
    )


def add_draft_arguments(group: argparse._ActionsContainer) -> None:
    """Add the arguments that say what drafts; every command has them.

    Args:
        group: A parser, or a group of its arguments.
    """
    add_drafter(group)
    add_num_draft_tokens(group)


def add_drafter(group: argparse._ActionsContainer) -> None:
    """Add which drafter is loaded, if any."""
    group.add_argument(
        "--draft-model",
        help="folder or Hub id of the drafter (default: found by itself inside the "
        "target's folder, beside it, or on the Hub)",
    )
    group.add_argument(
        "--no-draft", action="store_true", help="decode without a drafter"
    )


def add_num_draft_tokens(group: argparse._ActionsContainer) -> None:
    """Add --num-draft-tokens."""
    group.add_argument(
        "--num-draft-tokens",
        type=_number_or_auto,
        default=AUTO,
        metavar="K",
        help="drafts per round, 0 (plain decoding) to 8, or auto for as many in each "
        "round as are expected to be fastest (default: auto)",
    )


def _add_prompt_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("prompt")
    group.add_argument(
        "-p", "--prompt", help="the prompt; - reads standard input (default: a sample)"
    )
    add_system_prompt(group)
    group.add_argument(
        "--prompt-cache-file",
        metavar="FILE",
        help="what comes before the prompt, as mlx_lm.cache_prompt has written it; its "
        "model is the default of --model then",
    )
    group.add_argument(
        "--prefill-response", help="beginning of the answer, for the chat template"
    )
    add_template_arguments(group)


def add_system_prompt(group: argparse._ArgumentGroup) -> None:
    """Add --system-prompt."""
    group.add_argument("--system-prompt", help="system prompt for the chat template")


def add_template_arguments(group: argparse._ArgumentGroup) -> None:
    """Add how a prompt is made of messages."""
    group.add_argument(
        "--ignore-chat-template",
        action="store_true",
        help="give the prompt to the model as it is",
    )
    add_thinking(group)
    group.add_argument(
        "--show-thoughts",
        action="store_true",
        help="write thoughts to standard output where that is no terminal too",
    )
    group.add_argument(
        "--chat-template-config",
        metavar="JSON",
        help="more arguments for the chat template, a JSON object",
    )


def _add_generation_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("generation")
    add_length_arguments(group, DEFAULT_MAX_TOKENS)
    group.add_argument(
        "--stats-json",
        metavar="FILE",
        help="write the closing figures here as JSON; - for standard error",
    )
    group.add_argument(
        "--verbose",
        nargs="?",
        type=_boolean,
        const=True,
        metavar="BOOL",
        help="show all closing figures; False shows the text alone (default: what is "
        "loaded, and the figures that matter most)",
    )


def add_verbose(group: argparse._ArgumentGroup, what: str) -> None:
    """Add --verbose, which shows ``what``."""
    group.add_argument(
        "--verbose",
        type=_boolean,
        default=True,
        metavar="BOOL",
        help=f"{what} (default: True)",
    )


def add_length_arguments(group: argparse._ArgumentGroup, max_tokens: int) -> None:
    """Add where a text ends, and in what steps a prompt is read."""
    group.add_argument(
        "-m",
        "--max-tokens",
        type=int,
        default=max_tokens,
        help="most tokens to generate, -1 for no limit (default: %(default)s)",
    )
    group.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end the text before this string; may be given several times",
    )
    group.add_argument(
        "--extra-eos-token",
        nargs="+",
        default=[],
        metavar="TOKEN",
        help="more tokens that end the text",
    )
    group.add_argument(
        "--prefill-step-size",
        type=int,
        default=2048,
        help="most prompt tokens in one forward (default: %(default)s)",
    )


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Add how a token is chosen: sampling, and penalties before it."""
    _add_sampling_settings(parser)
    _add_penalties(parser)


def add_filters(group: argparse._ArgumentGroup) -> None:
    """Add the settings that a checkpoint may recommend."""
    group.add_argument(
        "--temp",
        type=float,
        help="temperature, 0 is greedy (default: the checkpoint's, else 0)",
    )
    group.add_argument(
        "--top-p",
        type=float,
        help="probability mass to keep (default: the checkpoint's, else 1)",
    )
    group.add_argument(
        "--top-k",
        type=int,
        help="tokens to keep, 0 for all (default: the checkpoint's, else 0)",
    )
    group.add_argument(
        "--min-p",
        type=float,
        help="smallest share of the best token's probability to keep (default: the "
        "checkpoint's, else 0)",
    )


def _add_sampling_settings(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling")
    add_filters(group)
    group.add_argument(
        "--xtc-probability",
        type=float,
        default=0.0,
        help="how often XTC excludes all top choices but the least likely of them, 0 "
        "to 1 (default: 0)",
    )
    group.add_argument(
        "--xtc-threshold",
        type=float,
        default=0.1,
        help="probability above which a token is a top choice, 0 to 0.5 (default: "
        "%(default)s)",
    )
    group.add_argument(
        "--seed", type=int, help="the sampled text is a function of seed and target"
    )
    group.add_argument(
        "--no-reproducible",
        action="store_true",
        help="accept more drafts in spite of --seed; the text then depends on their "
        "number too",
    )


def _add_penalties(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("penalties")
    group.add_argument(
        "--logit-bias",
        metavar="JSON",
        help="what to add to the logits of single tokens, a JSON object of token id: "
        "number",
    )
    group.add_argument(
        "--repetition-penalty",
        type=float,
        default=0.0,
        help="factor against tokens that were there already, 0 and 1 for none "
        "(default: 0)",
    )
    group.add_argument(
        "--repetition-context-size",
        type=int,
        default=20,
        help="how many of the last tokens count for --repetition-penalty, 0 for all "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--presence-penalty",
        type=float,
        default=0.0,
        help="what to take from the logits of the last 20 tokens (default: 0)",
    )
    group.add_argument(
        "--frequency-penalty",
        type=float,
        default=0.0,
        help="the same for every time that a token is among them (default: 0)",
    )


def add_thinking(group: argparse._ActionsContainer) -> None:
    """Add --thinking."""
    group.add_argument(
        "--thinking",
        choices=("on", "off"),
        help="whether the model thinks before it answers, where its chat template has "
        f"that (default: {'on' if DEFAULT_THINKING else 'off'})",
    )


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
    if args.no_draft and args.num_draft_tokens not in (0, AUTO):
        raise RequestError(
            "--num-draft-tokens must be 0 with --no-draft: got "
            f"{args.num_draft_tokens}. Leave one out."
        )
    given = {
        name: value for name, value in given_settings(args).items() if value is not None
    }
    SamplingParams(**given, **xtc_settings(args), seed=args.seed)
    _check_penalties(args)
    return Checked(
        _template_config(args.chat_template_config, args.thinking),
        _logit_bias(args.logit_bias),
    )


def _check_texts(args: argparse.Namespace) -> None:
    """Check that what goes to the tokenizer is text."""
    given = vars(args)
    for name in _TEXTS:
        value = given.get(name) or ""
        text = value if isinstance(value, str) else "".join(value)
        check_utf8(f"--{name.replace('_', '-')}", text)


def given_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The sampling settings that a checkpoint may have too; None where not given."""
    return {name: getattr(args, name) for name in ("temp", "top_p", "top_k", "min_p")}


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


def _number_or_auto(text: str) -> int | str:
    """A whole number, or auto."""
    if text == AUTO:
        return text
    try:
        return int(text)
    except ValueError:
        message = f"must be a whole number or auto: got {text!r}"
        raise argparse.ArgumentTypeError(message) from None


def _boolean(text: str) -> bool:
    """True unless the text says otherwise, as in mlx-lm."""
    return text.lower() not in ("false", "f")
