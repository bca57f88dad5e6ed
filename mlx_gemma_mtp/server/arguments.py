"""The arguments of ``mlx_gemma_mtp.server``, and what is wrong with them.

Every mistake that shows without a model is found here. Names are mlx-lm's where it has
them; vLLM's are understood where they mean something here. Knows nothing of MLX and of
HTTP.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ..cli.arguments import (
    add_checkpoint_arguments,
    add_draft_source,
    add_drafter,
    add_filters,
    add_num_draft_tokens,
    add_prompt_folder,
    add_target,
    add_thinking,
)
from ..cli.command_table import make_parser
from ..constants import PROMPT_FOLDER_BYTES
from .addresses import API_KEY_VARIABLE
from .refused import reason_against
from .settings import LOG_LEVELS, Settings, check, size_in_bytes


def parse(argv: Sequence[str] | None) -> Settings:
    """Read the command's arguments.

    Args:
        argv: Arguments; None for the process's.

    Raises:
        RequestError: One of them is unknown, or outside its range.
    """
    return check(configure_parser().parse_args(argv))


def configure_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = make_parser(
        "server",
        allow_abbrev=False,  # a flag of vLLM's must not be taken for the start of ours
        reason_against=reason_against,
    )
    _add_model_arguments(parser)
    _add_decoding_arguments(parser)
    _add_address_arguments(parser)
    _add_limit_arguments(parser)
    _add_default_arguments(parser)
    return parser


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "target",
        nargs="?",
        metavar="MODEL",
        help="the same as --model, as in vLLM's command",
    )
    add_target(group)
    add_drafter(group)
    add_checkpoint_arguments(group)
    group.add_argument(
        "--served-model-name",
        nargs="+",
        metavar="NAME",
        help="what requests may call the model (default: what --model says)",
    )
    group.add_argument(
        "--chat-template",
        metavar="FILE",
        help="a chat template in place of the checkpoint's: a file, or the template "
        "itself",
    )
    group.add_argument(
        "--chat-template-args",
        "--default-chat-template-kwargs",
        metavar="JSON",
        help="more arguments for the chat template, a JSON object",
    )
    add_thinking(group)


def _add_vllms_drafts(group: argparse._ArgumentGroup) -> None:
    """Add what says the same in vLLM's words."""
    group.add_argument(
        "--speculative-config",
        metavar="JSON",
        help="the same in vLLM's words: a JSON object with method (mtp), model, "
        "num_speculative_tokens",
    )
    group.add_argument(
        "--speculative-method",
        "--spec-method",
        metavar="METHOD",
        help="the same in vLLM's words: mtp, the only one",
    )
    group.add_argument(
        "--speculative-model",
        "--spec-model",
        metavar="MODEL",
        help="the drafter in vLLM's words; the target's own name means its own drafter",
    )
    group.add_argument(
        "--num-speculative-tokens",
        "--spec-tokens",
        type=int,
        metavar="K",
        help="--num-draft-tokens in vLLM's words",
    )


def _add_decoding_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("decoding")
    add_num_draft_tokens(group)
    add_draft_source(group)
    _add_vllms_drafts(group)
    group.add_argument(
        "--max-rows",
        "--max-num-seqs",
        "--decode-concurrency",
        type=int,
        default=32,
        help="most requests that decode together; more wait (default: %(default)s)",
    )
    group.add_argument(
        "--prefill-step-size",
        "--max-num-batched-tokens",
        type=int,
        default=2048,
        help="most prompt tokens in one forward, which is how long others wait "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--max-kv-bytes",
        type=size_in_bytes,
        metavar="SIZE",
        help="memory for the caches of running requests, such as 8GB; others wait "
        "(default: what the machine has beside the weights)",
    )
    _add_cache_arguments(group)


def _add_cache_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--prompt-cache-size",
        type=int,
        default=10,
        help="prompts whose caches are kept for later requests, 0 for none (default: "
        "%(default)s)",
    )
    group.add_argument(
        "--prompt-cache-bytes",
        type=size_in_bytes,
        default=2 * 10**9,
        metavar="SIZE",
        help="memory for these (default: 2GB)",
    )
    add_prompt_folder(group)
    group.add_argument(
        "--prompt-cache-disk-bytes",
        type=size_in_bytes,
        default=PROMPT_FOLDER_BYTES,
        metavar="SIZE",
        help="most bytes of the files there; the least recently used ones go first "
        f"(default: {PROMPT_FOLDER_BYTES // 10**9}GB)",
    )


def _add_address_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("address")
    group.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen at (default: %(default)s, this machine only)",
    )
    group.add_argument(
        "--port", type=int, default=8080, help="port, 0 for a free one (default: 8080)"
    )
    group.add_argument(
        "--api-key",
        help="what requests must bring, as Authorization: Bearer KEY; all but /health "
        f"and the page ask for it (default: {API_KEY_VARIABLE}, else none)",
    )
    group.add_argument(
        "--allowed-origins",
        nargs="+",
        default=[],
        metavar="ORIGIN",
        help="other web pages that may send requests, * for all (default: none)",
    )
    group.add_argument(
        "--allowed-hosts",
        nargs="+",
        default=[],
        metavar="NAME",
        help="names by which requests without a key may call this machine, beside "
        "localhost and addresses (default: none)",
    )
    group.add_argument(
        "--backlog",
        type=int,
        default=2048,
        help="connections that may wait to be accepted (default: %(default)s)",
    )


def _add_limit_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("limits")
    group.add_argument(
        "--max-waiting",
        type=int,
        default=512,
        help="most requests that wait for a row; more get status 429 (default: "
        "%(default)s)",
    )
    group.add_argument(
        "--max-connections",
        type=int,
        default=1024,
        help="most open connections; more get status 503 (default: %(default)s)",
    )
    group.add_argument(
        "--max-request-bytes",
        type=size_in_bytes,
        default=8 * 10**6,
        metavar="SIZE",
        help="largest body of a request; more gets status 413 (default: 8MB)",
    )
    group.add_argument(
        "--max-model-len",
        type=int,
        help="most tokens of prompt and answer together (default: the model's)",
    )
    group.add_argument(
        "--max-logprobs",
        type=int,
        default=20,
        help="most likely tokens that a request may ask for (default: %(default)s)",
    )
    group.add_argument(
        "--shutdown-timeout",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="how long running requests may go on after SIGTERM or Control-C "
        "(default: 30)",
    )
    group.add_argument(
        "--log-level",
        "--uvicorn-log-level",
        type=str.upper,
        choices=LOG_LEVELS,
        default="INFO",
        help="how much is said on standard error (default: %(default)s)",
    )


def _add_default_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("where a request does not say")
    group.add_argument(
        "--max-tokens",
        type=int,
        default=512,
        help="most tokens of an answer (default: %(default)s)",
    )
    add_filters(group)
