"""The ``mlx_gemma_mtp.generate`` command: parse, call, print, exit status.

Text goes to standard output as it is made, everything else to standard error. A
mistake of the user's is one line and exit status 1.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..checkpoints.template_files import missing_template_note
from ..cpu_kernels import compile_header
from ..distributed.environment import num_launched
from ..generation.chat_template import apply_chat_template
from ..markup.answer import AnswerReader, marks_of
from .arguments import EMBEDDED_PROMPT, configure_parser
from .checks import check, check_several, given_form
from .command import (
    EXIT_INTERRUPTED,
    check_output_file,
    check_utf8,
    exit_status,
    is_mute,
    not_utf8,
    set_up_log,
    write_file,
)
from .flags import (
    EMBEDDED_NOTE,
    add_eos_tokens,
    check_lengths,
    describe_sampling,
    load_model,
    logits_processors,
    open_cache_file,
    sampling_settings,
)

if TYPE_CHECKING:
    from ..generation.response import GenerationResponse
    from ..sampling.defaults import SamplingDefaults
    from .display import Display, PromptProgress

DEFAULT_PROMPT = "hello"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments; None for the process's.

    Returns:
        Exit status: 0, 1 for a mistake of the user's, 130 for Control-C, 141 where
        the reader of the text went away.
    """
    return exit_status(
        lambda: _run(configure_parser().parse_args(argv)), sys.stdout, sys.stderr
    )


def _run(args: argparse.Namespace) -> int:
    """Load, generate, print; of several machines the first one writes files."""
    if num_launched(os.environ) > 1:
        check_several(args)
    if is_mute():
        args.stats_json = None
    return _generate(args)


def _generate(args: argparse.Namespace) -> int:
    """Load, generate, print."""
    set_up_log(sys.stderr, verbose=args.verbose is not False)
    checked = check(args)
    form = given_form(args)
    if args.stats_json not in (None, "-"):
        check_output_file("--stats-json", args.stats_json)
    compile_header()  # meanwhile
    # Heavy imports wait until the arguments are known to be good.
    from ..generation.settings import check_max_thinking_tokens
    from ..generation.text import stream_generate
    from ..pair.pair import pair_of
    from .display import CompileProgress, Display, PromptProgress

    check_lengths(args)
    check_max_thinking_tokens(args.max_thinking_tokens)
    saved = open_cache_file(args)
    prompt = _read_prompt(args)
    if args.model is None and args.verbose is not False:
        _note(EMBEDDED_NOTE)
    model, tokenizer = load_model(args, saved.tokenizer_config if saved else None)
    pair = pair_of(model)
    if saved:
        saved.check_layout(pair.rounds.target.layout)
    add_eos_tokens(tokenizer, args.extra_eos_token)
    defaults = pair.sampling_defaults
    if args.verbose is not False:
        _describe_settings(args, tokenizer, defaults)
    whole, opening = _apply_template(args, tokenizer, prompt, checked.template_config)
    # None where there are none: the engine has a shorter way then.
    processors = logits_processors(args, checked.logit_bias, pair.vocab_size) or None
    reader = AnswerReader(marks_of(tokenizer), opening=opening)
    progress = PromptProgress(sys.stderr)
    with CompileProgress(sys.stderr) as compiling:
        responses = stream_generate(
            model,
            tokenizer,
            whole,
            max_tokens=args.max_tokens,
            num_draft_tokens=args.num_draft_tokens,
            draft_source=args.draft_source,
            exactness=args.exactness,
            **sampling_settings(args, defaults, tokenizer),
            logits_processors=processors,
            stop=args.stop,
            **form,
            max_thinking_tokens=args.max_thinking_tokens,
            prefill_step_size=args.prefill_step_size,
            prompt_cache=saved.caches if saved else None,
            prompt_progress_callback=progress.tell,
        )
        display = Display(
            sys.stdout, shows_thoughts=args.show_thoughts, compiling=compiling
        )
        response, status = _print_responses(responses, progress, reader, display)
    if response is not None:
        _print_figures(response, display, args)
    return status


def _describe_settings(
    args: argparse.Namespace, tokenizer: Any, defaults: SamplingDefaults
) -> None:
    """Say what the prompt goes through and how tokens are chosen."""
    if not (args.ignore_chat_template or tokenizer.has_chat_template):
        _note(missing_template_note(tokenizer, "the prompt goes in as it is"))
    for line in describe_sampling(args, defaults):
        _note(line)


def _note(line: str) -> None:
    print(line, file=sys.stderr)


def _read_prompt(args: argparse.Namespace) -> str:
    """The prompt's text: given, a sample, or standard input."""
    prompt: str | None = args.prompt
    if prompt is None:
        return EMBEDDED_PROMPT if args.model is None else DEFAULT_PROMPT
    try:
        prompt = sys.stdin.read() if prompt == "-" else prompt
    except UnicodeError as error:
        raise not_utf8("the prompt", error) from error
    check_utf8("the prompt", prompt)
    return prompt


def _apply_template(
    args: argparse.Namespace, tokenizer: Any, prompt: str, config: dict[str, Any]
) -> tuple[Any, str]:
    """The prompt, and what it has written of the answer.

    It is text, or tokens where a chat template was applied.
    """
    if args.ignore_chat_template or not tokenizer.has_chat_template:
        return prompt + (args.prefill_response or ""), ""
    messages = [{"role": "user", "content": prompt}]
    if args.system_prompt is not None:
        messages.insert(0, {"role": "system", "content": args.system_prompt})
    has_prefill = args.prefill_response is not None
    if has_prefill:
        messages.append({"role": "assistant", "content": args.prefill_response})
    found = apply_chat_template(
        tokenizer,
        messages,
        config,
        advice="Change --system-prompt, --prefill-response or --chat-template-config, "
        "or use --ignore-chat-template.",
        continues_last=has_prefill,
        is_begun=args.prompt_cache_file is not None,
    )
    return found.tokens, found.opening


def _print_responses(
    responses: Any, progress: PromptProgress, reader: AnswerReader, display: Display
) -> tuple[GenerationResponse | None, int]:
    """Print the text as it comes, then what Control-C has left of it.

    Returns:
        The last response, and the exit status.
    """
    response: GenerationResponse | None = None
    status = 0
    try:
        for response in responses:
            display.show(reader.read(response.marked_text))
    except KeyboardInterrupt:
        status = EXIT_INTERRUPTED
    finally:
        try:
            responses.close()
        finally:  # behind what a Control-C that comes now may break off
            progress.end()
        display.show(reader.read("", is_last=True))
        display.end()
    return response, status


def _print_figures(
    response: GenerationResponse, display: Display, args: argparse.Namespace
) -> None:
    """Print how the text has ended and how fast it came."""
    from ..generation.figures import describe, summary

    if response.finish_reason == "length" and not display.has_content:
        # Else the end shows by itself.
        _note(display.cut_off(response.generation_tokens))
    if args.verbose:
        _note(describe(response))
    if args.verbose is not False:
        _note(summary(response))
    if args.stats_json is not None:
        _write_stats(response, args.stats_json)


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
