"""The ``mlx_gemma_mtp.generate`` command: parse, call, print, exit status.

Text goes to standard output as it is made, everything else to standard error. A
mistake of the user's is one line and exit status 1.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .command import EXIT_BROKEN_PIPE, EXIT_INTERRUPTED, Parser, drop_output
from .config import SamplingParams
from .errors import MTPError, RequestError

if TYPE_CHECKING:
    from .text import GenerationResponse

DEFAULT_PROMPT = "hello"
EMBEDDED_PROMPT = "def fibonacci(n):\n"
DEFAULT_MAX_TOKENS = 100


def configure_parser() -> argparse.ArgumentParser:
    """The command's arguments; names and defaults are mlx-lm's where it has them."""
    parser = Parser(
        prog="mlx_gemma_mtp.generate",
        description="Generate text with a Gemma 4 model and its MTP drafter.",
    )
    _add_model_arguments(parser)
    _add_prompt_arguments(parser)
    _add_generation_arguments(parser)
    return parser


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        help="folder or Hub id of the target (default: the embedded pair, a tiny model "
        "that completes Python code)",
    )
    group.add_argument(
        "--draft-model",
        help="folder or Hub id of the drafter (default: found by itself inside the "
        "target's folder, beside it, or on the Hub)",
    )
    group.add_argument(
        "--no-draft", action="store_true", help="decode without a drafter"
    )
    group.add_argument(
        "--num-draft-tokens",
        type=int,
        metavar="K",
        help="drafts per round, 0 (plain decoding) to 8 (default: the drafter's own "
        "number, else 4)",
    )
    group.add_argument("--adapter-path", help="LoRA adapters for the target")
    group.add_argument(
        "--revision", help="branch, tag or commit of the target on the Hub"
    )
    group.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="let the tokenizer run code from the checkpoint",
    )


def _add_prompt_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("prompt")
    group.add_argument(
        "-p", "--prompt", help="the prompt; - reads standard input (default: a sample)"
    )
    group.add_argument("--system-prompt", help="system prompt for the chat template")
    group.add_argument(
        "--prefill-response", help="beginning of the answer, for the chat template"
    )
    group.add_argument(
        "--ignore-chat-template",
        action="store_true",
        help="give the prompt to the model as it is",
    )
    group.add_argument(
        "--chat-template-config",
        metavar="JSON",
        help="more arguments for the chat template, a JSON object",
    )


def _add_generation_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("generation")
    group.add_argument(
        "-m",
        "--max-tokens",
        type=int,
        default=DEFAULT_MAX_TOKENS,
        help="most tokens to generate, -1 for no limit (default: %(default)s)",
    )
    group.add_argument(
        "--temp", type=float, default=0.0, help="temperature, 0 is greedy (default: 0)"
    )
    group.add_argument(
        "--top-p", type=float, default=1.0, help="probability mass to keep (default: 1)"
    )
    group.add_argument(
        "--top-k", type=int, default=0, help="tokens to keep, 0 for all (default: 0)"
    )
    group.add_argument(
        "--min-p",
        type=float,
        default=0.0,
        help="smallest share of the best token's probability to keep (default: 0)",
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
    group.add_argument(
        "--verbose",
        type=_boolean,
        default=True,
        metavar="BOOL",
        help="show what is loaded and the closing figures (default: True)",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments; None for the process's.

    Returns:
        Exit status: 0, 1 for a mistake of the user's, 130 for Control-C, 141 where
        the reader of the text went away.
    """
    try:
        return _run(configure_parser().parse_args(argv))
    except MTPError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        drop_output(sys.stdout)
        return EXIT_BROKEN_PIPE


def _run(args: argparse.Namespace) -> int:
    """Load, generate, print."""
    _set_up_output(verbose=args.verbose)
    template_config = _check(args)
    # Heavy imports wait until the arguments are known to be good.
    from .load import embedded_pair_path, load
    from .text import stream_generate
    from .tokens import check_settings

    check_settings(
        max_tokens=args.max_tokens,
        num_draft_tokens=args.num_draft_tokens,
        prefill_step_size=args.prefill_step_size,
    )
    prompt = _read_prompt(args)
    if args.model is None and args.verbose:
        print(
            "No --model: using the embedded pair, a tiny model that completes Python "
            "code.",
            file=sys.stderr,
        )
    model, tokenizer = load(
        embedded_pair_path() if args.model is None else args.model,
        speculative_decoding=not args.no_draft,
        draft_model=args.draft_model,
        adapter_path=args.adapter_path,
        revision=args.revision,
        trust_remote_code=args.trust_remote_code,
    )
    _add_eos_tokens(tokenizer, args.extra_eos_token)
    responses = stream_generate(
        model,
        tokenizer,
        _apply_template(args, tokenizer, prompt, template_config),
        max_tokens=args.max_tokens,
        num_draft_tokens=args.num_draft_tokens,
        temp=args.temp,
        top_p=args.top_p,
        top_k=args.top_k,
        min_p=args.min_p,
        seed=args.seed,
        reproducible=not args.no_reproducible,
        stop=args.stop,
        prefill_step_size=args.prefill_step_size,
    )
    return _print_responses(responses, verbose=args.verbose)


def _set_up_output(*, verbose: bool) -> None:
    """Notes of the package go to standard error; any text can be printed."""
    logging.basicConfig(stream=sys.stderr, format="%(message)s")
    package = logging.getLogger("mlx_gemma_mtp")
    package.setLevel(logging.INFO if verbose else logging.ERROR)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # where the encoding is not UTF-8


def _check(args: argparse.Namespace) -> dict[str, Any]:
    """Find mistakes before anything is loaded; return the chat template's config."""
    if args.no_draft and args.draft_model:
        raise RequestError(
            "--no-draft and --draft-model exclude each other: got both. Leave one out."
        )
    if args.no_draft and args.num_draft_tokens:
        raise RequestError(
            "--num-draft-tokens must be 0 with --no-draft: got "
            f"{args.num_draft_tokens}. Leave one out."
        )
    SamplingParams(args.temp, args.top_p, args.top_k, args.min_p, args.seed)
    return _template_config(args.chat_template_config)


def _read_prompt(args: argparse.Namespace) -> str:
    """The prompt's text: given, a sample, or standard input."""
    prompt: str | None = args.prompt
    if prompt is None:
        return EMBEDDED_PROMPT if args.model is None else DEFAULT_PROMPT
    try:
        if prompt == "-":
            prompt = sys.stdin.read()
        prompt.encode()  # arguments keep what is not UTF-8 as surrogates
    except UnicodeError as error:
        raise RequestError(
            f"the prompt must be UTF-8 text: got {error}. Convert it first, for "
            "example with iconv."
        ) from error
    return prompt


def _apply_template(
    args: argparse.Namespace, tokenizer: Any, prompt: str, config: dict[str, Any]
) -> Any:
    """The prompt as text, or as tokens where a chat template was applied."""
    if args.ignore_chat_template or not tokenizer.has_chat_template:
        return prompt
    messages = [{"role": "user", "content": prompt}]
    if args.system_prompt is not None:
        messages.insert(0, {"role": "system", "content": args.system_prompt})
    has_prefill = args.prefill_response is not None
    if has_prefill:
        messages.append({"role": "assistant", "content": args.prefill_response})
    try:
        text = tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            continue_final_message=has_prefill,
            add_generation_prompt=not has_prefill,
            **config,
        )
    except Exception as error:  # templates raise whatever they like
        reason = " ".join(str(error).split())
        raise RequestError(
            f"the chat template must take this prompt: got {reason}. Change "
            "--system-prompt, --prefill-response or --chat-template-config, or use "
            "--ignore-chat-template."
        ) from error
    return tokenizer.encode(text, add_special_tokens=False)


def _template_config(text: str | None) -> dict[str, Any]:
    """The JSON object of --chat-template-config."""
    if text is None:
        return {}
    try:
        config = json.loads(text)
    except json.JSONDecodeError as error:
        config = str(error)
    if not isinstance(config, dict):
        raise RequestError(
            f"--chat-template-config must be a JSON object: got {text!r}. For example "
            "'{\"enable_thinking\": false}'."
        )
    return config


def _add_eos_tokens(tokenizer: Any, tokens: Sequence[str]) -> None:
    """Let more tokens end the text, each given by its text or its id."""
    vocabulary: dict[str, int] = tokenizer.get_vocab() if tokens else {}
    ids = set(vocabulary.values())
    for token in tokens:
        # An unknown text would become the unknown token's id.
        if not (int(token) in ids if token.isdecimal() else token in vocabulary):
            raise RequestError(
                f"--extra-eos-token must be a token of the model: got {token!r}. Give "
                "a token's text or id."
            )
        tokenizer.add_eos_token(token)


def _print_responses(responses: Any, *, verbose: bool) -> int:
    """Print the text as it comes, then the figures, also after Control-C."""
    response: GenerationResponse | None = None
    status = 0
    try:
        for response in responses:
            print(response.text, end="", flush=True)
    except KeyboardInterrupt:
        status = EXIT_INTERRUPTED
    finally:
        responses.close()
    print(flush=True)
    if verbose and response is not None:
        from .text import describe

        print(describe(response), file=sys.stderr)
    return status


def _boolean(text: str) -> bool:
    """True unless the text says otherwise, as in mlx-lm."""
    return text.lower() not in ("false", "f")
