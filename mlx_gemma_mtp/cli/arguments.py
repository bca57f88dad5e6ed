"""The arguments of ``mlx_gemma_mtp.generate``, of which other commands take groups.

Knows nothing of MLX.
"""

from __future__ import annotations

import argparse

from ..constants import AUTO, DRAFT_SOURCES, MODES
from ..generation.chat_template import DEFAULT_THINKING
from .command_table import make_parser
from .refused import TEXT_FLAGS

DEFAULT_MAX_TOKENS = 100
EMBEDDED_PROMPT = "def fibonacci(n):\n"  # a sample of what the embedded pair completes


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
    add_draft_source(group)


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


def add_draft_source(group: argparse._ActionsContainer) -> None:
    """Add --draft-source."""
    group.add_argument(
        "--draft-source",
        choices=DRAFT_SOURCES,
        default=AUTO,
        help="where drafts come from: the drafter; lookup, the text itself, where its "
        "newest tokens stood before, which needs no drafter; or auto, where there is a "
        "drafter, for the one that is expected to be faster in each round "
        "(default: auto)",
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


def add_prompt_folder(group: argparse._ArgumentGroup) -> None:
    """Add --prompt-cache-dir."""
    group.add_argument(
        "--prompt-cache-dir",
        metavar="DIR",
        help="also keep the caches of long prompts in this folder, for later "
        "processes; they tell what was said (default: in memory only)",
    )


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
        "--schema",
        metavar="FILE",
        help="write JSON that the JSON schema in FILE accepts",
    )
    group.add_argument(
        "--regex",
        metavar="TEXT",
        help="write text that this regular expression matches as a whole",
    )
    group.add_argument(
        "--max-thinking-tokens",
        type=int,
        metavar="N",
        help="most tokens of thoughts, 0 for none (default: no limit)",
    )
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
        "number and source too",
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
