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

from .arguments import (
    check,
    configure_parser,
    given_settings,
    penalties,
    xtc_settings,
)
from .command import EXIT_BROKEN_PIPE, EXIT_INTERRUPTED, drop_output, write_file
from .errors import MTPError, RequestError

if TYPE_CHECKING:
    from .generation_defaults import SamplingDefaults
    from .text import GenerationResponse

DEFAULT_PROMPT = "hello"
EMBEDDED_PROMPT = "def fibonacci(n):\n"
_LABELS = {
    "temp": "temperature",
    "top_k": "top-k",
    "top_p": "top-p",
    "min_p": "min-p",
}


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
    checked = check(args)
    # Heavy imports wait until the arguments are known to be good.
    from .load import embedded_pair_path, load
    from .pair import pair_of
    from .text import stream_generate
    from .tokens import check_settings

    check_settings(
        max_tokens=args.max_tokens,
        num_draft_tokens=args.num_draft_tokens,
        prefill_step_size=args.prefill_step_size,
    )
    prompt = _read_prompt(args)
    if args.model is None and args.verbose:
        _note(
            "No --model: using the embedded pair, a tiny model that completes Python "
            "code."
        )
    model, tokenizer = load(
        embedded_pair_path() if args.model is None else args.model,
        speculative_decoding=not args.no_draft,
        draft_model=args.draft_model,
        adapter_path=args.adapter_path,
        revision=args.revision,
        trust_remote_code=args.trust_remote_code,
    )
    pair = pair_of(model)
    _add_eos_tokens(tokenizer, args.extra_eos_token)
    responses = stream_generate(
        model,
        tokenizer,
        _apply_template(args, tokenizer, prompt, checked.template_config),
        max_tokens=args.max_tokens,
        num_draft_tokens=args.num_draft_tokens,
        exactness=args.exactness,
        **_sampling(args, pair.sampling_defaults, tokenizer),
        **_logits_processors(args, checked.logit_bias, pair.vocab_size),
        stop=args.stop,
        prefill_step_size=args.prefill_step_size,
    )
    return _print_responses(responses, verbose=args.verbose, stats_json=args.stats_json)


def _note(line: str) -> None:
    print(line, file=sys.stderr)


def _sampling(
    args: argparse.Namespace, defaults: SamplingDefaults, tokenizer: Any
) -> dict[str, Any]:
    """How to sample: as the flags say, else as the checkpoint says."""
    given = given_settings(args)
    settings = defaults.settings(**given)
    if args.verbose and settings["temp"]:
        _note(_describe_sampling(args, settings))
    if args.verbose and defaults.repetition_penalty and not args.repetition_penalty:
        _note(
            "The repetition_penalty in generation_config.json is not applied; "
            "--repetition-penalty sets one."
        )
    settings |= {"seed": args.seed, "reproducible": not args.no_reproducible}
    if args.xtc_probability:
        # What mlx-lm's own programs keep from XTC: line ends, and the end.
        special = [*tokenizer.encode("\n"), *tokenizer.eos_token_ids]
        settings |= {**xtc_settings(args), "xtc_special_tokens": special}
    return settings


def _describe_sampling(args: argparse.Namespace, settings: dict[str, Any]) -> str:
    """The settings that are on, with where they come from."""
    given = given_settings(args)
    is_on = {
        "temp": True,
        "top_k": settings["top_k"] > 0,
        "top_p": 0 < settings["top_p"] < 1,
        "min_p": settings["min_p"] > 0,
    }
    own: list[str] = []
    recommended: list[str] = []
    for name, label in _LABELS.items():
        if is_on[name]:
            place = recommended if given[name] is None else own
            place.append(f"{label} {settings[name]}")
    if args.xtc_probability:
        own.append(f"XTC {args.xtc_probability} above {args.xtc_threshold}")
    parts = [", ".join(own)] if own else []
    if recommended:
        parts.append(f"{', '.join(recommended)} (generation_config.json)")
    if args.temp is None:
        parts.append("--temp 0 for greedy")
    return f"Sampling: {'; '.join(parts)}."


def _logits_processors(
    args: argparse.Namespace, logit_bias: dict[int, float], vocab_size: int
) -> dict[str, Any]:
    """The keyword for what changes logits before a token is chosen, if anything does.

    Without one the engine has a shorter way.
    """
    for token in logit_bias:
        if token >= vocab_size:
            raise RequestError(
                f"--logit-bias must name tokens from 0 to {vocab_size - 1}: got "
                f"{token}. Is this the model's own token id?"
            )
    settings = penalties(args)
    if not logit_bias and not settings:
        return {}
    from mlx_lm.sample_utils import make_logits_processors

    processors = make_logits_processors(logit_bias or None, **settings)
    return {"logits_processors": processors}


def _set_up_output(*, verbose: bool) -> None:
    """Notes of the package go to standard error; any text can be printed."""
    logging.basicConfig(stream=sys.stderr, format="%(message)s")
    package = logging.getLogger("mlx_gemma_mtp")
    package.setLevel(logging.INFO if verbose else logging.ERROR)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # where the encoding is not UTF-8


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


def _print_responses(
    responses: Any, *, verbose: bool, stats_json: str | None = None
) -> int:
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
    if stats_json is not None and response is not None:
        _write_stats(response, stats_json)
    return status


def _write_stats(response: GenerationResponse, path: str) -> None:
    """Write a generation's figures as JSON.

    Raises:
        OutputError: The file cannot be written.
    """
    text = json.dumps(response.to_dict(), indent=2) + "\n"
    if path == "-":
        sys.stderr.write(text)
    else:
        write_file("--stats-json", path, text)
