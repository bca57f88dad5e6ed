"""The ``mlx_gemma_mtp.chat`` command: parse, read, print, exit status.

Answers go to standard output as they are made, everything else to standard error. In a
terminal a mistake is one line and the chat goes on; where the input is a file or a pipe
it ends the chat with status 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import closing
from typing import TYPE_CHECKING

from ..checkpoints.template_files import missing_template_note
from ..cli.arguments import (
    add_length_arguments,
    add_model_arguments,
    add_prompt_folder,
    add_sampling_arguments,
    add_system_prompt,
    add_template_arguments,
    add_verbose,
)
from ..cli.checks import check, given_settings
from ..cli.command import exit_status, set_up_log
from ..cli.command_table import make_parser
from ..cli.display import CompileProgress, Display, PromptProgress
from ..cli.flags import (
    EMBEDDED_NOTE,
    add_eos_tokens,
    check_lengths,
    describe_sampling,
    load_model,
    logits_processors,
    sampling_settings,
)
from ..cli.refused import TEXT_FLAGS
from ..cpu_kernels import compile_header
from ..distributed.alone import check_alone
from ..errors import MTPError
from .interrupt import Interrupts
from .reader import read_message

if TYPE_CHECKING:
    from .commands import Commands
    from .session import Session

DEFAULT_MAX_TOKENS = 512
_NO_TEMPLATE = "what you type and what it answers is one text that it goes on with"


def configure_parser() -> argparse.ArgumentParser:
    """The command's arguments; most are those of ``mlx_gemma_mtp.generate``."""
    parser = make_parser(
        "chat",
        epilog="/help in the chat lists what else it can do.",
        reason_against=TEXT_FLAGS.get,
    )
    add_model_arguments(parser)
    group = parser.add_argument_group("conversation")
    add_system_prompt(group)
    add_template_arguments(group)
    add_prompt_folder(group)
    group = parser.add_argument_group("answers")
    add_length_arguments(group, DEFAULT_MAX_TOKENS)
    group.add_argument(
        "--stats", action="store_true", help="show the figures after every answer"
    )
    add_verbose(group, "show what is loaded")
    add_sampling_arguments(parser)
    return parser


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
    """Load, then talk."""
    set_up_log(sys.stderr, verbose=args.verbose)
    check_alone("the chat")
    session = _make_session(args)
    with closing(session):
        _talk(session, args)
    return 0


def _talk(session: Session, args: argparse.Namespace) -> None:
    """Read messages and answer, to the end."""
    # Imported late: nothing heavy before the arguments are known to be good.
    from .commands import Commands
    from .terminal import Lines

    commands = Commands(session, drafts=args.num_draft_tokens, shows_stats=args.stats)
    lines = Lines(sys.stdin, sys.stdout, sys.stderr)
    if lines.is_terminal:
        _note("/help lists what else can be said, q or Ctrl-D leaves.")
    while not commands.has_ended:
        try:
            message = read_message(lines.next)
            if message is None:
                break
            lines.keep(message)
            _respond(session, commands, message, shows_thoughts=args.show_thoughts)
        except MTPError as error:
            if not lines.is_terminal:
                raise
            _note(f"error: {error}")
        except KeyboardInterrupt:
            if not lines.is_terminal:
                raise
            _note("")


def _make_session(args: argparse.Namespace) -> Session:
    """Load what the flags name and make a session of it."""
    checked = check(args)
    compile_header()  # meanwhile
    from ..pair.pair import pair_of
    from .prompts import PlainPrompts, TemplatePrompts
    from .session import Session, Settings

    check_lengths(args)
    if args.model is None and args.verbose:
        _note(EMBEDDED_NOTE)
    model, tokenizer = load_model(args)
    pair = pair_of(model)
    add_eos_tokens(tokenizer, args.extra_eos_token)
    is_plain = args.ignore_chat_template or not tokenizer.has_chat_template
    if args.verbose:
        for line in describe_sampling(args, pair.sampling_defaults):
            _note(line)
    if not (args.ignore_chat_template or tokenizer.has_chat_template):
        _note(missing_template_note(tokenizer, _NO_TEMPLATE))
    settings = Settings(
        max_tokens=args.max_tokens,
        prefill_step_size=args.prefill_step_size,
        exactness=args.exactness,
        stop=args.stop,
        sampling=sampling_settings(args, pair.sampling_defaults, tokenizer),
        logits_processors=logits_processors(args, checked.logit_bias, pair.vocab_size),
        defaults=pair.sampling_defaults,
        given=given_settings(args),
    )
    return Session(
        model,
        tokenizer,
        PlainPrompts(tokenizer)
        if is_plain
        else TemplatePrompts(tokenizer, checked.template_config),
        settings,
        num_draft_tokens=args.num_draft_tokens,
        draft_source=args.draft_source,
        system=args.system_prompt,
        prompt_folder=args.prompt_cache_dir,
    )


def _respond(
    session: Session, commands: Commands, message: str, *, shows_thoughts: bool
) -> None:
    """Carry a command out, or answer."""
    if not message.strip():
        return
    if not commands.is_meant(message):
        question = message.removeprefix("/") if message.startswith("//") else message
        _print_answer(session, question, shows_thoughts=shows_thoughts)
    else:
        text = commands.run(message)
        if text:
            _note(text)
        if not commands.asks_again:
            return
        commands.asks_again = False
        _retry(session, shows_thoughts=shows_thoughts)
    if commands.shows_stats and session.last is not None:
        from .figures import describe_turn

        _note(f"[{describe_turn(session.last)}]")


def _retry(session: Session, *, shows_thoughts: bool) -> None:
    """Answer the last question again; the answer before stays if there is no other.

    Raises:
        RequestError: There is no question.
    """
    conversation = session.conversation
    before = conversation.undo()
    num_others = len(conversation)
    if session.settings.gives_one_answer:
        _note(
            "(greedy, or of one seed: each try gives the same answer; see /temp, /seed)"
        )
    try:
        _print_answer(session, before.question, shows_thoughts=shows_thoughts)
    finally:
        if len(conversation) == num_others:
            conversation.add(before.question, before.answer, before.thought)


def _print_answer(session: Session, question: str, *, shows_thoughts: bool) -> None:
    """Print an answer as it comes.

    Raises:
        KeyboardInterrupt: Control-C was pressed before the first token, or where there
            is no terminal at which to go on.
    """
    response = None
    progress = PromptProgress(sys.stderr)
    answer = session.answer(question, progress.tell)
    with Interrupts() as interrupts, CompileProgress(sys.stderr) as compiling:
        display = Display(
            sys.stdout, shows_thoughts=shows_thoughts, compiling=compiling
        )
        try:
            for said in answer:
                response = said.response
                display.show(said.parts)
                interrupts.may_wait = True
                if interrupts.asked:
                    break
        finally:
            try:
                answer.close()
                if response is not None:
                    display.show(session.unsaid)
                    display.end()
            finally:  # behind what a Control-C that comes now may break off
                progress.end()
    if interrupts.asked and not sys.stdin.isatty():
        raise KeyboardInterrupt
    if interrupts.asked:
        _note("(stopped)")
    elif response is not None and response.finish_reason == "length":
        why = "the model's context is full" if session.is_full else None
        _note(display.cut_off(response.generation_tokens, why))


def _note(line: str) -> None:
    print(line, file=sys.stderr)


if __name__ == "__main__":
    raise SystemExit(main())
